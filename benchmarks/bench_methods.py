"""What each method's features know of places: landmarks of one phase looked up in the other, on held-out phantoms.

Run: uv run python benchmarks/bench_methods.py [--methods dino,mae] [--rhos 1,0.5] [--seeds 0]
                                               [--minutes 8 | --steps 600] [--quick]

Phantoms of 3 mm, split by patient: methods are trained on `train` for the same number of minutes each, with the recipe
below, and judged on `test`. Exhale landmarks (forks of airways and vessels, and places between) are looked up among all
lung points of inhale on a 4 mm grid by the cosine of their features; the error is the distance to the true place, a
patient's figure the mean over its landmarks. Beside it: the median, the share of landmarks found more than 20 mm off,
the error among points within 20 mm of where the coarse affine leads, as a registration would look (`near`), the grid's
own error, the nearest point by the coarse affine (position only), and the same encoder untrained. Runs that are in the
results with as many minutes are not repeated, but for `--again`; several processes may share the work.
The last line is one JSON object; `checks` say which runs beat their untrained encoder, and the point that the affine
leads to, by the 95 % interval of the paired bootstrap over patients. `--quick`: 12 phantoms of 6 mm, 6 seconds
a run, to another file.
"""

import argparse
import fcntl
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lungssl import pretraining
from lungssl.cohort import CohortConfig, builtin_cohort, preset_of
from lungssl.comparison import landmarks
from lungssl.comparison.landmarks import Found, PairPoints, look_up, with_points
from lungssl.config import Recipe, load_recipe
from lungssl.training.step_cost import measure_steps
from lungssl_backbones.weights import load_encoder
from lungssl_data.cache import PairCache
from lungssl_data.phantom import PhantomConfig, make_phantom
from lungssl_methods.budget import step_budget
from lungssl_ops.measure import commit, machine

STARTED_AT = commit()
"""What runs here, whatever is edited meanwhile."""
PATIENTS = 53
"""Of which the hash puts 32 into `train` and 13 into `test`."""
TEST_PATIENTS = 8
"""Of `test`, unless --patients says otherwise: as many as keep looking up shorter than training."""
VIT = {"backbone": {"name": "vit3d_nano", "patch_vox": 4}, "train": {"lr": 1e-3}}
RESENC = {"backbone": {"name": "resenc_tiny"}, "train": {"lr": 1.5e-3}}
CROPS = {"data": {"phases": "both", "crop_vox": [40, 40, 40], "jitter_mm": 6}}
WHOLE = {**CROPS, "views": {"global_vox": 32, "locals_per_slot": 0}}
WIDE = {
    "data": {"phases": "both", "crop_vox": [72, 72, 72], "jitter_mm": 6},
    "views": {"global_vox": 64, "locals_per_slot": 0},
    "backbone": {"name": "resenc_tiny", "widths": [8, 32, 64, 128, 128], "depths": [1, 1, 1, 1, 1]},
    "train": {"batch": 2, "lr": 3e-3},
}
"""192 mm: with 96 one landmark in ten was found more than 20 mm off, and half of those more than 50. A fifth stage sees
four times 16 voxels: with it and the rate 7.3 mm became 5.9 on `val` (4 mm voxels, 160 steps)."""
TWO = {**CROPS, "views": {"global_vox": 32, "globals_per_slot": 2, "locals_per_slot": 0}}
SMALL = {
    "data": {"phases": "both", "crop_vox": [32, 32, 32], "jitter_mm": 6},
    "views": {"global_vox": 24, "locals_per_slot": 0},
}
HEAD = {"prototypes": "auto", "head_hidden": 256, "head_bottleneck": 64}
QUICK_TEACHER = {"momentum": 0.95}
"""A half-life of 13 steps, as runs have some 200: with `auto`'s least, 0.99, neither `dino` nor `phase_dino` gained."""
DECODER = {"decoder_width": 96, "decoder_depth": 2, "decoder_heads": 4}
PREDICTOR = {"predictor_width": 96, "predictor_depth": 2, "predictor_heads": 4}
NEGATIVES = {"batch": 12, "lr": 1e-3}
EXACT = {"points": 640, "known_share": 0.0, "sigma_mm": 1.5, "far_mm": 8.0, "temperature": 0.07}
"""The phantom's displacement doesn't err, so that points 8 mm apart may be told apart, and no other warp is needed."""
RECIPES: dict[str, dict[str, Any]] = {
    "dino": {**SMALL, **VIT, "method": {"name": "dino", **HEAD, **QUICK_TEACHER}},
    "phase_dino": {**SMALL, **VIT, "method": {"name": "phase_dino", **HEAD, **QUICK_TEACHER}},
    "mae": {**WHOLE, **VIT, "method": {"name": "mae", "mask_unit_tokens": 2, **DECODER}},
    "simmim": {**WHOLE, **VIT, "method": {"name": "simmim", "mask_unit_tokens": 2}},
    "jepa": {**WHOLE, **VIT, "method": {"name": "jepa", **PREDICTOR, **QUICK_TEACHER}},
    "phase_jepa": {**WHOLE, **VIT, "method": {"name": "phase_jepa", **PREDICTOR, **QUICK_TEACHER}},
    "croco": {**WHOLE, **VIT, "method": {"name": "croco", "mask_unit_tokens": 2, **DECODER, "decoder_width": 192}},
    "simclr": {**WHOLE, **VIT, "method": {"name": "simclr"}, "train": NEGATIVES},
    "vicreg": {**WHOLE, **VIT, "method": {"name": "vicreg"}, "train": NEGATIVES},
    "vox2vec": {**TWO, **RESENC, "method": {"name": "vox2vec"}},
    "paired_dense": {**WIDE, "method": {"name": "paired_dense", **EXACT}},
    "spark": {**WHOLE, **RESENC, "method": {"name": "spark", "decoder_width": 64}, "train": {"lr": 3e-4}},
}
"""Sizes of the shipped small recipes, brought to one crop (a smaller one for DINO). Rates, momentum and `EXACT` by
a few runs of 3 and 4 minutes judged on `val` patients at rho 1 (docs/log.md, 2026-11-24): published ones are for runs a
thousand times longer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(RECIPES))
    parser.add_argument("--rhos", default="1,0.5", help="shares of texture that the phases have in common")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training a run, on this machine")
    parser.add_argument(
        "--steps", type=int, help="instead, where other jobs share the cores; minutes are then measured"
    )
    parser.add_argument("--patients", type=int, default=TEST_PATIENTS, help="of `test` that a run is judged on")
    parser.add_argument("--again", action="store_true", help="repeat runs that are in the results")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    methods = options.methods.split(",")
    if unknown := set(methods) - set(RECIPES):
        parser.error(f"unknown methods {sorted(unknown)}; known: {', '.join(RECIPES)}")
    results = Path(__file__).parent / "results" / ("methods_quick.json" if options.quick else "methods.json")
    if options.quick:
        results.unlink(missing_ok=True)
    minutes = 0.1 if options.quick else options.minutes
    wanted = {"minutes": minutes} if options.steps is None else {"steps": options.steps}
    for rho in map(float, options.rhos.split(",")):
        size = {"patients": 12, "spacing_mm": 6.0} if options.quick else {"patients": PATIENTS, "spacing_mm": 3.0}
        data = builtin_cohort(CohortConfig(texture_rho=rho, **size))
        pairs = test_pairs(data, rho, options.patients)
        baselines, places = position_only(pairs)
        untrained: dict[Any, list[Found]] = {}
        for seed in map(int, options.seeds.split(",")):
            for name in methods:
                about = {"method": name, "rho": rho, "seed": seed}
                if not options.again and any((about | wanted).items() <= row.items() for row in rows_of(results)):
                    continue
                row = about | baselines
                row |= one_run(name, seed, data, pairs, untrained, places, minutes=minutes, steps=options.steps)
                add(results, row)
                print(sentence(row), flush=True)
    print(tables(rows_of(results)))
    print(json.dumps(head(rows_of(results))))


def one_run(
    name: str,
    seed: int,
    data: Path,
    pairs: list[PairPoints],
    untrained: dict[Any, list[Found]],
    places: list[float],
    *,
    minutes: float,
    steps: int | None,
) -> dict[str, Any]:
    """Train, then look landmarks up; with the steps that fit into the time, or so many. `places`: of position only."""
    recipe = small_recipe(name, seed=seed, steps=4)
    parts = pretraining.build_pretraining(recipe, data)
    budget = step_budget(parts.method, parts.prepare(parts.read(0), 0), step=0)
    same_start = (recipe.backbone.name, recipe.views.global_vox, seed)
    if same_start not in untrained:
        encoder = parts.method.export_encoder()  # pyright: ignore[reportCallIssue]
        untrained[same_start] = [look_up(encoder, pair, recipe.views.global_vox) for pair in pairs]  # pyright: ignore[reportArgumentType]
    before = untrained[same_start]
    timed = steps is None
    if steps is None:
        config = parts.recipe.train
        cost = measure_steps(
            parts.method, read=parts.read, prepare=parts.prepare, config=config, seed=seed, device=parts.device
        )
        steps = max(4, int(60 * minutes / cost.step_s))
    recipe = small_recipe(name, seed=seed, steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        summary = pretraining.pretrain(recipe, data=data, out=Path(folder) / "run")
        seconds = time.perf_counter() - started
        encoder = load_encoder(Path(folder) / "run/export/encoder.safetensors")
    after = [look_up(encoder, pair, recipe.views.global_vox) for pair in pairs]
    errors = [one.mean_mm for one in after]
    gain = np.subtract([one.mean_mm for one in before], errors)
    low, high = bootstrap(gain)
    return {
        "minutes": minutes if timed else round(seconds / 60, 1),
        "error_mm": float(np.mean(errors)),
        "error_sd_mm": float(np.std(errors, ddof=1)),
        "median_mm": float(np.mean([one.median_mm for one in after])),
        "far_share": float(np.mean([one.far_share for one in after])),
        "near_mm": float(np.mean([one.near_mm for one in after])),
        "untrained_mm": float(np.mean([one.mean_mm for one in before])),
        "untrained_near_mm": float(np.mean([one.near_mm for one in before])),
        "gain_mm": float(gain.mean()),
        "gain_95_mm": [low, high],
        "less_than_position_95_mm": bootstrap(np.subtract(places, errors)),
        "near_less_than_position_95_mm": bootstrap(np.subtract(places, [one.near_mm for one in after])),
        "per_patient_mm": [round(value, 3) for value in errors],
        "backbone": label_of(recipe),
        "steps": steps,
        "batch": recipe.train.batch,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "tflop": round(steps * budget.flops / 1e12, 2),
        "alarms": summary["alarms"],
        "verdict": summary["verdict"],
        "commit": STARTED_AT,
    }


def label_of(recipe: Recipe) -> str:
    """The encoder's name, and its stages where they aren't the name's."""
    name, stages = recipe.backbone.name, len(getattr(recipe.backbone.config, "depths", ()))
    return f"{name}, {stages} stages" if name == "resenc_tiny" and stages != 4 else name


def small_recipe(name: str, *, seed: int, steps: int) -> Recipe:
    """A method's recipe of `RECIPES`, with the training that all share."""
    own = RECIPES[name]
    train = {"steps": steps, "batch": 6, "checkpoint_every": steps, "eval_every": max(1, steps // 4), **own["train"]}
    train["log_every"] = max(1, steps // 100)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump({**own, "train": train, "seed": seed}))
        return load_recipe(str(path), [])


def test_pairs(data: Path, rho: float, patients: int) -> list[PairPoints]:
    """Held-out phantoms, with landmarks, which the cohort's cache doesn't hold: made again from their seeds."""
    cache = PairCache(data)
    found = []
    for patient in cache.split("test")[:patients]:
        pair = cache[patient]
        seed = int(patient.removeprefix("phantom"))
        spacing = pair.scan("exhale").spacing_mm[0]
        config = PhantomConfig(preset=preset_of(seed), seed=seed, spacing_mm=spacing, texture_rho=rho)
        phantom = make_phantom(config)
        found.append(with_points(pair, phantom.landmarks_exhale_mm, phantom.landmarks_inhale_mm))
    return found


def position_only(pairs: list[PairPoints]) -> tuple[dict[str, float], list[float]]:
    """Mean errors over patients of the grid itself, and of the point that the affine leads to; these by patient."""
    floor, affine = zip(*(landmarks.position_only(pair) for pair in pairs), strict=True)
    means = {"floor_mm": float(np.mean(floor)), "position_only_mm": float(np.mean(affine)), "patients": len(pairs)}
    return means, list(affine)


def bootstrap(values: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean over patients, by percentiles."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (draws, len(values))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows that are known by now."""
    return json.loads(path.read_text())["rows"] if path.is_file() and path.stat().st_size else []


def add(path: Path, row: dict[str, Any]) -> None:
    """Put one row in place of the same run's; locked, as other processes may do so."""
    same = ("method", "rho", "seed", "minutes")
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [old for old in rows_of(path) if any(old[key] != row[key] for key in same)] + [row]
        path.write_text(json.dumps({**head(rows), "rows": rows}, indent=1) + "\n")


def head(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rows show."""
    checks = {}
    for row in rows:
        what = f"{row['method']} rho {row['rho']:g} seed {row['seed']}, {row['minutes']:g} min"
        checks[f"{what}: beats untrained"] = row["gain_95_mm"][0] > 0
        if row["method"] == "paired_dense":
            checks[f"{what}: beats position"] = row["less_than_position_95_mm"][0] > 0
            checks[f"{what}: beats position near it"] = row["near_less_than_position_95_mm"][0] > 0
    return {"benchmark": "methods", "ratios": {}, "checks": checks, "machine": machine("cpu"), "commit": commit()}


def sentence(row: dict[str, Any]) -> str:
    """One run in a line."""
    low, high = row["gain_95_mm"]
    return (
        f"{row['method']}, rho {row['rho']:g}, seed {row['seed']}: {row['error_mm']:.1f} mm, untrained "
        f"{row['untrained_mm']:.1f} (gain {row['gain_mm']:.1f}, 95 % {low:.1f} to {high:.1f}); {row['steps']} steps, "
        f"{row['seconds']:.0f} s"
    )


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: the first seed's runs of each rho, then every seed's error of the methods that have several."""
    found = []
    for rho in sorted({row["rho"] for row in rows}, reverse=True):
        found += [f"\nrho {rho:g}, seed 0\n", *table([row for row in rows if row["rho"] == rho and row["seed"] == 0])]
    return "\n".join([*found, "\nSeeds\n", *seeds_table(rows)])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown, the least error first."""
    titles = "method|encoder|min|steps|TFLOP|error|untrained|gain (95 %)|median|over 20 mm|near|near, untrained"
    lines = ["| " + " | ".join(titles.split("|")) + " |", "|" + "---|" * len(titles.split("|"))]
    for row in sorted(rows, key=lambda row: row["error_mm"]):
        low, high = row["gain_95_mm"]
        cells = [f"`{row['method']}`", row["backbone"], f"{row['minutes']:g}", row["steps"], f"{row['tflop']:.1f}"]
        cells += [f"{row['error_mm']:.1f}", f"{row['untrained_mm']:.1f}"]
        cells += [f"{row['gain_mm']:.1f} ({low:.1f} to {high:.1f})", f"{row['median_mm']:.1f}"]
        cells += [f"{100 * row['far_share']:.0f} %", f"{row['near_mm']:.1f}", f"{row['untrained_near_mm']:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def seeds_table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: what two seeds or more gave, each with its steps, as these differ with the machine's load."""
    runs: dict[tuple[str, float, float], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        runs.setdefault((row["method"], row["rho"], row["minutes"]), []).append(row)
    lines = ["| method | rho | error by seed (steps) | gain by seed | gain, mean |", "|" + "---|" * 5]
    for (method, rho, _), same in sorted(runs.items(), key=lambda item: (item[0][0], -item[0][1])):
        if len(same) > 1:
            errors = ", ".join(f"{row['error_mm']:.1f} ({row['steps']})" for row in same)
            gains = [row["gain_mm"] for row in same]
            shown = ", ".join(f"{gain:.1f}" for gain in gains)
            lines.append(f"| `{method}` | {rho:g} | {errors} | {shown} | {np.mean(gains):.1f} |")
    return lines


if __name__ == "__main__":
    main()
