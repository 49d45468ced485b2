"""I-JEPA's context and targets in 3-D: boxes to predict, and the tokens of a large box around them that stay.

Source: Assran et al. 2023, https://arxiv.org/abs/2301.08243 (4 targets of 15 to 20 %, aspect ratios 0.75 to 1.5, a
context of 85 to 100 % without the targets). Differs from it: boxes have two aspect ratios; they shrink on small grids
until enough context is certain to be left, where the source draws again and again.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Token indices, in (z, y, x) order over the grid, on the CPU."""

    context: Int64[Tensor, "b k"]
    """Ascending; in no target of the sample."""
    targets: Int64[Tensor, "b t m"]
    """Tokens of each of the sample's boxes, which may overlap each other."""


def sample_blocks(
    count: int,
    grid: tuple[int, int, int],
    *,
    targets: int = 4,
    target_scale: tuple[float, float] = (0.15, 0.2),
    aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    min_keep: int = 10,
    generator: torch.Generator | None = None,
) -> Blocks:
    """Context and targets of `count` samples: boxes of one size, drawn once, at places drawn per sample.

    Scales are shares of the grid's tokens. Every sample has as many context tokens, those of the sample that had the
    fewest left, and at least `min_keep`. Without a `generator`, torch's global one on the CPU.

    Raises ValueError for scales that are no shares, and for a grid with too few tokens.
    """
    for name, (low, high) in {"target_scale": target_scale, "context_scale": context_scale}.items():
        if not 0 < low <= high <= 1:
            raise ValueError(f"{name} must be two shares with 0 < low <= high <= 1, got {(low, high)}")
    z, y, x = grid
    tokens = z * y * x
    if targets < 1 or min_keep < 1 or tokens < targets + min_keep:
        raise ValueError(
            f"a grid of {grid} has {tokens} tokens, fewer than {targets} targets and min_keep={min_keep} context "
            f"tokens need (both at least 1); take larger views, or fewer targets or a smaller min_keep"
        )
    context_box = _sides(grid, _draw(context_scale, generator), (1.0, 1.0), at_least=targets + min_keep)
    # Even if no two boxes overlap and all are in the context, min_keep tokens are left.
    room = (context_box[0] * context_box[1] * context_box[2] - min_keep) // targets
    shape = _draw(aspect, generator), _draw(aspect, generator)
    box = _sides(grid, _draw(target_scale, generator), shape, at_most=room)
    boxes = _place(count * targets, grid, box, generator)
    hidden = boxes.reshape(count, targets, tokens).any(dim=1)
    left = _place(count, grid, context_box, generator) & ~hidden
    kept = int(left.sum(dim=1).min())
    # The first of a random order of the tokens that are left.
    order = torch.rand(count, tokens, generator=generator).masked_fill(~left, 2.0).argsort(dim=1)
    return Blocks(
        context=order[:, :kept].sort(dim=1).values,
        targets=boxes.nonzero()[:, 1].reshape(count, targets, -1),
    )


def _draw(bounds: tuple[float, float], generator: torch.Generator | None) -> float:
    low, high = bounds
    return low + (high - low) * float(torch.rand((), generator=generator))


def _sides(
    grid: tuple[int, int, int],
    share: float,
    aspect: tuple[float, float],
    *,
    at_least: int = 1,
    at_most: int | None = None,
) -> tuple[int, int, int]:
    """Sides of a box of about `share` of the grid, its shape that of the grid but for `aspect` of z and y to x."""
    unit = (share / (aspect[0] * aspect[1])) ** (1 / 3)
    stretch = (unit * aspect[0], unit * aspect[1], unit)
    sides = [min(side, max(1, round(side * part))) for side, part in zip(grid, stretch, strict=True)]
    while at_most is not None and sides[0] * sides[1] * sides[2] > at_most:
        sides[sides.index(max(sides))] -= 1
    while sides[0] * sides[1] * sides[2] < at_least:
        shortfall = [side / whole for side, whole in zip(sides, grid, strict=True)]
        sides[shortfall.index(min(shortfall))] += 1
    return sides[0], sides[1], sides[2]


def _place(
    count: int, grid: tuple[int, int, int], box: tuple[int, int, int], generator: torch.Generator | None
) -> Tensor:
    """Boxes at random places, as masks [count, tokens]."""
    masks = []
    for whole, side in zip(grid, box, strict=True):
        start = torch.randint(0, whole - side + 1, (count, 1), generator=generator)
        index = torch.arange(whole)
        masks.append((index >= start) & (index < start + side))
    z, y, x = masks
    return (z[:, :, None, None] & y[:, None, :, None] & x[:, None, None, :]).flatten(1)
