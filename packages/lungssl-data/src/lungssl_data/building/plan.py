"""Which patients a build is about, and the split of each: decided once for the whole list, whatever is built where."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import get_args

from lungssl_data.building.locks import Locks
from lungssl_data.cache_index import PatientRecord, open_patient_file, patient_record, temporary_path
from lungssl_data.layouts.source import PairSource
from lungssl_data.pair import CacheError, Split
from lungssl_data.splits import assign_splits

_DAMAGED_IDS = "delete it if you are sure that all ids in this cache are of the kind that this build makes"
_DAMAGED_SPLITS = "delete it: patients in the cache keep their splits, those who were only listed may get others"


def known_patients(folder: Path) -> dict[str, PatientRecord]:
    """The cache's readable patients; a damaged file or one of another format counts as not built."""
    found = {}
    for path in sorted(folder.glob("*.h5")):
        record = patient_in(folder, path.stem)
        if record is not None:
            found[path.stem] = record
    return found


def patient_in(folder: Path, patient: str) -> PatientRecord | None:
    """What the cache holds of one patient, or None if nothing that can be read."""
    try:
        with open_patient_file(folder / f"{patient}.h5") as file:
            record = patient_record(file)
    except (CacheError, OSError, RuntimeError, KeyError, TypeError, AttributeError):  # what h5py raises for damage
        return None
    return record if record.patient == patient else None  # a copy of another patient's file is not this one's


def check_case(sources: Sequence[PairSource], known: Iterable[str]) -> None:
    """CacheError for an id that differs from one in the cache in case only: one file on disks that ignore case."""
    there = {patient.lower(): patient for patient in known}
    for source in sources:
        other = there.get(source.patient.lower(), source.patient)
        if other != source.patient:
            raise CacheError(
                f"patient {source.patient} ({source.place}) is {other} in the cache; write it alike if they are one "
                f"patient, else rename one"
            )


def shard_of(sources: Sequence[PairSource], shard: tuple[int, int]) -> list[PairSource]:
    """The part `(i, n)` of the patients, 1 to n: by the SHA-256 of the id, so the same on every machine."""
    index, count = shard
    if not 1 <= index <= count:
        raise CacheError(f"shard {index}/{count}: the first number runs from 1 to the second")
    return [s for s in sources if int(hashlib.sha256(s.patient.encode()).hexdigest(), 16) % count == index - 1]


def keep_to_ids(folder: Path, ids: str, locks: Locks) -> None:
    """Hold a folder to one kind of ids, kept in `<folder>/.ids`; CacheError where it has another.

    A patient under an id as given and under a keyed one, or under two keys, would count as two people.
    """
    path = folder / ".ids"
    with locks.holding(".ids"):
        before = _text(path, _DAMAGED_IDS)
        if not before:
            os.replace(_written(path, ids), path)
    if before not in ("", ids):
        raise CacheError(
            f"this cache has patient ids {before}, and this build's are {ids}: one patient would have two; "
            f"build with the same ids and key as before, or into another folder"
        )


def decide_splits(
    sources: Sequence[PairSource], folder: Path, known: dict[str, PatientRecord], locks: Locks
) -> dict[str, Split]:
    """A split for each patient of the list and of the cache; what was decided before stays.

    The decisions are kept in `<folder>/.splits.json`, under a lock: several builders of one folder, each with its
    shard, read the same ones. Builders of folders of their own agree as long as they are given the same list.
    Raises CacheError where sources demand different splits for one person.
    """
    path = folder / ".splits.json"
    persons = {patient: record.person for patient, record in known.items()}
    persons |= {source.patient: source.person for source in sources}
    while True:
        with locks.holding(".splits"):
            before = _decided(path)
            fixed = dict(before)
            fixed.update((patient, record.split) for patient, record in known.items())
            fixed.update((source.patient, source.split) for source in sources if source.split is not None)
            splits = assign_splits([*known, *(source.patient for source in sources)], fixed, persons)
            if before | splits == before:
                return splits
            temporary = _written(path, json.dumps(before | splits, indent=0))
            if locks.holds(".splits"):  # else another builder has decided since: its decisions count
                os.replace(temporary, path)
                return splits
            temporary.unlink()


def _decided(path: Path) -> dict[str, Split]:
    """The splits decided before; CacheError where the file is damaged, as deciding anew could leak patients."""
    if not path.exists():
        return {}
    try:
        decided = json.loads(_text(path, _DAMAGED_SPLITS))
    except ValueError:
        decided = None
    if not isinstance(decided, dict) or not all(split in get_args(Split) for split in decided.values()):
        raise CacheError(f"{path}: is damaged; {_DAMAGED_SPLITS}")
    return decided


def _text(path: Path, next_step: str) -> str:
    """A small file's text, empty where there is none; CacheError where it can't be read."""
    if not path.exists():
        return ""
    if path.is_file():
        with suppress(OSError, UnicodeDecodeError):
            return path.read_text(encoding="utf-8")
    raise CacheError(f"{path}: can't be read, or is damaged; {next_step}")


def _written(path: Path, text: str) -> Path:
    """A temporary file on disk to put in a file's place: a crash or power loss leaves the old one or the new one."""
    temporary = temporary_path(path.parent, path.name.replace(".", "_"))
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return temporary
