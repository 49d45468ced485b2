"""Pair cache: a folder with one HDF5 file per patient, written once, atomically.

    <patient>.h5                 attrs: format, patient, split, key (what the file was made from and how)
      /exhale                    attrs: spacing_mm, origin_mm as (x, y, z) in LPS; source_sha256; lung_ml
      /exhale/ct           int16 [z, y, x]  Hounsfield units; padding and everything outside the scanner's view -1000
      /exhale/valid        uint8 [z, y, x]  1 where the scanner measured
      /exhale/lung         uint8 [z, y, x]  1 right lung, 2 left lung
      /exhale/lobes        uint8 [z, y, x]  1 RUL, 2 RML, 3 RLL, 4 LUL, 5 LLL; optional
      /exhale/lung_points_vox  uint16 [n, 3]  random lung voxels as (z, y, x), from which crops are centred
      /inhale/...                the same on its own grid; either phase may be absent
      /exhale_to_inhale          attrs: affine (3, 4), exhale LPS mm to inhale LPS mm, and where it is from
      /exhale_to_inhale/u  float32 [3, z, y, x]  optional displacement in mm, components (x, y, z), with its own
                                 spacing_mm, origin_mm and provenance
    index.json                   a summary that is rebuilt from the files whenever it disagrees with them

Grids are axis-aligned with LPS. Volumes are chunked 32**3 (`io.md` section 2); `lz4` is bitshuffle + LZ4 and needs
hdf5plugin to read, `gzip` reads anywhere. Every dataset carries the CRC-32 of its decoded bytes.
"""

import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import h5py
import hdf5plugin
import numpy as np
from jaxtyping import UInt8, UInt16
from numpy import ndarray

from lungssl_data.cache_index import (
    FORMAT_VERSION,
    Node,
    PatientRecord,
    PhaseRecord,
    open_patient_file,
    patient_record,
    read_index,
    triple,
)
from lungssl_data.pair import (
    AIR_HU,
    CacheError,
    Displacement,
    Phase,
    PhasePair,
    PhaseScan,
    Split,
    check_patient_id,
)

CHUNK_VOX = 32
"""Chunk side: a 96**3 crop decodes 2.3 times its voxels at 32, 4.5 times at 64 (`io.md` section 2, point 1)."""
MASKS = ("valid", "lung", "lobes")
_OPEN_FILES = 32  # well under the usual limit of 256-1024 descriptors a process, with several workers


def lung_points_vox(lung: UInt8[ndarray, "z y x"], *, count: int = 4096) -> UInt16[ndarray, "n 3"]:
    """At most `count` random lung voxels as (z, y, x), the same ones for the same mask.

    4096 points cover a 4-litre lung about every 10 mm: finer than any crop jitter.
    """
    inside = np.flatnonzero(lung)
    if len(inside) > count:
        inside = np.sort(np.random.default_rng(0).choice(inside, count, replace=False))
    return np.stack(np.unravel_index(inside, lung.shape), axis=1).astype(np.uint16)


def write_pair(pair: PhasePair, folder: Path, *, compression: Literal["lz4", "gzip"] = "lz4") -> Path:
    """Write `<folder>/<patient>.h5` so that a reader sees either the old file or the whole new one.

    Temporary file beside it, read back and compared, fsync, rename, fsync of the folder.
    """
    check_patient_id(pair.patient)
    if not pair.phases():
        raise CacheError(f"patient {pair.patient}: no exhale and no inhale scan; a pair needs at least one of them")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{pair.patient}.h5"
    temporary = folder / f".{pair.patient}.{os.getpid()}.tmp"
    try:
        with h5py.File(temporary, "w") as file:
            _write(file, pair, compression)
        problems = _check(temporary)
        if problems:
            raise CacheError(f"{target.name}: written data does not read back ({problems[0]}); check disk and memory")
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return target


class PairCache:
    """A folder of patients. Cheap to open; files are opened lazily, per process, and only so many at once.

    Raises CacheError for a folder without patients and for files of another format.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CacheError(f"{self.folder}: no such cache folder; make it with `lungssl cache build`")
        self.records = {record.patient: record for record in read_index(self.folder)}
        if not self.records:
            raise CacheError(f"{self.folder}: no patient files (*.h5) here; make them with `lungssl cache build`")
        self.patients = list(self.records)
        self._handles: OrderedDict[tuple[int, str], Node] = OrderedDict()

    def __len__(self) -> int:
        return len(self.patients)

    def __iter__(self) -> Iterator[PhasePair]:
        return (self[patient] for patient in self.patients)

    def __getitem__(self, patient: str | int) -> PhasePair:
        """Everything of one patient, by name or place."""
        record = self.record(self.patients[patient] if isinstance(patient, int) else patient)
        file = self._file(record.patient)
        affine = record.exhale_to_inhale
        return PhasePair(
            patient=record.patient,
            exhale=self._scan(record, "exhale") if record.exhale else None,
            inhale=self._scan(record, "inhale") if record.inhale else None,
            exhale_to_inhale=np.asarray(affine) if affine else None,
            affine_provenance=file["exhale_to_inhale"].attrs["provenance"] if affine else "",
            displacement=_read_displacement(file) if record.has_displacement else None,
            split=record.split,
            key=record.key,
        )

    def record(self, patient: str) -> PatientRecord:
        """Geometry and contents of one patient without reading voxels."""
        if patient not in self.records:
            raise CacheError(f"{self.folder}: no patient {patient!r} among {len(self)}; see `lungssl cache info`")
        return self.records[patient]

    def phase_record(self, patient: str, phase: Phase) -> PhaseRecord:
        """Geometry of one phase; CacheError where the patient lacks it."""
        record = self.record(patient)
        phase_record = getattr(record, phase)
        if phase_record is None:
            raise CacheError(f"patient {patient} has no {phase} scan, only {', '.join(record.phases())}")
        return phase_record

    def split(self, name: Split) -> list[str]:
        """Patients of one split."""
        return [patient for patient, record in self.records.items() if record.split == name]

    def read(
        self, patient: str, phase: Phase, name: str, start_vox: tuple[int, int, int], size_vox: tuple[int, int, int]
    ) -> ndarray:
        """A box of one dataset, starting at (z, y, x) index `start_vox`; outside the volume air (ct) or 0."""
        dataset = self._dataset(patient, phase, name)
        box = np.full(size_vox, AIR_HU if name == "ct" else 0, dtype=dataset.dtype)
        low = [max(0, s) for s in start_vox]
        high = [min(n, s + k) for n, s, k in zip(dataset.shape, start_vox, size_vox, strict=True)]
        if all(a < b for a, b in zip(low, high, strict=True)):
            source = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            into = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start_vox, strict=True))
            try:
                box[into] = dataset[source]
            except OSError as error:
                raise CacheError(
                    f"{patient}.h5: /{phase}/{name} is damaged within {source}; delete the file and rerun "
                    f"`lungssl cache build`"
                ) from error
        return box

    def lung_points_vox(self, patient: str, phase: Phase) -> UInt16[ndarray, "n 3"]:
        """Random lung voxels (z, y, x) to centre crops on."""
        return self._dataset(patient, phase, "lung_points_vox")[()]

    def displacement(self, patient: str) -> Displacement | None:
        """The field, read whole, or None."""
        return _read_displacement(self._file(patient)) if self.record(patient).has_displacement else None

    def fingerprint(self) -> str:
        """Hash over all patients' keys and splits: equal for equal data."""
        text = json.dumps(sorted((r.patient, r.key, r.split) for r in self.records.values()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def verify(self) -> Iterator[tuple[str, list[str]]]:
        """Read everything; yield each patient with its problems (none: an empty list)."""
        for patient in self.patients:
            yield patient, _check(self.folder / f"{patient}.h5")

    def close(self) -> None:
        """Close all open files."""
        while self._handles:
            self._handles.popitem()[1].close()

    def _file(self, patient: str) -> Node:
        key = (os.getpid(), patient)  # a handle must not be used across a fork: HDF5 would mix up file offsets
        if key not in self._handles:
            self._handles[key] = open_patient_file(self.folder / f"{patient}.h5")
            if len(self._handles) > _OPEN_FILES:
                self._handles.popitem(last=False)[1].close()
        self._handles.move_to_end(key)
        return self._handles[key]

    def _dataset(self, patient: str, phase: Phase, name: str) -> Node:
        record = self.phase_record(patient, phase)
        if name not in record.datasets:
            raise CacheError(f"patient {patient}: {phase} has no {name!r}, only {', '.join(record.datasets)}")
        return self._file(patient)[f"{phase}/{name}"]

    def _scan(self, record: PatientRecord, phase: Phase) -> PhaseScan:
        group = self._file(record.patient)[phase]
        return PhaseScan(
            ct_hu=group["ct"][()],
            valid=group["valid"][()],
            lung=group["lung"][()],
            lobes=group["lobes"][()] if "lobes" in group else None,
            spacing_mm=triple(group.attrs["spacing_mm"]),
            origin_mm=triple(group.attrs["origin_mm"]),
            source_sha256=group.attrs["source_sha256"],
        )


def _write(file: Node, pair: PhasePair, compression: str) -> None:
    file.attrs.update(format=FORMAT_VERSION, patient=pair.patient, split=pair.split, key=pair.key)
    for phase in pair.phases():
        scan = pair.scan(phase)
        group = file.create_group(phase)
        group.attrs["spacing_mm"] = scan.spacing_mm
        group.attrs["origin_mm"] = scan.origin_mm
        group.attrs["source_sha256"] = scan.source_sha256
        group.attrs["lung_ml"] = np.count_nonzero(scan.lung) * scan.geometry().voxel_ml()
        _dataset(group, "ct", scan.ct_hu, compression)
        for name in MASKS:
            mask = getattr(scan, name)
            if mask is not None:
                _dataset(group, name, mask, compression)
        _dataset(group, "lung_points_vox", lung_points_vox(scan.lung), compression)
    if pair.exhale_to_inhale is not None:
        link = file.create_group("exhale_to_inhale")
        link.attrs.update(affine=pair.exhale_to_inhale, provenance=pair.affine_provenance)
        if pair.displacement is not None:
            field = pair.displacement
            _dataset(link, "u", field.u_mm, compression)
            link["u"].attrs.update(spacing_mm=field.spacing_mm, origin_mm=field.origin_mm, provenance=field.provenance)


def _dataset(group: Node, name: str, data: ndarray, compression: str) -> None:
    options: dict[str, Any] = {}
    if data.ndim >= 3:
        options["chunks"] = (1,) * (data.ndim - 3) + tuple(min(CHUNK_VOX, n) for n in data.shape[-3:])
        if compression == "gzip":
            options |= {"compression": "gzip", "compression_opts": 4, "shuffle": True}
        else:
            options |= dict(hdf5plugin.Bitshuffle(cname="lz4"))
    group.create_dataset(name, data=data, **options)
    group[name].attrs["crc32"] = _crc32(data)


def _crc32(data: ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(data).data)


def _check(path: Path) -> list[str]:
    """Problems of one file: unreadable, or a dataset whose bytes changed."""
    problems: list[str] = []
    try:
        with open_patient_file(path) as file:

            def visit(name: str, item: Node) -> None:
                if isinstance(item, h5py.Dataset) and _crc32(item[()]) != item.attrs["crc32"]:
                    problems.append(f"/{name}: checksum differs")

            file.visititems(visit)
            for phase in patient_record(file).phases():
                if not len(file[phase]["lung_points_vox"]):
                    problems.append(f"/{phase}: empty lung mask")
    except (OSError, RuntimeError, KeyError, CacheError) as error:
        problems.append(f"unreadable ({type(error).__name__})")
    return problems


def _read_displacement(file: Node) -> Displacement:
    data = file["exhale_to_inhale/u"]
    return Displacement(
        u_mm=data[()],
        spacing_mm=triple(data.attrs["spacing_mm"]),
        origin_mm=triple(data.attrs["origin_mm"]),
        provenance=data.attrs["provenance"],
    )
