from collections.abc import Callable

import pytest
import torch
from lungssl_data.batch import PairBatch
from lungssl_methods.hidden_views import drawn_masks
from lungssl_methods.method import LocalGather
from lungssl_methods.simmim import SimMim, masked_l1
from lungssl_ops.patches import patchify
from torch import nn

MakeBatch = Callable[..., PairBatch]


def build(encoder: nn.Module, **changes: object) -> SimMim:
    return SimMim.Config(**({"mask_unit_tokens": 1} | changes)).build(encoder, total_steps=10)  # pyright: ignore


def test_only_hidden_voxels_of_positive_weight_count() -> None:
    predicted, target = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    mask, weight = torch.rand(2, 4) < 0.5, torch.rand(2, 4, 8)
    mask[0, 0], weight[0, 0, 0] = True, 0.0
    changed = target.clone()
    changed[~mask] += 5.0
    changed[0, 0, 0] += 5.0
    loss = masked_l1(predicted, target, mask, weight)
    torch.testing.assert_close(masked_l1(predicted, changed, mask, weight), loss)
    by_hand = sum(
        weight[i, j, k] * abs(predicted[i, j, k] - target[i, j, k])
        for i in range(2)
        for j in range(4)
        for k in range(8)
        if mask[i, j]
    ) / sum(weight[i, j, k] for i in range(2) for j in range(4) for k in range(8) if mask[i, j])
    assert loss.item() == pytest.approx(float(by_hand), rel=1e-5)


def test_the_encoder_is_told_which_tokens_are_hidden(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = build(encoder)
    batch = make_batch(2, locals_per_slot=0)
    seen: list[torch.Tensor] = []
    method.encoder.register_forward_hook(lambda _m, _a, kwargs, _o: seen.append(kwargs["mask"]), with_kwargs=True)
    output = method(batch, 0)
    assert output.metrics["masked_share"].item() == pytest.approx(round(0.6 * 24) / 24)
    assert torch.equal(seen[0].float().mean(), output.metrics["masked_share"])


def test_the_loss_is_the_distance_in_network_input(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = build(encoder)
    batch = make_batch(2, locals_per_slot=0)
    for view in batch.views:
        view.image.fill_(0.25)
    with torch.no_grad():
        method.predict.weight.zero_()
        method.predict.bias.fill_(0.25 + 0.1)
    assert method(batch, 0).loss.item() == pytest.approx(0.1, rel=1e-4)


def test_predicting_the_visible_mean_scores_one(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = build(encoder)
    batch = make_batch(1, locals_per_slot=0)
    for view in batch.views:  # one value per patch column: the mean of what is visible depends on the mask
        view.image.copy_(torch.rand(1, 1, 8, 12, 16))
        view.lung.fill_(True)
    torch.manual_seed(4)
    image = torch.cat([view.image for view in batch.views])
    mask = drawn_masks(image, 4, views=2, ratio=0.6, unit=1, training=True, gather=LocalGather())
    patches = patchify(image, (4, 4, 4))
    means = [patches[row][~mask[row]].mean() for row in range(2)]
    losses = [(patches[row][mask[row]] - means[row]).abs().mean() for row in range(2)]
    torch.manual_seed(4)
    output = method(batch, 0)
    ratio = output.loss.item() / (sum(losses).item() / 2)
    assert output.metrics["loss_vs_mean"].item() == pytest.approx(ratio, rel=1e-5)


def test_it_learns_what_can_be_told_from_the_rest(make_batch: MakeBatch) -> None:
    from lungssl_backbones import create_backbone

    torch.manual_seed(0)
    method = build(create_backbone("vit3d_nano"))
    batch = make_batch(4, locals_per_slot=0, global_size=(16, 16, 16))
    for index, view in enumerate(batch.views):
        view.image.copy_(torch.rand(4, 1, 1, 1, 1).expand_as(view.image) * (0.5 + 0.5 * index))
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        output = method(batch, step)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_local_views_are_refused(encoder: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"simmim hides parts of global views .* locals_per_slot=1; set"):
        build(encoder).check_views(globals_per_slot=1, locals_per_slot=1)
