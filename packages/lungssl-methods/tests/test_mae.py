from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lungssl_data.batch import PairBatch
from lungssl_methods.mae import Mae, sincos_positions
from lungssl_methods.masking import random_block_masks, visible_indices
from torch import nn

MakeBatch = Callable[..., PairBatch]


def _config(**changes: object) -> Mae.Config:
    small = {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2, "mask_unit_tokens": 1}
    return Mae.Config(**(small | changes))  # pyright: ignore


def _predict_anything(method: Mae) -> None:
    nn.init.normal_(method.predict[1].weight)


def _predict_constant(method: Mae, value: float) -> None:
    with torch.no_grad():
        method.predict[1].weight.zero_()
        method.predict[1].bias.fill_(value)


def _batch(make_batch: MakeBatch, b: int = 2) -> PairBatch:
    return make_batch(b, locals_per_slot=0)  # 8 x 12 x 16 voxels: 2 x 3 x 4 tokens


def test_masks_hide_exactly_as_many_cubes_in_every_sample() -> None:
    mask = random_block_masks(7, (4, 6, 2), ratio=0.75, unit=2)
    assert mask.shape == (7, 48)
    cubes = mask.reshape(7, 2, 2, 3, 2, 1, 2).permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
    assert (cubes.all(-1) == cubes.any(-1)).all()  # whole cubes
    assert (cubes.all(-1).flatten(1).sum(1) == round(0.75 * 6)).all()
    assert len({tuple(row) for row in mask.tolist()}) > 1


def test_visible_indices_are_ascending_and_the_complement_of_the_mask() -> None:
    mask = random_block_masks(5, (3, 4, 5), ratio=0.6)
    keep = visible_indices(mask)
    assert keep.shape == (5, 24) and (keep.diff(dim=1) > 0).all()
    assert not mask.gather(1, keep).any()


def test_masks_follow_the_global_generator_and_a_given_one() -> None:
    torch.manual_seed(3)
    first = random_block_masks(2, (4, 4, 4), ratio=0.5)
    torch.manual_seed(3)
    assert torch.equal(first, random_block_masks(2, (4, 4, 4), ratio=0.5))
    given = [random_block_masks(2, (4, 4, 4), ratio=0.5, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*given)


def test_grids_that_cannot_be_masked_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"\(3, 4, 4\) tokens doesn't split into hidden cubes of 2 .*mask_unit_tokens=1"
    ):
        random_block_masks(1, (3, 4, 4), ratio=0.75, unit=2)
    with pytest.raises(ValueError, match=r"mask_ratio 0.75 hides 1 of 1 cubes .* take larger views"):
        random_block_masks(1, (2, 2, 2), ratio=0.75, unit=2)


def test_the_encoder_never_sees_hidden_voxels(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config().build(encoder, total_steps=10)
    _predict_anything(method)
    batch = _batch(make_batch)
    images = [view.image.clone().requires_grad_() for view in batch.views]
    mask = random_block_masks(4, (2, 3, 4), ratio=0.75)
    method._decode(method.visible(method.encoder, torch.cat(images), mask), (2, 3, 4)).sum().backward()
    mask = mask.reshape(4, 2, 3, 4)
    for axis in (1, 2, 3):
        mask = mask.repeat_interleave(4, dim=axis)
    gradient = torch.cat([image.grad for image in images if image.grad is not None])[:, 0]
    assert (gradient[mask] == 0).all() and (gradient[~mask] != 0).any()


def test_a_perfect_decoder_would_cost_nothing(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config(norm="none").build(encoder, total_steps=10)
    batch = _batch(make_batch)
    constant = tuple(replace(view, image=torch.full_like(view.image, 0.3)) for view in batch.views)
    _predict_constant(method, 0.3)
    assert method(replace(batch, views=constant), 0).loss.item() == pytest.approx(0.0, abs=1e-12)


def test_it_starts_at_predicting_zero_which_costs_n_minus_1_over_n(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config().build(encoder, total_steps=10)
    batch = _batch(make_batch)
    lung = tuple(replace(view, lung=torch.ones_like(view.lung)) for view in batch.views)
    metrics = method(replace(batch, views=lung), 0).metrics
    assert metrics["loss_vs_zero"].item() == pytest.approx(1.0)
    assert metrics["loss"].item() == pytest.approx(63 / 64, abs=1e-6)
    assert metrics["masked_share"].item() == pytest.approx(0.75)


def test_padding_counts_for_nothing(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config(norm="none").build(encoder, total_steps=10).eval()
    _predict_constant(method, 0.0)
    batch = _batch(make_batch)
    valid = torch.ones_like(batch.views[0].valid)
    valid[:, :, :5] = False

    def loss(padding: float) -> float:
        views = []
        for view in batch.views:
            image = torch.where(valid[:, None], view.image, padding)
            views.append(replace(view, image=image, valid=valid))
        return method(replace(batch, views=tuple(views)), 0).loss.item()

    assert loss(0.0) == loss(9.0)


def test_voxels_outside_the_lung_weigh_a_tenth(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config(norm="none").build(encoder, total_steps=10).eval()
    _predict_constant(method, 0.0)
    batch = _batch(make_batch)
    # the lung reads 1 and the rest 3: predicting 0 costs (w_lung * 1 + w_out * 9) / (w_lung + w_out)
    lung = torch.zeros_like(batch.views[0].lung)
    lung[..., ::2] = True
    image = torch.where(lung, 1.0, 3.0)[:, None]
    views = tuple(replace(view, lung=lung, image=image) for view in batch.views)
    loss = method(replace(batch, views=views), 0).loss
    assert loss.item() == pytest.approx((1.0 + 0.1 * 9.0) / 1.1, rel=1e-6)


def test_convolutional_encoders_get_the_mask(convolutional_encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config().build(convolutional_encoder, total_steps=10)
    _predict_anything(method)
    method(_batch(make_batch), 0).loss.backward()
    token = method.encoder.get_parameter("mask_token")
    assert token.grad is not None and (token.grad != 0).any()


def test_both_slots_are_one_batch(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _config().build(encoder, total_steps=10)
    method(make_batch(3, globals_per_slot=2, locals_per_slot=0), 0)
    assert method.encoder.calls == [(12, 1, 8, 12, 16)]


def test_a_hidden_block_is_16_voxels_wide_by_default(encoder: nn.Module) -> None:
    assert Mae.Config().build(encoder, total_steps=10).unit_tokens == 4  # tokens of 4 voxels
    assert _config(mask_unit_tokens=2).build(encoder, total_steps=10).unit_tokens == 2


def test_held_out_masks_are_fixed_and_trained_ones_are_not(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method, batch = _config().build(encoder, total_steps=10), _batch(make_batch)
    _predict_anything(method)
    assert method(batch, 0).loss.item() != method(batch, 0).loss.item()
    method.eval()
    assert method(batch, 0).loss.item() == method(batch, 5).loss.item()


def test_every_token_has_its_own_position_and_axes_are_not_mixed_up() -> None:
    positions = sincos_positions((2, 3, 4), 26)
    assert positions.shape == (24, 26)
    assert torch.cdist(positions, positions).fill_diagonal_(1.0).min() > 0.5
    assert (positions[:, 24:] == 0).all()
    # tokens 0 and 1 differ in x only: the first 4 frequencies of sines are z's, the next y's, the last x's
    assert torch.equal(positions[0, :8], positions[1, :8]) and not torch.equal(positions[0, 8:12], positions[1, 8:12])
    assert positions[1, 8].item() == pytest.approx(torch.sin(torch.tensor(1.0)).item())


def test_local_views_are_refused(encoder: nn.Module) -> None:
    method = _config().build(encoder, total_steps=10)
    with pytest.raises(ValueError, match=r"got globals_per_slot=1 and locals_per_slot=2; set .* locals_per_slot to 0"):
        method.check_views(globals_per_slot=1, locals_per_slot=2)


def test_global_views_of_two_sizes_are_refused(encoder: nn.Module, make_batch: MakeBatch) -> None:
    batch, other = _batch(make_batch), make_batch(2, locals_per_slot=0, global_size=(8, 8, 8))
    method = _config().build(encoder, total_steps=10)
    with pytest.raises(ValueError, match=r"global views of one size, got \[\(2, 1, 8, 12, 16\), \(2, 1, 8, 8, 8\)\]"):
        method(replace(batch, views=(batch.views[0], other.views[1])), 0)
