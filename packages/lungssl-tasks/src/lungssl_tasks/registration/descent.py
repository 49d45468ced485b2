"""Descent on a field: local correlation of the lungs, with a smooth field that doesn't fold.

Minimises, level by level from coarse to fine,

    1 - LNCC(fixed, moving(p + v)) + a mean |grad v|^2 + b mean bending(v) + c mean relu(-det(I + grad v))

with LNCC in the lung and a rim around it, the other three in the lung and one voxel around it, in voxels of the level.
v is read from a coarser lattice of nodes, smoothed once: a step moves a neighbourhood, not a voxel; or, where it is to
be a diffeomorphism, the nodes are a stationary velocity, followed for a unit of time (Arsigny et al. 2006,
doi:10.1007/11866565_113; the search's field is taken for the first velocity). Adam after
Siebert et al. 2024 (`search.py`), whose similarity is MIND-SSC; LNCC as in ANTs (Avants et al. 2008,
doi:10.1016/j.media.2007.06.004), whose tail the search before avoids.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from lungssl_ops.lncc import lncc
from lungssl_ops.warp import exponential, jacobian_determinant, warp, warp_loss_terms
from torch import Tensor

from lungssl_tasks.registration.common_grid import CommonGrid

NODES = 2
"""Voxels of the level from node to node of the lattice."""
LAST_RATE = 0.1
"""Of the rate at the end of a level, after a cosine."""
EPS = 1e-4
"""Variance that a flat window is given, for images in [0, 1]: 11 HU, about a CT's noise at these voxels."""
STILL = 0.1
"""Adam's epsilon for the loss times the lung's nodes, where a node's gradient is 0.1 to 1 while there is something to
gain: below it steps shrink with the gradient, so that rounding errors don't move a field that is where it should be."""
SQUARINGS = 6
"""Of a velocity: 64 steps, for residual motions of 30 mm half a voxel of 1 mm each."""
MOST_SMOOTHINGS = 50
"""Rounds that `unfolded` may take; a fold left after them is reported, not hidden."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One resolution."""

    spacing_mm: float
    """Voxels; a whole multiple of the scans' own, to the nearest."""
    iterations: int
    rate: float = 0.4
    """Adam's, in voxels of the level."""
    window: int = 5
    """LNCC's, in voxels: on phantoms of 2 mm, 5 errs by 1.00 mm where 7 errs by 1.09 and 9 by 1.19 (docs/log.md)."""
    rim: int = 1
    """Voxels around the lung that LNCC counts. They hold its edge, which outshines the texture beside it: on four
    phantoms of 2 mm, 2 at both levels errs by 0.84 mm, 1 by 0.80, 0 by 0.76 but with rougher edges (SD of ln J 0.18
    for 0.12), 0 at 4 mm and 1 at 2 mm by 0.74 (docs/log.md)."""


@dataclass(frozen=True, kw_only=True)
class DescentConfig:
    """Levels and what keeps the field smooth. Weights and window were chosen one by one on phantoms
    with voxels of 2 mm; all together are not measured (docs/log.md)."""

    levels: tuple[Level, ...] = (Level(spacing_mm=4.0, iterations=80, rim=0), Level(spacing_mm=2.0, iterations=40))
    diffusion: float = 0.05
    bending: float = 2.0
    folding: float = 10.0
    diffeomorphic: bool = False
    """Whether v is the exponential of a velocity: smooth both ways by construction, at the price of its time."""

    def multiple(self, spacing_mm: float) -> int:
        """What the sides of a grid must be divided by."""
        return math.lcm(*(NODES * _factor(level, spacing_mm) for level in self.levels), 1)


def descend(
    pair: CommonGrid,
    v_vox: Float[Tensor, "1 3 z y x"],
    config: DescentConfig,
    say: Callable[[str], None] = lambda _: None,
) -> Float[Tensor, "1 3 z y x"]:
    """The field after all levels, in voxels of the pair's grid, without folds in the lung as far as that goes.

    `v_vox` is what it begins with.
    """

    def field(nodes: Float[Tensor, "1 3 z y x"]) -> Float[Tensor, "1 3 z y x"]:
        return exponential(nodes, steps=SQUARINGS) if config.diffeomorphic else nodes

    fixed, moving = pair.lungs()
    for level in config.levels:
        factor = _factor(level, pair.spacing_mm)
        near, far, lung = (F.avg_pool3d(one, factor) for one in (fixed, moving, pair.fixed_lung))
        lung = (lung > 0.5).float()
        smooth = _grown(lung, 1)
        seen = F.avg_pool3d(warp(pair.moving_seen, field(v_vox)), factor)
        counts = _grown(lung, level.rim) * (seen > 0.99)  # what the moving scan cuts off is led by what is around it
        nodes = (F.avg_pool3d(v_vox, factor * NODES) / factor).requires_grad_(True)
        adam = torch.optim.Adam([nodes], lr=level.rate, eps=STILL)
        of_nodes = lung.sum() / NODES**3
        for step in range(level.iterations):
            turn = 0.5 * (1 + math.cos(math.pi * step / level.iterations))
            adam.param_groups[0]["lr"] = level.rate * (LAST_RATE + (1 - LAST_RATE) * turn)
            terms = warp_loss_terms(far, field(_read(nodes)), weight=smooth, with_bending=True)
            assert terms.bending is not None
            similarity = lncc(near, terms.warped, window=level.window, eps=EPS, mask=counts)
            loss = 1 - similarity + config.diffusion * terms.diffusion + config.bending * terms.bending
            loss = (loss + config.folding * terms.folding).sum() * of_nodes
            adam.zero_grad()
            loss.backward()
            adam.step()
        with torch.no_grad():
            v_vox = _finer(_read(nodes), factor) * factor
        say(f"descent at {factor * pair.spacing_mm:g} mm")
    return unfolded(field(v_vox), pair.fixed_lung > 0)


def unfolded(v_vox: Float[Tensor, "1 3 z y x"], lung: Bool[Tensor, "1 1 z y x"]) -> Float[Tensor, "1 3 z y x"]:
    """The field, smoothed around voxels of the lung where det(I + grad v) is not above 0, as often as is needed."""
    for _ in range(MOST_SMOOTHINGS):
        folds = (jacobian_determinant(v_vox)[:, None] <= 0) & lung
        if not folds.any():
            break
        v_vox = torch.where(_grown(folds.float(), 3) > 0, _smooth(v_vox), v_vox)
    return v_vox


def _read(nodes: Float[Tensor, "1 3 z y x"]) -> Float[Tensor, "1 3 Z Y X"]:
    return _finer(_smooth(nodes), NODES)


def _smooth(field: Float[Tensor, "1 3 z y x"]) -> Float[Tensor, "1 3 z y x"]:
    return F.avg_pool3d(F.pad(field, (1,) * 6, mode="replicate"), 3, stride=1)


def _finer(field: Float[Tensor, "1 3 z y x"], factor: int) -> Float[Tensor, "1 3 Z Y X"]:
    if factor == 1:
        return field
    return F.interpolate(field, scale_factor=factor, mode="trilinear", align_corners=False)


def _grown(mask: Float[Tensor, "1 1 z y x"], voxels: int) -> Float[Tensor, "1 1 z y x"]:
    return F.max_pool3d(mask, 2 * voxels + 1, stride=1, padding=voxels)


def _factor(level: Level, spacing_mm: float) -> int:
    return max(1, round(level.spacing_mm / spacing_mm))
