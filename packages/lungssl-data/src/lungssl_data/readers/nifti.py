"""NIfTI: headers by nibabel, voxels straight into their array. The one place where RAS becomes LPS and back.

Texts of a header (descrip, aux_file, intent_name, db_name) and extensions are passed over unread; none is written.
"""

from pathlib import Path

import nibabel
import numpy as np
from jaxtyping import Float, Shaped
from nibabel.spatialimages import HeaderDataError
from numpy import ndarray

from lungssl_data.readers.checks import (
    Stored,
    VolumeError,
    allocate,
    check_file,
    damaged,
    geometry_of,
    native,
    require_file,
)
from lungssl_data.readers.streams import InflatedStream, RawStream, StreamError
from lungssl_data.volume import Geometry

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])
LARGEST_OFFSET = 64 << 20
"""Bytes of header and extensions before the voxels; a file that claims more is refused."""
_NIFTI1, _NIFTI2 = 348, 540
MOST_FORMS_APART_VOX = 0.5
"""Between sform and qform at any corner, in units of the smallest voxel side: rounding of quaternions and float32 stays
under 0.01, half a voxel is the least that a program would notice."""


def read(path: Path) -> tuple[Stored, Geometry]:
    """Voxels as stored and their grid. 4-D files pass if they hold one frame."""
    require_file(path)
    name = path.name
    gzipped = name.lower().endswith(".gz")
    try:
        with path.open("rb") as file:
            stream = InflatedStream(file) if gzipped else RawStream(file)
            header, consumed = _header(stream, name)
            shape, dtype = _shape(header, name)
            claim = int(np.prod(shape, dtype=object)) * dtype.itemsize
            check_file(claim, path.stat().st_size, encoding="gzip" if gzipped else "raw", name=name)
            geometry = geometry_of(_affine_lps(header, name), shape, name)
            _check_qform(header, name)
            slope, intercept = _rescale(header, name)
            stream.skip(_offset(header, consumed, name) - consumed)
            values = allocate(shape, dtype, name)
            stream.fill(values.reshape(-1).view(np.uint8))
            stream.finish()
    except StreamError as error:
        raise VolumeError(error.problem, name=name) from error
    except OSError as error:
        raise damaged(name) from error
    return Stored(values=native(values), slope=slope, intercept=intercept), geometry


def write(path: Path, values: Shaped[ndarray, "z y x"], geometry: Geometry) -> None:
    """Write in the array's own dtype, with the same orientation as sform and qform, both "scanner" (code 1)."""
    affine = np.eye(4)
    affine[:3] = RAS_TO_LPS @ geometry.index_to_mm()
    image = nibabel.Nifti1Image(values.T, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def _header(stream: InflatedStream | RawStream, name: str) -> tuple[nibabel.Nifti1Header, int]:
    """The header as it is, nothing mended, and its bytes."""
    try:
        block = stream.take(_NIFTI1)
        size = {n.to_bytes(4, order): n for n in (_NIFTI1, _NIFTI2) for order in ("little", "big")}.get(block[:4])
        if size == _NIFTI2:
            block += stream.take(_NIFTI2 - _NIFTI1)
            return nibabel.Nifti2Header(block, check=False), len(block)
        if size == _NIFTI1:
            return nibabel.Nifti1Header(block, check=False), len(block)
    except StreamError as error:
        raise damaged(name) from error
    raise VolumeError("is not a NIfTI-1 or NIfTI-2 file; export it again as .nii.gz", name=name)


def _shape(header: nibabel.Nifti1Header, name: str) -> tuple[tuple[int, int, int], np.dtype]:
    """Voxels along (z, y, x) and their stored type."""
    if header["magic"].item()[:3] not in (b"n+1", b"n+2"):
        raise VolumeError(
            "is not a NIfTI file with its voxels inside (.hdr and .img are not read); export it again as .nii.gz",
            name=name,
        )
    rank = int(header["dim"][0])
    shape = tuple(int(n) for n in header["dim"][1 : rank + 1]) if 1 <= rank <= 7 else ()
    if len(shape) < 3 or any(n != 1 for n in shape[3:]) or min(shape) < 1:
        raise VolumeError(f"has dimensions {shape}, one 3-D frame is expected; extract the frame first", name=name)
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise damaged(name) from error
    if dtype.kind not in "iuf":
        raise VolumeError(f"has voxels of type {dtype}, grey values are expected; export it as int16", name=name)
    if int(header["bitpix"]) != 8 * dtype.itemsize:
        raise damaged(name)
    x, y, z = shape[:3]
    return (z, y, x), dtype


def _offset(header: nibabel.Nifti1Header, consumed: int, name: str) -> int:
    """First byte of the voxels; 4 bytes after the header say whether extensions follow."""
    offset = float(header["vox_offset"])
    if not (offset.is_integer() and consumed + 4 <= offset <= LARGEST_OFFSET):
        raise damaged(name)
    return int(offset)


def _rescale(header: nibabel.Nifti1Header, name: str) -> tuple[float, float]:
    """Slope and intercept; a slope of 0 or none means 1 and 0 (nifti1.h)."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0
    if not (np.isfinite(slope) and np.isfinite(intercept)):
        raise VolumeError("its scl_slope or scl_inter is not finite; export it again", name=name)
    return slope, intercept


def _affine_lps(header: nibabel.Nifti1Header, name: str) -> Float[ndarray, "3 4"]:
    """From index to LPS mm by the sform if its code is set, else the qform; both are set alike, or it is refused.

    ITK and nibabel take the sform, other programs the qform: where they differ, nobody knows what the file means.
    """
    if int(header["xyzt_units"]) & 7 in (1, 3):
        raise VolumeError("its voxel size is not in millimetres; export it with unit mm", name=name)
    if int(header["sform_code"]) > 0:
        affine = header.get_sform()
    elif int(header["qform_code"]) > 0:
        voxel_mm = np.asarray(header["pixdim"][1:4], float)
        if not (np.isfinite(voxel_mm).all() and voxel_mm.min() > 0):
            raise VolumeError("its voxel size is not positive; convert it from DICOM again", name=name)
        try:
            affine = header.get_qform()
        except (HeaderDataError, ValueError) as error:
            raise VolumeError("its qform quaternion is invalid; convert it from DICOM again", name=name) from error
    else:
        raise VolumeError(
            "neither sform nor qform is set, so left and right are unknown; convert it from DICOM again", name=name
        )
    return RAS_TO_LPS @ np.asarray(affine[:3], float)


def _check_qform(header: nibabel.Nifti1Header, name: str) -> None:
    """VolumeError where both sform and qform are set and put a corner of the volume at different places."""
    if min(int(header["sform_code"]), int(header["qform_code"])) <= 0:
        return
    sform = header.get_sform()
    try:
        qform = header.get_qform()
    except (HeaderDataError, ValueError):
        return  # no quaternion: there is one orientation only
    corners = np.array(np.meshgrid(*((0, int(n) - 1) for n in header["dim"][1:4]))).reshape(3, -1)
    apart_mm = np.linalg.norm((sform - qform)[:3, :3] @ corners + (sform - qform)[:3, 3:], axis=0).max()
    voxel_mm = np.linalg.norm(sform[:3, :3], axis=0).min()
    if not apart_mm <= MOST_FORMS_APART_VOX * voxel_mm:  # NaN, too
        raise VolumeError(
            f"its sform and qform put a corner {apart_mm:.1f} mm apart, so programs place it differently; find out "
            "which is right and set both to it",
            name=name,
        )
