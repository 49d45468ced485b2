"""A copy of a cache whose displacements are estimated from the scans alone, and what that took."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

from lungssl_data.cache import PairCache, write_pair
from lungssl_tasks.registration import EstimateConfig, estimate_displacement

from lungssl.training.run_folder import write_atomic

_SECONDS = "registration_seconds.json"


def estimated_cache(cache: PairCache, folder: Path, *, say: Callable[[str], None]) -> Path:
    """Estimate what `folder` lacks. Patients of `test` aren't copied: nothing can be trained on them by mistake."""
    folder.mkdir(parents=True, exist_ok=True)
    config = EstimateConfig()
    for patient in [*cache.split("train"), *cache.split("val")]:
        pair = cache[patient]
        if len(pair.phases()) < 2 or (folder / f"{patient}.h5").exists():
            continue
        started = time.perf_counter()
        found = estimate_displacement(pair, config)
        seconds = time.perf_counter() - started
        write_pair(dataclasses.replace(pair, displacement=found, key=f"{pair.key}, {found.provenance}"), folder)
        known = _seconds(folder)
        write_atomic(folder / _SECONDS, json.dumps(known | {patient: round(seconds, 2)}, indent=1))
        say(f"displacement of {patient} estimated in {seconds:.1f} s")
    return folder


def registration_seconds(data: Path) -> float:
    """That estimating a cache's displacements took; 0 for a cache that came with them."""
    return sum(_seconds(data).values())


def _seconds(folder: Path) -> dict[str, float]:
    path = folder / _SECONDS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
