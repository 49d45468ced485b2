"""Displacement fields as files: a vector image in LPS mm on the fixed grid, as ITK, elastix and Slicer resample with.

.nrrd and .mha only. NIfTI is refused here: its vector intents are read with different signs by different programs
(`registration.md`, convention traps).
"""

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float32
from numpy import ndarray

from lungssl_data.readers.itk import read_vectors
from lungssl_data.volume import Geometry

SUFFIXES = (".nrrd", ".mha")


def read_field(path: Path) -> tuple[Float32[ndarray, "3 z y x"], Geometry]:
    """Displacements in mm, components (x, y, z) LPS first, and their grid, which must be axis-aligned.

    Raises ValueError for other formats, damaged files, non-vector images, oblique grids and infinite displacements.
    """
    _check_suffix(path)
    vectors, geometry = read_vectors(path)
    if not np.allclose(geometry.direction, np.eye(3), atol=1e-6):
        raise ValueError(f"{path.name}: the grid is not axis-aligned with LPS; resample the field first")
    array = np.moveaxis(vectors, -1, 0).astype(np.float32)
    if np.isinf(array).any():
        raise ValueError(f"{path.name}: holds infinite displacements; write NaN where the field is not known")
    return np.ascontiguousarray(array), geometry


def write_field(path: Path, u_mm: Float32[ndarray, "3 z y x"], geometry: Geometry) -> None:
    """Write a field that SimpleITK, Slicer and elastix read as a fixed-to-moving displacement."""
    _check_suffix(path)
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.moveaxis(u_mm, 0, -1)), isVector=True)
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection(geometry.direction.ravel().tolist())
    sitk.WriteImage(image, str(path), useCompression=True)


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path.name}: displacement fields are read and written as {' or '.join(SUFFIXES)}")
