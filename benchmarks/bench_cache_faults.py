"""Kill -9 at random moments of a build with two concurrent builders: what is lost?

Run: uv run python benchmarks/bench_cache_faults.py [--kills 200] [--quick]

Each run starts two builders on one empty folder, kills one of them or both at a random moment of the build, and lets a
third builder finish. Lost are patients whose file is missing, doesn't verify, or differs in its data, split or key from
an undisturbed build's. Files that are there right after the kill are verified, too, and locks and temporary files that
stay behind are counted. A kill is not a power cut: what the disk itself loses is not tested here.

Builders are forked from a process that has everything imported and no HDF5 file open, so that a run takes a second.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from lungssl_data.build import build_cache, pair_from_source
from lungssl_data.cache import PairCache
from lungssl_data.layouts import read_layout
from lungssl_data.layouts.source import PairSource
from lungssl_data.pair import PhasePair
from lungssl_data.phantom import PhantomConfig, make_phantom, write_phantom
from lungssl_data.prepare import PrepareConfig
from lungssl_ops.measure import commit, machine

CONFIG = PrepareConfig(spacing_mm=8.0)
PATIENTS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="moments at which builders are killed")
    parser.add_argument("--quick", action="store_true", help="5 kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kills = 5 if options.quick else options.kills
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for patient in range(PATIENTS):
            phantom = make_phantom(PhantomConfig(seed=patient, spacing_mm=8.0, preset="deep"))
            write_phantom(phantom, root / "raw" / f"p{patient}")
        sources = read_layout("folder", root / "raw")
        pair_from_source(sources[0], config=CONFIG, split="train")  # loads the kernels; opens no HDF5 file
        finish([builder(sources, root / "whole")])
        whole_s = min(two_builders_s(sources, root / f"two{repeat}") for repeat in range(3))
        moments = [(part + rng.random()) / kills * whole_s for part in range(kills)]  # random, and all over the build
        rng.shuffle(moments)
        rows = []
        for run, moment_s in enumerate(moments):
            cache = root / f"run{run}"
            both = rng.random() < 0.5
            children = [builder(sources, cache), builder(sources, cache)]
            time.sleep(moment_s)
            killed = children if both else [rng.choice(children)]
            done = len(list(cache.glob("*.h5")))
            for child in killed:
                os.kill(child, signal.SIGKILL)
            for child in killed:
                os.waitpid(child, 0)
            at_kill = forked(lambda cache=cache: survey(cache))()
            finish([*(child for child in children if child not in killed), builder(sources, cache)])
            after = forked(lambda cache=cache: compare(root / "whole", cache))()
            rows.append({"killed": len(killed), "moment_s": round(moment_s, 3), "done": done, **at_kill, **after})
            shutil.rmtree(cache)
    result = {
        "benchmark": "cache_faults",
        "ratios": {},
        "checks": {
            "runs": len(rows),
            "lost": sum(len(row["lost"]) for row in rows),
            "damaged_at_kill": sum(row["damaged"] for row in rows),
            "left_behind": sum(row["left_behind"] for row in rows),
            "kills_before_the_end": sum(row["done"] < PATIENTS for row in rows),
        },
        "machine": machine("cpu")
        | {"load": round(os.getloadavg()[0], 1)}
        | {"quick": options.quick, "build_s": round(whole_s, 2)},
        "commit": commit(),
        "rows": rows,
    }
    name = "cache_faults_quick.json" if options.quick else "cache_faults.json"
    (Path(__file__).parent / "results" / name).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}))


def builder(sources: list[PairSource], cache: Path) -> int:
    """Fork a process that builds the cache; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        failed = [b.message for b in build_cache(sources, cache, config=CONFIG) if b.outcome == "failed"]
        print(*failed, sep="\n", end="", flush=True)
        code = bool(failed)
    finally:
        os._exit(code)


def two_builders_s(sources: list[PairSource], cache: Path) -> float:
    """How long two undisturbed builders take together."""
    started = time.monotonic()
    finish([builder(sources, cache), builder(sources, cache)])
    return time.monotonic() - started


def finish(children: list[int]) -> None:
    """Wait for builders that nobody kills."""
    for child in children:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != 0:
            raise RuntimeError(f"a builder that was not killed ended with {status}")


def forked(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """The function in a forked process: this one must not open HDF5 files before it forks builders."""

    def run() -> dict[str, Any]:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(write, json.dumps(function()).encode())
            finally:
                os._exit(0)
        os.close(write)
        with open(read, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(pid, 0)
        return json.loads(answer)

    return run


def survey(cache: Path) -> dict[str, Any]:
    """How many of the files that are there right after the kill are damaged."""
    if not list(cache.glob("*.h5")):
        return {"damaged": 0}
    return {"damaged": sum(bool(found) for _, found in PairCache(cache).verify())}


def compare(whole: Path, cache: Path) -> dict[str, Any]:
    """The patients that a finished cache lost against an undisturbed one, and what nobody cleaned up."""
    expected, found = PairCache(whole), PairCache(cache)
    problems = dict(found.verify())
    lost = [
        patient
        for patient in expected.patients
        if problems.get(patient, ["missing"]) or not same(expected[patient], found[patient])
    ]
    return {"lost": lost, "left_behind": len([*cache.glob(".*.tmp"), *cache.glob(".*.lock*")])}


def same(one: PhasePair, other: PhasePair) -> bool:
    """Equal in everything that training sees."""
    first, second = (asdict(pair) for pair in (one, other))
    return _equal(first, second)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and one.tobytes() == other.tobytes()
    return one == other


if __name__ == "__main__":
    main()
