"""One plain DICOM CT series as a volume: headers by pydicom, pixels by SimpleITK.

Slices are ordered by position along the slice normal, never by InstanceNumber. What a stack of slices cannot be, and
SimpleITK would silently make of it anyway (gap, duplicate, gantry tilt: measured), is refused with the cause. No text
of a tag enters an error message: patients are named in them.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from jaxtyping import Float
from numpy import ndarray
from pydicom.errors import InvalidDicomError

from lungssl_data.readers.checks import Stored, VolumeError, check_size, geometry_of
from lungssl_data.volume import Geometry

SPACING_VARIATION = 0.05
"""Steps between slices may differ by this share of the median step; one missing slice is a variation of 1."""
TILT_DEGREES = 0.1
"""Slices shifted against each other by more (0.5 mm over a 300 mm scan) are a sheared stack."""
DUPLICATE_MM = 0.01
_TAGS = [
    "Modality",
    "SeriesInstanceUID",
    "ImageType",
    "BurnedInAnnotation",
    "NumberOfFrames",
    "SamplesPerPixel",
    "Rows",
    "Columns",
    "PixelSpacing",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "RescaleSlope",
    "RescaleIntercept",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Slice:
    path: Path
    rows: int
    columns: int
    pixel_mm: Float[ndarray, "2"]
    """Distance between rows, between columns."""
    axes: Float[ndarray, "2 3"]
    """LPS directions along a row (index x) and along a column (index y)."""
    position_mm: Float[ndarray, "3"]


def read(path: Path) -> tuple[Stored, Geometry]:
    """Rescaled values (slope and intercept of each slice) and their grid, slices ascending along the normal."""
    name = path.name
    slices = _one_series(path)
    first = slices[0]
    for other in slices[1:]:
        if (other.rows, other.columns) != (first.rows, first.columns):
            raise VolumeError(f"{name}: its slices differ in size; keep the slices of one reconstruction")
        if not np.allclose(other.pixel_mm, first.pixel_mm, rtol=1e-4):
            raise VolumeError(f"{name}: its slices differ in pixel spacing; keep the slices of one reconstruction")
        if not np.allclose(other.axes, first.axes, atol=1e-3):
            raise VolumeError(f"{name}: its slices differ in orientation; keep the slices of one reconstruction")
    normal = np.cross(first.axes[0], first.axes[1])
    slices.sort(key=lambda s: float(s.position_mm @ normal))
    step_mm = _step_mm(np.stack([s.position_mm for s in slices]), normal, name)
    spacing = np.array([first.pixel_mm[1], first.pixel_mm[0], step_mm])
    affine = np.column_stack([np.stack([*first.axes, normal], axis=1) * spacing, slices[0].position_mm])
    shape = (len(slices), first.rows, first.columns)
    geometry = geometry_of(affine, shape, name)
    check_size(int(np.prod(shape, dtype=object)) * 4, name)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(s.path) for s in slices])
    # Or the first slice's type would hold all: a later slice with a fractional slope would be cut to integers.
    reader.SetOutputPixelType(sitk.sitkFloat32)
    try:
        values = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise VolumeError(f"{name}: a slice's pixels cannot be decoded; export the series uncompressed") from error
    if values.shape != shape:
        raise VolumeError(f"{name}: the pixels of its slices do not match their headers; export the series again")
    return Stored(values=values), geometry


def _one_series(path: Path) -> list[_Slice]:
    """The slices of the one CT series in a folder, or of the series that one .dcm file belongs to."""
    if not path.exists():
        raise VolumeError(f"{path.name}: no such file or folder; check the path")
    folder = path if path.is_dir() else path.parent
    series: dict[str, list[tuple[Path, pydicom.Dataset]]] = {}
    wanted, others = None, 0
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    for number, file in enumerate(files, start=1):
        header = _header(file, f"{path.name}: file {number} of {len(files)} by name")
        if header is None:
            continue
        if header.get("Modality") != "CT" or "LOCALIZER" in (header.get("ImageType") or ()):
            others += 1
            continue
        uid = str(header.get("SeriesInstanceUID"))
        series.setdefault(uid, []).append((file, header))
        if file == path:
            wanted = uid
    if not series or (path != folder and wanted is None):
        raise VolumeError(
            f"{path.name}: no CT slice found ({others} other DICOM files); give the folder that holds the CT series"
        )
    if path == folder and len(series) > 1:
        sizes = ", ".join(str(n) for n in sorted(len(s) for s in series.values()))
        raise VolumeError(
            f"{path.name}: holds {len(series)} CT series (of {sizes} slices); give one .dcm file of the series you "
            "mean, or move each series to its own folder"
        )
    chosen = series[wanted] if wanted is not None else next(iter(series.values()))
    if len(chosen) < 2:
        raise VolumeError(f"{path.name}: the CT series has 1 slice, a volume needs 2 or more; export all slices")
    return [_slice(file, header, path.name) for file, header in chosen]


def _header(file: Path, where: str) -> pydicom.Dataset | None:
    """The header, or None for a file that does not claim to be DICOM."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's warnings quote the values of tags
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
            for tag in _TAGS:
                header.get(tag)  # values are decoded, and refused, on first use
            return header
    except InvalidDicomError:
        if file.suffix.lower() != ".dcm":
            return None
    except Exception:  # any error: damaged headers raise whatever the parser trips over
        pass
    raise VolumeError(f"{where} is a damaged DICOM file; export the series again")


def _slice(file: Path, header: pydicom.Dataset, name: str) -> _Slice:
    if int(header.get("NumberOfFrames") or 1) > 1:
        raise VolumeError(f"{name}: holds a multi-frame image; export it as a classic CT series, one file a slice")
    if header.get("BurnedInAnnotation") == "YES":
        raise VolumeError(f"{name}: has text burned into its pixels; use the original CT series")
    missing = [tag for tag in _TAGS[6:] if header.get(tag) is None]
    if missing or header.get("SamplesPerPixel", 1) != 1:
        raise VolumeError(
            f"{name}: a slice lacks {', '.join(missing) or 'grey values'}; use the original axial CT series"
        )
    rows, columns = int(header.Rows), int(header.Columns)
    try:
        pixel_mm = np.array([float(v) for v in header.PixelSpacing]).reshape(2)
        axes = np.array([float(v) for v in header.ImageOrientationPatient]).reshape(2, 3)
        position_mm = np.array([float(v) for v in header.ImagePositionPatient]).reshape(3)
    except ValueError as error:
        raise VolumeError(f"{name}: a slice's position or spacing is not a number; export the series again") from error
    return _Slice(path=file, rows=rows, columns=columns, pixel_mm=pixel_mm, axes=axes, position_mm=position_mm)


def _step_mm(positions_mm: Float[ndarray, "slices 3"], normal: Float[ndarray, "3"], name: str) -> float:
    """The slice spacing; VolumeError for duplicates, gaps and tilt."""
    along_mm = positions_mm @ normal
    steps_mm = np.diff(along_mm)
    duplicates = int(np.count_nonzero(steps_mm < DUPLICATE_MM))
    if duplicates:
        where = along_mm[:-1][steps_mm < DUPLICATE_MM][0]
        raise VolumeError(
            f"{name}: {duplicates} slices share their position with another (the first at {where:.2f} mm along the "
            "slice axis); the series holds a slice twice or two phases, separate them"
        )
    median_mm = float(np.median(steps_mm))
    uneven = np.flatnonzero(np.abs(steps_mm - median_mm) > SPACING_VARIATION * median_mm)
    if len(uneven):
        places = ", ".join(f"{along_mm[i]:.2f} to {along_mm[i + 1]:.2f}" for i in uneven[:4])
        more = f" and {len(uneven) - 4} more" if len(uneven) > 4 else ""
        raise VolumeError(
            f"{name}: slices are {median_mm:.2f} mm apart, but not from {places} mm along the slice axis{more}; "
            "slices are missing or the spacing changes, export the complete series"
        )
    drift_mm = np.linalg.norm(positions_mm - positions_mm[0] - np.outer(along_mm - along_mm[0], normal), axis=1)
    tilt = float(np.degrees(np.arctan(drift_mm.max() / (along_mm[-1] - along_mm[0]))))
    if tilt > TILT_DEGREES:
        raise VolumeError(
            f"{name}: the gantry was tilted by {tilt:.2f} degrees, so the slices form a sheared stack; "
            "correct the tilt with a resampling converter first"
        )
    return float((along_mm[-1] - along_mm[0]) / (len(along_mm) - 1))
