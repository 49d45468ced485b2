"""Joint models against their single-task twins: the same pairs, steps and seeds, on phantoms that none was trained on.

Run: uv run python benchmarks/bench_joint.py [--arms NAMES] [--seeds 0,1,2] [--steps 300] [--labels 4] [--quick]

Arms: `twins` (two networks apart, a field that never sees a label), `separate` (the same, with labels that the field
carries), `dense`, `sedd`, `cross_stitch` and `cross_stitch_half` (its matrices begin at 0.5), all with equal weights;
`..._homoscedastic` and `..._dwa`. Each is trained on the built-in kind of cohort (phantoms of `--spacing-mm`, half of
their texture in common) and judged on its test patients: Dice of exhale's lobes as predicted, and as the field carries
them over from inhale; error of the displacement in the lung, folds. Means over seeds of means over patients. Results go
on from `results/joint.json`, an arm's rows replaced when run again; `--quick`: 8 mm, 8 patients, three steps, apart.
The last line is one JSON object; a ratio is the twins' error (1 - Dice, or mm) by the arm's.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lungssl.cohort import CohortConfig, builtin_cohort
from lungssl.config import load_recipe
from lungssl.finetuning import Labels
from lungssl.finetuning_joint import finetune_joint
from lungssl.joint_scoring import score_joint, summary_of
from lungssl_data.cache import PairCache
from lungssl_ops.measure import commit, machine
from lungssl_tasks.aeration.parts import LOBE_NAMES
from lungssl_tasks.model_folder import load_joint

HERE = Path(__file__).parent
BASE = {
    "twins": ["task.model.architecture=separate", "task.guided=false"],
    "separate": ["task.model.architecture=separate"],
    "dense": ["task.model.architecture=dense"],
    "sedd": ["task.model.architecture=sedd"],
    "cross_stitch": ["task.model.architecture=cross_stitch"],
    "cross_stitch_half": ["task.model.architecture=cross_stitch", "task.model.stitch_keep=0.5"],
}
ARMS = BASE | {
    f"{name}_{how}": [*BASE[name], f"task.weighting={how}"]
    for how in ("homoscedastic", "dwa")
    for name in ("dense", "sedd", "cross_stitch")
}
TWINS = "twins"
QUICK = [
    *("backbone.widths=[8,16,16]", "backbone.depths=[1,1,1]", "task.model.register.width=8"),
    *("task.model.segment.base_width=4", "task.model.segment.max_width=8"),
]
FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "predicted_dice": lambda held: held["predicted"]["all"]["dice"]["mean"],
    "warped_dice": lambda held: held["warped"]["all"]["dice"]["mean"],
    "error_mm": lambda held: next(iter(held["registration"].values()))["mean_mm"],
    "p95_mm": lambda held: next(iter(held["registration"].values()))["p95_mm"],
    "affine_mm": lambda held: next(iter(held["registration"].values()))["affine_mm"],
    "folded_share": lambda held: next(iter(held["registration"].values()))["folded_share"],
    "sdlogj": lambda held: next(iter(held["registration"].values()))["sdlogj"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--labels", type=int, default=4, help="training patients whose lobes are given")
    parser.add_argument("--patients", type=int, default=32)
    parser.add_argument("--spacing-mm", type=float, default=6.0)
    parser.add_argument("--encoder", type=Path, default=None, help="pretrained weights; random ones without it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps, options.labels, options.patients, options.spacing_mm = "0", 3, 2, 8, 8.0
    arms = options.arms.split(",")
    for arm in arms:
        if arm not in ARMS:
            parser.error(f"unknown arm {arm}; known: {', '.join(ARMS)}")
    cohort = CohortConfig(patients=options.patients, spacing_mm=options.spacing_mm, seed=700)
    data = builtin_cohort(cohort, say=say)
    out = HERE / "results" / f"joint{'_quick' if options.quick else ''}.json"
    rows = {(row["arm"], row["seed"]): row for row in json.loads(out.read_text())["rows"]} if out.is_file() else {}
    setting = {"cohort": cohort.name(), "steps": options.steps, "labels": options.labels}
    setting["encoder"] = options.encoder is not None
    if others := {key for key, row in rows.items() if any(row[name] != value for name, value in setting.items())}:
        parser.error(f"{out.name} has {len(others)} rows of other settings than {setting}; move it away first")
    for seed in map(int, options.seeds.split(",")):  # arms in turn, so that a slow hour of the machine hits all alike
        for arm in arms:
            rows[arm, seed] = {"arm": arm, "seed": seed, **measured(arm, seed, data, options), "commit": commit()}
            rows[arm, seed] |= {"machine": machine("cpu"), **setting}
            say(json.dumps(rows[arm, seed]))
            lines = ",\n".join(json.dumps(one) for one in rows.values())
            out.write_text(f'{{"benchmark": "joint", "rows": [\n{lines}\n]}}\n')
    say(table(list(rows.values())))
    print(json.dumps({"benchmark": "joint", **verdict(list(rows.values())), "commit": commit()}))


def measured(arm: str, seed: int, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run of an arm, judged on the test patients."""
    every = [f"seed={seed}", f"train.steps={options.steps}", f"train.eval_every={options.steps}"]
    every.append(f"train.checkpoint_every={options.steps}")
    recipe = load_recipe("finetune/joint", [*ARMS[arm], *every, *(QUICK if options.quick else [])])
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        seen = Labels(patients=options.labels, draw=seed)
        summary = finetune_joint(
            recipe, data=data, out=run, encoder=options.encoder, labels=seen, device=options.device
        )
        seconds = time.perf_counter() - started
        model, _ = load_joint(run / "export" / "model")
    cache = PairCache(data)
    device = torch.device("cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu")
    scores = score_joint(
        model,
        cache,
        cache.split("test"),
        names=LOBE_NAMES,
        device=device,
        say=lambda line: print(line, file=sys.stderr),
    )
    held = summary_of(scores)
    row: dict[str, Any] = {name: round(figure(held), 4) for name, figure in FIGURES.items()}
    row |= {"test_patients": held["predicted"]["patients"], "seconds": round(seconds, 1)}
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    row |= {name: round(value, 4) for name, value in summary["val"].items() if name.startswith("weight_")}
    if "cross_stitch" in summary:
        row["cross_stitch"] = {
            level: [[round(value, 3) for value in line] for line in one["mean"]]
            for level, one in summary["cross_stitch"].items()
        }
    return row


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """By arm and figure: mean and standard deviation over seeds."""
    held = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        held[arm] = {
            name: (
                statistics.fmean(row[name] for row in mine),
                statistics.stdev(row[name] for row in mine) if len(mine) > 1 else 0.0,
            )
            for name in (*FIGURES, "seconds", "parameters")
        }
    return held


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'arm':>26} {'predicted Dice':>16} {'warped Dice':>16} {'error mm':>14} {'folds %':>8} {'M par.':>7} {'s':>7}"
    ]
    for arm, held in means(rows).items():
        cells = [f"{held[name][0]:.3f} ({held[name][1]:.3f})" for name in ("predicted_dice", "warped_dice")]
        error = f"{held['error_mm'][0]:.2f} ({held['error_mm'][1]:.2f})"
        lines.append(
            f"{arm:>26} {cells[0]:>16} {cells[1]:>16} {error:>14} {100 * held['folded_share'][0]:>8.3f} "
            f"{held['parameters'][0] / 1e6:>7.2f} {held['seconds'][0]:>7.0f}"
        )
    for row in rows:
        if "cross_stitch" in row:
            lines.append(f"{row['arm']}, seed {row['seed']}: {json.dumps(row['cross_stitch'])}")
    return "\n".join(lines)


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of the twins' error by each arm's, and whether arms beat the twins at both tasks."""
    held = means(rows)
    if TWINS not in held:
        return {"ratios": {}, "checks": {}}
    ratios, checks = {}, {}
    for arm in held:
        if arm == TWINS:
            continue
        for name, error in (
            ("predicted", lambda one: 1 - one["predicted_dice"][0]),
            ("warped", lambda one: 1 - one["warped_dice"][0]),
            ("mm", lambda one: one["error_mm"][0]),
        ):
            ratios[f"{arm}_{name}_vs_{TWINS}"] = round(error(held[TWINS]) / max(error(held[arm]), 1e-6), 2)
        checks[f"{arm}_better_at_both"] = all(ratios[f"{arm}_{name}_vs_{TWINS}"] > 1 for name in ("predicted", "mm"))
    return {"ratios": ratios, "checks": checks}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
