"""Lesions from two diameters against lesions from whole masks: the same network, phantoms, steps and seeds.

Run: uv run python benchmarks/bench_cosegment.py [--arms diameters,masks,...] [--seeds 0,1,2] [--steps 600] [--quick]

`lungssl finetune cosegment` on phantoms of 4 mm with ground glass and consolidation, judged on those of split `test` by
the Dice of each phase's lesions, mean over patients of means over lesions. Lesions lie up to a quarter of the side off
the middles of crops, always at the same places. Arms: `diameters` (labels cut out by GrabCut from two diameters each;
networks are told these diameters, of judged lesions too), `masks` (the bound, told as well), `own` (diameters, channels
weighed by the scan's own features), `none` (diameters, no gate), `untold` and `untold_masks` (networks that aren't
told). Rivals, which learn nothing: `ball` (in the crop's middle, of the training lesions' mean
radius), `told_ball` (the same in crops with lesions in their middles: it is told where), `ellipsoid` (of the
judged lesions' diameters), `grabcut` (what it makes of them). Results go on from `results/cosegment.json`, an arm's row
replaced when run again; `--quick`: 8 phantoms of 6 mm, 4 steps, apart. The last line is one JSON object:
`share_of_masks` is the diameters' Dice by that of the masks, which is to be 0.85 at least; ratios are error (1 - Dice)
of a rival by the diameters'.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from lungssl.cohort import CohortConfig, builtin_cohort
from lungssl.config import load_recipe
from lungssl.finetuning import Labels
from lungssl.finetuning_cosegment import finetune_cosegment, judged_lesions, masked
from lungssl.lesion_scoring import score_lesions, score_masks, summary
from lungssl.training.precision import pick_device
from lungssl_data.cache import PairCache
from lungssl_ops.measure import commit, machine
from lungssl_tasks.cosegmentation.diameters import lesions_of
from lungssl_tasks.cosegmentation.lesion_pairs import LesionPair
from lungssl_tasks.cosegmentation.lesions import LEAST_VOXELS, PHASES
from lungssl_tasks.model_folder import load_cosegmentation
from numpy import ndarray
from torch import Tensor

HERE = Path(__file__).parent
LEAST_SHARE = 0.85
"""Issue 8."""
SIDE_VOX = 32
"""As the recipe."""
ARMS = {
    "diameters": [],
    "masks": ["task.supervision=masks"],
    "own": ["task.model.attention=own"],
    "none": ["task.model.attention=none"],
    "untold": ["task.model.told=false"],
    "untold_masks": ["task.model.told=false", "task.supervision=masks"],
}
RIVALS = ("ball", "told_ball", "ellipsoid", "grabcut")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=",".join((*ARMS, *RIVALS)))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--patients", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="8 phantoms of 6 mm, 4 steps, one seed")
    options = parser.parse_args()
    pathology = ("ground_glass", "consolidation")
    cohort = CohortConfig(patients=options.patients, spacing_mm=4.0, seed=300, pathology=pathology)
    if options.quick:
        options.seeds, options.steps = "0", 4
        cohort = CohortConfig(patients=8, spacing_mm=6.0, seed=300, pathology=pathology)
    arms = options.arms.split(",")
    if unknown := set(arms) - set(ARMS) - set(RIVALS):
        parser.error(f"unknown arms {sorted(unknown)}; known: {', '.join((*ARMS, *RIVALS))}")
    path = HERE / "results" / f"cosegment{'_quick' if options.quick else ''}.json"
    rows = {(row["arm"], row["seed"]): row for row in json.loads(path.read_text())["rows"]} if path.is_file() else {}
    setting = {"cohort": cohort.name(), "side_vox": SIDE_VOX}
    wanted = {arm: setting | ({"steps": options.steps} if arm in ARMS else {}) for arm in (*ARMS, *RIVALS)}
    if others := [key for key, row in rows.items() if any(row.get(n) != v for n, v in wanted[key[0]].items())]:
        parser.error(f"{path.name} has {len(others)} rows of other settings than {setting}; move it away first")
    data = builtin_cohort(cohort, say=say)
    for seed in map(int, options.seeds.split(",")):  # arms in turn, so that a slow hour of the machine hits all alike
        for arm in arms:
            if arm in RIVALS:
                if (arm, 0) in rows and seed > 0:
                    continue
                key, row = (arm, 0), rival(arm, PairCache(data))
            else:
                key, row = (arm, seed), measured(ARMS[arm], seed, data, options)
            rows[key] = {"arm": key[0], "seed": key[1], **row, **wanted[arm]}
            rows[key] |= {"machine": machine("cpu"), "commit": commit()}
            say(json.dumps(rows[key]))
            lines = ",\n".join(json.dumps(one) for one in rows.values())
            path.write_text(f'{{"benchmark": "cosegment", "rows": [\n{lines}\n]}}\n')
    means = {arm: mean_of([row for row in rows.values() if row["arm"] == arm]) for arm, _ in rows}
    say(table(means))
    print(json.dumps({"benchmark": "cosegment", **verdict(means), "means": means, "commit": commit()}))


def measured(overrides: list[str], seed: int, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run, judged on the test patients' lesions."""
    every = [f"train.{name}={options.steps}" for name in ("steps", "eval_every", "checkpoint_every")]
    recipe = load_recipe("finetune/cosegment", [*overrides, *every, f"seed={seed}", f"task.side_vox={SIDE_VOX}"])
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        finetune_cosegment(recipe, data=data, out=run, encoder=None, labels=Labels(), device=options.device)
        seconds = time.perf_counter() - started
        model, side_vox = load_cosegmentation(run / "export" / "model")
    lesions = judged_lesions(PairCache(data), "test", side_vox=side_vox)
    return summary(score_lesions(model, lesions, device=pick_device(options.device))) | {"seconds": round(seconds, 1)}


def rival(arm: str, cache: PairCache) -> dict[str, Any]:
    """What draws without having learned, on the same lesions."""
    shift_vox = 0 if arm == "told_ball" else None
    lesions = judged_lesions(cache, "test", side_vox=SIDE_VOX, shift_vox=shift_vox)
    if arm == "grabcut":
        return summary(score_masks(lambda pair: (cut_out(pair, "exhale"), cut_out(pair, "inhale")), lesions))
    if arm == "ellipsoid":
        return summary(score_masks(lambda pair: (inside(pair.exhale_told), inside(pair.inhale_told)), lesions))
    radius_vox = mean_radius_vox(cache)
    apart = np.indices((SIDE_VOX,) * 3) - SIDE_VOX // 2
    ball = (apart**2).sum(axis=0) <= radius_vox**2
    return summary(score_masks(lambda pair: (ball, ball), lesions)) | {"radius_vox": round(radius_vox, 2)}


def cut_out(pair: LesionPair, phase: str) -> Bool[ndarray, "z y x"]:
    """GrabCut's mask."""
    return (getattr(pair, f"{phase}_labels") == 1).numpy()[0]


def inside(told: Tensor) -> Bool[ndarray, "z y x"]:
    """The diameters' ellipsoid."""
    return (told >= 0.5).numpy()[0, 0]


def mean_radius_vox(cache: PairCache) -> float:
    """Of balls as large as the training patients' lesions are."""
    scans = [cache[patient].scan(phase) for patient in masked(cache, "train") for phase in PHASES]
    sizes = [part.voxels for scan in scans if scan.lesion is not None for part in lesions_of(scan.lesion)]
    return float(np.mean([(3 * size / (4 * np.pi)) ** (1 / 3) for size in sizes if size >= LEAST_VOXELS]))


def mean_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By phase, means over seeds, and the standard deviation of the Dice."""
    held: dict[str, dict[str, float]] = {}
    for phase in PHASES:
        held[phase] = {name: round(statistics.fmean(row[phase][name] for row in rows), 4) for name in rows[0][phase]}
        dice = [row[phase]["dice"] for row in rows]
        held[phase] |= {"dice_sd_of_seeds": round(statistics.stdev(dice), 4) if len(dice) > 1 else 0.0}
        held[phase] |= {"seeds": len(rows)}
    return held


def table(means: dict[str, dict[str, dict[str, float]]]) -> str:
    """As docs/guide/cosegment.md has it."""
    lines = [f"{'arm':>10} {'seeds':>5} {'exhale':>14} {'inhale':>14}"]
    for arm, held in means.items():
        cells = [f"{held[phase]['dice']:.3f} ({held[phase]['dice_sd_of_seeds']:.3f})" for phase in PHASES]
        lines.append(f"{arm:>10} {held['exhale']['seeds']:>5} {cells[0]:>14} {cells[1]:>14}")
    return "\n".join(lines)


def verdict(means: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Share of the masks' Dice, whether it is reached, and whether the network that learned is better than rivals."""
    if "diameters" not in means:
        return {"ratios": {}, "checks": {}}
    mine = {phase: means["diameters"][phase]["dice"] for phase in PHASES}
    share, checks, ratios = {}, {}, {}
    if "masks" in means:
        share = {phase: round(mine[phase] / max(means["masks"][phase]["dice"], 1e-6), 3) for phase in PHASES}
        checks = {f"{phase}_from_diameters_reaches_{LEAST_SHARE}": share[phase] >= LEAST_SHARE for phase in PHASES}
    for arm in means:
        if arm in RIVALS:
            errors = {phase: 1 - means[arm][phase]["dice"] for phase in PHASES}
            ratios |= {f"{phase}_vs_{arm}": round(errors[phase] / max(1 - mine[phase], 1e-6), 2) for phase in PHASES}
            checks[f"better_than_{arm}"] = all(mine[phase] > means[arm][phase]["dice"] for phase in PHASES)
    return {"ratios": ratios, "checks": checks, "share_of_masks": share}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
