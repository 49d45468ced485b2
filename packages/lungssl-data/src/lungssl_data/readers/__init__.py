"""Read and write volumes and label maps: NIfTI, MetaImage, NRRD; read DICOM series.

    read_volume("ct.nii.gz")        -> Volume, int16 HU with rescale slope applied, rounded; padding values are kept
    read_slices(series.files)       -> Volume of one DICOM series among others (`dicom_tree.find_series`)
    write_volume("ct.mha", volume)
    read_labels("lobes.nrrd")       -> LabelMap, uint8
    write_labels("mask.nii.gz", label_map)
    write_floats("jacobian.nii.gz", values, geometry)

| format | read | write |
|---|---|---|
| .nii .nii.gz | x | x |
| .mha .nrrd | x | x, compressed |
| .mhd .nhdr (header with a data file beside it) | x | no: two files cannot be replaced at once |
| folder of one DICOM CT series and phase, or one .dcm of it | volumes | no |

Voxel order and direction matrix come and go unchanged, so a mask written on a volume's geometry has that volume's grid.
Files are written beside the target and then renamed: a crash leaves the old file. No text goes into their headers.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from jaxtyping import Float32
from numpy import ndarray

from lungssl_data.readers.checks import VolumeError, hounsfield, label_values, replacing
from lungssl_data.volume import Geometry, LabelMap, Volume

__all__ = [
    "VolumeError",
    "files_of",
    "read_labels",
    "read_slices",
    "read_volume",
    "write_floats",
    "write_labels",
    "write_volume",
]

READERS = {
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".mha": "itk",
    ".mhd": "itk",
    ".nrrd": "itk",
    ".nhdr": "itk",
    ".dcm": "dicom",
}
WRITABLE = (".nii", ".nii.gz", ".mha", ".nrrd")


def read_volume(path: str | Path) -> Volume:
    """Read a CT as int16 Hounsfield units; scanner padding (-2048, -3024) is kept, `Volume.valid()` tells it.

    What a DICOM header calls padding becomes -2048.

    Raises VolumeError, in one line, for a missing, damaged or sheared file, for values that are NaN or outside int16,
    and for a DICOM folder that is not exactly one gapless, untilted CT series.
    """
    path = Path(path)
    raw, geometry = _module(path).read(path)
    return Volume(hu=hounsfield(raw, path.name), geometry=geometry)


def read_slices(files: Sequence[Path]) -> Volume:
    """Read one phase of one DICOM CT series, its files in any order; raises VolumeError as `read_volume` does."""
    return import_module("lungssl_data.readers.dicom").read_slices(files)


def files_of(path: str | Path) -> list[Path]:
    """Every file that reading `path` reads, in a fixed order: a header's data file and a series' slices, too.

    Raises VolumeError as `read_volume` does for headers that point elsewhere.
    """
    path = Path(path)
    if path.is_dir():
        return [file for file in sorted(path.rglob("*")) if file.is_file()]
    if path.suffix.lower() == ".dcm":
        return [file for file in sorted(path.parent.iterdir()) if file.is_file()]
    module = _module(path)
    return module.files_of(path) if hasattr(module, "files_of") else [path]


def read_labels(path: str | Path) -> LabelMap:
    """Read a label map; raises VolumeError as `read_volume` does and for values that are not whole numbers 0 to 255."""
    path = Path(path)
    module = _module(path)
    if module.__name__.endswith(".dicom"):
        raise VolumeError("label maps are not read from DICOM; convert it to .nii.gz or .nrrd", name=path.name)
    raw, geometry = module.read(path)
    return LabelMap(labels=label_values(raw, path.name), geometry=geometry)


def write_volume(path: str | Path, volume: Volume) -> None:
    """Write a CT as int16 .nii, .nii.gz, .mha or .nrrd, replacing the file in one step."""
    path = _writable(Path(path))
    with replacing(path) as temporary:
        _module(temporary).write(temporary, volume.hu, volume.geometry)


def write_labels(path: str | Path, label_map: LabelMap) -> None:
    """Write a label map as uint8 .nii, .nii.gz, .mha or .nrrd, replacing the file in one step."""
    path = _writable(Path(path))
    with replacing(path) as temporary:
        _module(temporary).write(temporary, label_map.labels, label_map.geometry)


def write_floats(path: str | Path, values: Float32[ndarray, "z y x"], geometry: Geometry) -> None:
    """Write a map as float32 .nii, .nii.gz, .mha or .nrrd, replacing the file in one step."""
    path = _writable(Path(path))
    with replacing(path) as temporary:
        _module(temporary).write(temporary, values, geometry)


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def _module(path: Path) -> ModuleType:
    name = "dicom" if path.is_dir() else READERS.get(_suffix(path))
    if name is None:
        raise VolumeError(f"not a known format; known are {', '.join(READERS)} and a DICOM folder", name=path.name)
    return import_module(f"lungssl_data.readers.{name}")


def _writable(path: Path) -> Path:
    if _suffix(path) not in WRITABLE:
        raise VolumeError(f"cannot be written; name the file {', '.join(WRITABLE)}", name=path.name)
    return path
