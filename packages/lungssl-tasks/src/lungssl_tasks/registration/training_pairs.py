"""Whole pairs to train a registration network on: brought together by an affine that is off by chance.

Stateless: sample i is a function of the seed and i alone.
"""

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from lungssl_data.cache import PairCache
from lungssl_data.pair import Displacement, PhaseScan
from lungssl_data.volume import Geometry
from numpy import ndarray
from scipy import ndimage
from torch import Tensor

from lungssl_tasks.registration.alignment import AlignmentConfig, align
from lungssl_tasks.registration.common_grid import CommonGrid, common_grid, labels_at, sampling_matrix
from lungssl_tasks.segmentation import IGNORE_LABEL

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class TrainingPair:
    """A pair on one grid, and where its points are, if that is known."""

    grid: CommonGrid
    true_vox: Float[Tensor, "1 3 z y x"] | None
    """v in voxels; NaN where unknown."""
    fixed_labels: UInt8[Tensor, "1 z y x"] | None = None
    """Lobes; IGNORE_LABEL where nothing was measured. None: nobody drew them, or they weren't asked for."""
    moving_labels: UInt8[Tensor, "1 z y x"] | None = None

    def to(self, device: torch.device) -> "TrainingPair":
        """On a device."""
        held = {
            field.name: getattr(self.grid, field.name).to(device)
            for field in dataclasses.fields(self.grid)
            if isinstance(getattr(self.grid, field.name), Tensor)
        }
        known = {
            name: None if value is None else value.to(device)
            for name in ("true_vox", "fixed_labels", "moving_labels")
            for value in (getattr(self, name),)
        }
        return TrainingPair(grid=dataclasses.replace(self.grid, **held), **known)


@dataclass(frozen=True, kw_only=True)
class AffineJitter:
    """By how much the affine is wrong on purpose: uniform in each direction, about the fixed lung's centre. Ours,
    not tuned.
    """

    rotation_deg: float = 4.0
    scale: float = 0.06
    shift_mm: float = 6.0

    def draw(self, centre_mm: Float[ndarray, "3"], random: np.random.Generator) -> Float[ndarray, "4 4"]:
        """One, fixed LPS mm to themselves."""
        angles = np.deg2rad(random.uniform(-self.rotation_deg, self.rotation_deg, 3))
        turn = np.array([[0, -angles[2], angles[1]], [angles[2], 0, -angles[0]], [-angles[1], angles[0], 0]])
        linear = np.eye(3) + turn + np.diag(random.uniform(-self.scale, self.scale, 3))
        matrix = np.eye(4)
        matrix[:3, :3] = linear
        matrix[:3, 3] = centre_mm - linear @ centre_mm + random.uniform(-self.shift_mm, self.shift_mm, 3)
        return matrix


class TrainingPairs:
    """Pairs of a cache's patients, one after another in a new order each round."""

    def __init__(
        self,
        cache: PairCache,
        patients: list[str],
        *,
        multiple: int,
        seed: int,
        jitter: AffineJitter | None = None,
        with_truth: bool = False,
        labelled: Collection[str] = (),
        labelled_share: float = 0.0,
    ) -> None:
        """`multiple`: of the grids' sides. Without `jitter` the affine is as found. `labelled`: the patients whose
        lobes are given; `labelled_share` of the samples are drawn from these alone, evenly spread. ValueError for no
        patient, and for a share outside [0, 1] or of nobody.
        """
        if not patients:
            raise ValueError("no patient has both phases; a registration network needs pairs")
        self.cache, self.patients, self.multiple, self.seed = cache, patients, multiple, seed
        self.jitter, self.with_truth, self.labelled = jitter, with_truth, frozenset(labelled)
        if not 0 <= labelled_share <= 1 or (labelled_share and not labelled):
            raise ValueError(f"labelled_share {labelled_share} of {len(labelled)} labelled patients, expected 0 to 1")
        self.labelled_share = labelled_share
        self._affines: dict[str, Float[ndarray, "3 4"]] = {}

    def __len__(self) -> int:
        return len(self.patients)

    def batch(self, index: int, size: int) -> list[TrainingPair]:
        """Micro-batch `index` of `size` pairs."""
        return [self.pair(index * size + k) for k in range(size)]

    def patient(self, index: int) -> str:
        """Whose pair sample `index` is."""
        before, after = (math.floor(count * self.labelled_share) for count in (index, index + 1))
        special = after > before
        among = [one for one in self.patients if one in self.labelled] if special else self.patients
        turn, place = divmod(before if special else index - before, len(among))
        order = np.random.default_rng([self.seed, turn, *([2] if special else [])]).permutation(len(among))
        return among[order[place]]

    def pair(self, index: int) -> TrainingPair:
        """Sample `index`."""
        patient = self.patient(index)
        held = self.cache[patient]
        fixed, moving = held.scan("exhale"), held.scan("inhale")
        if patient not in self._affines:
            self._affines[patient] = align(fixed, moving, AlignmentConfig(), device=CPU)
        affine = self._affines[patient]
        if self.jitter is not None:
            centre = fixed.geometry().index_to_mm() @ [*np.argwhere(fixed.lung > 0).mean(axis=0)[::-1], 1.0]
            affine = affine @ self.jitter.draw(centre, np.random.default_rng([self.seed, index, 1]))
        grid = common_grid(fixed, moving, affine, multiple=self.multiple, device=CPU)
        true_vox = None
        if self.with_truth and held.displacement is not None:
            padded = dataclasses.replace(fixed.geometry(), shape=tuple(grid.fixed_hu.shape[2:]))
            true_vox = residual_vox(held.displacement, affine, padded)
        labels: tuple[UInt8[Tensor, "1 z y x"] | None, UInt8[Tensor, "1 z y x"] | None] = (None, None)
        if patient in self.labelled:
            labels = pair_labels(fixed, moving, affine, grid)
        return TrainingPair(grid=grid, true_vox=true_vox, fixed_labels=labels[0], moving_labels=labels[1])


def pair_labels(
    fixed: PhaseScan, moving: PhaseScan, affine: Float[ndarray, "3 4"], grid: CommonGrid
) -> tuple[UInt8[Tensor, "1 z y x"] | None, UInt8[Tensor, "1 z y x"] | None]:
    """Both scans' lobes on the pair's grid, the moving ones by `labels_at`; None for a scan without lobes."""
    sizes = grid.fixed_hu.shape[2:]
    here = there = None
    if fixed.lobes is not None:
        here = torch.full((1, *sizes), IGNORE_LABEL, dtype=torch.uint8)
        z, y, x = fixed.lobes.shape
        here[0, :z, :y, :x] = torch.from_numpy(np.where(fixed.valid > 0, fixed.lobes, np.uint8(IGNORE_LABEL)))
    if moving.lobes is not None:
        padded = dataclasses.replace(fixed.geometry(), shape=tuple(sizes))
        theta = sampling_matrix(padded, moving.geometry(), affine, CPU)[None]
        where = F.affine_grid(theta, [1, 1, *sizes], align_corners=True)
        there = labels_at(np.where(moving.valid > 0, moving.lobes, np.uint8(IGNORE_LABEL)), where)
        there = torch.where(grid.moving_seen[:, 0].bool(), there, IGNORE_LABEL)
    return here, there


def residual_vox(
    displacement: Displacement, affine: Float[ndarray, "3 4"], grid: Geometry
) -> Float[Tensor, "1 3 z y x"]:
    """v on an axis-aligned grid of cubes, in its voxels, for p + u(p) = A(p + v(p)); NaN beyond the displacement."""
    spacing_mm = np.asarray(grid.spacing_mm)
    index = np.indices(grid.shape).reshape(3, -1).T[:, ::-1]
    points = index * spacing_mm + np.asarray(grid.origin_mm)
    there = ((points - np.asarray(displacement.origin_mm)) / np.asarray(displacement.spacing_mm)).T[::-1]
    u_mm = np.stack(
        [
            ndimage.map_coordinates(component, there, order=1, mode="constant", cval=np.nan)
            for component in displacement.u_mm
        ],
        axis=1,
    )
    v_mm = (points + u_mm - affine[:, 3]) @ np.linalg.inv(affine[:, :3]).T - points
    return torch.from_numpy((v_mm / spacing_mm).T.reshape(1, 3, *grid.shape).astype(np.float32))
