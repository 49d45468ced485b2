"""What cross-phase completion learns: against copies that learn nothing, with a stranger's scan, and where it looks.

Run: uv run python benchmarks/bench_completion.py [--rho 1] [--minutes 8] [--seed 0] [--quick]

`croco` is trained on phantoms of 3 mm and judged on held-out patients of `test`: its loss over those of copies of the
other scan (identity, coarse affine, the true displacement, that with density; each as it is, and scaled by the factor
that suits the very patient best; below 1 is better), its loss with the
other scan exchanged for another patient's over that with its own, and attention-TRE, untrained and trained. Intervals
are 95 % of the bootstrap over patients. The last line is one JSON object. `--quick`: 12 phantoms of 6 mm, 6 seconds.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lungssl import pretraining
from lungssl.cohort import CohortConfig, builtin_cohort
from lungssl.config import load_recipe
from lungssl.training.checkpoint import load_checkpoint, newest_valid
from lungssl.training.step_cost import measure_steps
from lungssl_data.batch import PairBatch
from lungssl_data.cache import PairCache
from lungssl_data.crops import PairCrops
from lungssl_data.pair import Split
from lungssl_methods.croco import Croco
from lungssl_ops.measure import commit, machine
from torch import nn

STARTED_AT = commit()
"""What runs here, whatever is edited meanwhile."""
CROPS_PER_PATIENT = 8
"""Of the lung of a test patient: a patient's figure is their mean."""
RECIPE = {
    "data": {"phases": "both", "crop_vox": [40, 40, 40], "jitter_mm": 6, "correspondences": True},
    "views": {"global_vox": 32, "locals_per_slot": 0},
    "backbone": {"name": "vit3d_nano", "patch_vox": 4},
    "method": {
        "name": "croco",
        "mask_unit_tokens": 2,
        "decoder_width": 192,
        "decoder_depth": 2,
        "decoder_heads": 4,
    },
}
"""Recipe `croco_vit_nano`."""
COPIES = {
    "the copy at the same place": "loss_vs_identity",
    "the affine copy": "loss_vs_affine",
    "the copy at the same place, scaled to suit best": "loss_vs_scaled_identity",
    "the affine copy, scaled to suit best": "loss_vs_scaled_affine",
}
"""That a network must beat, and the figure that says so."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rho", type=float, default=1.0, help="share of texture that the phases have in common")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    size = {"patients": 12, "spacing_mm": 6.0} if options.quick else {"patients": 53, "spacing_mm": 3.0}
    data = builtin_cohort(CohortConfig(texture_rho=options.rho, **size))
    row = one_run(data, minutes=0.1 if options.quick else options.minutes, seed=options.seed)
    row = {"rho": options.rho, "seed": options.seed} | row
    path = Path(__file__).parent / "results" / ("completion_quick.json" if options.quick else "completion.json")
    rows = json.loads(path.read_text())["rows"] if path.is_file() and not options.quick else []
    rows = [old for old in rows if (old["rho"], old["seed"]) != (row["rho"], row["seed"])] + [row]
    checks = {}
    for one in rows:
        after, what = one["after"], f"rho {one['rho']:g} seed {one['seed']}"
        for copy, figure in COPIES.items():
            checks[f"{what}: beats {copy}"] = after[figure]["high"] < 1
        checks[f"{what}: a stranger's scan costs"] = after["stranger_vs_own"]["low"] > 1
    result = {"benchmark": "completion", "ratios": {}, "checks": checks, "machine": machine("cpu"), "commit": commit()}
    path.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    print(table(row))
    print(json.dumps(result))


def one_run(data: Path, *, minutes: float, seed: int) -> dict[str, Any]:
    """Figures before and after as many steps as fit into the minutes."""
    parts = built(data, steps=4, seed=seed)
    before = judged(parts.method, parts, data)
    cost = measure_steps(
        parts.method, read=parts.read, prepare=parts.prepare, config=parts.recipe.train, seed=seed, device=parts.device
    )
    steps = max(4, int(60 * minutes / cost.step_s))
    parts = built(data, steps=steps, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        out, started = Path(folder) / "run", time.perf_counter()
        pretraining.pretrain(parts.recipe, data=data, out=out)
        seconds = time.perf_counter() - started
        last = newest_valid(out / "checkpoints", say=print)
        assert last is not None
        load_checkpoint(last, parts.method)
    return {
        "before": before,
        "after": judged(parts.method, parts, data),
        "steps": steps,
        "batch": parts.recipe.train.batch,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "commit": STARTED_AT,
    }


def built(data: Path, *, steps: int, seed: int) -> pretraining.Pretraining:
    train = {"steps": steps, "batch": 4, "lr": 1e-3, "checkpoint_every": steps, "eval_every": max(1, steps // 4)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump({**RECIPE, "train": train, "seed": seed}))
        return pretraining.build_pretraining(load_recipe(str(path), []), data)


@torch.no_grad()
def judged(method: nn.Module, parts: pretraining.Pretraining, data: Path) -> dict[str, dict[str, float]]:
    """Means over test patients and their intervals; the head of `head_tre_mm` is the nearest of the `val` patients'."""
    assert isinstance(method, Croco)
    method.eval()
    batches = crops_of(parts, data, "test")
    chosen = int(torch.stack([method.head_tre_mm(batch) for batch in crops_of(parts, data, "val")]).nanmean(0).argmin())
    figures: dict[str, list[float]] = {}
    for index, batch in enumerate(batches):
        one = {name: float(value) for name, value in method(batch, 0).metrics.items()}
        stranger = method(with_scan_of(batch, batches[(index + 1) % len(batches)]), 0).metrics["loss"]
        one["stranger_vs_own"] = float(stranger) / one["loss"]
        one["head_tre_mm"] = float(method.head_tre_mm(batch).flatten()[chosen])
        for name, value in one.items():
            figures.setdefault(name, []).append(value)
    return {name: interval(np.array(values)) for name, values in figures.items()}


def crops_of(parts: pretraining.Pretraining, data: Path, split: Split) -> list[PairBatch]:
    """Undisturbed crops, a batch for each patient of a split."""
    config = dataclasses.replace(parts.recipe.data, crops_per_patient=CROPS_PER_PATIENT, patients=None)
    crops = PairCrops(PairCache(data), config, split=split, seed=0)
    return [parts.sampler.plain(crops.batch(index, CROPS_PER_PATIENT)) for index in range(len(crops.patients))]


def with_scan_of(batch: PairBatch, other: PairBatch) -> PairBatch:
    """The batch with the inhale voxels of another patient's crops, at the places of its own."""
    views = tuple(
        dataclasses.replace(view, image=theirs.image) if view.slot == 1 else view
        for view, theirs in zip(batch.views, other.views, strict=True)
    )
    return dataclasses.replace(batch, views=views)


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean over patients, its 95 % interval by percentiles of the bootstrap, and the number of patients."""
    values = values[np.isfinite(values)]
    means = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "patients": len(values)}


def table(row: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"| rho {row['rho']:g}, seed {row['seed']}, {row['steps']} steps | untrained | trained |", "|---|---|---|"]
    for name in row["after"]:
        cells = [
            f"{f['mean']:.3g} ({f['low']:.3g} to {f['high']:.3g})" for f in (row["before"][name], row["after"][name])
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
