"""NIfTI by nibabel. The one place where RAS becomes LPS and back."""

import zlib
from pathlib import Path

import nibabel
import numpy as np
from jaxtyping import Float, Shaped
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy import ndarray

from lungssl_data.readers.checks import Stored, VolumeError, check_file, damaged, geometry_of, require_file
from lungssl_data.volume import Geometry

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])
_DAMAGE = (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error)


def read(path: Path) -> tuple[Stored, Geometry]:
    """Voxels as stored and their grid. 4-D files pass if they hold one frame."""
    require_file(path)
    name = path.name
    try:
        # No memory map: it would crash the process when the file is later replaced by a shorter one.
        image = nibabel.load(path, mmap=False)
    except _DAMAGE as error:
        raise damaged(name) from error
    if not isinstance(image, nibabel.Nifti1Image):
        raise VolumeError(f"{name}: is not a NIfTI-1 or NIfTI-2 file; export it again as .nii.gz")
    header = image.header
    shape = tuple(int(n) for n in image.shape)
    if len(shape) < 3 or any(n != 1 for n in shape[3:]) or min(shape) < 1:
        raise VolumeError(f"{name}: has dimensions {shape}, one 3-D frame is expected; extract the frame first")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise VolumeError(f"{name}: has voxels of type {dtype}, grey values are expected; export it as int16")
    claim = int(np.prod(shape, dtype=object)) * dtype.itemsize
    gzipped = name.lower().endswith(".gz")
    check_file(claim, path.stat().st_size, encoding="gzip" if gzipped else "raw", name=name)
    x, y, z = shape[:3]
    geometry = geometry_of(_affine_lps(header, name), (z, y, x), name)
    proxy = image.dataobj
    assert isinstance(proxy, ArrayProxy)
    try:
        values = proxy.get_unscaled()
    except _DAMAGE as error:
        raise damaged(name) from error
    stored = values.reshape((x, y, z), order="F").T
    return Stored(values=stored, slope=float(proxy.slope), intercept=float(proxy.inter)), geometry


def write(path: Path, values: Shaped[ndarray, "z y x"], geometry: Geometry) -> None:
    """Write in the array's own dtype, with the same orientation as sform and qform, both "scanner" (code 1)."""
    affine = np.eye(4)
    affine[:3] = RAS_TO_LPS @ geometry.index_to_mm()
    image = nibabel.Nifti1Image(values.T, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def _affine_lps(header: nibabel.Nifti1Header, name: str) -> Float[ndarray, "3 4"]:
    """From index to LPS mm by the sform if its code is set, else the qform: what ITK and nibabel do."""
    if header.get_xyzt_units()[0] in ("meter", "micron"):
        raise VolumeError(f"{name}: its voxel size is not in millimetres; export it with unit mm")
    try:
        if int(header["sform_code"]) > 0:
            affine = header.get_sform()
        elif int(header["qform_code"]) > 0:
            affine = header.get_qform()
        else:
            raise VolumeError(
                f"{name}: neither sform nor qform is set, so left and right are unknown; convert it from DICOM again"
            )
    except HeaderDataError as error:
        raise VolumeError(f"{name}: its qform quaternion is invalid; convert it from DICOM again") from error
    return RAS_TO_LPS @ np.asarray(affine[:3], float)
