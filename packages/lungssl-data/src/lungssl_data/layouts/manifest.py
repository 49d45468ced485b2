"""A CSV with one line per scan, or the folder of a `manifest.csv`; paths are relative to the file.

    patient_id,phase,image,lung,lung_codes,lobes,lobe_codes,lesion,lesion_codes,displacement,landmarks,split
    p01,exhale,p01/ee.mha,p01/ee_mask.mha,,,,,,,,train
    p01,inhale,p01/ei_dicom,,,,,,,,,

Only the first three columns are needed. The `..._codes` name the labels' convention (keys of LUNG_CODES, LOBE_CODES and
LESION_CODES). Of the whole patient, once or alike in both lines: `displacement`, an exhale-to-inhale field; `landmarks`
(experts') and `keypoints` (a program's), tables as in the layout `folder`; `split`: train, val or test; `person`, equal
for patients who are one person; `site` and `licence`, kept as the data set's name and terms.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lungssl_data.layouts.files import read_landmarks
from lungssl_data.layouts.source import LESION_CODES, LOBE_CODES, LUNG_CODES, PairSource, ScanSource, parse_phase
from lungssl_data.pair import CacheError, LandmarkKind, Phase
from lungssl_data.splits import FRACTIONS

NAME = "manifest.csv"
NEEDED = ("patient_id", "phase", "image")
MASKS = ("lung", "lobes", "lesion")
CODES = {"lung_codes": LUNG_CODES, "lobe_codes": LOBE_CODES, "lesion_codes": LESION_CODES}
OF_PATIENT = ("displacement", "landmarks", "keypoints", "split", "person", "site", "licence")
COLUMNS = (*NEEDED, *MASKS, *CODES, *OF_PATIENT)
POINTS: dict[str, LandmarkKind] = {"landmarks": "expert", "keypoints": "automatic"}


def recognises(root: Path) -> bool:
    """Whether it is a .csv file, or a folder with a manifest.csv."""
    return (root.suffix.lower() == ".csv" and root.is_file()) or (root / NAME).is_file()


def read(root: Path) -> list[PairSource]:
    """Patients in the order of their first line; CacheError with the line's number for what can't be used."""
    manifest = root / NAME if root.is_dir() else root
    if not manifest.is_file():
        raise CacheError(f"{manifest}: no such file; expected a CSV with the columns {', '.join(COLUMNS)}")
    with open(manifest, newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle)
        unknown = set(reader.fieldnames or ()) - set(COLUMNS)
        missing = set(NEEDED) - set(reader.fieldnames or ())
        if unknown or missing:
            raise CacheError(
                f"{manifest.name}: unknown columns {sorted(unknown)}, missing columns {sorted(missing)}; "
                f"known are {', '.join(COLUMNS)}"
            )
        lines = [(reader.line_num, {k: (v or "").strip() for k, v in row.items()}) for row in reader]
    patients: dict[str, dict[str, Any]] = {}
    for number, line in lines:
        _at(manifest, f"line {number}", lambda line=line: _add(patients, line, manifest.parent))
    if not patients:
        raise CacheError(f"{manifest.name}: no lines below the header; write one line per scan")
    return [
        _at(manifest, f"patient {patient}", lambda patient=patient, parts=parts: _source(patient, parts))
        for patient, parts in patients.items()
    ]


def _at(manifest: Path, place: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except CacheError as error:
        raise CacheError(f"{manifest.name} {place}: {error}") from error


def _add(patients: dict[str, dict[str, Any]], line: dict[str, str], root: Path) -> None:
    phase: Phase = parse_phase(line["phase"])
    patient = line["patient_id"]
    parts = patients.setdefault(patient, {"scans": {}, **dict.fromkeys(OF_PATIENT, "")})
    if phase in parts["scans"]:
        raise CacheError(f"patient {patient}: a second {phase} scan; a patient has one of each")
    codes = {name: line.get(name) or "lungssl" for name in CODES}
    for name, known in CODES.items():
        if codes[name] not in known:
            raise CacheError(f"{name} {codes[name]!r} is unknown; known are {', '.join(known)}")
    if (split := line.get("split")) and split not in FRACTIONS:
        raise CacheError(f"split {split!r} is unknown; known are {', '.join(FRACTIONS)}")
    for name in OF_PATIENT:
        said, before = line.get(name) or "", parts[name]
        if name in ("displacement", *POINTS) and said:
            said = _path(root, said)
        if said and before and said != before:
            raise CacheError(
                f"patient {patient}: in both {before} and {said}; a patient is in one split"
                if name == "split"
                else f"patient {patient}: two values of {name}; a patient has one"
            )
        parts[name] = said or before
    paths = {name: _path(root, line.get(name)) for name in ("image", *MASKS)}
    image = paths.pop("image")
    if image is None:
        raise CacheError("the image column is empty; give a volume file or a DICOM folder")
    parts["scans"][phase] = ScanSource(
        image=image,
        lung=paths["lung"],
        lung_codes=codes["lung_codes"],
        lobes=paths["lobes"],
        lobe_codes=codes["lobe_codes"],
        lesion=paths["lesion"],
        lesion_codes=codes["lesion_codes"],
        evidence="manifest",
    )


def _source(patient: str, parts: dict[str, Any]) -> PairSource:
    return PairSource(
        patient=patient,
        scans=parts["scans"],
        displacement=parts["displacement"] or None,
        landmarks={kind: read_landmarks(parts[name]) for name, kind in POINTS.items() if parts[name]},
        dataset=parts["site"],
        licence=parts["licence"],
        person=parts["person"],
        split=parts["split"] or None,
    )


def _path(root: Path, text: str | None) -> Path | None:
    if not text:
        return None
    path = root / text
    if not path.exists():
        raise CacheError(f"{text}: no such file or folder beside the manifest")
    return path
