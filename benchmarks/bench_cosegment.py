"""Lesions from two diameters against lesions from whole masks: the same network, phantoms, steps and seeds.

Run: uv run python benchmarks/bench_cosegment.py [--arms diameters,masks,...] [--seeds 0,1,2] [--steps 400] [--quick]

`lungssl finetune cosegment` on phantoms of 4 mm with ground glass and consolidation, judged on those of split `test` by
the Dice of each phase's lesions that the phantom has there, mean over patients of means over lesions. Arms: `diameters`
(labels cut out by GrabCut from two diameters each), `masks` (the bound), `alone` (diameters, and the two scans never
meet: task.model.attention=none), `taught` (diameters, from half of the steps on what a mean teacher is sure of). Beside
them, what GrabCut itself makes of the judged lesions. Results in `results/cosegment.json`; the last line is one JSON
object: `share_of_masks` is the diameters' Dice by that of the masks, which is to be 0.85 at least.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lungssl.cohort import CohortConfig, builtin_cohort
from lungssl.config import load_recipe
from lungssl.finetuning import Labels
from lungssl.finetuning_cosegment import finetune_cosegment, judged_lesions
from lungssl.lesion_scoring import score_lesions, summary
from lungssl.training.precision import pick_device
from lungssl_data.cache import PairCache
from lungssl_ops.measure import commit, machine
from lungssl_tasks.model_folder import load_cosegmentation

HERE = Path(__file__).parent
LEAST_SHARE = 0.85
"""Issue 8."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="diameters,masks,alone,taught")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--patients", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="8 phantoms of 6 mm, 4 steps, one seed")
    options = parser.parse_args()
    pathology = ("ground_glass", "consolidation")
    cohort = CohortConfig(patients=options.patients, spacing_mm=4.0, seed=300, pathology=pathology)
    if options.quick:
        options.seeds, options.steps = "0", 4
        cohort = CohortConfig(patients=8, spacing_mm=6.0, seed=300, pathology=pathology)
    arms = {
        "diameters": [],
        "masks": ["task.supervision=masks"],
        "alone": ["task.model.attention=none"],
        "taught": [f"task.teach_after={options.steps // 2}"],
    }
    if unknown := set(options.arms.split(",")) - set(arms):
        parser.error(f"unknown arms {sorted(unknown)}; known: {', '.join(arms)}")
    data = builtin_cohort(cohort, say=say)
    rows: list[dict[str, Any]] = []
    for seed in map(int, options.seeds.split(",")):  # arms in turn, so that a slow hour of the machine hits all alike
        for arm in options.arms.split(","):
            rows.append({"arm": arm, "seed": seed, **measured(arms[arm], seed, data, options)})
            say(json.dumps(rows[-1]))
    means = {arm: mean_of([row for row in rows if row["arm"] == arm]) for arm in options.arms.split(",")}
    result = {
        "benchmark": "cosegment",
        "means": means,
        "cohort": cohort.name(),
        "steps": options.steps,
        "rows": rows,
        "machine": machine("cpu"),
        "commit": commit(),
    }
    path = HERE / "results" / f"cosegment{'_quick' if options.quick else ''}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    share = {
        phase: round(means["diameters"][phase]["dice"] / max(means["masks"][phase]["dice"], 1e-6), 3)
        for phase in ("exhale", "inhale")
        if {"diameters", "masks"} <= set(means)
    }
    checks = {f"{phase}_from_diameters_reaches_{LEAST_SHARE}": value >= LEAST_SHARE for phase, value in share.items()}
    print(
        json.dumps({"benchmark": "cosegment", "ratios": {}, "checks": checks, "share_of_masks": share, "means": means})
    )


def measured(overrides: list[str], seed: int, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run, judged on the test patients' lesions."""
    every = [f"train.{name}={options.steps}" for name in ("steps", "eval_every", "checkpoint_every")]
    recipe = load_recipe("finetune/cosegment", [*overrides, *every, f"seed={seed}"])
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        finetune_cosegment(recipe, data=data, out=run, encoder=None, labels=Labels(), device=options.device)
        seconds = time.perf_counter() - started
        model, side_vox = load_cosegmentation(run / "export" / "model")
    lesions = judged_lesions(PairCache(data), "test", side_vox=side_vox)
    return summary(score_lesions(model, lesions, device=pick_device(options.device))) | {"seconds": round(seconds, 1)}


def mean_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By phase, means over seeds, and the standard deviation of the Dice."""
    held: dict[str, dict[str, float]] = {}
    for phase in ("exhale", "inhale"):
        held[phase] = {name: round(statistics.fmean(row[phase][name] for row in rows), 4) for name in rows[0][phase]}
        dice = [row[phase]["dice"] for row in rows]
        held[phase]["dice_sd_of_seeds"] = round(statistics.stdev(dice), 4) if len(dice) > 1 else 0.0
    return held


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
