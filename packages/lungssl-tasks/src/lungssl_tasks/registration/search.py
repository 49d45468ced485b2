"""Discrete search: cost volumes both ways, coupled convex optimisation, the two fields made inverse.

Costs are of MIND-SSC, of features that are given for each point (an encoder's), or of both.

Source: ConvexAdam, Siebert et al. 2024, IEEE Transactions on Medical Imaging 44(2), 738-748,
https://ieeexplore.ieee.org/document/10681158; the ops' own sources are in `lungssl_ops`. Differs from it: features of
what is not lung are 0, so that only lungs are matched; descent comes after, on another similarity (`descent.py`).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
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
    given_share: float = 1.0
    """Of the cost, what given features have, where there are any; MIND-SSC has the rest. They are scaled to spread as
    much over the lung as MIND-SSC does, for which the coupling's weights were made."""
    components: int = 24
    """Given features with more channels are led back to so many principal components of both lungs: of 360 channels, 24
    search as well (3.16 mm, all 3.24) in a sixth of the time (docs/log.md)."""

    def block(self, spacing_mm: float) -> int:
        """Voxels to a side of the coarse grid's."""
        return max(1, round(self.grid_mm / spacing_mm))


def search(
    pair: CommonGrid,
    config: SearchConfig,
    given: tuple[Float[Tensor, "1 _c _z _y _x"], Float[Tensor, "1 _c _z _y _x"]] | None = None,
) -> tuple[Float[Tensor, "1 3 z y x"], float]:
    """The coarse field v in voxels of the pair's grid, and how far both directions disagree: the median over lung, in
    mm, of |f(p) + b(p + f(p))|, before they are made consistent.

    `given`: features of fixed and moving at the middles of the coarse grid's voxels, blocks of `config.block` voxels.
    """
    block = config.block(pair.spacing_mm)
    shape = pair.fixed_hu.shape[2:]
    short = [(-size) % block for size in shape]
    padding = [0, short[2], 0, short[1], 0, short[0]]

    def coarse(values: Float[Tensor, "1 c z y x"]) -> Float[Tensor, "1 c Z Y X"]:
        return F.avg_pool3d(F.pad(values, padding), block)

    scans = (pair.fixed_hu, pair.fixed_lung), (pair.moving_hu, pair.moving_lung)
    fixed, moving = (coarse(mind_ssc(hu.clamp(*LUNG_HU), radius=1, dilation=1) * lung) for hu, lung in scans)
    if given is not None:
        fixed, moving = _mixed((fixed, moving), given, (coarse(scans[0][1]), coarse(scans[1][1])), config)
    reach = math.ceil(config.reach_mm / (block * pair.spacing_mm))
    half = torch.float16 if fixed.device.type == "cpu" else torch.float32
    forward, backward = (
        coupled_convex(cost_volume(a, b, reach=reach, dtype=half)).float()
        for a, b in ((fixed, moving), (moving, fixed))
    )
    inside = coarse(pair.fixed_lung)[0, 0] > 0.5
    there_and_back = torch.linalg.vector_norm(forward + warp(backward, forward), dim=1)[0][inside]
    disagreement_mm = float(there_and_back.median()) * block * pair.spacing_mm if inside.any() else math.nan
    forward, _ = inverse_consistent(forward, backward)
    # A coarse voxel lies at the middle of its block: interpolation by edges, not by corners.
    field = F.interpolate(forward * block, scale_factor=block, mode="trilinear", align_corners=False)
    z, y, x = shape
    return field[:, :, :z, :y, :x].contiguous(), disagreement_mm


def _mixed(
    mind: tuple[Float[Tensor, "1 m z y x"], Float[Tensor, "1 m z y x"]],
    given: tuple[Float[Tensor, "1 _c _z _y _x"], Float[Tensor, "1 _c _z _y _x"]],
    lungs: tuple[Float[Tensor, "1 1 z y x"], Float[Tensor, "1 1 z y x"]],
    config: SearchConfig,
) -> tuple[Float[Tensor, "1 k z y x"], Float[Tensor, "1 k z y x"]]:
    """Features whose squared distances are `given_share` of the given ones', scaled, and the rest of MIND-SSC's."""
    for features, about in zip(given, mind, strict=True):
        if features.shape[2:] != about.shape[2:] or features.shape[1] != given[0].shape[1]:
            expected = ", ".join(map(str, about.shape[2:]))
            raise ValueError(
                f"given features have shape {tuple(features.shape)}, expected [1, c, {expected}], c alike for both"
            )
    inside, share = lungs[0][0, 0] > 0.5, config.given_share
    given = principal(given, (inside, lungs[1][0, 0] > 0.5), config.components)

    def spread(features: Float[Tensor, "1 c z y x"]) -> Float[Tensor, ""]:
        return features[0][:, inside].var(dim=1).sum()

    scale = (share * spread(mind[0]) / spread(given[0]).clamp_min(1e-12)).sqrt()
    fixed, moving = (
        torch.cat([(1 - share) ** 0.5 * about, scale * features * (lung > 0)], dim=1)
        for about, features, lung in zip(mind, given, lungs, strict=True)
    )
    return fixed, moving


def principal(
    features: tuple[Float[Tensor, "1 _c _z _y _x"], Float[Tensor, "1 _c _z _y _x"]],
    inside: tuple[Bool[Tensor, "_z _y _x"], Bool[Tensor, "_z _y _x"]],
    components: int,
) -> tuple[Float[Tensor, "1 _k _z _y _x"], Float[Tensor, "1 _k _z _y _x"]]:
    """Both volumes' coordinates along the first principal components of the voxels inside both, around their mean.

    Distances are those of the features but for what lies along the others. Features of no more channels stay.
    """
    if features[0].shape[1] <= components:
        return features
    rows = torch.cat([one[0][:, there].T for one, there in zip(features, inside, strict=True)]).double()
    mean = rows.mean(dim=0)
    axes = torch.linalg.eigh((rows - mean).T @ (rows - mean)).eigenvectors[:, -components:].to(features[0])
    middle = mean.to(features[0]).reshape(1, -1, 1, 1, 1)
    first, second = (torch.einsum("bczyx,ck->bkzyx", one - middle, axes).contiguous() for one in features)
    return first, second
