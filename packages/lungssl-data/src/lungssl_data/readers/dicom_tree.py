"""All CT series below a folder, as a PACS export lays them out: in any folders, among any other files.

Patients, studies and frames of reference leave as keyed ids (`lungssl_data.ids`), phases with the rule they were read
from, never a text of the files.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lungssl_data.ids import keyed_id
from lungssl_data.pair import Phase
from lungssl_data.readers.checks import VolumeError
from lungssl_data.readers.dicom_slice import Other, Refused, Slice, check_modality, read_slice
from lungssl_data.readers.dicom_stack import Group, group, ordered
from lungssl_data.readers.threads import each


@dataclass(frozen=True, kw_only=True)
class CtSeries:
    """One phase of one CT series."""

    patient: str
    """Keyed id: of the PatientID, else of name and birth date, else of the study."""
    told_by: Literal["id", "name", "study"]
    """What `patient` is of."""
    person: tuple[str, str, str]
    """Keyed ids of name, birth date and sex; empty where not given."""
    study: str
    """Keyed id."""
    frame: str
    """Keyed id of the frame of reference: points of series with the same one correspond."""
    files: tuple[Path, ...]
    """Ascending along the slice normal, for `read_slices`; in the order of their names where there is a problem."""
    phase: Phase | None
    phase_percent: float | None
    """Of the breathing cycle, 0 being end inhale by convention."""
    evidence: str
    """The rule that the phase was read from, or that tells it from the series' other phases; empty for neither."""
    slices: int
    spacing_mm: tuple[float, float, float]
    """Along (x, y, z); zeros where there is a problem."""
    problem: str | None
    """Why it can't be read, without any name; None for a series that can."""


def find_series(root: Path, *, key: bytes) -> list[CtSeries]:
    """Every CT series and phase below `root`, by patient, study and place; one that can't be read says why.

    Headers are read in parallel. Localizers, secondary captures, projections, other modalities and files that are no
    DICOM are passed over, as are hidden files, links to folders, and links to files outside `root`. A damaged file is
    a series of its own with its problem. Raises VolumeError only for a folder that does not exist.
    """
    if not root.is_dir():
        raise VolumeError("no such folder; give the one that holds the DICOM files", name=root.name)
    files = _files(root)
    series: dict[tuple[str, str], list[Slice | Refused]] = {}
    others = []
    for one in each(_read, files):
        if isinstance(one, Other):
            others.append(one)
        elif one is not None:
            # A refused file without a series can't be told from others, so it stands alone.
            series.setdefault((one.patient, one.series or str(one.path)), []).append(one)
    listed = [entry for members in series.values() for entry in _entries(members, others, key)]
    return sorted(listed, key=lambda entry: (entry.patient, entry.study, entry.files))


def _files(root: Path) -> list[Path]:
    inside = root.resolve()
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith(".") or (path.is_symlink() and not path.resolve().is_relative_to(inside)):
                continue
            if path.is_file():
                files.append(path)
    return files


def _read(path: Path) -> Slice | Refused | Other | None:
    try:
        found = read_slice(path)
        if found is None and path.suffix.lower() == ".dcm":
            raise VolumeError("is a damaged DICOM file; export the series again")
        return found
    except VolumeError as error:
        empty = {"series": "", "study": "", "patient": "", "frame": "", "person": ("", "", "")}
        return Refused(path=path, problem=f"a file {error.problem}", **empty)


def _entries(members: Sequence[Slice | Refused], others: Sequence[Other], key: bytes) -> list[CtSeries]:
    refused = [one for one in members if isinstance(one, Refused)]
    if refused:
        problem = refused[0].problem
        if len(refused) < len(members):
            problem = f"{len(refused)} of {len(members)} slices: {problem}"
        return [_entry(members, key, problem=problem)]
    try:
        check_modality(members[0].series, others)
    except VolumeError as error:
        return [_entry(members, key, problem=error.problem)]
    entries = []
    for part in group([one for one in members if isinstance(one, Slice)]):
        try:
            stack, geometry = ordered(part.slices)
        except VolumeError as error:
            entries.append(_entry(part.slices, key, part=part, problem=error.problem))
        else:
            entries.append(_entry(stack, key, part=part, spacing_mm=geometry.spacing_mm))
    return entries


def _entry(
    members: Sequence[Slice | Refused],
    key: bytes,
    *,
    part: Group | None = None,
    spacing_mm: tuple[float, float, float] = (0.0, 0.0, 0.0),
    problem: str | None = None,
) -> CtSeries:
    first = members[0]
    patient, told_by = _patient(first)
    return CtSeries(
        patient=keyed_id(patient, key),
        told_by=told_by,
        person=tuple(keyed_id(text, key, prefix="n") if text else "" for text in first.person),
        study=keyed_id(first.study, key, prefix="s"),
        frame=keyed_id(first.frame, key, prefix="f"),
        files=tuple(one.path for one in members),
        phase=part.phase if part else None,
        phase_percent=part.percent if part else None,
        evidence=part.evidence if part else "",
        slices=len(members),
        spacing_mm=spacing_mm,
        problem=problem,
    )


def _patient(first: Slice | Refused) -> tuple[str, Literal["id", "name", "study"]]:
    name, born, _ = first.person
    if first.patient:
        return first.patient, "id"
    if name and born:
        return f"name {name} born {born}", "name"
    return f"study {first.study or first.path}", "study"
