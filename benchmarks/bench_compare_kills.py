"""Kill -9 at random moments of a comparison, again and again: what is lost, what is repeated?

Run: uv run python benchmarks/bench_compare_kills.py [--kills 30] [--quick]

A small comparison (three arms, a model from labels on each, phantoms of 8 mm, runs of a few steps) is killed at a
random moment, begun again with the same call, killed again, up to three times, then left to finish. Lost are runs whose
figures differ from the undisturbed comparison's, repeated those whose result was there before a kill and was written
again.
Processes are forked from one that has everything imported, so that a kill seldom falls into the imports.
The last line is one JSON object.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from lungssl.cohort import CohortConfig, make_cohort
from lungssl.comparison.plan import Plan, load_plan
from lungssl.comparison.runs import carry_out
from lungssl_ops.measure import commit, machine

KILLS_PER_COMPARISON = 3
PLAN = {
    "title": "Does it go on?",
    "recipe": "demo/pretrain",
    "overrides": ["train.steps=6", "train.batch=2", "train.eval_every=3", "train.checkpoint_every=2"],
    "arms": {
        "A0": {"isolates": "floor", "pretrained": False},
        "A1": {"isolates": "one phase", "overrides": ["data.phases=exhale", "method.pairs=within"]},
        "A4": {"isolates": "pairing", "overrides": ["method.pairs=cross"]},
    },
    "contrasts": [["A4", "A1"]],
    "primary": ["landmark_mm", "dice"],
    "labels": {"recipe": "demo/segment", "patients": [1]}
    | {"overrides": ["train.steps=6", "train.eval_batches=0", "train.checkpoint_every=2", "views.global_vox=32"]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="3 kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kills = 3 if options.quick else options.kills
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for _ in make_cohort(CohortConfig(patients=12, spacing_mm=8.0), root / "data"):
            pass
        (root / "plan.yaml").write_text(json.dumps(PLAN))
        plan = load_plan(root / "plan.yaml")
        started = time.monotonic()
        wait(comparison(plan, root / "data", root / "whole"))
        whole_s = time.monotonic() - started
        whole = figures(root / "whole")
        rows = []
        while sum(len(row["moments_s"]) for row in rows) < kills:
            row = disturbed(plan, root / "data", root / "out", rng, whole_s)
            found = figures(root / "out")
            row["lost"] = sorted(name for name in whole if found.get(name) != whole[name])
            shutil.rmtree(root / "out")
            rows.append(row)
            print(row, flush=True)
    name = "compare_kills_quick.json" if options.quick else "compare_kills.json"
    result = {
        "benchmark": "compare_kills",
        "ratios": {},
        "checks": {
            "kills": sum(len(row["moments_s"]) for row in rows),
            "kills_before_the_end": sum(row["before_the_end"] for row in rows),
            "lost": sum(len(row["lost"]) for row in rows),
            "repeated": sum(row["repeated"] for row in rows),
        },
        "machine": machine("cpu") | {"runs": len(whole), "whole_s": round(whole_s, 1)},
        "commit": commit(),
        "rows": rows,
    }
    (Path(__file__).parent / "results" / name).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}))


def disturbed(plan: Plan, data: Path, out: Path, rng: random.Random, whole_s: float) -> dict[str, Any]:
    """Begin a comparison, kill it, begin again, and leave the last alone."""
    moments, before_the_end, repeated = [], 0, 0
    kept: dict[str, int] = {}
    for _ in range(KILLS_PER_COMPARISON):
        moment_s = rng.random() * whole_s * 0.7
        child = comparison(plan, data, out)
        time.sleep(moment_s)
        before_the_end += os.waitpid(child, os.WNOHANG)[0] == 0 and killed(child)
        moments.append(round(moment_s, 2))
        there = written(out)
        repeated += sum(there[name] != at for name, at in kept.items())
        kept = there
    wait(comparison(plan, data, out))
    there = written(out)
    return {
        "moments_s": moments,
        "before_the_end": before_the_end,
        "repeated": repeated + sum(there[name] != at for name, at in kept.items()),
    }


def killed(child: int) -> bool:
    """Kill a process and wait for its end; whether it was the kill that ended it."""
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def comparison(plan: Plan, data: Path, out: Path) -> int:
    """Fork a process that carries a plan out; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        code = bool(carry_out(plan, data=data, out=out, say=lambda _: None).missing)
    finally:
        os._exit(code)


def wait(child: int) -> None:
    """For a comparison that nobody kills."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != 0:
        raise RuntimeError(f"a comparison that was not killed ended with {code}")


def figures(out: Path) -> dict[str, Any]:
    """What each finished run gave."""
    rows = [json.loads(path.read_text()) for path in (out / "results").glob("*.json")]
    return {row["id"]: (row["failed"], row["values"], row["scalars"]) for row in rows}


def written(out: Path) -> dict[str, int]:
    """When each result was written."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "results").glob("*.json")}


if __name__ == "__main__":
    main()
