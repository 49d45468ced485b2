"""A CSV with one line per scan, or the folder of a `manifest.csv`; paths are relative to the file.

    patient_id,phase,image,lung,lung_codes,lobes,lobe_codes,lesion,lesion_codes,vessels,vessel_codes,displacement,landmarks,split
    p01,exhale,p01/ee.mha,p01/ee_mask.mha,,,,,,,,,,train
    p01,inhale,p01/ei_dicom,,,,,,,,,,,

Only the first three columns are needed. The `..._codes` name the labels' convention (keys of LUNG_CODES, LOBE_CODES,
LESION_CODES and VESSEL_CODES). Of the whole patient, once or alike in both lines: `displacement`, an exhale-to-inhale
field; `landmarks` (experts') and `keypoints` (a program's), tables as in the layout `folder`; `split`: train, val or
test; `person`, equal for patients who are one person; `site` and `licence`, kept as the data set's name and terms.
"""

import csv
import io
from collections import Counter
from pathlib import Path
from typing import Any

from lungssl_data.layouts.files import read_landmarks
from lungssl_data.layouts.source import (
    LESION_CODES,
    LOBE_CODES,
    LUNG_CODES,
    MASKS,
    VESSEL_CODES,
    PairSource,
    ScanSource,
    attempt,
    check_path,
    nameless,
    parse_phase,
)
from lungssl_data.pair import CacheError, LandmarkKind, Landmarks, Phase
from lungssl_data.splits import FRACTIONS

NAME = "manifest.csv"
NEEDED = ("patient_id", "phase", "image")
CODES = {"lung_codes": LUNG_CODES, "lobe_codes": LOBE_CODES, "lesion_codes": LESION_CODES, "vessel_codes": VESSEL_CODES}
OF_PATIENT: tuple[str, ...] = ("displacement", "landmarks", "keypoints", "split", "person", "site", "licence")
COLUMNS = (*NEEDED, *MASKS, *CODES, *OF_PATIENT)
POINTS: dict[str, LandmarkKind] = {"landmarks": "expert", "keypoints": "automatic"}
LARGEST_BYTES = 256 << 20
"""A million lines of 256 characters."""

Lines = list[tuple[int, dict[str, str]]]
"""One patient's lines with their numbers, the header's being 1."""


def recognises(root: Path) -> bool:
    """Whether it is a .csv file, or a folder with a manifest.csv."""
    return (root.suffix.lower() == ".csv" and root.is_file()) or (root / NAME).is_file()


def read(root: Path) -> list[PairSource]:
    """Patients in the order of their first line, with a problem where a line of theirs, or its files, can't be used.

    CacheError, with the line's number, where the table as such can't be read. What lines hold is told by its column,
    never in words: a cell in the wrong column may be anything.
    """
    manifest = root / NAME if root.is_dir() else root
    if not manifest.is_file():
        raise CacheError(f"{manifest}: no such file; expected a CSV with the columns {', '.join(COLUMNS)}")
    patients: dict[str, Lines] = {}
    for number, line in _lines(manifest):
        if not line["patient_id"]:
            raise CacheError(f"{manifest.name} line {number}: the patient_id is empty; give each line its patient's")
        patients.setdefault(line["patient_id"], []).append((number, line))
    if not patients:
        raise CacheError(f"{manifest.name}: no lines below the header; write one line per scan")
    sources = []
    for patient, lines in patients.items():
        place = f"line {lines[0][0]}"
        sources += attempt(patient, _source, patient, lines, manifest.parent, place, place=place)
    return sources


def _lines(manifest: Path) -> Lines:
    """All lines, their cells by column and without blanks at their ends."""
    name = manifest.name
    reader = csv.DictReader(io.StringIO(_text(manifest), newline=""))
    try:
        _check_header(name, list(reader.fieldnames or ()))
        lines = []
        for row in reader:
            if None in row:  # where DictReader puts what is left
                raise CacheError(
                    f"{name} line {reader.line_num}: more cells than the header has columns; put cells that hold a "
                    f'comma into "double quotes"'
                )
            cells = {column: (cell or "").strip() for column, cell in row.items()}
            if any(cells.values()):  # spreadsheets leave lines of commas at the end
                lines.append((reader.line_num, cells))
    except csv.Error as error:
        number = reader.reader.line_num  # DictReader's own counts the lines that went well
        raise CacheError(f"{name} line {number}: is no CSV; save the table as CSV again") from error
    return lines


def _text(manifest: Path) -> str:
    size = manifest.stat().st_size
    if size > LARGEST_BYTES:
        raise CacheError(f"{manifest.name}: {size} bytes are no list of scans, which has {LARGEST_BYTES} at most")
    content = manifest.read_bytes()
    remedy = 'save it as "CSV UTF-8" (Excel: Save As; LibreOffice: Save As, Edit filter settings, Unicode (UTF-8))'
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise CacheError(f"{manifest.name} line {number}: is not in UTF-8; {remedy}") from None
    if "\0" in text:
        number = text[: text.index("\0")].count("\n") + 1
        raise CacheError(f"{manifest.name} line {number}: a NUL byte, so this is no text in UTF-8; {remedy}")
    return text


def _check_header(name: str, header: list[str]) -> None:
    unknown = [place for place, column in enumerate(header, start=1) if column not in COLUMNS]
    missing = [column for column in NEEDED if column not in header]
    if unknown or missing:
        raise CacheError(
            f"{name}: the header's columns {unknown} are unknown, {missing} are missing; the first line names the "
            f"columns, with commas between them; known are {', '.join(COLUMNS)}"
        )
    twice = [column for column, count in Counter(header).items() if count > 1]
    if twice:
        raise CacheError(f"{name}: the header has the columns {twice} twice; keep one of each")


def _source(patient: str, lines: Lines, root: Path, place: str) -> list[PairSource]:
    whole = dict.fromkeys(OF_PATIENT, "")
    scans: dict[Phase, ScanSource] = {}
    for number, line in lines:
        try:
            phase, scan = _scan(line, root)
            if phase in scans:
                raise CacheError(f"a second {phase} scan; a patient has one of each")
            scans[phase] = scan
            _add(whole, line)
        except (CacheError, OSError) as error:  # of the system: a cell that is too long for a path
            raise CacheError(f"line {number}: {nameless(error)}") from error
    landmarks: dict[LandmarkKind, Landmarks] = {}
    try:
        files = {name: _path(root, whole, name) for name in ("displacement", *POINTS)}
        for name, kind in POINTS.items():
            if path := files[name]:
                landmarks[kind] = read_landmarks(path, name)
    except (CacheError, OSError) as error:
        raise CacheError(f"{place}: {nameless(error)}") from error
    return [
        PairSource(
            patient=patient,
            scans=scans,
            displacement=files["displacement"],
            landmarks=landmarks,
            dataset=whole["site"],
            licence=whole["licence"],
            person=whole["person"],
            split=whole["split"] or None,  # pyright: ignore[reportArgumentType]
            place=place,
        )
    ]


def _scan(line: dict[str, str], root: Path) -> tuple[Phase, ScanSource]:
    phase = parse_phase(line["phase"])
    codes = {name: line.get(name) or "lungssl" for name in CODES}
    for name, known in CODES.items():
        if codes[name] not in known:
            raise CacheError(f"{name} is unknown; known are {', '.join(known)}")
    image = _path(root, line, "image")
    if image is None:
        raise CacheError("the image column is empty; give a volume file or a DICOM folder")
    masks = {name: _path(root, line, name) for name in MASKS}
    return phase, ScanSource(image=image, evidence="manifest", **masks, **codes)  # pyright: ignore[reportArgumentType]


def _add(whole: dict[str, str], line: dict[str, str]) -> None:
    """Take in what a line says of its patient; CacheError where another said otherwise."""
    if (split := line.get("split")) and split not in FRACTIONS:
        raise CacheError(f"the split is unknown; known are {', '.join(FRACTIONS)}")
    for name in OF_PATIENT:
        said, before = line.get(name) or "", whole[name]
        if said and before and said != before:
            raise CacheError(
                f"in both {before} and {said}; a patient is in one split"
                if name == "split"
                else f"a second value of {name}; a patient has one"
            )
        whole[name] = said or before


def _path(root: Path, cells: dict[str, Any], column: str) -> Path | None:
    """A column's path, from the manifest's folder; None for an empty cell."""
    if not cells.get(column):
        return None
    path = root / cells[column]
    check_path(path, column)
    return path
