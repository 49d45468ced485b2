"""Of `latent`, `jepa` and `phase_jepa`."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_data.batch import PairBatch
from lungssl_methods.auto import RunSize
from lungssl_methods.jepa import Jepa
from lungssl_methods.latent import (
    LatentPredictor,
    latent_loss,
    latent_targets,
    target_std,
)
from lungssl_methods.method import Method
from lungssl_methods.phase_jepa import PhaseJepa, lung_volume_ml
from torch import nn

MakeBatch = Callable[..., PairBatch]
SMALL = {"predictor_width": 24, "predictor_depth": 1, "predictor_heads": 2}
KINDS = [Jepa, PhaseJepa]


def _method(kind: type[Jepa] | type[PhaseJepa], encoder: nn.Module, **changes: object) -> Jepa | PhaseJepa:
    return kind.Config(**(SMALL | changes)).build(encoder, total_steps=10)  # pyright: ignore


def _batch(make_batch: MakeBatch, b: int = 2, **changes: object) -> PairBatch:
    return make_batch(b, locals_per_slot=0, global_size=(16, 12, 16), **changes)  # 4 x 3 x 4 tokens


def _predict_anything(method: Jepa | PhaseJepa) -> None:
    nn.init.normal_(method.predictor.project.weight)


def test_predicting_zero_of_unit_gaussian_targets_costs_the_known_values() -> None:
    target = latent_targets(torch.randn(4, 2000, 64, dtype=torch.float64))
    zero, weight = torch.zeros_like(target), torch.ones(4, 2000)
    # a layer-normed Gaussian of 64 channels is Gaussian to 1 in 64
    assert latent_loss(zero, target, weight, norm="l1").item() == pytest.approx(math.sqrt(2 / math.pi), abs=5e-3)
    assert latent_loss(zero, target, weight, norm="smooth_l1").item() == pytest.approx(0.424, abs=5e-3)
    assert target_std(target).item() == pytest.approx(1.0, abs=1e-2)


def test_targets_are_layer_normed_and_carry_no_gradient() -> None:
    tokens = (3.0 + 5.0 * torch.randn(2, 7, 32)).requires_grad_()
    target = latent_targets(tokens)
    assert not target.requires_grad
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 7), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(-1, correction=0), torch.ones(2, 7), atol=1e-4, rtol=0)


def test_tokens_of_no_weight_cost_nothing_and_only_they_costs_zero_with_zero_gradient() -> None:
    target, weight = torch.zeros(1, 2, 3), torch.tensor([[1.0, 0.0]])
    predicted = torch.tensor([[[3.0, 0.5, 0.0], [9.0, 9.0, 9.0]]], requires_grad=True)
    assert latent_loss(predicted, target, weight, norm="l1").item() == pytest.approx(3.5 / 3)
    assert latent_loss(predicted, target, weight).item() == pytest.approx((2.5 + 0.125) / 3)
    loss = latent_loss(predicted, target, torch.zeros(1, 2))
    loss.backward()
    assert loss.item() == 0.0 and predicted.grad is not None and not predicted.grad.any()


def test_the_predictor_tells_targets_by_their_place_only() -> None:
    predictor = LatentPredictor(6, width=12, depth=1, heads=2)
    nn.init.normal_(predictor.project.weight)
    context, seen, hidden = torch.randn(1, 4, 6), torch.randn(1, 4, 12), torch.randn(1, 3, 12)
    found = predictor(context, seen, hidden)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(predictor(context, seen, hidden[:, order]), found[:, order])
    shuffled = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(predictor(context[:, shuffled], seen[:, shuffled], hidden), found)
    assert not torch.allclose(predictor(context[:, shuffled], seen, hidden), found)
    with pytest.raises(ValueError, match="predictor_width 10 must be a multiple of predictor_heads 4"):
        LatentPredictor(6, width=10, depth=1, heads=4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_contract_of_methods_is_kept(
    kind: type[Jepa] | type[PhaseJepa], encoder: nn.Module, make_batch: MakeBatch
) -> None:
    method = _method(kind, encoder)
    assert isinstance(method, Method)
    method.check_views(globals_per_slot=1, locals_per_slot=0)
    output = method(_batch(make_batch), 0)
    output.loss.backward()
    assert all(p.grad is not None for name, p in method.encoder.named_parameters() if name != "mask_token")
    assert all(p.grad is None for p in method.teacher_encoder.parameters())
    assert all(value.ndim == 0 and not value.requires_grad for value in output.metrics.values())
    assert output.metrics["loss"].item() == output.loss.item()
    assert method.export_encoder().state_dict().keys() == encoder.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_encoder_learns_to_predict_better_than_zero(
    kind: type[Jepa] | type[PhaseJepa], make_batch: MakeBatch
) -> None:
    name = "loss_vs_zero" if kind is Jepa else "across_loss_vs_zero"
    method = _method(kind, create_backbone("vit3d_nano"), momentum=0.9)
    batch = make_batch(2, locals_per_slot=0, global_size=(32, 16, 48))
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
    ratios = []
    for step in range(14):
        optimizer.zero_grad()
        output = method(batch, step)
        output.loss.backward()
        optimizer.step()
        method.after_optimizer_step(step)
        ratios.append(output.metrics[name].item())
    assert ratios[0] == pytest.approx(1.0)  # it starts at predicting 0
    assert ratios[-1] < 0.9
    untouched = {n for n, p in method.encoder.named_parameters() if p.grad is None or not p.grad.any()}
    assert untouched <= {"mask_token"}


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_losses_repeat_and_move_no_state(
    kind: type[Jepa] | type[PhaseJepa], encoder: nn.Module, make_batch: MakeBatch
) -> None:
    method, batch = _method(kind, encoder), _batch(make_batch)
    _predict_anything(method)
    assert method(batch, 0).loss.item() != method(batch, 0).loss.item()
    method.eval()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    assert method(batch, 0).loss.item() == method(batch, 9).loss.item()
    assert all(torch.equal(before[key], value) for key, value in method.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_follows_by_its_momentum_and_arrives_at_1(
    kind: type[Jepa] | type[PhaseJepa], encoder: nn.Module
) -> None:
    method = _method(kind, encoder, momentum=0.5)
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter += 1.0
    gap = [s - t for s, t in zip(method.encoder.parameters(), method.teacher_encoder.parameters(), strict=True)]
    assert all(torch.allclose(one, torch.ones_like(one)) for one in gap)
    method.after_optimizer_step(0)
    gap = [s - t for s, t in zip(method.encoder.parameters(), method.teacher_encoder.parameters(), strict=True)]
    assert all(torch.allclose(one, torch.full_like(one, 0.5)) for one in gap)
    assert method.momentum(9) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_not_predicted(
    kind: type[Jepa] | type[PhaseJepa], encoder: nn.Module, make_batch: MakeBatch
) -> None:
    method = _method(kind, encoder, **({} if kind is Jepa else {"floor_weights": (0.0, 0.0)}))
    batch = _batch(make_batch)
    padding = tuple(replace(view, valid=torch.zeros_like(view.valid)) for view in batch.views)
    assert method(replace(batch, views=padding), 0).loss.item() == 0.0


@pytest.mark.parametrize(("kind", "name"), [(Jepa, "jepa"), (PhaseJepa, "phase_jepa")])
def test_what_it_cannot_use_is_refused(
    kind: type[Jepa] | type[PhaseJepa],
    name: str,
    encoder: nn.Module,
    convolutional_encoder: nn.Module,
    make_batch: MakeBatch,
) -> None:
    with pytest.raises(ValueError, match=rf"^{name} encodes the visible tokens alone, .* tiny cannot .*vit3d_nano"):
        _method(kind, convolutional_encoder)
    with pytest.raises(ValueError, match="Linear is not an Encoder"):
        _method(kind, nn.Linear(2, 2))
    method = _method(kind, encoder)
    with pytest.raises(ValueError, match=rf"^{name} .* got globals_per_slot=1 and locals_per_slot=2"):
        method.check_views(globals_per_slot=1, locals_per_slot=2)
    batch, other = _batch(make_batch), make_batch(2, locals_per_slot=0, global_size=(8, 8, 8))
    with pytest.raises(ValueError, match=rf"^{name} needs global views of one size"):
        method(replace(batch, views=(batch.views[0], other.views[1])), 0)


def test_jepa_reads_no_voxel_of_its_targets(encoder: nn.Module, make_batch: MakeBatch) -> None:
    # the loss's gradient reaches context voxels only: the teacher's path carries none
    method = _method(Jepa, encoder, targets=1)
    _predict_anything(method)
    batch = _batch(make_batch)
    images = [view.image.clone().requires_grad_() for view in batch.views]
    views = tuple(replace(view, image=image) for view, image in zip(batch.views, images, strict=True))
    output = method(replace(batch, views=views), 0)
    output.loss.backward()
    seen = torch.cat([image.grad for image in images if image.grad is not None])
    tokens = torch.nn.functional.max_pool3d(seen.abs(), 4).flatten(1) > 0
    assert (tokens.float().mean(1) == output.metrics["context_share"]).all()
    assert 10 / 48 <= output.metrics["context_share"].item() < 1


def test_each_phase_is_predicted_from_the_other(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _method(PhaseJepa, encoder, within_weight=0.0, floor_weights=(0.0, 0.0)).eval()
    _predict_anything(method)
    batch = _batch(make_batch)

    def across(changed: PairBatch) -> float:
        return method(changed, 0).metrics["across_loss_vs_zero"].item()

    # rows of slot 1 permuted alone: each patient's exhale now meets a stranger's inhale
    stranger = replace(batch.views[1], image=batch.views[1].image.flip(0), coords_mm=batch.views[1].coords_mm.flip(0))
    assert across(batch) != across(replace(batch, views=(batch.views[0], stranger)))
    shrunk = replace(batch.views[1], lung=torch.zeros_like(batch.views[1].lung))
    assert across(batch) != across(replace(batch, views=(batch.views[0], shrunk)))  # the volume ratio is seen


def test_within_a_phase_nothing_of_the_other_is_seen(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _method(PhaseJepa, encoder, within_weight=1.0, floor_weights=(0.0, 0.0)).eval()
    _predict_anything(method)
    batch = _batch(make_batch, 1)
    valid = torch.zeros_like(batch.views[1].valid)
    unmeasured = replace(batch, views=(batch.views[0], replace(batch.views[1], valid=valid)))
    other = replace(unmeasured.views[1], image=torch.rand_like(batch.views[1].image))
    found = [method(one, 0).loss.item() for one in (unmeasured, replace(batch, views=(batch.views[0], other)))]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] != pytest.approx(method(batch, 0).loss.item(), rel=1e-4)


def test_views_of_several_crops_per_slot_meet_their_own_patient(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _method(PhaseJepa, encoder)
    output = method(_batch(make_batch, 3, globals_per_slot=2), 0)
    assert torch.isfinite(output.loss)
    assert all(shape[0] == 12 for shape in method.encoder.calls)  # pyright: ignore


def test_one_scan_seen_twice_is_trained_on_too(encoder: nn.Module, make_batch: MakeBatch) -> None:
    assert torch.isfinite(_method(PhaseJepa, encoder)(_batch(make_batch, paired=False), 0).loss)


def test_the_lungs_volume_is_that_of_their_voxels(make_batch: MakeBatch) -> None:
    view = _batch(make_batch).views[0]  # 2 mm voxels
    lung = torch.zeros_like(view.lung)
    lung[:, :5, :5, :5] = True
    torch.testing.assert_close(lung_volume_ml(replace(view, lung=lung)), torch.full((2,), 1.0), atol=1e-3, rtol=0)
    mirrored = replace(view, lung=lung, coords_mm=view.coords_mm * torch.tensor([-1.0, 2.0, 1.0]).reshape(3, 1, 1, 1))
    torch.testing.assert_close(lung_volume_ml(mirrored), torch.full((2,), 2.0), atol=1e-3, rtol=0)


def test_weights_outside_of_0_to_1_are_refused(encoder: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"within_weight must be in \[0, 1\], got 1.5"):
        _method(PhaseJepa, encoder, within_weight=1.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_momentum_left_open_is_settled_by_the_run_with_a_reason(kind: type[Jepa] | type[PhaseJepa]) -> None:
    run = RunSize(effective_batch=256, total_steps=100_000, patients=10)
    config, reasons = kind.Config().settled(run)
    assert config.momentum == pytest.approx(0.996) and "256 samples a step" in reasons["momentum"]
    assert kind.Config(momentum=0.9).settled(run) == (kind.Config(momentum=0.9), {})
