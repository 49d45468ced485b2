"""What is in each patient file, known without reading voxels; kept in `index.json`, rebuilt from the files."""

import functools
import hashlib
import json
import os
import re
import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import h5py

from lungssl_data.pair import CacheError, LandmarkKind, Phase, Split

FORMAT_VERSION = 3
LANDMARKS = "exhale_to_inhale/landmarks_{}"
"""Where the landmarks of each kind are in a patient file."""

Node = Any  # an HDF5 file, group or dataset; h5py types an item as a union of all of them


@dataclass(frozen=True, kw_only=True)
class PhaseRecord:
    """What the index knows of one phase."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    lung_ml: float
    datasets: tuple[str, ...]
    source_sha256: str


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
    landmarks: tuple[LandmarkKind, ...]
    person: str

    def phases(self) -> tuple[Phase, ...]:
        """The phases that are there, exhale first."""
        return tuple(p for p in ("exhale", "inhale") if getattr(self, p) is not None)


def rebuild_index(folder: Path) -> list[PatientRecord]:
    """Read every patient file's head and write `index.json`."""
    return read_index(folder, trust=False)


def read_index(folder: Path, *, trust: bool = True) -> list[PatientRecord]:
    index_path = folder / "index.json"
    known = _known(index_path) if trust else {}
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.h5")):
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        entry = known.get(path.stem)
        if entry is None or entry["stamp"] != stamp:
            entry = {"stamp": stamp, **_read_record(path)}
        if entry["patient"] != path.stem:
            raise CacheError(
                f"{path}: holds patient {entry['patient']}, so it was renamed or copied; delete it, or name it "
                f"{entry['patient']}.h5 again"
            )
        entries[path.stem] = entry
    if entries != known and os.access(folder, os.W_OK):
        temporary = temporary_path(folder, "index")
        temporary.write_text(json.dumps({"format": FORMAT_VERSION, "patients": entries}, indent=1), encoding="utf-8")
        os.replace(temporary, index_path)
    return [_record_from_json(entry) for entry in entries.values()]


def temporary_path(folder: Path, name: str) -> Path:
    """Where a file is written before it is published: `.<name>.<machine>.<pid>-<random>.tmp`, no dot in any part."""
    return folder / f".{name}.{this_machine()}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


@functools.cache
def this_machine() -> str:
    """Names what a process id is counted in: host, boot and process namespace. Containers often share a host's name."""
    parts = [socket.gethostname()]
    for path in (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")):
        try:
            parts.append(os.readlink(path) if path.is_symlink() else path.read_text(encoding="ascii").strip())
        except OSError:
            parts.append("")  # not Linux
    host = re.sub(r"[^A-Za-z0-9-]", "-", parts[0])
    return f"{host}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


def _known(index_path: Path) -> dict[str, dict[str, Any]]:
    """The index as it is on disk; empty where there is none, it is of another format or not whole: files are asked."""
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index.get("patients", {}) if isinstance(index, dict) and index.get("format") == FORMAT_VERSION else {}


def _read_record(path: Path) -> dict[str, Any]:
    try:
        with open_patient_file(path) as file:
            return asdict(patient_record(file))
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{path}: damaged HDF5 file; delete it and rerun `lungssl cache build`") from error


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
            source_sha256=data["source_sha256"],
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
        landmarks=tuple(entry["landmarks"]),
        person=entry["person"],
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
            source_sha256=str(group.attrs["source_sha256"]),
        )

    affine = file["exhale_to_inhale"].attrs.get("affine") if "exhale_to_inhale" in file else None
    return PatientRecord(
        patient=str(file.attrs["patient"]),
        split=file.attrs["split"],
        key=str(file.attrs["key"]),
        exhale=phase("exhale"),
        inhale=phase("inhale"),
        exhale_to_inhale=tuple(tuple(map(float, row)) for row in affine) if affine is not None else None,
        has_displacement="exhale_to_inhale/u" in file,
        landmarks=tuple(kind for kind in get_args(LandmarkKind) if LANDMARKS.format(kind) in file),
        person=str(file.attrs["person"]),
    )


def open_patient_file(path: Path) -> Node:
    if path.exists() and not path.is_file():  # who opens a pipe waits for ever
        raise CacheError(f"{path}: is neither a file nor a link to one; take it out of the cache's folder")
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
