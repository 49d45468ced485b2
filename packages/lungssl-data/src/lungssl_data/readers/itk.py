"""MetaImage (.mha, .mhd) and NRRD (.nrrd, .nhdr) by SimpleITK, after a look at the header as text.

The header may name a data file anywhere on the disk: only the header's own file, or a plain name beside it, is let in.
"""

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Shaped
from numpy import ndarray

from lungssl_data.readers.checks import Stored, VolumeError, check_file, damaged, geometry_of, require_file
from lungssl_data.volume import Geometry

_HEADER_BYTES = 1 << 16


def read(path: Path) -> tuple[Stored, Geometry]:
    """Voxels and their grid; space "RAS" of NRRD arrives as LPS. 4-D files pass if they hold one frame."""
    require_file(path)
    name = path.name
    metaimage = path.suffix.lower() in (".mha", ".mhd")
    data, encoding = _metaimage_data(path) if metaimage else _nrrd_data(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("MetaImageIO" if metaimage else "NrrdImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise damaged(name) from error
    size = reader.GetSize()
    if len(size) < 3 or any(n != 1 for n in size[3:]) or min(size) < 1 or reader.GetNumberOfComponents() != 1:
        raise VolumeError(
            f"{name}: has dimensions {size} with {reader.GetNumberOfComponents()} values per voxel, one 3-D frame of "
            "grey values is expected; extract the frame first"
        )
    claim = int(np.prod(size, dtype=object)) * _bytes_per_voxel(reader.GetPixelID())
    check_file(claim, data.stat().st_size, encoding=encoding, name=name)
    rank = len(size)
    direction = np.reshape(reader.GetDirection(), (rank, rank))[:3, :3]
    affine = np.column_stack([direction * np.asarray(reader.GetSpacing()[:3]), reader.GetOrigin()[:3]])
    x, y, z = (int(n) for n in size[:3])
    geometry = geometry_of(affine, (z, y, x), name)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise damaged(name) from error
    return Stored(values=sitk.GetArrayFromImage(image).reshape(z, y, x)), geometry


def files_of(path: Path) -> list[Path]:
    """The header and, where it is detached, its data file."""
    require_file(path)
    metaimage = path.suffix.lower() in (".mha", ".mhd")
    data, _ = _metaimage_data(path) if metaimage else _nrrd_data(path)
    return [path] if data == path else [path, data]


def write(path: Path, values: Shaped[ndarray, "z y x"], geometry: Geometry) -> None:
    """Write compressed, in the array's own dtype."""
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection(geometry.direction.ravel().tolist())
    sitk.WriteImage(image, str(path), useCompression=True)


def _bytes_per_voxel(pixel_id: int) -> int:
    return np.dtype(sitk.GetArrayViewFromImage(sitk.Image([1, 1, 1], pixel_id)).dtype).itemsize


def _header_lines(path: Path) -> list[str]:
    with path.open("rb") as file:
        return file.read(_HEADER_BYTES).decode("latin-1").splitlines()


def _metaimage_data(path: Path) -> tuple[Path, str]:
    """The file that holds the voxels, and its encoding."""
    fields = {}
    for line in _header_lines(path):
        key, _, value = (part.strip() for part in line.partition("="))
        fields[key.lower()] = value
        if key.lower() == "elementdatafile":  # the last line of the header
            break
    else:
        raise VolumeError(f"{path.name}: has no ElementDataFile line, so it is not a MetaImage; export it again")
    encoding = "gzip" if fields.get("compresseddata", "false").lower() == "true" else "raw"
    value = fields["elementdatafile"]
    return (path if value.upper() == "LOCAL" else _beside(path, value)), encoding


def _nrrd_data(path: Path) -> tuple[Path, str]:
    """The file that holds the voxels, and its encoding."""
    lines = _header_lines(path)
    if not lines or not lines[0].startswith("NRRD"):
        raise VolumeError(f"{path.name}: does not begin with NRRD, so it is not a NRRD file; export it again")
    data, encoding = path, "raw"
    for line in lines[1:]:
        if not line.strip():  # an empty line ends the header
            break
        key, _, value = (part.strip() for part in line.partition(":"))
        if key.lower() in ("data file", "datafile"):
            data = _beside(path, value)
        elif key.lower() == "encoding":
            encoding = {"gz": "gzip"}.get(value.lower(), value.lower())
    return data, encoding


def _beside(header: Path, value: str) -> Path:
    data = header.with_name(value) if value and Path(value).name == value and not set(value) & set("\\/% ") else None
    if data is None or not data.is_file():
        raise VolumeError(
            f"{header.name}: its data file must be one file in the header's own folder, named without a path; "
            "put it there and correct the header, or convert both to one .mha or .nrrd file"
        )
    return data
