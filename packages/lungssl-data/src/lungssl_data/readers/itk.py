"""MetaImage (.mha, .mhd) and NRRD (.nrrd, .nhdr): grids by SimpleITK, voxels straight into their array.

The header may name a data file anywhere on the disk: only the header's own file, or a plain name beside it, is let in.
It is looked at as bytes before SimpleITK sees it; comments and key/value pairs are passed over. SimpleITK never reads
voxels here: its parser might find another data file in the same header.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK as sitk
from jaxtyping import Shaped
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

_HEADER_BYTES = 1 << 16
_METAIMAGE_NUMBERS = {"ElementSpacing": 1, "ElementSize": 1, "Offset": 1, "Position": 1, "Origin": 1}
_METAIMAGE_NUMBERS |= {"TransformMatrix": 2, "Rotation": 2, "Orientation": 2}
_ENCODINGS: dict[str, Literal["raw", "gzip"]] = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}
_SPACES = ("lps", "left-posterior-superior", "ras", "right-anterior-superior", "las", "left-anterior-superior")
_SPACES += tuple(f"{name}-time" for name in _SPACES)
"""Of NRRD; these are the ones that ITK knows to turn into LPS."""
_METAIMAGE_KEYS = {
    key.lower(): key
    for key in (
        *_METAIMAGE_NUMBERS,
        *("ObjectType", "NDims", "DimSize", "ElementType", "ElementDataFile", "HeaderSize", "ElementNumberOfChannels"),
        *("BinaryData", "BinaryDataByteOrderMSB", "ElementByteOrderMSB", "CompressedData", "CompressedDataSize"),
    )
}
"""As MetaIO spells what decides over grid and voxels; it passes over other spellings, which we must not read then."""


@dataclass(frozen=True, kw_only=True)
class _Data:
    """Where the voxels are."""

    path: Path
    offset: int | None
    """First byte; None: the last bytes of the file are the voxels."""
    encoding: Literal["raw", "gzip"]
    order: Literal["<", ">"]
    """Of bytes: "<" or ">"."""
    sizes: tuple[int, ...]
    """Voxels along x, y, z, ... as the header writes them."""


def read(path: Path) -> tuple[Stored, Geometry]:
    """Voxels and their grid; space "RAS" of NRRD arrives as LPS. 4-D files pass if they hold one frame."""
    name = path.name
    data, reader = _opened(path)
    size = reader.GetSize()
    if len(size) < 3 or any(n != 1 for n in size[3:]) or min(size) < 1 or reader.GetNumberOfComponents() != 1:
        raise VolumeError(
            f"has dimensions {size} with {reader.GetNumberOfComponents()} values per voxel, one 3-D frame of "
            "grey values is expected; extract the frame first",
            name=name,
        )
    if [n for n in data.sizes if n != 1] != [n for n in size if n != 1]:
        raise damaged(name)
    dtype = _dtype(reader.GetPixelID())
    x, y, z = (int(n) for n in size[:3])
    claim = x * y * z * dtype.itemsize
    check_file(claim, data.path.stat().st_size, encoding=data.encoding, name=name)
    rank = len(size)
    direction = np.reshape(reader.GetDirection(), (rank, rank))[:3, :3]
    affine = np.column_stack([direction * np.asarray(reader.GetSpacing()[:3]), reader.GetOrigin()[:3]])
    geometry = geometry_of(affine, (z, y, x), name)
    return Stored(values=_voxels(data, (z, y, x), dtype, name)), geometry


def read_vectors(path: Path) -> tuple[Shaped[ndarray, "z y x 3"], Geometry]:
    """An image of three components per voxel, float32 or float64, and its grid; VolumeError for any other."""
    data, reader = _opened(path)
    dtype = {sitk.sitkVectorFloat32: "f4", sitk.sitkVectorFloat64: "f8"}.get(reader.GetPixelID())
    size = reader.GetSize()
    expected = tuple(size) if _is_metaimage(path) else (3, *size)
    if dtype is None or reader.GetNumberOfComponents() != 3 or len(size) != 3:
        raise VolumeError(
            "is no 3-D image of 3 float components per voxel; write it as a displacement field does", name=path.name
        )
    if data.sizes != expected:
        raise damaged(path.name)
    x, y, z = (int(n) for n in size)
    claim = 3 * x * y * z * np.dtype(dtype).itemsize
    check_file(claim, data.path.stat().st_size, encoding=data.encoding, name=path.name)
    affine = np.column_stack([np.reshape(reader.GetDirection(), (3, 3)) * reader.GetSpacing(), reader.GetOrigin()])
    flat = _voxels(data, (z, y, 3 * x), np.dtype(dtype), path.name)
    return flat.reshape(z, y, x, 3), geometry_of(affine, (z, y, x), path.name)


def files_of(path: Path) -> list[Path]:
    """The header and, where it is detached, its data file."""
    data = _located(path)
    return [path] if data.path == path else [path, data.path]


def write(path: Path, values: Shaped[ndarray, "z y x"], geometry: Geometry) -> None:
    """Write compressed, in the array's own dtype."""
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection(geometry.direction.ravel().tolist())
    sitk.WriteImage(image, str(path), useCompression=True)


def _is_metaimage(path: Path) -> bool:
    return path.suffix.lower() in (".mha", ".mhd")


def _located(path: Path) -> _Data:
    require_file(path)
    return _metaimage_data(path) if _is_metaimage(path) else _nrrd_data(path)


def _opened(path: Path) -> tuple[_Data, sitk.ImageFileReader]:
    """Where the voxels are, by our parser, and SimpleITK's reader with the header read."""
    data = _located(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("MetaImageIO" if _is_metaimage(path) else "NrrdImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise damaged(path.name) from error
    return data, reader


def _dtype(pixel_id: int) -> np.dtype:
    return np.dtype(sitk.GetArrayViewFromImage(sitk.Image([1, 1, 1], pixel_id)).dtype)


def _voxels(data: _Data, shape: tuple[int, int, int], dtype: np.dtype, name: str) -> Shaped[ndarray, "z y x"]:
    values = allocate(shape, dtype.newbyteorder(data.order), name)
    try:
        with data.path.open("rb") as file:
            file.seek(data.path.stat().st_size - values.nbytes if data.offset is None else data.offset)
            stream = InflatedStream(file) if data.encoding == "gzip" else RawStream(file)
            stream.fill(values.reshape(-1).view(np.uint8))
            stream.finish()
    except StreamError as error:
        raise VolumeError(error.problem, name=name) from error
    except (OSError, ValueError) as error:
        raise damaged(name) from error
    return native(values)


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEADER_BYTES)


def _metaimage_data(path: Path) -> _Data:
    header = _header(path)
    fields: dict[str, str] = {}
    end = 0
    while "elementdatafile" not in fields:
        line, newline, _ = header[end:].partition(b"\n")
        end += len(line) + len(newline)
        key, equals, value = (part.strip() for part in line.decode("latin-1").partition("="))
        if not newline and not key:
            raise VolumeError("has no ElementDataFile line, so it is not a MetaImage; export it again", name=path.name)
        if (key and not equals) or _METAIMAGE_KEYS.get(key.lower(), key) != key:
            raise VolumeError("its header is not spelled as MetaImage's are; export it again", name=path.name)
        if fields.setdefault(key.lower(), value) != value and key.lower() != "comment":
            raise VolumeError("its header states something twice; export it again", name=path.name)
    if not {"ndims", "dimsize", "elementtype"} <= fields.keys():
        raise damaged(path.name)
    rank = len(fields["dimsize"].split())
    for key, count in _METAIMAGE_NUMBERS.items():
        # SimpleITK takes what is no number as 0 or 1.
        if key.lower() in fields and not _are_numbers(fields[key.lower()], rank**count):
            raise VolumeError(f"its {key} is not {rank**count} numbers; export it again", name=path.name)
    if not _is_true(fields, "binarydata", True):
        raise VolumeError("holds its voxels as text; export it as binary", name=path.name)
    value, skip = fields["elementdatafile"], _integer(fields.get("headersize", "0"), path)
    local = value.upper() == "LOCAL"
    orders = {
        _is_true(fields, key, False) for key in ("elementbyteordermsb", "binarydatabyteordermsb") if key in fields
    }
    if len(orders) > 1:
        raise VolumeError("its header states two byte orders; export it again", name=path.name)
    unit = fields.get("distanceunits", "mm").lower()
    if unit not in ("mm", "?", ""):  # "?" is MetaIO's word for unknown
        raise VolumeError("its DistanceUnits is not mm; export it in millimetres", name=path.name)
    return _Data(
        path=path if local else _beside(path, value),
        offset=end if local else None if skip == -1 else skip,
        encoding="gzip" if _is_true(fields, "compresseddata", False) else "raw",
        order=">" if True in orders else "<",
        sizes=_sizes(fields["dimsize"], path),
    )


def _nrrd_data(path: Path) -> _Data:
    header = _header(path)
    if not header.startswith(b"NRRD"):
        raise VolumeError("does not begin with NRRD, so it is not a NRRD file; export it again", name=path.name)
    fields: dict[str, str] = {}
    end = 0
    while True:
        line, newline, _ = header[end:].partition(b"\n")
        end += len(line) + len(newline)
        if not newline or not line.strip():  # an empty line ends the header
            break
        key, colon, value = line.decode("latin-1").partition(":")
        if not colon or value.startswith("=") or line.startswith(b"#"):
            continue  # the first line, comments, key/value pairs
        key = key.strip().lower().replace(" ", "")
        if key in fields:
            raise VolumeError("its header states something twice; export it again", name=path.name)
        fields[key] = value.strip()
    attached = "datafile" not in fields
    if attached and not newline:
        raise damaged(path.name)
    encoding = _ENCODINGS.get(fields.get("encoding", "").lower())
    if encoding is None:
        raise VolumeError("its voxels are neither raw nor gzip; export it as one of them", name=path.name)
    skip = _integer(fields.get("byteskip", "0"), path)
    if _integer(fields.get("lineskip", "0"), path) or (skip and (encoding != "raw" or attached)):
        raise VolumeError("skips lines or bytes before its voxels; export it without", name=path.name)
    if fields.get("space", "").lower() not in _SPACES:
        raise VolumeError(
            "its space is not one of left-posterior-superior, right-anterior-superior and left-anterior-superior, so "
            "left and right are unknown; export it with its orientation",
            name=path.name,
        )
    if any(unit.strip('"').lower() not in ("mm", "millimeter", "???", "none", "") for unit in _units(fields)):
        raise VolumeError("its space units is not mm; export it in millimetres", name=path.name)
    return _Data(
        path=path if attached else _beside(path, fields["datafile"]),
        offset=end if attached else None if skip == -1 else skip,
        encoding=encoding,
        order=">" if fields.get("endian", "").lower() == "big" else "<",
        sizes=_sizes(fields.get("sizes", ""), path),
    )


def _units(fields: dict[str, str]) -> list[str]:
    """Units of NRRD's axes of space, as they are spelled; empty where none are given."""
    return fields.get("spaceunits", "").split() + fields.get("units", "").split()


def _is_true(fields: dict[str, str], key: str, default: bool) -> bool:
    """As MetaIO reads it: by the first letter."""
    return fields[key][:1] in ("T", "t", "1") if key in fields else default


def _integer(text: str, path: Path) -> int:
    if text not in ("-1",) and not (text.isdecimal() and len(text) < 13):
        raise damaged(path.name)
    return int(text)


def _are_numbers(text: str, count: int) -> bool:
    try:
        numbers = [float(part) for part in text.split()]
    except ValueError:
        return False
    return len(numbers) == count and bool(np.isfinite(numbers).all())


def _sizes(text: str, path: Path) -> tuple[int, ...]:
    parts = text.split()
    if not all(part.isdecimal() and len(part) < 13 for part in parts):
        raise damaged(path.name)
    return tuple(int(part) for part in parts)


def _beside(header: Path, value: str) -> Path:
    plain = value and Path(value).name == value and not set(value) & set("\\/% ")
    # "LIST" is a file's name to us, and to both formats the word for one file per slice.
    data = header.with_name(value) if plain and value.upper() != "LIST" else None
    if data is None or not data.is_file() or data.resolve().parent != header.resolve().parent:
        raise VolumeError(
            "its data file must be one file in the header's own folder, named without a path; "
            "put it there and correct the header, or convert both to one .mha or .nrrd file",
            name=header.name,
        )
    return data
