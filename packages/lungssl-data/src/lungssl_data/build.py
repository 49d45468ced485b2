"""Building a pair cache from files: what is done already stays, what fails is reported, the rest goes on.

    <cache>/build.jsonl      one line per patient of each build: outcome, message, warnings, seconds
    <cache>/.ids             whether patient ids are as given or keyed, and with which key (`building/plan.py`)
    <cache>/.splits.json     the split of every patient ever listed (`building/plan.py`)
    <cache>/.hashes.jsonl    content hashes of source files (`building/hashes.py`); safe to delete
    <cache>/.<patient>.lock  a patient that a builder is at work on (`building/locks.py`)

Any number of builders, on any number of machines, may work on one folder at a time.
"""

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Literal

from lungssl_data.building.duplicates import EqualScans
from lungssl_data.building.hashes import append
from lungssl_data.building.locks import STALE_S, Locks, sweep
from lungssl_data.building.patient import Built, PhaseCheck, Recipe, build_patient, failed, pair_from_source
from lungssl_data.building.plan import check_case, decide_splits, keep_to_ids, known_patients, patient_in, shard_of
from lungssl_data.building.workers import Workers
from lungssl_data.cache_index import rebuild_index
from lungssl_data.layouts.patients import check_ids
from lungssl_data.layouts.source import PairSource
from lungssl_data.pair import CacheError, Split
from lungssl_data.prepare import PrepareConfig

__all__ = ["Built", "PhaseCheck", "build_cache", "pair_from_source"]

_POLL_S = 0.3
"""Between looks at patients that another builder is at work on."""


def build_cache(
    sources: Sequence[PairSource],
    folder: Path,
    *,
    config: PrepareConfig,
    compression: Literal["lz4", "gzip"] = "lz4",
    jobs: int = 0,
    shard: tuple[int, int] = (1, 1),
    phase_check: PhaseCheck = "fail",
    ids: str = "as given",
    time_limit_s: float | None = None,
    memory_limit_gib: float | None = None,
    lock_stale_s: float = STALE_S,
) -> Iterator[Built]:
    """Build or complete a cache, patient by patient; yields each one's outcome as it is known.

    A patient is rebuilt when its files, `config` or the code's version changed (content hash). Patients in the folder
    that `sources` doesn't name are left alone. A patient that fails leaves no file of this build behind. Sources with a
    `problem` fail with it, first of all; they get no split, and nobody else's depends on them.

    `jobs` processes work side by side and may die without harm to other patients; with 0 all happens in this process,
    and the two limits, which are those of a process, can't be given. `shard` (i, n) builds the i-th of n parts; splits
    are those of the whole list. `phase_check` says whether an inhale with less gas than its exhale fails its patient.
    `ids` says of what kind the patients' ids are (`ids.ids_of`); a folder keeps to one kind.
    """
    check_ids(sources)
    if jobs == 0 and (time_limit_s is not None or memory_limit_gib is not None):
        raise ValueError("limits of time and memory are those of a worker process; build with jobs=1 or more")
    mine = shard_of(sources, shard)
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"{folder}: is a file; name a folder for the cache")
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    locks = Locks(folder, stale_s=lock_stale_s)
    try:
        keep_to_ids(folder, ids, locks)
        known = known_patients(folder)
        check_case(sources, known)
        splits = decide_splits([source for source in sources if not source.problem], folder, known, locks)
        equal_scans = EqualScans(known.values())
        recipe = Recipe(
            folder=folder,
            config=config,
            compression=compression,
            phase_check=phase_check,
            threads=max(1, (os.cpu_count() or 1) // max(jobs, 1)),
        )
        unusable = (failed(source.patient, source.problem, folder) for source in mine if source.problem)
        usable = [source for source in mine if not source.problem]
        if jobs == 0:
            outcomes = _here(usable, splits, recipe, locks)
        else:
            workers = Workers(jobs, recipe, time_limit_s=time_limit_s, memory_limit_gib=memory_limit_gib)
            outcomes = _in_workers(usable, splits, workers, locks)
        for built in chain(unusable, outcomes):
            record = patient_in(folder, built.patient) if built.outcome == "built" else None
            if record is not None:
                built = replace(built, warnings=(*built.warnings, *equal_scans.warnings(record)))
            _log(folder, built)
            yield built
    finally:
        locks.close()
    rebuild_index(folder)


def _here(sources: Sequence[PairSource], splits: dict[str, Split], recipe: Recipe, locks: Locks) -> Iterator[Built]:
    queue = deque(sources)
    while queue:
        for _ in range(len(queue)):
            source = queue.popleft()
            if not locks.acquire(source.patient):
                queue.append(source)  # another builder has it: the others first, then see what it made
                continue
            try:
                built = build_patient(source, splits[source.patient], recipe)
            finally:
                locks.release(source.patient)
            yield built
        if queue:
            time.sleep(_POLL_S)


def _in_workers(
    sources: Sequence[PairSource], splits: dict[str, Split], workers: Workers, locks: Locks
) -> Iterator[Built]:
    queue = deque(sources)
    try:
        while queue or workers.busy():
            for _ in range(len(queue)):
                if not workers.idle():
                    break
                source = queue.popleft()
                if locks.acquire(source.patient):
                    workers.start(source, splits[source.patient])
                else:
                    queue.append(source)
            if not workers.busy():
                time.sleep(_POLL_S)
                continue
            for built in workers.finished(_POLL_S if workers.idle() and queue else 60.0):
                locks.release(built.patient)
                yield built
    finally:
        workers.close()


def _log(folder: Path, built: Built) -> None:
    line = {
        "unix_s": round(time.time()),
        "patient": built.patient,
        "outcome": built.outcome,
        "message": built.message,
        "warnings": built.warnings,
        "time_s": round(built.time_s, 2),
    }
    append(folder / "build.jsonl", json.dumps(line) + "\n")
