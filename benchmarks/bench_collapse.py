"""Do alarms tell broken runs from sound ones? Both, as `lungssl pretrain` makes them on the built-in phantoms.

Run: uv run python benchmarks/bench_collapse.py [--seeds 3] [--recipes mae_vit_nano] [--quick]

200 steps each. Broken, of `dino_vit_nano`: neither centred nor sharpened (teacher temperature that of the student);
teacher momentum 0; 100 times the learning rate. Sound: `dino_vit_nano` with every seed, the other small recipes, and
those with another method swapped in, with one. A ratio doesn't apply; `checks` say whether each broken run gave an
alarm and each sound one none. `--quick`: one broken run and one sound one, of one seed.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lungssl import pretraining
from lungssl.cohort import builtin_cohort
from lungssl.config import Recipe, load_recipe
from lungssl.errors import TrainingError
from lungssl.training.logs import read_metrics
from lungssl_methods.distillation import Distillation
from lungssl_ops.measure import commit, machine

STEPS = 200
COMMON = (f"train.steps={STEPS}", "train.eval_every=25", f"train.checkpoint_every={STEPS}")
BROKEN = {
    "neither centred nor sharpened": ("method.teacher_temperature=[0.1,0.1]",),
    "teacher momentum 0": ("method.momentum=0.0",),
    "learning rate x 100": ("train.lr=0.1",),
    "teacher temperature 0.5": ("method.teacher_temperature=[0.5,0.5]",),
}
UNCENTRED = "neither centred nor sharpened"
SOUND = (
    *("dino_resenc_tiny", "mae_vit_nano", "mae_resenc_tiny"),
    *("phase_dino_vit_nano", "croco_vit_nano", "paired_dense_resenc_tiny"),
    *("spark_resenc_tiny", "simclr_vit_nano", "vicreg_vit_nano", "simmim_vit_nano", "jepa_vit_nano"),
    *("phase_jepa_vit_nano", "vox2vec_resenc_tiny"),
)
SWAPPED = {
    "simclr_vit_nano": ("mae_vit_nano", "method={name: simclr}"),
    "vicreg_vit_nano": ("mae_vit_nano", "method={name: vicreg}"),
    "simmim_vit_nano": ("mae_vit_nano", "method={name: simmim, mask_unit_tokens: 2}"),
    "jepa_vit_nano": (
        "mae_vit_nano",
        "method={name: jepa, predictor_width: 96, predictor_depth: 2, predictor_heads: 4}",
        "train.lr=auto",  # at mae_vit_nano's own, 1e-3, it collapses, and an alarm says so (docs/log.md, 2026-11-24)
    ),
    "phase_jepa_vit_nano": (
        *("croco_vit_nano", "method={name: phase_jepa, predictor_width: 96, predictor_depth: 2, predictor_heads: 4}"),
    ),
    "vox2vec_resenc_tiny": ("paired_dense_resenc_tiny", "method={name: vox2vec}"),
}
"""Methods without a shipped small recipe: whose data and backbone, and the method."""
SHOWN = ("loss", "teacher_entropy_lnk", "teacher_kl_lnk", "prototypes_used")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of dino_vit_nano, sound and broken")
    parser.add_argument("--recipes", help="only these sound ones, e.g. mae_vit_nano; the other results are kept")
    parser.add_argument("--broken", help="only this way of breaking dino_vit_nano; the other results are kept")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    seeds = range(1 if options.quick else options.seeds)
    data = builtin_cohort()
    broken = {UNCENTRED: BROKEN[UNCENTRED]} if options.quick else BROKEN
    plan = [("dino_vit_nano", what, seed, changes) for what, changes in broken.items() for seed in seeds]
    plan += [("dino_vit_nano", "sound", seed, ()) for seed in seeds]
    plan += [] if options.quick else [(recipe, "sound", 0, ()) for recipe in SOUND]
    name = "collapse_quick.json" if options.quick else "collapse.json"
    results = Path(__file__).parent / "results" / name
    rows = []
    if options.recipes or options.broken:
        recipes = (options.recipes or "").split(",")
        plan = [one for one in plan if one[1] == options.broken or (one[1] == "sound" and one[0] in recipes)]
        again = {one[:3] for one in plan}
        kept = json.loads(results.read_text())["rows"]
        rows = [row for row in kept if (row["recipe"], row["what"], row["seed"]) not in again]
    for recipe, what, seed, changes in plan:
        base, *method = SWAPPED.get(recipe, (recipe,))
        made = load_recipe(base, [*method, *COMMON, f"seed={seed}", *changes])
        rows.append(one_run(recipe, what, made, data))
        said = "; ".join(rows[-1]["alarms"]) or "no alarm"
        print(f"{recipe}, {what}, seed {seed}: {said} ({rows[-1]['seconds']:.0f} s)", flush=True)
    checks = {
        f"{row['recipe']}, {row['what']}, seed {row['seed']}": bool(row["alarms"]) == (row["what"] != "sound")
        for row in rows
    }
    head = {"benchmark": "collapse", "ratios": {}, "checks": checks, "machine": machine("cpu"), "commit": commit()}
    results.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    print(json.dumps(head))


def one_run(name: str, what: str, recipe: Recipe, data: Path) -> dict[str, Any]:
    """A run's alarms, and the figures that they look at, at its held-out evaluations."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        row: dict[str, Any] = {"recipe": name, "what": what, "seed": recipe.seed, "commit": commit()}
        try:
            summary = _pretrain(recipe, data, run, centred=what != UNCENTRED)
            row |= {key: summary[key] for key in ("alarms", "verdict", "seconds")}
        except TrainingError as error:  # a loss that is no number ends the run: told, too
            row |= {"alarms": [str(error)], "verdict": None, "seconds": 0.0}
        lines = [line for line in read_metrics(run / "metrics.jsonl") if "val/loss" in line]
        row["held_out"] = [{"step": line["step"], **_figures(line, SHOWN)} for line in lines]
    return row


def _pretrain(recipe: Recipe, data: Path, run: Path, *, centred: bool) -> dict[str, Any]:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    if centred:
        return pretraining.pretrain(recipe, data=data, out=run)
    with patch.object(Distillation, "update", Distillation.forget):  # the centre stays where it starts
        return pretraining.pretrain(recipe, data=data, out=run)


def _figures(line: dict[str, Any], held_out: Sequence[str]) -> dict[str, float]:
    found = {name: line[f"val/{name}"] for name in held_out if f"val/{name}" in line}
    found |= {name: value for name, value in line.items() if name.startswith("probe/")}
    return {name: round(value, 4) for name, value in found.items()}


if __name__ == "__main__":
    main()
