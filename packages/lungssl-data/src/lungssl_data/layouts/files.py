"""What the layouts share: files by their names, points by their conventions, and the mark of a phantom's copy."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from jaxtyping import Float, Float64
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage
from numpy import ndarray

from lungssl_data.layouts.source import NamedError, check_path
from lungssl_data.pair import CacheError, Landmarks, Phase
from lungssl_data.readers import VolumeError, files_of
from lungssl_data.readers.checks import geometry_of
from lungssl_data.readers.nifti import RAS_TO_LPS
from lungssl_data.readers.raw import RawFormat
from lungssl_data.volume import Geometry

PHANTOM_FILE = "lungssl-phantom.json"
"""Beside a collection's copy made of phantoms: `{"layout": name, "formats": {case: {phase: RawFormat's fields}}}`."""
MOST_NAMES = 20_000
"""`has_name` looks no further: some 0.2 s for each layout that is asked."""

LARGEST_POINTS_BYTES = 16 << 20
"""A hundred thousand points; the largest published lists have 10,000."""


def names_under(root: Path) -> Iterator[str]:
    """Files below `root` as relative paths with `/`, folder by folder; hidden ones and __MACOSX are passed over."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "__MACOSX")
        within = Path(folder).relative_to(root)
        for name in sorted(names):
            if not name.startswith("."):
                yield (within / name).as_posix()


def has_name(root: Path, pattern: str) -> bool:
    """Whether the end of some path below `root` matches, without regard to case."""
    compiled = _compiled(pattern)
    return any(compiled.search(name) for name, _ in zip(names_under(root), range(MOST_NAMES), strict=False))


def found(root: Path, pattern: str) -> dict[tuple[str, ...], Path]:
    """Files whose path ends in `pattern` by the match's groups in lower case; NamedError where two have the same."""
    compiled = _compiled(pattern)
    files: dict[tuple[str, ...], Path] = {}
    for name in names_under(root):
        match = compiled.search(name)
        if match is None:
            continue
        key = tuple((group or "").lower() for group in match.groups())
        if key in files:
            other = files[key].relative_to(root).as_posix()
            raise NamedError("are the same scan by their names; keep one of them", names=f"{other} and {name}")
        files[key] = root / name
    return files


def nothing_found(root: Path, expected: str) -> CacheError:
    """The error where a layout finds none of its files."""
    where = "no such folder" if not root.is_dir() else "none of its files here"
    return CacheError(f"{root}: {where}; expected {expected}")


def read_points(path: Path, role: str, *, columns: int = 3) -> Float64[ndarray, "n columns"]:
    """Numbers, `columns` to a line, between blanks, tabs or commas; CacheError with role and line for anything else."""
    return _points(role, _lines(path, role), columns, first_line=1)


def paired(exhale_mm: Float64[ndarray, "e 3"], inhale_mm: Float64[ndarray, "i 3"]) -> Landmarks:
    """Corresponding points; CacheError where their numbers differ."""
    if len(exhale_mm) != len(inhale_mm):
        raise CacheError(
            f"{len(exhale_mm)} landmarks at exhale, {len(inhale_mm)} at inhale; they must correspond line by line, "
            f"copy the files again"
        )
    return Landmarks(exhale_mm=exhale_mm, inhale_mm=inhale_mm)


def check_distance(points: Landmarks, low_mm: float, high_mm: float) -> None:
    """CacheError unless the landmarks' mean distance is the documented one: it tests spacings, units and pairing."""
    mean_mm = float(points.identity_tre_mm().mean())
    if not low_mm <= mean_mm <= high_mm:
        raise CacheError(
            f"its landmarks are {mean_mm:.2f} mm apart on average, documented are {low_mm:.2f} to {high_mm:.2f} mm; "
            f"the files are of different cases, or edited: copy them again"
        )


def read_landmarks(path: Path, role: str) -> Landmarks:
    """Our own table: the header `exhale_x_mm, ..., inhale_z_mm`, then points in LPS mm."""
    header, *lines = _lines(path, role) or [""]
    columns = [f"{phase}_{axis}_mm" for phase in ("exhale", "inhale") for axis in "xyz"]
    if [name.strip() for name in header.split(",")] != columns:
        raise CacheError(f"{role}: its first line is not the header {','.join(columns)}; write it")
    points = _points(role, lines, 6, first_line=2)
    return Landmarks(exhale_mm=points[:, :3], inhale_mm=points[:, 3:])


def index_to_mm(points: Float[ndarray, "n 3"], grid: Geometry) -> Float64[ndarray, "n 3"]:
    """0-based voxel indices (x, y, z), fractions allowed, in LPS mm."""
    affine = grid.index_to_mm()
    return np.asarray(points, float) @ affine[:, :3].T + affine[:, 3]


def raw_to_mm(points: Float[ndarray, "n 3"], form: RawFormat) -> Float64[ndarray, "n 3"]:
    """1-based voxels (x, y, z) of a file without a header in LPS mm; turned over where its slices are."""
    index = np.asarray(points, float) - 1
    if form.flip_z:
        index[:, 2] = form.shape[0] - 1 - index[:, 2]
    return index * form.spacing_mm + form.origin_mm


def grid_of(path: Path, role: str) -> Geometry:
    """The grid that `read_volume` would give, from the header alone; CacheError with the role where it would raise."""
    check_path(path, role)
    try:
        return _grid_of(path)
    except VolumeError as error:
        raise CacheError(f"{role}: {error.problem}") from error


def is_phantom(root: Path) -> bool:
    """Whether `root` is a copy that `lungssl phantom --layout` made."""
    return (root / PHANTOM_FILE).is_file()


def dataset_name(root: Path, name: str) -> str:
    """The collection's name, "" for nobody's, with a note where it is a copy made of phantoms."""
    return f"{name} (phantom)".strip() if is_phantom(root) else name


def phantom_formats(root: Path) -> Mapping[str, Mapping[Phase, RawFormat]]:
    """What a copy made of phantoms says of its files without headers, by case; empty for the collection itself."""
    if not is_phantom(root):
        return {}
    try:
        formats = json.loads((root / PHANTOM_FILE).read_text(encoding="utf-8"))["formats"]
        return {
            case: {
                phase: RawFormat(
                    shape=tuple(fields["shape"]),
                    spacing_mm=tuple(fields["spacing_mm"]),
                    origin_mm=tuple(fields["origin_mm"]),
                    flip_z=fields["flip_z"],
                )
                for phase, fields in phases.items()
            }
            for case, phases in formats.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{PHANTOM_FILE}: damaged; make the copy again with `lungssl phantom --layout`") from error


def _grid_of(path: Path) -> Geometry:
    if path.name.lower().endswith((".nii", ".nii.gz")):
        try:
            image = nibabel.load(path)
        except (OSError, ImageFileError, HeaderDataError, ValueError) as error:
            raise VolumeError("the header can't be read; copy the file again", name=path.name) from error
        if not isinstance(image, SpatialImage) or image.affine is None or len(image.shape) < 3:
            raise VolumeError("is no 3-D volume", name=path.name)
        x, y, z = (int(n) for n in image.shape[:3])
        return geometry_of(RAS_TO_LPS @ np.asarray(image.affine)[:3], (z, y, x), path.name)
    files_of(path)  # refuses a header that points elsewhere
    reader = sitk.ImageFileReader()
    reader.SetImageIO("MetaImageIO" if path.suffix.lower() in (".mhd", ".mha") else "NrrdImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise VolumeError("the header can't be read; copy the file again", name=path.name) from error
    direction = np.reshape(reader.GetDirection(), (reader.GetDimension(),) * 2)[:3, :3]
    affine = np.column_stack([direction * np.asarray(reader.GetSpacing()[:3]), reader.GetOrigin()[:3]])
    x, y, z = (int(n) for n in reader.GetSize()[:3])
    return geometry_of(affine, (z, y, x), path.name)


def _lines(path: Path, role: str) -> list[str]:
    check_path(path, role)
    if not path.is_file():
        raise CacheError(f"{role}: is a folder; expected a file of points")
    if path.stat().st_size > LARGEST_POINTS_BYTES:
        raise CacheError(f"{role}: {path.stat().st_size} bytes are no list of points; copy it again")
    return path.read_text(encoding="utf-8-sig", errors="replace").splitlines()


def _points(role: str, lines: list[str], columns: int, *, first_line: int) -> Float64[ndarray, "n columns"]:
    rows = []
    for number, line in enumerate(lines, start=first_line):
        parts = line.replace(",", " ").split()
        if not parts:
            continue
        try:
            row = [float(part) for part in parts]
        except ValueError:
            row = []
        if len(row) != columns or not np.isfinite(row).all():
            raise CacheError(f"{role} line {number}: expected {columns} numbers; is it a list of points?")
        rows.append(row)
    if not rows:
        raise CacheError(f"{role}: no points in it, expected {columns} numbers a line; copy it again")
    return np.array(rows)


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|/){pattern}$", re.IGNORECASE)
