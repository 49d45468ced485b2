"""A CT volume and where it lies in the patient.

Arrays are indexed (z, y, x). Vectors (spacing, origin, points, index triples) are (x, y, z), in LPS millimetres:
x to the patient's left, y to the back, z to the head, as ITK, DICOM, Slicer and elastix have them.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int16, UInt8
from numpy import ndarray

PADDING_BELOW_HU = -1500
"""Values below are scanner padding, not air: vendors pad with -2000, -2048 or -3024, air reads about -1000 with
noise of tens of HU (the same bound as the public DIR-Lab loaders use on stored values)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """The voxel grid of a volume in LPS millimetres."""

    shape: tuple[int, int, int]
    """Voxels along (z, y, x)."""
    spacing_mm: tuple[float, float, float]
    """Voxel size along index axes (x, y, z)."""
    origin_mm: tuple[float, float, float]
    """LPS position of the centre of voxel 0."""
    direction: Float[ndarray, "3 3"]
    """Columns are the unit LPS directions of index axes x, y, z (ITK's direction matrix)."""

    def index_to_mm(self) -> Float[ndarray, "3 4"]:
        """The 3x4 affine from (x, y, z) voxel index to LPS mm."""
        affine = np.empty((3, 4))
        affine[:, :3] = self.direction * np.asarray(self.spacing_mm)
        affine[:, 3] = self.origin_mm
        return affine

    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(abs(np.linalg.det(self.index_to_mm()[:, :3]))) / 1000.0

    def same_grid(self, other: "Geometry", *, tolerance_mm: float = 1e-3) -> bool:
        """Whether both grids have the same shape and no corner differs by more than `tolerance_mm`."""
        if self.shape != other.shape:
            return False
        corner = np.append(np.asarray(self.shape[::-1], float), 1.0)
        first = self.index_to_mm() - other.index_to_mm()
        return bool(np.abs(first[:, 3]).max() <= tolerance_mm and np.abs(first * corner).sum(1).max() <= tolerance_mm)


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """A CT: Hounsfield units on a grid."""

    hu: Int16[ndarray, "z y x"]
    geometry: Geometry

    def valid(self) -> Bool[ndarray, "z y x"]:
        """Where the scanner measured: everything but padding."""
        return self.hu >= PADDING_BELOW_HU


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelMap:
    """A segmentation on a grid; 0 is background."""

    labels: UInt8[ndarray, "z y x"]
    geometry: Geometry
