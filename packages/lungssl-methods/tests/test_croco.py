"""T12, the copies that learn nothing, and attention-TRE."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lungssl_data.batch import PairBatch, View
from lungssl_data.views import scale_hu
from lungssl_methods.completion_baselines import attention_tre_mm, copied
from lungssl_methods.croco import Croco
from lungssl_methods.cross_decoder import CrossDecoder
from lungssl_methods.hidden_views import drawn_masks
from lungssl_methods.method import LocalGather
from torch import nn

MakeBatch = Callable[..., PairBatch]
SMALL = {"decoder_width": 48, "decoder_depth": 2, "decoder_heads": 4, "mask_unit_tokens": 1}


def build(encoder: nn.Module, **changes: object) -> Croco:
    return Croco.Config(**(SMALL | changes)).build(encoder, total_steps=10)  # pyright: ignore


def smooth_pair(shift_vox: int = 0, b: int = 2, side: int = 16) -> PairBatch:
    """Two phases of smooth lungs on grids of 2 mm; slot 1 is slot 0 moved `shift_vox` to the left (+x)."""
    coarse = torch.rand(b, 1, side // 2, side // 2, (side + shift_vox) // 2 + 1)
    wide = nn.functional.interpolate(coarse, size=(side, side, side + shift_vox), mode="trilinear", align_corners=True)
    grid = torch.stack(torch.meshgrid(*(2.0 * torch.arange(side) for _ in range(3)), indexing="ij")[::-1])
    coords = grid.expand(b, 3, -1, -1, -1).contiguous()
    moved = coords + torch.tensor([2.0 * shift_vox, 0.0, 0.0])[:, None, None, None]
    whole = torch.ones(b, side, side, side, dtype=torch.bool)
    views = (
        View(
            image=wide[..., shift_vox:].contiguous(),
            coords_mm=coords,
            partner_mm=moved,
            valid=whole,
            lung=whole,
            slot=0,
            kind="global",
        ),
        View(image=wide[..., :side].contiguous(), coords_mm=coords, valid=whole, lung=whole, slot=1, kind="global"),
    )
    turn = torch.eye(3, 4).repeat(b, 1, 1)
    turn[:, 0, 3] = shift_vox
    return PairBatch(
        views=views,
        slot_phase=torch.tensor([[0, 1]]).repeat(b, 1),
        patient=torch.arange(b),
        exhale_to_inhale=turn,
    )


def test_every_output_depends_on_the_other_scan_and_on_the_visible_tokens_only(encoder: nn.Module) -> None:
    method = build(encoder)
    nn.init.normal_(method.predict.weight, std=0.1)
    batch = smooth_pair(b=3)
    method.eval()
    before = method(batch, 0).loss
    first, second = batch.views
    shuffled = replace(second, image=second.image.roll(1, 0))
    assert method(replace(batch, views=(first, shuffled)), 0).loss.item() != pytest.approx(before.item(), rel=1e-4)
    image = torch.cat([first.image, second.image]).requires_grad_()
    mask = drawn_masks(image, 4, views=2, ratio=0.9, unit=1, training=True, gather=LocalGather())
    tokens = method.visible(method.encoder, image, mask)
    (gradient,) = torch.autograd.grad(tokens.sum(), image)
    patches = gradient.unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4).abs().sum((1, 5, 6, 7)).flatten(1)
    assert not patches[mask].any() and patches[~mask].all()


def test_it_learns_to_copy_from_the_same_place_of_the_other_scan_and_not_from_a_strangers(encoder: nn.Module) -> None:
    torch.manual_seed(0)
    method = build(encoder, decoder_depth=1)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(80):  # fresh pairs: a few would be learned by heart, without the other scan
        optimizer.zero_grad()
        method(smooth_pair(b=4), step).loss.backward()
        optimizer.step()
    method.eval()
    batch = smooth_pair(b=4)
    output = method(batch, 80)
    assert output.metrics["loss_vs_zero"].item() < 0.6
    assert output.metrics["attention_tre_mm"].item() < 2.0  # tokens are 8 mm apart
    stranger = replace(batch.views[1], image=batch.views[1].image.roll(1, 0))
    assert method(replace(batch, views=(batch.views[0], stranger)), 0).loss.item() > 1.5 * output.loss.item()


def test_copies_are_exact_where_they_should_be() -> None:
    batch = smooth_pair(shift_vox=4)
    first, second = batch.views
    for how, exact in (("identity", False), ("affine", False), ("warp", True), ("density", True)):
        values, known = copied(batch, first, second, how)  # pyright: ignore[reportArgumentType]
        error = (values - first.image).abs()[:, 0]
        assert known.any() and bool(error[known].max() < 1e-4) is exact, how
    true_affine = replace(batch, exhale_to_inhale=batch.exhale_to_inhale * torch.tensor([1.0, 1.0, 1.0, 2.0]))
    values, known = copied(true_affine, first, second, "affine")
    assert (values - first.image).abs()[:, 0][known].max() < 1e-4
    assert not known[..., 12:].any() and known[..., :12].all()  # beyond the other view nothing is known


def test_a_perfect_copy_costs_nothing_where_it_knows_a_part_of_a_patch(encoder: nn.Module) -> None:
    # 6 voxels are a token and a half: the last patches that the copy knows end in their middle
    batch = smooth_pair(shift_vox=6)
    metrics = build(encoder).eval()(batch, 0).metrics
    for how in ("warp", "density"):
        assert metrics["loss"].item() / metrics[f"loss_vs_{how}"].item() < 1e-5
    assert metrics["loss"].item() / metrics["loss_vs_identity"].item() > 0.1


def test_a_copy_of_what_differs_is_scaled_down_to_saying_nothing(encoder: nn.Module, make_batch: MakeBatch) -> None:
    # Two independent scans: the copy costs the variance of both, twice that of predicting 0, as croco does untrained.
    batch = make_batch(3, locals_per_slot=0, global_size=(16, 16, 16))
    views = tuple(replace(view, coords_mm=batch.views[0].coords_mm) for view in batch.views)
    metrics = build(encoder).eval()(replace(batch, views=views), 0).metrics
    assert metrics["loss_vs_identity"].item() == pytest.approx(0.5, rel=0.1)
    assert metrics["loss_vs_scaled_identity"].item() == pytest.approx(1.0, rel=0.05)


def test_a_scaled_copy_has_the_factor_that_suits_it_best(encoder: nn.Module) -> None:
    batch = smooth_pair(shift_vox=6)
    method = build(encoder, norm="none").eval()
    metrics = method(batch, 0).metrics
    first, second = batch.views

    def ratio(factor: float) -> float:
        scaled = replace(batch, views=(first, replace(second, image=factor * second.image)))
        return metrics["loss"].item() / method(scaled, 0).metrics["loss_vs_identity"].item()

    best = min(ratio(0.02 * step) for step in range(1, 100))
    assert metrics["loss"].item() / metrics["loss_vs_scaled_identity"].item() == pytest.approx(best, rel=0.01)


def test_the_density_copy_presses_the_tissue_into_less_room() -> None:
    batch = smooth_pair()
    first, second = batch.views
    expansion = first.coords_mm * 1.5 ** (1 / 3)
    first = replace(first, partner_mm=expansion)
    second = replace(second, image=scale_hu(torch.full_like(second.image, -800.0)))
    values, known = copied(batch, first, second, "density")
    expected = scale_hu(torch.tensor(-700.0)).item()
    assert known.any() and (values[:, 0][known] - expected).abs().max() < 1e-4


def test_copies_that_know_nothing_are_left_out_of_the_figures(encoder: nn.Module) -> None:
    method = build(encoder).eval()
    batch = smooth_pair(shift_vox=2)
    metrics = method(batch, 0).metrics
    names = {f"loss_vs_{how}" for how in ("identity", "affine", "warp", "density")}
    names_of_places = {f"{what}_tre_mm" for what in ("attention", "identity", "affine")} | {"attention_tre_mean_mm"}
    assert names | names_of_places <= metrics.keys()
    assert metrics["identity_tre_mm"].item() == pytest.approx(4.0, abs=1e-3)
    assert metrics["affine_tre_mm"].item() == pytest.approx(2.0, abs=1e-3)
    first, second = batch.views
    unknown = method(replace(batch, views=(replace(first, partner_mm=None), second)), 0).metrics
    assert "loss_vs_identity" in unknown and not {"loss_vs_warp", "attention_tre_mm"} & unknown.keys()
    assert not names & method.train()(batch, 0).metrics.keys()


def trained(method: Croco, steps: int, make: Callable[[], PairBatch], *, lr: float) -> None:
    """By AdamW, its rate falling to 0."""
    optimizer = torch.optim.AdamW(method.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        method(make(), step).loss.backward()
        optimizer.step()
        schedule.step()


def test_an_identity_pair_is_learned_to_a_thousandth_and_from_the_other_scan(encoder: nn.Module) -> None:
    batch = smooth_pair(b=1)
    method = build(encoder, decoder_depth=1)
    trained(method, 400, lambda: batch, lr=1e-2)
    own = method.eval()(batch, 0).metrics["loss"].item()
    assert own < 1e-3  # the floor of variance is below that of every patch: it bounds nothing
    stranger = replace(batch.views[1], image=smooth_pair(b=1).views[1].image)
    assert method(replace(batch, views=(batch.views[0], stranger)), 0).loss.item() > 100 * own


def translated(b: int) -> PairBatch:
    """Pairs a token (8 mm) apart, half of which the affine tells; what slot 1's view doesn't show is not known."""
    batch = smooth_pair(shift_vox=4, b=b)
    first, second = batch.views
    assert first.partner_mm is not None
    shown = first.partner_mm[:, :1] <= second.coords_mm.amax()
    first = replace(first, partner_mm=torch.where(shown, first.partner_mm, torch.nan))
    return replace(batch, views=(first, second))


def test_attention_finds_the_part_of_a_translation_that_the_affine_does_not_tell(encoder: nn.Module) -> None:
    method = build(encoder, decoder_depth=1, directions="exhale").eval()
    before = method(translated(8), 0).metrics
    assert before["identity_tre_mm"].item() == pytest.approx(8.0, abs=1e-3)
    assert before["affine_tre_mm"].item() == pytest.approx(4.0, abs=1e-3)  # half a token
    assert method.head_tre_mm(translated(8)).min().item() > 4.0
    trained(method.train(), 150, lambda: translated(4), lr=3e-3)
    chosen, judged = (method.eval().head_tre_mm(translated(8)) for _ in range(2))  # pairs that it never saw
    assert judged.flatten()[chosen.argmin()].item() < 1.0  # of 8 such runs the worst had 0.3


def test_every_heads_error_is_told_so_that_a_head_can_be_fixed_elsewhere(encoder: nn.Module) -> None:
    method = build(encoder).eval()
    batch = smooth_pair(shift_vox=2)
    heads = method.head_tre_mm(batch)
    assert heads.shape == (2, 4) and len(heads.unique()) > 1  # blocks, heads
    assert heads.min().item() == method(batch, 0).metrics["attention_tre_mm"].item()
    assert torch.equal(heads, method.head_tre_mm(batch))
    one = build(encoder, directions="exhale").eval()
    one.load_state_dict(method.state_dict())
    torch.testing.assert_close(one.head_tre_mm(batch), heads)
    first, second = batch.views
    assert first.partner_mm is not None
    nowhere = replace(first, partner_mm=torch.full_like(first.partner_mm, torch.nan))
    assert method.head_tre_mm(replace(batch, views=(nowhere, second))).isnan().all()
    with pytest.raises(ValueError, match=r"croco's head_tre_mm needs to know where .*data.correspondences: true"):
        method.head_tre_mm(replace(batch, views=(replace(first, partner_mm=None), second)))
    with pytest.raises(ValueError, match="slot 0's tokens, which directions='inhale' doesn't complete"):
        build(encoder, directions="inhale").head_tre_mm(batch)


def test_attention_tre_is_zero_where_attention_is_at_the_truth() -> None:
    memory = torch.randn(2, 5, 3) * 20
    weights = torch.eye(5).expand(2, 5, 5)
    assert attention_tre_mm(weights, memory, memory).item() == 0.0
    moved = memory + torch.tensor([3.0, 4.0, 0.0])
    assert attention_tre_mm(weights, memory, moved).item() == pytest.approx(5.0, rel=1e-5)
    moved[:, 0] = torch.nan  # not known: doesn't count
    assert attention_tre_mm(weights, memory, moved).item() == pytest.approx(5.0, rel=1e-5)
    between = torch.full((2, 5, 5), 0.2)
    truth = memory.mean(dim=1, keepdim=True).expand(-1, 5, -1)
    assert attention_tre_mm(between, memory, truth).item() == pytest.approx(0.0, abs=1e-5)


def test_the_weights_are_those_that_the_decoder_attends_with() -> None:
    decoder = CrossDecoder(24, depth=2, heads=3).double()
    tokens, memory = torch.randn(2, 4, 24).double(), torch.randn(2, 6, 24).double()
    weights = decoder.attention(tokens, memory)
    assert weights.shape == (2, 2, 3, 4, 6)  # blocks, samples, heads
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 3, 4).to(weights))
    # A memory that says the same everywhere is looked at evenly; one token that says more draws the eye.
    same = decoder.attention(tokens, memory[:, :1].expand(-1, 6, -1))
    torch.testing.assert_close(same, torch.full_like(same, 1 / 6))
    order = torch.randperm(6)
    torch.testing.assert_close(decoder.attention(tokens, memory[:, order]), weights[..., order])
    torch.testing.assert_close(decoder(tokens, memory[:, order]), decoder(tokens, memory))
    with pytest.raises(ValueError, match="decoder_width 25 must be a multiple of decoder_heads 3"):
        CrossDecoder(25, depth=1, heads=3)


@pytest.mark.parametrize("directions", ["exhale", "inhale", "both"])
def test_directions_choose_which_slot_is_completed(directions: str, encoder: nn.Module) -> None:
    method = build(encoder, directions=directions).eval()
    calls = method.encoder.calls
    metrics = method(smooth_pair(), 0).metrics
    assert [shape[0] for shape in calls] == ([4, 4] if directions == "both" else [2, 2])
    assert ("loss_vs_identity" in metrics) is (directions != "inhale")


def test_local_views_and_views_of_two_sizes_are_refused(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = build(encoder)
    with pytest.raises(ValueError, match=r"croco hides parts of global views .* locals_per_slot=2; set"):
        method.check_views(globals_per_slot=1, locals_per_slot=2)
    batch = smooth_pair()
    odd = make_batch(2, locals_per_slot=0).views[1]
    with pytest.raises(ValueError, match="croco needs global views of one size"):
        method(replace(batch, views=(batch.views[0], odd)), 0)
