"""A pair on one grid: the moving scan and its lung, brought onto the fixed scan's voxels by an affine.

What comes after looks only for the rest v: a fixed point p lies at A(p + v(p)) in the moving scan.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from lungssl_data.pair import PhaseScan
from lungssl_data.volume import Geometry
from torch import Tensor

LUNG_HU = (-1000.0, 100.0)
"""Clipped to: what lungs hold (`registration.md`, the setting that peers were measured with)."""


@dataclass(frozen=True, kw_only=True)
class CommonGrid:
    """Both scans on the fixed grid, padded at the far ends to multiples of a number of voxels."""

    fixed_hu: Float[Tensor, "1 1 z y x"]
    fixed_lung: Float[Tensor, "1 1 z y x"]
    """0 or 1."""
    moving_hu: Float[Tensor, "1 1 z y x"]
    moving_lung: Float[Tensor, "1 1 z y x"]
    moving_seen: Float[Tensor, "1 1 z y x"]
    """1 where the moving scan has voxels."""
    spacing_mm: float

    def lungs(self) -> tuple[Float[Tensor, "1 1 z y x"], Float[Tensor, "1 1 z y x"]]:
        """Both scans between 0 (-1000 HU) and 1 (100 HU); what is not lung is 1, so that edges of lungs attract each
        other and ribs, which slide along them, don't.
        """
        low, high = LUNG_HU
        fixed, moving = (
            torch.where(lung > 0, (hu.clamp(low, high) - low) / (high - low), 1.0)
            for hu, lung in ((self.fixed_hu, self.fixed_lung), (self.moving_hu, self.moving_lung))
        )
        return fixed, moving


def common_grid(
    fixed: PhaseScan, moving: PhaseScan, affine: Float[np.ndarray, "3 4"], *, multiple: int, device: torch.device
) -> CommonGrid:
    """Sample `moving` where `affine` (fixed to moving LPS mm) takes the voxels of `fixed`; its border repeats.

    `multiple`: what the padded sides are to be divided by.
    """
    short = [(-size) % multiple for size in fixed.ct_hu.shape]
    padding = [0, short[2], 0, short[1], 0, short[0]]
    z, y, x = (size + more for size, more in zip(fixed.ct_hu.shape, short, strict=True))
    padded = dataclasses.replace(fixed.geometry(), shape=(z, y, x))
    theta = sampling_matrix(padded, moving.geometry(), affine, device)[None]
    grid = F.affine_grid(theta, [1, 1, z, y, x], align_corners=True)
    hu, lung = (
        F.grid_sample(_tensor(values, device), grid, padding_mode="border", align_corners=True)
        for values in (moving.ct_hu, moving.lung > 0)
    )
    seen = (grid.abs() <= 1).all(dim=-1)[None].float()
    return CommonGrid(
        fixed_hu=F.pad(_tensor(fixed.ct_hu, device), padding, mode="replicate"),
        fixed_lung=F.pad(_tensor(fixed.lung > 0, device), padding),
        moving_hu=hu,
        moving_lung=(lung > 0.5).float() * seen,
        moving_seen=seen,
        spacing_mm=fixed.spacing_mm[0],
    )


def sampling_matrix(
    fixed: Geometry, moving: Geometry, affine: Float[np.ndarray, "3 4"], device: torch.device
) -> Float[Tensor, "3 4"]:
    """`affine` between the coordinates of `torch.nn.functional.grid_sample`, -1 to 1 from first to last voxel."""
    from_unit, to_unit = unit_to_mm(fixed), np.linalg.inv(unit_to_mm(moving))
    whole = to_unit @ np.vstack([affine, [0, 0, 0, 1]]) @ from_unit
    return torch.from_numpy(whole[:3]).float().to(device)


def labels_at(labels: UInt8[np.ndarray, "z y x"], where: Float[Tensor, "1 _z _y _x 3"]) -> UInt8[Tensor, "1 _z _y _x"]:
    """The label with most weight at places in `grid_sample`'s coordinates, each label's map read linearly; the border
    repeats.

    Smoother than the nearest voxel's label, and at voxels the same.
    """
    best = chosen = None
    for code in np.unique(labels).tolist():
        share = F.grid_sample(_tensor(labels == code, where.device), where, padding_mode="border", align_corners=True)
        here = torch.full_like(share, code, dtype=torch.uint8)
        if best is None or chosen is None:
            best, chosen = share, here
        else:
            chosen = torch.where(share > best, here, chosen)
            best = torch.maximum(best, share)
    assert chosen is not None
    return chosen[:, 0]


def unit_to_mm(grid: Geometry) -> Float[np.ndarray, "4 4"]:
    """From -1 to 1 between the first and last voxel of an axis-aligned grid, (x, y, z), to LPS mm."""
    half = (np.array(grid.shape[::-1]) - 1) / 2 * np.asarray(grid.spacing_mm)
    matrix = np.diag([*np.maximum(half, 1e-6), 1.0])
    matrix[:3, 3] = np.asarray(grid.origin_mm) + half
    return matrix


def _tensor(values: np.ndarray, device: torch.device) -> Float[Tensor, "1 1 z y x"]:
    return torch.from_numpy(values.astype(np.float32))[None, None].to(device)
