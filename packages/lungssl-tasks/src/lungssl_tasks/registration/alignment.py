"""The coarse affine of a pair from its lungs, wherever the scans' origins are: starts from shape, refined on content.

Starts match the lungs' centres and spreads along the axes, for several rotations, and for lungs that one scan cuts
their apices and bases with no change of size. The best by local correlation are refined by Adam on all twelve numbers.
A bad affine costs more than the choice of method, and mutual information diverges at large ratios of lung volume
(`registration.md`, section 2).
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from lungssl_data.pair import PhaseScan
from lungssl_ops.lncc import lncc
from torch import Tensor

from lungssl_tasks.registration.common_grid import LUNG_HU, sampling_matrix, unit_to_mm

TURNS_DEG = (-45.0, -22.5, 22.5, 45.0)
"""Rotations tried about each axis beside none: patients on their side, tilted gantries; refining does the rest."""
WINDOW = 5
"""LNCC's, in voxels."""
EPS = 1e-4
"""As in `descent.py`."""
LEAST_SEEN = 0.5
"""Of the fixed lung and its rim, at least so much lies within the moving scan; what doesn't is not counted."""
POINTS = 20_000
"""Of a lung, to take moments of."""


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """How the affine is looked for."""

    voxel_mm: float = 8.0
    """Scans are averaged to about this: large enough to see past what isn't in its place yet."""
    refined: int = 2
    """Of the starts, the best so many."""
    iterations: int = 60
    """Of Adam, for each."""
    rate: float = 0.01
    """Adam's; a step moves a point at the lung's edge, some 100 mm from the centre, by 1 mm."""


def align(
    fixed: PhaseScan, moving: PhaseScan, config: AlignmentConfig, *, device: torch.device
) -> Float[np.ndarray, "3 4"]:
    """Fixed LPS mm to moving LPS mm, from all that both `lung` masks hold. ValueError for lungs that have no depth."""
    for name, scan in (("fixed", fixed), ("moving", moving)):
        if any(np.ptp(index) == 0 for index in np.nonzero(scan.lung)):
            raise ValueError(f"the {name} lung is one voxel thin along an axis; give a mask of whole lungs")
    near, far = (_coarse(scan, config.voxel_mm) for scan in (fixed, moving))
    problem = _Problem(near, far, device)
    starts = [(problem.similarity(start), start) for start in starting_affines(fixed, moving)]
    best = sorted(starts, key=lambda one: -one[0])[: config.refined]
    found = [problem.refined(start, config) for _, start in best] + best
    return max(found, key=lambda one: one[0])[1]


def starting_affines(fixed: PhaseScan, moving: PhaseScan) -> list[Float[np.ndarray, "3 4"]]:
    """From the lungs' shapes alone; the first has no rotation."""
    there, here = (_lung_points_mm(scan) for scan in (moving, fixed))
    starts = [_matched(here, there, rotation) for rotation in _rotations()]
    rigid = np.eye(3)
    # Cut lungs: the apex is at the same place, or the base is, and sizes are as they are.
    for place in (np.median, lambda points, axis: points.max(axis=axis), lambda points, axis: points.min(axis=axis)):
        shift = np.median(there, axis=0) - np.median(here, axis=0)
        shift[2] = place(there[:, 2], axis=0) - place(here[:, 2], axis=0)
        starts.append(np.concatenate([rigid, shift[:, None]], axis=1))
    return starts


def _matched(
    here: Float[np.ndarray, "n 3"], there: Float[np.ndarray, "m 3"], rotation: Float[np.ndarray, "3 3"]
) -> Float[np.ndarray, "3 4"]:
    """Centres and spreads along the fixed scan's axes made equal after a rotation."""
    turned = there @ rotation  # rows: rotation^-1 applied
    scale = turned.std(axis=0) / here.std(axis=0)
    matrix = rotation @ np.diag(scale)
    return np.concatenate([matrix, (there.mean(axis=0) - matrix @ here.mean(axis=0))[:, None]], axis=1)


def _rotations() -> list[Float[np.ndarray, "3 3"]]:
    found = [np.eye(3)]
    for axis, degrees in itertools.product(range(3), TURNS_DEG):
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        i, j = [other for other in range(3) if other != axis]
        matrix = np.eye(3)
        matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
        found.append(matrix)
    return found


def _lung_points_mm(scan: PhaseScan) -> Float[np.ndarray, "n 3"]:
    index = np.argwhere(scan.lung > 0)
    index = index[:: max(1, len(index) // POINTS)]
    return index[:, ::-1] * np.asarray(scan.spacing_mm) + np.asarray(scan.origin_mm)


def _coarse(scan: PhaseScan, voxel_mm: float) -> PhaseScan:
    """Blocks of voxels averaged; a block is lung where most of it is."""
    factor = max(1, round(voxel_mm / max(scan.spacing_mm)))
    z, y, x = (max(1, size // factor) for size in scan.ct_hu.shape)
    cut = tuple(slice(0, n * factor) for n in (z, y, x))

    def blocks(values: np.ndarray) -> np.ndarray:
        k = [min(factor, size) for size in scan.ct_hu.shape]
        part = values[cut].reshape(z, k[0], y, k[1], x, k[2])
        return part.mean(axis=(1, 3, 5))

    low, high = LUNG_HU
    lung = blocks((scan.lung > 0).astype(np.float32)) > 0.5
    spacing = np.asarray(scan.spacing_mm)
    return PhaseScan(
        ct_hu=np.rint(blocks(np.clip(scan.ct_hu, low, high))).astype(np.int16),
        valid=np.ones((z, y, x), np.uint8),
        lung=lung.astype(np.uint8),
        spacing_mm=_triple(spacing * factor),
        origin_mm=_triple(np.asarray(scan.origin_mm) + spacing * (factor - 1) / 2),
    )


def _triple(vector: Float[np.ndarray, "3"]) -> tuple[float, float, float]:
    x, y, z = vector.tolist()
    return x, y, z


class _Problem:
    """How well an affine brings two coarse scans together."""

    def __init__(self, fixed: PhaseScan, moving: PhaseScan, device: torch.device) -> None:
        self.scans, self.device = (fixed, moving), device
        self.fixed, self.moving = (_lung_image(scan, device) for scan in (fixed, moving))
        lung = torch.from_numpy((fixed.lung > 0).astype(np.float32))[None, None].to(device)
        self.counts = F.max_pool3d(lung, 5, stride=1, padding=2)
        inside = np.argwhere(fixed.lung > 0)[:, ::-1] * np.asarray(fixed.spacing_mm) + np.asarray(fixed.origin_mm)
        self.centre, self.size = inside.mean(axis=0), max(float(inside.std()), 1.0)

    def similarity(self, affine: Float[np.ndarray, "3 4"]) -> float:
        near, far = (scan.geometry() for scan in self.scans)
        matrix = sampling_matrix(near, far, affine, self.device)
        return float(self._lncc(matrix))

    def refined(
        self, start: Float[np.ndarray, "3 4"], config: AlignmentConfig
    ) -> tuple[float, Float[np.ndarray, "3 4"]]:
        """Adam on a small affine about the lung's centre that comes first, in units of the lung's size."""
        change = torch.zeros(3, 4, device=self.device, requires_grad=True)
        before = torch.from_numpy(np.vstack([start, [0, 0, 0, 1]]))
        adam = torch.optim.Adam([change], lr=config.rate)
        for _ in range(config.iterations):
            loss = -self._lncc(self._sampling(before, change))
            adam.zero_grad()
            loss.backward()
            adam.step()
        with torch.no_grad():
            affine = (before @ self._about_centre(change.detach().cpu().double()))[:3].numpy()
        return self.similarity(affine), affine

    def _about_centre(self, change: Float[Tensor, "3 4"]) -> Float[Tensor, "4 4"]:
        centre = torch.from_numpy(self.centre).to(change)
        matrix = torch.eye(4, dtype=change.dtype, device=change.device)
        linear = matrix[:3, :3] + change[:, :3]
        shift = centre - linear @ centre + change[:, 3] * self.size
        last = matrix[3:]
        return torch.cat([torch.cat([linear, shift[:, None]], dim=1), last])

    def _sampling(self, before: Float[Tensor, "4 4"], change: Float[Tensor, "3 4"]) -> Float[Tensor, "3 4"]:
        to_mm, to_unit = (torch.from_numpy(unit_to_mm(scan.geometry())) for scan in self.scans)
        whole = to_unit.inverse() @ before @ self._about_centre(change.cpu().double()) @ to_mm
        return whole[:3].float().to(self.device)

    def _lncc(self, matrix: Float[Tensor, "3 4"]) -> Float[Tensor, ""]:
        z, y, x = self.fixed.shape[2:]
        grid = F.affine_grid(matrix[None], [1, 1, z, y, x], align_corners=True)
        warped = F.grid_sample(self.moving, grid, padding_mode="border", align_corners=True)
        seen = self.counts * (grid.abs() <= 1).all(dim=-1)[None]
        if seen.sum() < LEAST_SEEN * self.counts.sum():  # or it would look best where it sees least
            return lncc(self.fixed, warped, window=WINDOW, eps=EPS, mask=self.counts).sum() - 1
        return lncc(self.fixed, warped, window=WINDOW, eps=EPS, mask=seen).sum()


def _lung_image(scan: PhaseScan, device: torch.device) -> Float[Tensor, "1 1 z y x"]:
    low, high = LUNG_HU
    image = np.where(scan.lung > 0, (scan.ct_hu.astype(np.float32) - low) / (high - low), 1.0)
    return torch.from_numpy(image.astype(np.float32))[None, None].to(device)
