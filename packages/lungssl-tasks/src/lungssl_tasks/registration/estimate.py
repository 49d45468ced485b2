"""A displacement between a pair's scans from the scans alone: discrete search, then descent, on MIND-SSC features.

The pipeline of ConvexAdam (Siebert et al. 2024, IEEE Transactions on Medical Imaging 44(2), 738-748,
https://ieeexplore.ieee.org/document/10681158) after the pair's coarse affine: MIND-SSC of both scans in the lung, cost
volumes both ways on a coarse grid, coupled convex optimisation, the two fields made inverse to each other, then Adam on
the field itself. Differs from it: costs and regulariser count only lung, the diffusion is in mm.
Axes: arrays (z, y, x); displacements have components (x, y, z).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from lungssl_data.pair import Displacement, PhasePair, PhaseScan
from lungssl_ops.cost_volume import cost_volume, coupled_convex, inverse_consistent
from lungssl_ops.mind import mind_ssc
from lungssl_ops.warp import warp_loss_terms
from torch import Tensor

AERATED_HU = (-1000.0, 100.0)
"""Clipped to: what lungs hold (`registration.md`, the setting that peers were measured with)."""


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """How a displacement is looked for."""

    grid_mm: float = 6.0
    """Pitch of the coarse grid, and of its labels; never below the scans' voxels."""
    reach_mm: float = 24.0
    """Farthest that a place is looked for from the affine's: phantoms' landmarks are up to 19 mm off."""
    iterations: int = 60
    """Of Adam."""
    lr: float = 0.1
    """Of Adam, in voxels."""
    smoothness: float = 1.0
    """Weight of the field's mean |grad u|^2 beside the mean squared difference of MIND-SSC's channels, times 12."""

    def provenance(self) -> str:
        """For the cache."""
        return f"estimated: MIND-SSC, coupled convex, Adam ({self})"


def estimate_displacement(pair: PhasePair, config: EstimateConfig | None = None) -> Displacement:
    """Where exhale's lung is in inhale, on exhale's grid; NaN farther than `grid_mm` from the lung.

    Raises ValueError for a pair with one phase, without a coarse affine, or with voxels that aren't cubes.
    """
    config = config or EstimateConfig()
    exhale, inhale = pair.scan("exhale"), pair.scan("inhale")
    if pair.exhale_to_inhale is None:
        raise ValueError(f"patient {pair.patient} has no coarse affine to start from; build the cache again")
    if max(exhale.spacing_mm) - min(exhale.spacing_mm) > 1e-3:
        raise ValueError(f"patient {pair.patient} has voxels of {exhale.spacing_mm} mm; resample to cubes first")
    spacing_mm = exhale.spacing_mm[0]
    affine = torch.from_numpy(np.asarray(pair.exhale_to_inhale)).double()
    places = _voxel_mm(exhale)
    fixed, fixed_lung = (torch.from_numpy(a.astype(np.float32))[None, None] for a in (exhale.ct_hu, exhale.lung > 0))
    moving, moving_lung = (
        _sampled(inhale, values, _moved(places, affine)) for values in (inhale.ct_hu, inhale.lung > 0)
    )
    moving_lung = (moving_lung > 0.5).float()
    features = [_features(*scan) for scan in ((fixed, fixed_lung), (moving, moving_lung))]
    u_vox = _search(*features, spacing_mm=spacing_mm, config=config)
    u_vox = _descend(*features, u_vox, fixed_lung, config=config)
    steps_mm = u_vox[0].movedim(0, -1).double() * spacing_mm
    u_mm = (_moved(places + steps_mm, affine) - places).movedim(-1, 0).float()
    width = 2 * max(1, round(config.grid_mm / spacing_mm)) + 1
    known = F.max_pool3d(fixed_lung, width, stride=1, padding=width // 2)[0, 0] > 0
    u_mm = torch.where(known, u_mm, torch.nan)
    return Displacement(
        u_mm=u_mm.numpy(),
        spacing_mm=exhale.spacing_mm,
        origin_mm=exhale.origin_mm,
        provenance=config.provenance(),
    )


def _voxel_mm(scan: PhaseScan) -> Float[Tensor, "z y x 3"]:
    """Place of every voxel, (x, y, z)."""
    axes = [
        torch.arange(n, dtype=torch.float64) * s + o
        for n, s, o in zip(scan.ct_hu.shape[::-1], scan.spacing_mm, scan.origin_mm, strict=True)
    ]
    z, y, x = torch.meshgrid(*reversed(axes), indexing="ij")
    return torch.stack([x, y, z], dim=-1)


def _moved(places_mm: Float[Tensor, "z y x 3"], affine: Float[Tensor, "3 4"]) -> Float[Tensor, "z y x 3"]:
    return places_mm @ affine[:, :3].T + affine[:, 3]


def _sampled(scan: PhaseScan, values: np.ndarray, places_mm: Float[Tensor, "z y x 3"]) -> Float[Tensor, "1 1 z y x"]:
    """A scan's values at places, trilinear; its border repeats."""
    size = torch.tensor(values.shape[::-1], dtype=torch.float64)
    vox = (places_mm - torch.tensor(scan.origin_mm).double()) / torch.tensor(scan.spacing_mm).double()
    grid = (vox / (size - 1).clamp_min(1) * 2 - 1).float()[None]
    image = torch.from_numpy(values.astype(np.float32))[None, None]
    return F.grid_sample(image, grid, padding_mode="border", align_corners=True)


def _features(hu: Float[Tensor, "1 1 z y x"], lung: Float[Tensor, "1 1 z y x"]) -> Float[Tensor, "1 12 z y x"]:
    return mind_ssc(hu.clamp(*AERATED_HU), radius=1, dilation=1) * lung


def _search(
    fixed: Float[Tensor, "1 c z y x"],
    moving: Float[Tensor, "1 c z y x"],
    *,
    spacing_mm: float,
    config: EstimateConfig,
) -> Float[Tensor, "1 3 z y x"]:
    """The coarse field in voxels of the full grid, both ways consistent."""
    pool = max(1, round(config.grid_mm / spacing_mm))
    coarse = [F.avg_pool3d(scan, pool, ceil_mode=True) for scan in (fixed, moving)]
    reach = math.ceil(config.reach_mm / (pool * spacing_mm))
    forward, backward = (
        coupled_convex(cost_volume(a, b, reach=reach, dtype=torch.float16)).float() for a, b in (coarse, coarse[::-1])
    )
    forward, _ = inverse_consistent(forward, backward)
    # A coarse voxel lies at the middle of its block: interpolation by edges, not by corners.
    field = F.interpolate(forward * pool, scale_factor=pool, mode="trilinear", align_corners=False)
    z, y, x = fixed.shape[2:]
    return field[:, :, :z, :y, :x].contiguous()


def _descend(
    fixed: Float[Tensor, "1 c z y x"],
    moving: Float[Tensor, "1 c z y x"],
    u_vox: Float[Tensor, "1 3 z y x"],
    lung: Float[Tensor, "1 1 z y x"],
    *,
    config: EstimateConfig,
) -> Float[Tensor, "1 3 z y x"]:
    """Adam on the field."""
    u_vox = u_vox.clone().requires_grad_(True)
    adam = torch.optim.Adam([u_vox], lr=config.lr)
    for _ in range(config.iterations):
        terms = warp_loss_terms(moving, u_vox, weight=lung)
        difference = ((terms.warped - fixed).square() * lung).sum() / lung.sum()
        loss = difference + config.smoothness * terms.diffusion.sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return u_vox.detach()
