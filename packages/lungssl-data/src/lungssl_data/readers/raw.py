"""Files of bare voxels, x fastest, whose grid only their collection's documentation knows (DIR-Lab, POPI)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lungssl_data.readers.checks import Stored, VolumeError, check_size, geometry_of, require_file
from lungssl_data.volume import Geometry


@dataclass(frozen=True, kw_only=True)
class RawFormat:
    """What a file without a header holds."""

    shape: tuple[int, int, int]
    """Voxels along (z, y, x)."""
    spacing_mm: tuple[float, float, float]
    """Along (x, y, z)."""
    dtype: str = "<i2"
    """As numpy writes it."""
    origin_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    flip_z: bool = False
    """The first slice is the highest: it is turned over, so that z runs to the head."""


def read(path: Path, form: RawFormat) -> tuple[Stored, Geometry]:
    """Stored values and their grid; VolumeError unless the file has exactly the bytes of `form`."""
    require_file(path)
    dtype = np.dtype(form.dtype)
    expected = int(np.prod(form.shape, dtype=np.int64)) * dtype.itemsize
    check_size(expected, path.name)
    if path.stat().st_size != expected:
        z, y, x = form.shape
        raise VolumeError(
            f"{path.stat().st_size} bytes, expected {expected} ({x} x {y} x {z} voxels of "
            f"{dtype.itemsize} bytes); it is another case, or truncated: copy it again",
            name=path.name,
        )
    values = np.fromfile(path, dtype).reshape(form.shape)
    if form.flip_z:
        values = np.ascontiguousarray(values[::-1])
    x, y, z = form.spacing_mm
    affine = np.array([[x, 0, 0, form.origin_mm[0]], [0, y, 0, form.origin_mm[1]], [0, 0, z, form.origin_mm[2]]], float)
    return Stored(values=values.astype(dtype.newbyteorder("=")), slope=1.0, intercept=0.0), geometry_of(
        affine, form.shape, path.name
    )
