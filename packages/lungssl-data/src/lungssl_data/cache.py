"""Pair cache: a folder with one HDF5 file per patient, written once, atomically.

    <patient>.h5                 attrs: format, patient, person, split, key (what the file was made from and how),
                                 head_sha256 (over all other attributes, names and shapes in the file)
      /exhale                    attrs: spacing_mm, origin_mm as (x, y, z) in LPS; source_sha256; lung_ml
      /exhale/ct           int16 [z, y, x]  Hounsfield units; padding and everything outside the scanner's view -1000
      /exhale/valid        uint8 [z, y, x]  1 where the scanner measured
      /exhale/lung         uint8 [z, y, x]  1 right lung, 2 left lung
      /exhale/lobes        uint8 [z, y, x]  1 RUL, 2 RML, 3 RLL, 4 LUL, 5 LLL; optional
      /exhale/lesion       uint8 [z, y, x]  1 ground glass, 2 consolidation, 3 lesion of unnamed type; optional
      /exhale/vessels      uint8 [z, y, x]  1 airway, 2 artery, 3 vein, 4 vessel of unnamed kind; optional
      /exhale/lung_points_vox  uint16 [n, 3]  random lung voxels as (z, y, x), from which crops are centred
      /inhale/...                the same on its own grid; either phase may be absent
      /exhale_to_inhale          attrs: affine (3, 4), exhale LPS mm to inhale LPS mm, and where it is from
      /exhale_to_inhale/u  float32 [3, z, y, x]  optional displacement in mm, components (x, y, z), with its own
                                 spacing_mm, origin_mm and provenance
      /exhale_to_inhale/landmarks_expert, landmarks_automatic  float64 [n, 2, 3]  optional corresponding points, exhale
                                 then inhale, (x, y, z) in LPS mm: set by people, found by a program
      /chunks/exhale       int64 [v, z, y, x, 2]  place and size in bytes of each chunk of the phase's volumes, these in
                                 the order of attribute `volumes`, ct first; absent in gzip files
    index.json                   a summary that is rebuilt from the files whenever it disagrees with them

Grids are axis-aligned with LPS. Volumes are in chunks of 32**3 voxels (fewer where a side is shorter): `lz4` is the
filters shuffle (ct only) and LZ4 with one LZ4 block per byte plane (`chunk_codec.py`), needs hdf5plugin to read and is
read here without HDF5; `gzip` reads anywhere. Every dataset but `/chunks` carries the CRC-32 of its decoded bytes.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from jaxtyping import UInt16
from numpy import ndarray

from lungssl_data.cache_file import Compression, check_file, read_displacement, read_landmarks, write_patient
from lungssl_data.cache_index import PatientRecord, PhaseRecord, open_patient_file, read_index, temporary_path
from lungssl_data.direct_chunks import PatientChunks
from lungssl_data.pair import (
    AIR_HU,
    CacheError,
    Displacement,
    LandmarkKind,
    Landmarks,
    Phase,
    PhasePair,
    PhaseScan,
    Split,
    check_patient_id,
)

_OPEN_FILES = 128
"""Of the usual 1024 descriptors a process; loaders pass tensors between processes by descriptors, too."""


def write_pair(pair: PhasePair, folder: Path, *, compression: Compression = "lz4") -> Path:
    """Write `<folder>/<patient>.h5` so that a reader sees either the old file or the whole new one.

    Temporary file beside it, read back and compared, fsync, rename, fsync of the folder.
    """
    check_patient_id(pair.patient)
    if not pair.phases():
        raise CacheError(f"patient {pair.patient}: no exhale and no inhale scan; a pair needs at least one of them")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{pair.patient}.h5"
    temporary = temporary_path(folder, pair.patient)
    try:
        with h5py.File(temporary, "w") as file:
            write_patient(file, pair, compression)
        problems = check_file(temporary)
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
    """A folder of patients. Cheap to open; files are opened lazily, and only so many at once.

    Open files are memory maps: they survive a fork, and pickling leaves them behind. Raises CacheError for a folder
    without patients and for files of another format.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CacheError(f"{self.folder}: no such cache folder; make it with `lungssl cache build`")
        self.records = {record.patient: record for record in read_index(self.folder)}
        if not self.records:
            raise CacheError(f"{self.folder}: no patient files (*.h5) here; make them with `lungssl cache build`")
        self.patients = list(self.records)
        self._open: OrderedDict[str, PatientChunks] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def __len__(self) -> int:
        return len(self.patients)

    def __iter__(self) -> Iterator[PhasePair]:
        return (self[patient] for patient in self.patients)

    def __getitem__(self, patient: str | int) -> PhasePair:
        """Everything of one patient, by name or place."""
        record = self.record(self.patients[patient] if isinstance(patient, int) else patient)
        affine = record.exhale_to_inhale
        with open_patient_file(self._path(record.patient)) as file:
            return PhasePair(
                patient=record.patient,
                exhale=self._scan(record, "exhale") if record.exhale else None,
                inhale=self._scan(record, "inhale") if record.inhale else None,
                exhale_to_inhale=np.asarray(affine) if affine else None,
                affine_provenance=file["exhale_to_inhale"].attrs["provenance"] if affine else "",
                displacement=read_displacement(file) if record.has_displacement else None,
                landmarks=read_landmarks(file),
                person=record.person,
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
        """A box of one volume, starting at (z, y, x) index `start_vox`; outside the volume air (ct) or 0.

        CacheError naming patient and chunk where the file is damaged.
        """
        out = np.empty(size_vox, np.int16 if name == "ct" else np.uint8)
        return self.read_into(patient, phase, name, start_vox, out)

    def read_into(
        self, patient: str, phase: Phase, name: str, start_vox: tuple[int, int, int], out: ndarray
    ) -> ndarray:
        """`read` into `out` [z, y, x], int16 for ct and uint8 for masks, C-contiguous; returns it."""
        shape = self._shape(patient, phase, name)
        if any(s < 0 or s + k > n for s, k, n in zip(start_vox, out.shape, shape, strict=True)):
            out.fill(AIR_HU if name == "ct" else 0)
        chunks = self._chunks(patient)
        volume = chunks.volumes.get(f"{phase}/{name}")
        if volume is None:
            self._read_by_hdf5(patient, f"{phase}/{name}", start_vox, out)
        elif volume.shape != shape:
            raise CacheError(f"{self._path(patient)}: changed since the cache was opened; open the cache again")
        else:
            chunks.read_into(f"{phase}/{name}", start_vox, out)
        return out

    def lung_points_vox(self, patient: str, phase: Phase) -> UInt16[ndarray, "n 3"]:
        """Random lung voxels (z, y, x) to centre crops on."""
        self.phase_record(patient, phase)
        with open_patient_file(self._path(patient)) as file:
            return file[f"{phase}/lung_points_vox"][()]

    def displacement(self, patient: str) -> Displacement | None:
        """The field, read whole, or None."""
        if not self.record(patient).has_displacement:
            return None
        with open_patient_file(self._path(patient)) as file:
            return read_displacement(file)

    def landmarks(self, patient: str) -> dict[LandmarkKind, Landmarks]:
        """Corresponding points by who set them; none: empty."""
        if not self.record(patient).landmarks:
            return {}
        with open_patient_file(self._path(patient)) as file:
            return read_landmarks(file)

    def reader_kind(self, patient: str) -> Literal["direct", "hdf5"]:
        """How a patient's volumes are read: straight from the chunks (`lz4`), or by HDF5 (`gzip`, much slower)."""
        return "direct" if self._chunks(patient).volumes else "hdf5"

    def fingerprint(self) -> str:
        """Hash over all patients' keys and splits: equal for equal data."""
        text = json.dumps(sorted((r.patient, r.key, r.split) for r in self.records.values()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def verify(self) -> Iterator[tuple[str, list[str]]]:
        """Read everything; yield each patient with its problems (none: an empty list)."""
        for patient in self.patients:
            yield patient, check_file(self._path(patient))

    def close(self) -> None:
        """Let go of all open files."""
        self._open.clear()

    def _path(self, patient: str) -> Path:
        return self.folder / f"{patient}.h5"

    def _chunks(self, patient: str) -> PatientChunks:
        # Single steps on the dict, no lock: threads may read at once, and a lock might be held across a fork.
        chunks = self._open.pop(patient, None) or PatientChunks(self._path(patient))
        self._open[patient] = chunks
        while len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return chunks

    def _shape(self, patient: str, phase: Phase, name: str) -> tuple[int, int, int]:
        record = self.phase_record(patient, phase)
        if name not in record.datasets:
            raise CacheError(f"patient {patient}: {phase} has no {name!r}, only {', '.join(record.datasets)}")
        return record.shape

    def _read_by_hdf5(self, patient: str, name: str, start_vox: tuple[int, int, int], out: ndarray) -> None:
        # Opened for each box: nothing is open across a fork, and gzip takes 20 times as long as opening does.
        with open_patient_file(self._path(patient)) as file:
            dataset = file[name]
            low = [max(0, s) for s in start_vox]
            high = [min(n, s + k) for n, s, k in zip(dataset.shape, start_vox, out.shape, strict=True)]
            if not all(a < b for a, b in zip(low, high, strict=True)):
                return
            source = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            into = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start_vox, strict=True))
            try:
                out[into] = dataset[source]
            except OSError as error:
                chunks = [(a // c, (b - 1) // c) for a, b, c in zip(low, high, dataset.chunks, strict=True)]
                raise CacheError(
                    f"patient {patient}: /{name} is damaged in a chunk within {chunks} (z, y, x); "
                    f"delete the patient's file and rerun `lungssl cache build`"
                ) from error

    def _scan(self, record: PatientRecord, phase: Phase) -> PhaseScan:
        known = self.phase_record(record.patient, phase)

        def whole(name: str) -> ndarray:
            return self.read(record.patient, phase, name, (0, 0, 0), known.shape)

        return PhaseScan(
            ct_hu=whole("ct"),
            valid=whole("valid"),
            lung=whole("lung"),
            lobes=whole("lobes") if "lobes" in known.datasets else None,
            lesion=whole("lesion") if "lesion" in known.datasets else None,
            vessels=whole("vessels") if "vessels" in known.datasets else None,
            spacing_mm=known.spacing_mm,
            origin_mm=known.origin_mm,
            source_sha256=known.source_sha256,
        )
