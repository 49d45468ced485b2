"""Which tokens of a crop are hidden."""

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

MASK_WIDTH_VOX = 16
"""Side of a hidden block: MAE's 16 pixels, and the best of nnssl's 3-D ablation (`ssl.md` B.2)."""


def random_block_masks(
    count: int,
    grid: tuple[int, int, int],
    *,
    ratio: float,
    unit: int = 1,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "count n"]:
    """`count` random masks over the tokens of `grid` (z, y, x), on the CPU; true is hidden.

    Tokens are hidden in cubes of `unit` a side. round(ratio * cubes) cubes are hidden in each mask, exactly. Without a
    `generator`, torch's global one on the CPU.

    Raises ValueError where the grid doesn't split into cubes, or the ratio would hide none or all of them.
    """
    cubes = _cubes(grid, unit)
    hidden = round(ratio * cubes)
    if not 0 < hidden < cubes:
        raise ValueError(
            f"mask_ratio {ratio} hides {hidden} of {cubes} cubes of {unit} tokens a side, but some must be hidden and "
            f"some visible; take larger views, or mask_unit_tokens=1"
        )
    return _hide(torch.full((count,), hidden), grid, unit, generator)


def visible_indices(mask: Bool[Tensor, "b n"]) -> Int64[Tensor, "b k"]:
    """Ascending indices of the visible tokens; every mask must hide as many."""
    return (~mask).nonzero()[:, 1].reshape(len(mask), -1)


def varied_block_masks(
    count: int,
    grid: tuple[int, int, int],
    *,
    ratio: tuple[float, float],
    share: float,
    unit: int = 1,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "count n"]:
    """Masks as iBOT has them: round(share * count) crops, at least one, are masked, the others not at all.

    Their ratios are spread evenly over `ratio`, one from each equal part, in random order (DINOv2's stratified draw,
    https://arxiv.org/abs/2304.07193). At least one cube of `unit` tokens is hidden and one visible.

    Raises ValueError as `random_block_masks`, and for a share or ratios outside of [0, 1].
    """
    low, high = ratio
    if not (0 <= low <= high <= 1 and 0 < share <= 1):
        raise ValueError(f"masks need 0 <= low <= high <= 1 and a share in (0, 1], got ratio {ratio}, share {share}")
    cubes = _cubes(grid, unit)
    if cubes < 2:
        raise ValueError(f"a grid of {grid} tokens has {cubes} cube of {unit} tokens a side; masks need 2 or more")
    masked = max(1, round(share * count))
    place = torch.arange(masked) + torch.rand(masked, generator=generator)
    hidden = torch.zeros(count)
    hidden[:masked] = ((low + (high - low) * place / masked) * cubes).round().clamp(1, cubes - 1)
    hidden = hidden[torch.randperm(count, generator=generator)]
    return _hide(hidden, grid, unit, generator)


def _cubes(grid: tuple[int, int, int], unit: int) -> int:
    if unit < 1 or any(side % unit for side in grid):
        raise ValueError(
            f"a grid of {grid} tokens doesn't split into hidden cubes of {unit} tokens a side; "
            f"take views whose sides are multiples of {unit} tokens, or mask_unit_tokens=1"
        )
    z, y, x = (side // unit for side in grid)
    return z * y * x


def _hide(
    hidden: Tensor, grid: tuple[int, int, int], unit: int, generator: torch.Generator | None
) -> Bool[Tensor, "count n"]:
    """Masks that hide `hidden` [count] random cubes each."""
    z, y, x = (side // unit for side in grid)
    rank = torch.rand(len(hidden), z * y * x, generator=generator).argsort(dim=1).argsort(dim=1)
    mask = (rank < hidden[:, None]).reshape(len(hidden), z, y, x)
    for axis in (1, 2, 3):
        mask = mask.repeat_interleave(unit, dim=axis)
    return mask.flatten(1)
