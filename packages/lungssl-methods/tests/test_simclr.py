import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_data.batch import PairBatch
from lungssl_methods.contrast import nt_xent
from lungssl_methods.method import Method
from lungssl_methods.projector import Projector
from lungssl_methods.simclr import SimClr, global_pairs
from lungssl_methods.variance import barlow_twins, vicreg_terms
from lungssl_methods.vicreg import VicReg
from torch import nn

MakeBatch = Callable[..., PairBatch]


def _simclr(encoder: nn.Module, **changes: object) -> SimClr:
    return SimClr.Config(**({"hidden": 16, "out": 8} | changes)).build(encoder, total_steps=10)  # pyright: ignore


def _vicreg(encoder: nn.Module, **changes: object) -> VicReg:
    return VicReg.Config(**({"expander": (16, 16, 8)} | changes)).build(encoder, total_steps=10)  # pyright: ignore


def _batch(make_batch: MakeBatch, b: int = 4, globals_per_slot: int = 1) -> PairBatch:
    return make_batch(b, globals_per_slot=globals_per_slot, locals_per_slot=0)


def _without_a_voxel(batch: PairBatch, view: int, sample: int) -> PairBatch:
    valid = batch.views[view].valid.clone()
    valid[sample] = False
    views = [replace(one, valid=valid) if i == view else one for i, one in enumerate(batch.views)]
    return replace(batch, views=tuple(views))


def _projected(method: SimClr | VicReg, batch: PairBatch) -> torch.Tensor:
    views = batch.global_views()
    return method.projector(torch.stack([method.encoder(view.image).embedding() for view in views]))


@pytest.mark.parametrize("build", [_simclr, _vicreg])
@pytest.mark.parametrize("backbone", ["vit3d_nano", "resenc_tiny"])
def test_both_kinds_of_backbone_learn(
    build: Callable[[nn.Module], SimClr | VicReg], backbone: str, make_batch: MakeBatch
) -> None:
    method = build(create_backbone(backbone))
    assert isinstance(method, Method)
    batch = make_batch(3, locals_per_slot=0, global_size=(16, 32, 16))
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-3)
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        output = method(batch, step)
        output.loss.backward()
        untouched = {n for n, p in method.encoder.named_parameters() if p.grad is None or not p.grad.any()}
        assert untouched <= {"mask_token", "mask_value"}
        optimizer.step()
        method.after_optimizer_step(step)
        losses.append(output.loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert method.export_encoder() is method.encoder


@pytest.mark.parametrize("build", [_simclr, _vicreg])
def test_held_out_losses_repeat_and_move_no_running_statistics(
    build: Callable[[nn.Module], SimClr | VicReg], encoder: nn.Module, make_batch: MakeBatch
) -> None:
    method, batch = build(encoder), _batch(make_batch)
    before = method.projector.state_dict()["net.1.running_mean"].clone()
    method(batch, 0)
    trained = method.projector.state_dict()["net.1.running_mean"].clone()
    assert not torch.equal(before, trained)
    method.eval()
    assert method(batch, 0).loss.item() == method(batch, 9).loss.item()
    assert torch.equal(trained, method.projector.state_dict()["net.1.running_mean"])


def test_simclrs_loss_is_that_of_the_two_slots_views(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method, batch = _simclr(encoder).eval(), replace(_batch(make_batch), patient=torch.tensor([0, 0, 1, 2]))
    z = _projected(method, batch)
    output = method(batch, 0)
    assert output.loss.item() == pytest.approx(nt_xent(z[0], z[1], batch.patient).item(), rel=1e-6)
    assert output.metrics["negatives"].item() == (4 + 4 + 6 + 6) / 4
    chance = (2 * math.log(5) + 2 * math.log(7)) / 4
    assert output.metrics["loss_lnk"].item() == pytest.approx(output.loss.item() / chance, rel=1e-6)


def test_pair_policies_say_which_views_are_positives(encoder: nn.Module, make_batch: MakeBatch) -> None:
    batch = _batch(make_batch, globals_per_slot=2)  # slots 0, 1, 0, 1

    def pairs(policy: object) -> set[tuple[int, int, float]]:
        return {(i, j, weight) for i, j, weight, _ in global_pairs(batch, policy)}  # pyright: ignore

    within, cross = {(0, 2), (1, 3)}, {(0, 1), (0, 3), (1, 2), (2, 3)}
    assert pairs("within") == {(*pair, 1.0) for pair in within}
    assert pairs("cross") == {(*pair, 1.0) for pair in cross}
    assert pairs((1.0, 0.25)) == {(*pair, 0.25) for pair in within} | {(*pair, 1.0) for pair in cross}
    method = _simclr(encoder, pairs=(1.0, 0.25)).eval()
    z = _projected(method, batch)
    losses = {pair: nt_xent(z[pair[0]], z[pair[1]], batch.patient) for pair in within | cross}
    expected = sum((0.25 if pair in within else 1.0) * loss.item() for pair, loss in losses.items()) / 4.5
    assert method(batch, 0).loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("build", [_simclr, _vicreg])
def test_crops_that_fell_into_padding_are_in_no_pair(
    build: Callable[[nn.Module], SimClr | VicReg], encoder: nn.Module, make_batch: MakeBatch
) -> None:
    method, batch = build(encoder).eval(), _batch(make_batch)
    partial = _without_a_voxel(batch, view=1, sample=2)
    loss = method(partial, 0).loss.item()
    image = partial.views[0].image.clone()
    image[2] = 9.0  # the same sample's other view, which then has no partner either
    views = (replace(partial.views[0], image=image), partial.views[1])
    assert method(replace(partial, views=views), 0).loss.item() == pytest.approx(loss, rel=1e-6)
    assert method(batch, 0).loss.item() != pytest.approx(loss, rel=1e-5)


def test_vicregs_loss_weighs_its_terms(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method, batch = _vicreg(encoder).eval(), _batch(make_batch)
    z = _projected(method, batch)
    invariance, variance, covariance = vicreg_terms(z[0], z[1])
    output = method(batch, 0)
    assert output.loss.item() == pytest.approx((25 * invariance + 25 * variance + covariance).item(), rel=1e-5)
    found = [output.metrics[name].item() for name in ("invariance", "variance", "covariance")]
    assert found == pytest.approx([invariance.item(), variance.item(), covariance.item()], rel=1e-5)
    twins = _vicreg(method.encoder, objective="barlow_twins").eval()
    z = _projected(twins, batch)
    assert twins(batch, 0).loss.item() == pytest.approx(barlow_twins(z[0], z[1]).item(), rel=1e-5)


def test_collapse_shows_in_the_embeddings_spread(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method, batch = _simclr(encoder), _batch(make_batch)
    assert method(batch, 0).metrics["embedding_std"].item() > 0.01
    with torch.no_grad():
        encoder.get_parameter("norm.weight").zero_()
        encoder.get_parameter("norm.bias").fill_(1.0)
    metrics = method(batch, 0).metrics
    assert metrics["embedding_std"].item() == pytest.approx(0.0, abs=1e-6)
    assert metrics["loss_lnk"].item() == pytest.approx(1.0, abs=1e-6)


def test_a_batch_of_one_patient_has_a_loss_of_zero_and_says_why(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method, batch = _simclr(encoder), _batch(make_batch)
    output = method(replace(batch, patient=torch.zeros(4, dtype=torch.long)), 0)
    output.loss.backward()
    assert output.loss.item() == output.metrics["negatives"].item() == output.metrics["loss_lnk"].item() == 0.0


def test_vicreg_without_a_measured_pair_still_gives_every_parameter_a_gradient(
    encoder: nn.Module, make_batch: MakeBatch
) -> None:
    method, batch = _vicreg(encoder), _batch(make_batch, b=2)
    output = method(_without_a_voxel(batch, view=0, sample=1), 0)
    output.loss.backward()
    assert output.loss.item() == 0.0 and "variance" not in output.metrics
    assert all(p.grad is not None for n, p in method.named_parameters() if n != "encoder.mask_token")


def test_what_cannot_work_is_refused_with_what_is_needed(encoder: nn.Module, make_batch: MakeBatch) -> None:
    with pytest.raises(ValueError, match=r"negatives are the batch's other patients, got effective_batch=1; .*dino"):
        SimClr.Config().build(encoder, total_steps=10, effective_batch=1)
    with pytest.raises(ValueError, match=r"at least 2 samples in each forward for its statistics, got 1"):
        _vicreg(encoder)(_batch(make_batch, b=1), 0)
    with pytest.raises(ValueError, match="objective must be 'vicreg' or 'barlow_twins', got 'vicregl'"):
        misspelt = VicReg.Config()
        object.__setattr__(misspelt, "objective", "vicregl")  # past the types, which tests check
        misspelt.build(encoder, total_steps=10)
    with pytest.raises(ValueError, match=r"pair policy \(0.0, 0.0\) must be one of"):
        _simclr(encoder, pairs=(0.0, 0.0))
    with pytest.raises(ValueError, match=r"widths of at least 1, hidden ones then the output's, got \(\)"):
        Projector(4, ())
    for build, name in ((_simclr, "simclr"), (_vicreg, "vicreg")):
        method = build(encoder, pairs="within")
        with pytest.raises(ValueError, match=f"{name} with pairs='within' .* got globals_per_slot=1; set it to 2"):
            method.check_views(globals_per_slot=1, locals_per_slot=0)
        with pytest.raises(ValueError, match=f"{name} compares global views .* locals_per_slot=2; .* to 0"):
            method.check_views(globals_per_slot=2, locals_per_slot=2)
        method.check_views(globals_per_slot=2, locals_per_slot=0)
        with pytest.raises(ValueError, match="Linear is not an Encoder"):
            build(nn.Linear(2, 2))


def test_the_projector_treats_all_rows_as_one_batch() -> None:
    projector, x = Projector(4, (6, 3)), torch.randn(2, 5, 4) + 7.0
    together = projector(x.flatten(0, 1)).unflatten(0, (2, 5))
    torch.testing.assert_close(projector(x), together)
    hidden = projector.net[1](projector.net[0](x.flatten(0, 1)))
    torch.testing.assert_close(hidden.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
