"""Which tokens of a crop are hidden."""

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


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
    if unit < 1 or any(side % unit for side in grid):
        raise ValueError(
            f"a grid of {grid} tokens doesn't split into hidden cubes of {unit} tokens a side; "
            f"take views whose sides are multiples of {unit} tokens, or mask_unit_tokens=1"
        )
    cz, cy, cx = (side // unit for side in grid)
    cubes = cz * cy * cx
    hidden = round(ratio * cubes)
    if not 0 < hidden < cubes:
        raise ValueError(
            f"mask_ratio {ratio} hides {hidden} of {cubes} cubes of {unit} tokens a side, but some must be hidden and "
            f"some visible; take larger views, or mask_unit_tokens=1"
        )
    rank = torch.rand(count, cubes, generator=generator).argsort(dim=1).argsort(dim=1)
    mask = (rank < hidden).reshape(count, cz, cy, cx)
    for axis in (1, 2, 3):
        mask = mask.repeat_interleave(unit, dim=axis)
    return mask.flatten(1)


def visible_indices(mask: Bool[Tensor, "b n"]) -> Int64[Tensor, "b k"]:
    """Ascending indices of the visible tokens; every mask must hide as many."""
    return (~mask).nonzero()[:, 1].reshape(len(mask), -1)
