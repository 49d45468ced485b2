"""A copy of a cache whose displacements are estimated from the scans alone, and what that took."""

import dataclasses
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lungssl_data.cache import PairCache, write_pair
from lungssl_tasks.registration import EstimateConfig, estimate_displacement

from lungssl.training.run_folder import write_atomic

_SECONDS = "registration_seconds.json"


def estimated_cache(cache: PairCache, folder: Path, config: EstimateConfig, *, say: Callable[[str], None]) -> Path:
    """Estimate what a folder in `folder`, one for each cache and `config`, lacks; returns it.

    Patients of `test` aren't copied: nothing can be trained on them by mistake. One process at a time estimates, others
    wait for it.
    """
    settings = json.dumps([cache.fingerprint(), dataclasses.asdict(config)], sort_keys=True)
    folder = folder / hashlib.sha256(settings.encode()).hexdigest()[:8]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _estimate(cache, folder, config, say)
    return folder


def _estimate(cache: PairCache, folder: Path, config: EstimateConfig, say: Callable[[str], None]) -> None:
    for patient in [*cache.split("train"), *cache.split("val")]:
        pair = cache[patient]
        if len(pair.phases()) < 2 or (folder / f"{patient}.h5").exists():
            continue
        started = time.perf_counter()
        found = estimate_displacement(pair, config)
        seconds = time.perf_counter() - started
        write_atomic(folder / _SECONDS, json.dumps(_seconds(folder) | {patient: round(seconds, 2)}, indent=1))
        write_pair(dataclasses.replace(pair, displacement=found, key=f"{pair.key}, {found.provenance}"), folder)
        say(f"displacement of {patient} estimated in {seconds:.1f} s")


def registration_seconds(data: Path, patients: Sequence[str]) -> float:
    """That estimating these patients' displacements took; 0 for a cache that came with them."""
    known = _seconds(data)
    return sum(known.get(patient, 0.0) for patient in patients)


def _seconds(folder: Path) -> dict[str, float]:
    path = folder / _SECONDS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
