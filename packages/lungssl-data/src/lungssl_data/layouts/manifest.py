"""A CSV with one line per scan; paths are relative to the file.

    patient_id,phase,image,lung,lobes,lobe_codes,displacement,split
    p01,exhale,p01/ee.mha,p01/ee_mask.mha,,,,train
    p01,inhale,p01/ei_dicom,,,,,

Only the first three columns are needed. `lobe_codes` names the labels' convention (`lungssl`, `totalsegmentator`,
`ltrc`, `lola11`), `displacement` an exhale-to-inhale field, `split` is train, val or test.
"""

import csv
from pathlib import Path

from lungssl_data.layouts.source import LOBE_CODES, PairSource, ScanSource, parse_phase
from lungssl_data.pair import CacheError, Phase
from lungssl_data.splits import FRACTIONS

COLUMNS = ("patient_id", "phase", "image", "lung", "lobes", "lobe_codes", "displacement", "split")


def read(manifest: Path) -> list[PairSource]:
    """Patients in the order of their first line; CacheError with the line's number for what can't be used."""
    if not manifest.is_file():
        raise CacheError(f"{manifest}: no such file; expected a CSV with the columns {', '.join(COLUMNS)}")
    with open(manifest, newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle)
        unknown = set(reader.fieldnames or ()) - set(COLUMNS)
        missing = set(COLUMNS[:3]) - set(reader.fieldnames or ())
        if unknown or missing:
            raise CacheError(
                f"{manifest.name}: unknown columns {sorted(unknown)}, missing columns {sorted(missing)}; "
                f"known are {', '.join(COLUMNS)}"
            )
        lines = [(reader.line_num, {k: (v or "").strip() for k, v in row.items()}) for row in reader]
    patients: dict[str, dict] = {}
    for number, line in lines:
        try:
            _add(patients, line, manifest.parent)
        except CacheError as error:
            raise CacheError(f"{manifest.name} line {number}: {error}") from error
    if not patients:
        raise CacheError(f"{manifest.name}: no lines below the header; write one line per scan")
    return [PairSource(patient=patient, **parts) for patient, parts in patients.items()]


def _add(patients: dict[str, dict], line: dict[str, str], root: Path) -> None:
    phase: Phase = parse_phase(line["phase"])
    parts = patients.setdefault(line["patient_id"], {"scans": {}, "displacement": None, "split": None})
    if phase in parts["scans"]:
        raise CacheError(f"patient {line['patient_id']}: a second {phase} scan; a patient has one of each")
    codes = line.get("lobe_codes") or "lungssl"
    if codes not in LOBE_CODES:
        raise CacheError(f"lobe_codes {codes!r} is unknown; known are {', '.join(LOBE_CODES)}")
    split = line.get("split") or parts["split"]
    if split not in (None, *FRACTIONS):
        raise CacheError(f"split {split!r} is unknown; known are {', '.join(FRACTIONS)}")
    if parts["split"] not in (None, split):
        raise CacheError(
            f"patient {line['patient_id']}: in both {parts['split']} and {split}; a patient is in one split"
        )
    paths = {name: _path(root, line.get(name)) for name in ("image", "lung", "lobes", "displacement")}
    if paths["image"] is None:
        raise CacheError("the image column is empty; give a volume file or a DICOM folder")
    parts["scans"][phase] = ScanSource(image=paths["image"], lung=paths["lung"], lobes=paths["lobes"], lobe_codes=codes)
    parts["displacement"] = paths["displacement"] or parts["displacement"]
    parts["split"] = split


def _path(root: Path, text: str | None) -> Path | None:
    if not text:
        return None
    path = root / text
    if not path.exists():
        raise CacheError(f"{text}: no such file or folder beside the manifest")
    return path
