from math import prod

import pytest
import torch
from lungssl_methods.block_targets import Blocks, sample_blocks

GRIDS = [(6, 6, 6), (4, 2, 6), (12, 8, 10), (2, 3, 4), (1, 8, 8)]


def _mask(index: torch.Tensor, tokens: int) -> torch.Tensor:
    return torch.zeros(len(index), tokens, dtype=torch.bool).scatter(1, index, torch.ones_like(index, dtype=torch.bool))


def _same(first: Blocks, second: Blocks) -> bool:
    return torch.equal(first.context, second.context) and torch.equal(first.targets, second.targets)


@pytest.mark.parametrize("grid", GRIDS)
def test_context_and_targets_never_overlap_and_enough_is_kept(grid: tuple[int, int, int]) -> None:
    for seed in range(20):
        blocks = sample_blocks(5, grid, generator=torch.Generator().manual_seed(seed))
        assert blocks.context.shape[0] == 5 and blocks.context.shape[1] >= 10
        assert (blocks.context.diff(dim=1) > 0).all()  # ascending, so each once
        context, targets = _mask(blocks.context, prod(grid)), _mask(blocks.targets.flatten(1), prod(grid))
        assert not (context & targets).any()


@pytest.mark.parametrize("grid", GRIDS)
def test_every_target_is_a_full_box_of_one_size(grid: tuple[int, int, int]) -> None:
    blocks = sample_blocks(3, grid, targets=2)
    sides = set()
    for box in blocks.targets.flatten(0, 1):
        place = torch.stack(torch.unravel_index(box, grid))
        extent = place.amax(dim=1) - place.amin(dim=1) + 1
        assert prod(extent.tolist()) == len(box.unique()) == len(box)
        sides.add(tuple(extent.tolist()))
    assert len(sides) == 1


def test_boxes_have_about_the_share_that_was_asked_for() -> None:
    shares = []
    for seed in range(40):
        blocks = sample_blocks(1, (16, 16, 16), context_scale=(1.0, 1.0), generator=torch.Generator().manual_seed(seed))
        shares.append(blocks.targets.shape[2] / 16**3)
    assert 0.12 < min(shares) and max(shares) < 0.24
    assert sum(shares) / len(shares) == pytest.approx(0.175, abs=0.02)


def test_without_chance_to_overlap_the_context_is_all_the_rest() -> None:
    blocks = sample_blocks(4, (4, 4, 4), targets=1, context_scale=(1.0, 1.0))
    assert blocks.context.shape[1] + blocks.targets.shape[2] == 64


def test_places_differ_between_samples_and_follow_the_generator() -> None:
    first, second = (sample_blocks(4, (8, 8, 8), generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert _same(first, second)
    assert not _same(first, sample_blocks(4, (8, 8, 8), generator=torch.Generator().manual_seed(2)))
    assert len({tuple(box.tolist()) for box in first.targets[:, 0]}) > 1


def test_axes_are_not_mixed_up() -> None:
    # a box as long as the grid in z and y, and half of x
    blocks = sample_blocks(1, (2, 3, 8), targets=1, target_scale=(0.5, 0.5), aspect=(2.0, 2.0))
    z, y, x = torch.unravel_index(blocks.targets[0, 0], (2, 3, 8))
    assert len(z.unique()) == 2 and len(y.unique()) == 3 and len(x.unique()) < 8


def test_grids_and_scales_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"grid of \(2, 2, 3\) has 12 tokens, fewer than 4 targets and min_keep=10"):
        sample_blocks(1, (2, 2, 3))
    with pytest.raises(ValueError, match=r"target_scale must be two shares .* got \(0.5, 0.2\)"):
        sample_blocks(1, (4, 4, 4), target_scale=(0.5, 0.2))
    with pytest.raises(ValueError, match=r"context_scale must be two shares .* got \(0.5, 1.5\)"):
        sample_blocks(1, (4, 4, 4), context_scale=(0.5, 1.5))
