"""Displacement fields as files: a vector image in LPS mm on the fixed grid, as ITK, elastix and Slicer resample with.

| suffix | read | written as |
|---|---|---|
| .nrrd, .mha | yes | vector image |
| .nii, .nii.gz | no | 5-D, intent 1007 (VECTOR), LPS mm, as SimpleITK, ITK and ANTs write it and read it back |
| .h5 | no | ITK `DisplacementFieldTransform` |

NIfTI isn't read: its vector intents are read with different signs by different programs (`registration.md`,
convention traps).
"""

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float32
from numpy import ndarray

from lungssl_data.readers.checks import replacing
from lungssl_data.readers.itk import read_vectors
from lungssl_data.volume import Geometry

SUFFIXES = (".nrrd", ".mha")
WRITABLE = (*SUFFIXES, ".nii.gz", ".nii", ".h5")


def read_field(path: Path, *, oblique: bool = False) -> tuple[Float32[ndarray, "3 z y x"], Geometry]:
    """Displacements in mm, components (x, y, z) LPS first, and their grid, axis-aligned unless `oblique` may be.

    Raises ValueError for other formats, damaged files, non-vector images, oblique grids and infinite displacements.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path.name}: displacement fields are read from {' or '.join(SUFFIXES)}")
    vectors, geometry = read_vectors(path)
    if not oblique and not np.allclose(geometry.direction, np.eye(3), atol=1e-6):
        raise ValueError(f"{path.name}: the grid is not axis-aligned with LPS; resample the field first")
    array = np.moveaxis(vectors, -1, 0).astype(np.float32)
    if np.isinf(array).any():
        raise ValueError(f"{path.name}: holds infinite displacements; write NaN where the field is not known")
    return np.ascontiguousarray(array), geometry


def write_field(path: Path, u_mm: Float32[ndarray, "3 z y x"], geometry: Geometry) -> None:
    """Write a field that SimpleITK, Slicer, ANTs and elastix read as a fixed-to-moving displacement.

    Replaces the file in one step. Raises ValueError for an unknown suffix.
    """
    check_writable(path)
    image = field_image(u_mm, geometry)
    with replacing(path) as temporary:
        if path.suffix == ".h5":
            transform = sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))
            sitk.WriteTransform(transform, str(temporary))
        else:
            sitk.WriteImage(image, str(temporary), useCompression=True)


def field_image(u_mm: Float32[ndarray, "3 z y x"], geometry: Geometry) -> sitk.Image:
    """A field as SimpleITK's vector image."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.moveaxis(u_mm, 0, -1)), isVector=True)
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection(geometry.direction.ravel().tolist())
    return image


def check_writable(path: Path) -> None:
    """ValueError unless `write_field` can write a file of this name."""
    if not path.name.endswith(WRITABLE):
        raise ValueError(f"{path.name}: displacement fields are written as {', '.join(WRITABLE)}")
