"""What is in each patient file, known without reading voxels; kept in `index.json`, rebuilt from the files."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py

from lungssl_data.pair import CacheError, Phase, Split

FORMAT_VERSION = 1

Node = Any  # an HDF5 file, group or dataset; h5py types an item as a union of all of them


@dataclass(frozen=True, kw_only=True)
class PhaseRecord:
    """What the index knows of one phase."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    lung_ml: float
    datasets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PatientRecord:
    """What the index knows of one patient."""

    patient: str
    split: Split
    key: str
    exhale: PhaseRecord | None
    inhale: PhaseRecord | None
    exhale_to_inhale: tuple[tuple[float, ...], ...] | None
    has_displacement: bool

    def phases(self) -> tuple[Phase, ...]:
        """The phases that are there, exhale first."""
        return tuple(p for p in ("exhale", "inhale") if getattr(self, p) is not None)


def rebuild_index(folder: Path) -> list[PatientRecord]:
    """Read every patient file's head and write `index.json`."""
    return read_index(folder, trust=False)


def read_index(folder: Path, *, trust: bool = True) -> list[PatientRecord]:
    index_path = folder / "index.json"
    known = json.loads(index_path.read_text()) if trust and index_path.exists() else {}
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.h5")):
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        entry = known.get(path.stem)
        if entry is None or entry["stamp"] != stamp:
            with open_patient_file(path) as file:
                entry = {"stamp": stamp, **asdict(patient_record(file))}
        entries[path.stem] = entry
    if entries != known and os.access(folder, os.W_OK):
        temporary = folder / f".index.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(entries, indent=1))
        os.replace(temporary, index_path)
    return [_record_from_json(entry) for entry in entries.values()]


def _record_from_json(entry: dict[str, Any]) -> PatientRecord:
    def phase(data: dict[str, Any] | None) -> PhaseRecord | None:
        if data is None:
            return None
        return PhaseRecord(
            shape=tuple(data["shape"]),
            spacing_mm=triple(data["spacing_mm"]),
            origin_mm=triple(data["origin_mm"]),
            lung_ml=data["lung_ml"],
            datasets=tuple(data["datasets"]),
        )

    affine = entry["exhale_to_inhale"]
    return PatientRecord(
        patient=entry["patient"],
        split=entry["split"],
        key=entry["key"],
        exhale=phase(entry["exhale"]),
        inhale=phase(entry["inhale"]),
        exhale_to_inhale=tuple(tuple(row) for row in affine) if affine else None,
        has_displacement=entry["has_displacement"],
    )


def patient_record(file: Node) -> PatientRecord:
    def phase(name: Phase) -> PhaseRecord | None:
        if name not in file:
            return None
        group = file[name]
        return PhaseRecord(
            shape=tuple(group["ct"].shape),
            spacing_mm=triple(group.attrs["spacing_mm"]),
            origin_mm=triple(group.attrs["origin_mm"]),
            lung_ml=float(group.attrs["lung_ml"]),
            datasets=tuple(group),
        )

    link = file.get("exhale_to_inhale")
    return PatientRecord(
        patient=str(file.attrs["patient"]),
        split=file.attrs["split"],
        key=str(file.attrs["key"]),
        exhale=phase("exhale"),
        inhale=phase("inhale"),
        exhale_to_inhale=None if link is None else tuple(tuple(map(float, row)) for row in link.attrs["affine"]),
        has_displacement=link is not None and "u" in link,
    )


def open_patient_file(path: Path) -> Node:
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise CacheError(f"{path}: not a readable HDF5 file; delete it and rerun `lungssl cache build`") from error
    version = file.attrs.get("format")
    if version != FORMAT_VERSION:
        file.close()
        raise CacheError(
            f"{path}: cache format {version}, this lungssl reads {FORMAT_VERSION}; "
            f"rebuild it with `lungssl cache build`"
        )
    return file


def triple(values: Any) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in values)
    return x, y, z
