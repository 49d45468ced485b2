"""A DICOM CT series as a volume: one folder, one file of a series, or the files of one series.

Slices are ordered by position along the slice normal, never by InstanceNumber. No text of an element enters an error
message: patients are named in them.
"""

from collections.abc import Sequence
from pathlib import Path

from lungssl_data.readers.checks import Stored, VolumeError
from lungssl_data.readers.dicom_pixels import read_hu
from lungssl_data.readers.dicom_slice import Other, Refused, Slice, check_modality, read_slice
from lungssl_data.readers.dicom_stack import Group, group, ordered
from lungssl_data.readers.threads import each
from lungssl_data.volume import Geometry, Volume


def read(path: Path) -> tuple[Stored, Geometry]:
    """Hounsfield units and their grid, slices ascending along the normal."""
    try:
        volume = _volume(_one_group(path).slices)
    except VolumeError as error:
        raise VolumeError(error.problem, name=path.name) from error
    return Stored(values=volume.hu), volume.geometry


def read_slices(files: Sequence[Path]) -> Volume:
    """The volume that these files of one series and phase hold, in any order; VolumeError as `read_volume`."""
    if not files:
        raise VolumeError("no files; give those of one CT series")
    name = files[0].parent.name
    try:
        slices = _usable(_found(files))
        if len(slices) != len(files):
            raise VolumeError(
                f"{len(files) - len(slices)} of {len(files)} files are no CT slice; list the series again"
            )
        if len({one.series for one in slices}) > 1:
            raise VolumeError("these files are of more than one CT series; give those of one")
        return _volume(slices)
    except VolumeError as error:
        raise VolumeError(error.problem, name=name) from error


def files_in_order(path: Path) -> list[Path]:
    """The files of the series and phase that `read` takes, one a slice of its volume, in the order of the slices.

    Raises VolumeError as `read`.
    """
    try:
        stack, _ = ordered(_one_group(path).slices)
    except VolumeError as error:
        raise VolumeError(error.problem, name=path.name) from error
    return [one.path for one in stack]


def _volume(slices: Sequence[Slice]) -> Volume:
    stack, geometry = ordered(slices)
    return Volume(hu=read_hu(stack), geometry=geometry)


def _found(files: Sequence[Path]) -> list[Slice | Refused | Other | None]:
    def read_one(numbered: tuple[int, Path]) -> Slice | Refused | Other | None:
        number, file = numbered
        try:
            found = read_slice(file)
        except VolumeError as error:
            raise VolumeError(f"file {number} of {len(files)} by name {error.problem}") from error
        if found is None and file.suffix.lower() == ".dcm":
            raise VolumeError(f"file {number} of {len(files)} by name is a damaged DICOM file; export the series again")
        return found

    return each(read_one, list(enumerate(files, start=1)))


def _usable(found: Sequence[Slice | Refused | Other | None]) -> list[Slice]:
    for one in found:
        if isinstance(one, Refused):
            raise VolumeError(one.problem)
    return [one for one in found if isinstance(one, Slice)]


def _one_group(path: Path) -> Group:
    """The one phase of the one CT series in a folder, or the one that a .dcm file belongs to."""
    if not path.exists():
        raise VolumeError("no such file or folder; check the path")
    folder = path if path.is_dir() else path.parent
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    found = _found(files)
    if path != folder:
        own = next((one for file, one in zip(files, found, strict=True) if file == path), None)
        uid = own.series if isinstance(own, (Slice, Refused)) else None
        found = [one for one in found if one is not None and one.series == uid]
        if uid is None:
            raise VolumeError("is no CT slice; give a file of the CT series, or its folder")
    _usable([one for one in found if isinstance(one, Refused) and not one.series])
    others = [one for one in found if isinstance(one, Other)]
    images = [one for one in found if isinstance(one, (Slice, Refused))]
    series = sorted({one.series for one in images})
    if not series:
        raise VolumeError(
            f"no CT slice found ({len(others)} other DICOM files); give the folder that holds the CT series"
        )
    if len(series) > 1:
        sizes = sorted(sum(one.series == uid for one in images) for uid in series)
        raise VolumeError(
            f"holds {len(series)} CT series (of {', '.join(map(str, sizes))} slices); give one .dcm file of the series "
            "you mean, or move each series to its own folder"
        )
    check_modality(series[0], others)
    groups = group(_usable(found))
    if path != folder:
        groups = [part for part in groups if any(one.path == path for one in part.slices)]
    if len(groups) > 1:
        _refuse_several(groups)
    return groups[0]


def _refuse_several(groups: list[Group]) -> None:
    slices = [part.slices[0] for part in groups]
    sizes = ", ".join(str(len(part.slices)) for part in groups)
    if len({one.frame for one in slices}) > 1:
        raise VolumeError("its slices differ in frame of reference; keep the slices of one acquisition")
    if not any(part.evidence for part in groups):
        raise VolumeError("its slices differ in orientation; keep the slices of one reconstruction")
    raise VolumeError(
        f"the CT series holds {len(groups)} phases (of {sizes} slices, told apart by {groups[0].evidence}); give one "
        ".dcm file of the phase you mean"
    )
