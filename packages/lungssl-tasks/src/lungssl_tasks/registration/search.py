"""Discrete search: MIND-SSC cost volumes both ways, coupled convex optimisation, the two fields made inverse.

Source: ConvexAdam, Siebert et al. 2024, IEEE Transactions on Medical Imaging 44(2), 738-748,
https://ieeexplore.ieee.org/document/10681158; the ops' own sources are in `lungssl_ops`. Differs from it: features of
what is not lung are 0, so that only lungs are matched; descent comes after, on another similarity (`descent.py`).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lungssl_ops.cost_volume import cost_volume, coupled_convex, inverse_consistent
from lungssl_ops.mind import mind_ssc
from lungssl_ops.warp import warp
from torch import Tensor

from lungssl_tasks.registration.common_grid import LUNG_HU, CommonGrid


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How far and how finely places are looked for."""

    grid_mm: float = 6.0
    """Pitch of the coarse grid and of its labels. ConvexAdam's lung setting has 8 mm; not tuned."""
    reach_mm: float = 24.0
    """Farthest that a place is looked for from the affine's, along each axis: after an affine, COPD patients' points
    are up to some 25 mm off (`registration.md`). Cost and memory grow with its cube."""


def search(pair: CommonGrid, config: SearchConfig) -> tuple[Float[Tensor, "1 3 z y x"], float]:
    """The coarse field v in voxels of the pair's grid, and how far both directions disagree: the median over lung, in
    mm, of |f(p) + b(p + f(p))|, before they are made consistent.
    """
    features = [
        mind_ssc(hu.clamp(*LUNG_HU), radius=1, dilation=1) * lung
        for hu, lung in ((pair.fixed_hu, pair.fixed_lung), (pair.moving_hu, pair.moving_lung))
    ]
    block = max(1, round(config.grid_mm / pair.spacing_mm))
    shape = pair.fixed_hu.shape[2:]
    short = [(-size) % block for size in shape]
    padding = [0, short[2], 0, short[1], 0, short[0]]
    fixed, moving = (F.avg_pool3d(F.pad(one, padding), block) for one in features)
    reach = math.ceil(config.reach_mm / (block * pair.spacing_mm))
    half = torch.float16 if fixed.device.type == "cpu" else torch.float32
    forward, backward = (
        coupled_convex(cost_volume(a, b, reach=reach, dtype=half)).float()
        for a, b in ((fixed, moving), (moving, fixed))
    )
    inside = F.avg_pool3d(F.pad(pair.fixed_lung, padding), block)[0, 0] > 0.5
    there_and_back = torch.linalg.vector_norm(forward + warp(backward, forward), dim=1)[0][inside]
    disagreement_mm = float(there_and_back.median()) * block * pair.spacing_mm if inside.any() else math.nan
    forward, _ = inverse_consistent(forward, backward)
    # A coarse voxel lies at the middle of its block: interpolation by edges, not by corners.
    field = F.interpolate(forward * block, scale_factor=block, mode="trilinear", align_corners=False)
    z, y, x = shape
    return field[:, :, :z, :y, :x].contiguous(), disagreement_mm
