"""What every reader refuses, and how every writer replaces a file."""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int16, Shaped, UInt8
from numpy import ndarray

from lungssl_data.volume import Geometry

LARGEST_BYTES = 4 << 30
"""A header that claims more is refused: a 512 x 512 x 2000 CT takes 1 GiB as int16, 4 GiB as float64."""
DEFLATE_RATIO = 1032
"""Deflate cannot shrink data further (https://www.zlib.net/zlib_tech.html)."""
FEW_BYTES = 4 << 20
"""Without so much, libraries can't even read a header, and call the file what they like."""
SHEAR_DEGREES = 0.1
"""Index axes this far from a right angle displace the far corner of a 300 mm scan by 0.5 mm."""
VOXEL_MM = (0.01, 100.0)
"""Voxel sizes outside are no scan's in millimetres: micro-CT begins at 0.01, scouts end below 100."""
FARTHEST_MM = 1e5
"""No table moves a patient by 100 m."""
PADDING_HU = -2048
"""What stored padding values become (`Volume.valid` tells it from air)."""
INT16 = np.iinfo(np.int16)


class VolumeError(ValueError):
    """A file that cannot be read as a volume, or written: what is wrong and what to do, in one line.

    File names can be patients' names: whatever is kept or sent on (a build's report) takes `problem`, not the message.
    """

    def __init__(self, problem: str, *, name: str = "") -> None:
        super().__init__(f"{name}: {problem}" if name else problem)
        self.problem = problem
        """What is wrong and what to do, without the file's name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """Voxels as they lie in the file; the value of one is `values * slope + intercept`."""

    values: Shaped[ndarray, "z y x"]
    slope: float = 1.0
    intercept: float = 0.0


def hounsfield(stored: Stored, name: str) -> Int16[ndarray, "z y x"]:
    """Rescaled and rounded values, slice by slice; VolumeError for NaN and for values beyond int16."""
    if stored.values.dtype == np.int16 and stored.slope == 1.0 and stored.intercept == 0.0:
        return np.ascontiguousarray(stored.values)
    hu = np.empty(stored.values.shape, np.int16)
    for z, values in enumerate(stored.values):
        rescaled = values * stored.slope + stored.intercept
        if not np.isfinite(rescaled).all():
            raise VolumeError("holds NaN or infinite values; replace them by the padding value -2048", name=name)
        rounded = np.rint(rescaled)
        if rounded.min() < INT16.min or rounded.max() > INT16.max:
            raise VolumeError(
                f"values from {rescaled.min():g} to {rescaled.max():g} do not fit int16 Hounsfield units; "
                "is this a CT, and is its rescale slope right?",
                name=name,
            )
        hu[z] = rounded
    return hu


def label_values(stored: Stored, name: str) -> UInt8[ndarray, "z y x"]:
    """The values as uint8; VolumeError unless they are whole numbers from 0 to 255."""
    labels = np.empty(stored.values.shape, np.uint8)
    for z, values in enumerate(stored.values):
        rescaled = values * stored.slope + stored.intercept
        if not (np.isfinite(rescaled).all() and (rescaled >= 0).all() and (rescaled <= 255).all()):
            raise VolumeError("a label map holds whole numbers from 0 to 255, this file holds others", name=name)
        labels[z] = rescaled
        if (labels[z] != rescaled).any():
            raise VolumeError("a label map holds whole numbers, this file holds fractions; is it a mask?", name=name)
    return labels


def geometry_of(affine: Float[ndarray, "3 4"], shape: tuple[int, int, int], name: str) -> Geometry:
    """The grid of an affine from (x, y, z) index to LPS mm.

    VolumeError if it is singular, not finite or sheared, or has voxels or a place that no scanner has.
    """
    if not np.isfinite(affine).all() or np.abs(affine).max() > FARTHEST_MM:
        raise VolumeError(
            f"its orientation matrix is not finite, or beyond {FARTHEST_MM:g} mm; set a valid one", name=name
        )
    spacing = np.linalg.norm(affine[:, :3], axis=0)
    if spacing.min() < 1e-6 or abs(np.linalg.det(affine[:, :3] / spacing)) < 1e-3:
        raise VolumeError("its orientation matrix is singular or not finite; set a valid one", name=name)
    if spacing.min() < VOXEL_MM[0] or spacing.max() > VOXEL_MM[1]:
        raise VolumeError(
            f"its voxels measure {spacing[0]:g} x {spacing[1]:g} x {spacing[2]:g} mm, {VOXEL_MM[0]:g} to "
            f"{VOXEL_MM[1]:g} mm are possible; is its unit millimetres?",
            name=name,
        )
    direction = affine[:, :3] / spacing
    cosines = np.abs(direction.T @ direction - np.eye(3)).max()
    shear = float(np.degrees(np.arcsin(min(1.0, cosines))))
    if shear > SHEAR_DEGREES:
        raise VolumeError(f"its axes are sheared by {shear:.2f} degrees; resample it to right angles first", name=name)
    x, y, z = (float(s) for s in spacing)
    ox, oy, oz = (float(o) for o in affine[:, 3])
    return Geometry(shape=shape, spacing_mm=(x, y, z), origin_mm=(ox, oy, oz), direction=direction)


def check_size(claim_bytes: int, name: str) -> None:
    """Refuse, before memory is taken, a header that claims more than `LARGEST_BYTES` of voxels."""
    if claim_bytes > LARGEST_BYTES:
        raise VolumeError(
            f"its header claims {claim_bytes / 2**30:.1f} GiB of voxels, more than the limit of "
            f"{LARGEST_BYTES / 2**30:.0f} GiB; the header is damaged, or the scan must be cropped first",
            name=name,
        )


def check_file(claim_bytes: int, stored_bytes: int, *, encoding: str, name: str) -> None:
    """Refuse a header that claims more voxels than its file can hold; `encoding` is raw, gzip or another word."""
    check_size(claim_bytes, name)
    largest = {"raw": stored_bytes, "gzip": stored_bytes * DEFLATE_RATIO}.get(encoding, claim_bytes)
    if claim_bytes > largest:
        raise VolumeError(
            f"its header claims {claim_bytes} bytes of voxels, the file can hold {largest}; "
            "it is truncated, copy it again",
            name=name,
        )


def damaged(name: str) -> VolumeError:
    """The error for a file that its library cannot decode; the library's own text may quote the file.

    Raises MemoryError where not even FEW_BYTES are to be had: then the file may be sound.
    """
    try:
        mmap.mmap(-1, FEW_BYTES).close()
    except OSError as error:
        raise MemoryError("out of memory while reading a file") from error
    return VolumeError("the file is damaged or truncated and cannot be decoded; copy or export it again", name=name)


def require_file(path: Path) -> None:
    """VolumeError unless `path` is a file."""
    if not path.is_file():
        raise VolumeError("no such file; check the path", name=path.name)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path in the same folder to write to; on success it takes the place of `path`, else it is removed."""
    if not path.parent.is_dir():
        raise VolumeError("the folder to write to does not exist; create it first", name=path.name)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def allocate(shape: tuple[int, int, int], dtype: np.dtype, name: str) -> Shaped[ndarray, "z y x"]:
    """An array to fill; VolumeError where memory is short."""
    try:
        return np.empty(shape, dtype)
    except MemoryError as error:
        raise VolumeError("there is not enough memory for its voxels; close other programs", name=name) from error


def native(values: Shaped[ndarray, "*shape"]) -> Shaped[ndarray, "*shape"]:
    """The same values in the machine's byte order, swapped in place."""
    if values.dtype.isnative:
        return values
    return values.byteswap(inplace=True).view(values.dtype.newbyteorder("="))
