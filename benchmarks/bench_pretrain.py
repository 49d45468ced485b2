"""Pretraining steps, data wait included, beside a plain PyTorch step with lightly's losses and MONAI's transforms.

Run: OMP_NUM_THREADS=2 uv run python benchmarks/bench_pretrain.py [--methods dino,mae] [--rounds 6] [--quick]

The peer is optional: pip install lightly==1.6.0 torchvision monai. It is in `pretrain_peers.py`, which says what was
done to make it fast. Both train the same backbone (`vit3d_s`, patches of 8 voxels) on views of the same sizes from the
same phantoms, under the same autocast, with AdamW and clipped gradients; the peer's transformer layers are plain
PyTorch (one more row has it on ours). Ours goes through the functions that `lungssl pretrain` calls: crops from the
cache by `read_ahead`, `prepare`, `train_step`. They take turns in blocks of
steps; each block starts with steps that use up what was prefetched. The peer is measured with 1 and 2 worker
processes, and its best counts.

Floor: the FLOPs of a step's forward and backward, as torch's counter has them, at the speed of the fastest bf16 product
measured at the start. `profile`: parts of our step, and its ops, that take 5 % or more.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch
from lungssl.cohort import CohortConfig, builtin_cohort
from lungssl.config import load_recipe
from lungssl.pretraining import Pretraining, build_pretraining
from lungssl.training.allocator import keep_freed_memory
from lungssl.training.loop import make_optimizer, train_step
from lungssl.training.precision import autocast
from lungssl.training.profiling import StepProfiler
from lungssl.training.read_ahead import read_ahead
from lungssl.training.watch import buffers_of
from lungssl_methods.budget import counted_flops
from lungssl_ops.measure import commit, machine, timings

STARTED_AT = commit()
OUR_LAYERS = "lightly on our layers"
"""The peer with our transformer layers in C++, for comparison."""
WANTED_RATIO, WANTED_SHARE, SAME_FLOPS = 1.3, 0.40, 0.10
WORKERS = (1, 2)
"""Of the peer's loader; what it holds ready is used up before a block counts."""
SIZES = ["data.crop_vox=[64,64,64]", "views.global_vox=48", "views.local_vox=24", "data.jitter_mm=6"]
BATCH = ["train.batch=4", "train.accumulate=1", "train.workers=0", "train.eval_batches=1"]
RECIPES = {
    "dino": ("dino_vit_s", [*SIZES, *BATCH]),
    "mae": ("mae_vit_s", [*SIZES, *BATCH, "views.locals_per_slot=0"]),
}
"""Shipped recipes with views of half the side, of which two cores make a step in a second."""
QUICK = ["backbone.name=vit3d_nano", "data.crop_vox=[32,32,32]", "views.global_vox=32", "views.local_vox=16"]


class Side(Protocol):
    """Ours or the peer: steps of training."""

    prefetched: int
    """Batches that may lie ready when a block begins."""

    def step(self) -> None:
        """One optimizer step, data included."""
        ...


class Ours:
    """The loop's own parts. Its evaluations, logs and checkpoints, every 100 steps and more, are left out."""

    prefetched = 1

    def __init__(self, parts: Pretraining) -> None:
        self.parts, self.config = parts, parts.recipe.train
        self.optimizer = make_optimizer(parts.method, self.config)
        self.stream = read_ahead(parts.read, 0, 10**6, workers=0)
        self.number = count()
        parts.method.train()

    def step(self) -> None:
        """As `fit` makes it."""
        buffers_of(self.parts.method)
        train_step(
            self.parts.method,
            self.optimizer,
            self.stream,
            self.parts.prepare,
            step=next(self.number),
            config=self.config,
            seed=0,
            device=self.parts.device,
        )

    def flops(self) -> int:
        """Of forward and backward, in whole numbers whatever the precision."""
        batch = self.parts.prepare(self.parts.read(0), 0)
        with autocast(self.parts.device, self.config.precision, self.parts.method):
            counted = counted_flops(self.parts.method, batch)
        self.parts.method.zero_grad(set_to_none=True)
        for module in self.parts.method.modules():
            if hasattr(module, "forget"):
                module.forget()  # pyright: ignore[reportCallIssue]
        return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(RECIPES))
    parser.add_argument("--rounds", type=int, default=6, help="blocks of each side")
    parser.add_argument("--steps", type=int, default=5, help="steps of a block that count")
    parser.add_argument("--workers", default=WORKERS, type=lambda words: tuple(map(int, words.split(","))))
    parser.add_argument("--quick", action="store_true", help="vit3d_nano, small views, two short rounds")
    options = parser.parse_args()
    methods = options.methods.split(",")
    if unknown := set(methods) - set(RECIPES):
        parser.error(f"unknown methods {sorted(unknown)}; known: {', '.join(RECIPES)}")
    rounds, steps = (2, 2) if options.quick else (options.rounds, options.steps)
    result = run(methods, rounds=rounds, steps=steps, workers=options.workers, quick=options.quick)
    out = Path(__file__).parent / "results" / ("pretrain_quick.json" if options.quick else "pretrain.json")
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}))


def run(methods: list[str], *, rounds: int, steps: int, workers: tuple[int, ...], quick: bool) -> dict[str, Any]:
    """The table as {"benchmark", "ratios", "shares", "checks", "peaks", "machine", "commit", "rows"}."""
    keep_freed_memory()  # as `fit` does; the peer has it, too
    size = CohortConfig(patients=2, spacing_mm=6.0) if quick else CohortConfig(patients=8, spacing_mm=3.0)
    data = builtin_cohort(size)
    peaks = matmul_peaks()
    rows = {
        method: measure(method, data, peaks, rounds=rounds, steps=steps, workers=workers, quick=quick)
        for method in methods
    }
    ratios = {f"{name}_vs_lightly": row["ratio"] for name, row in rows.items() if row["ratio"] is not None}
    ratios |= {
        f"{name}_vs_lightly_on_our_layers": row["ratio_on_our_layers"]
        for name, row in rows.items()
        if row["ratio_on_our_layers"] is not None
    }
    shares = {f"{name}_of_floor": row["ours"]["share_of_floor"] for name, row in rows.items()}
    checks = {
        f"{name}_at_least_{WANTED_RATIO}": ratio >= WANTED_RATIO
        for name, ratio in ratios.items()
        if name.endswith("_vs_lightly")
    }
    checks |= {f"{name}_at_least_{WANTED_SHARE:.0%}": share >= WANTED_SHARE for name, share in shares.items()}
    checks |= {
        f"{name}_same_flops": abs(row["peer_flops"] / row["flops"] - 1) <= SAME_FLOPS
        for name, row in rows.items()
        if row["peer_flops"]
    }
    return {
        "benchmark": "pretrain",
        "ratios": ratios,
        "shares": shares,
        "checks": checks,
        "peaks": {name: round(value / 1e12, 3) for name, value in peaks.items()},
        "data": "phantoms (synthetic)",
        "machine": machine("cpu") | {"quick": quick, "versions": _versions()},
        "commit": STARTED_AT,
        "rows": rows,
    }


def measure(
    method: str,
    data: Path,
    peaks: dict[str, float],
    *,
    rounds: int,
    steps: int,
    workers: tuple[int, ...],
    quick: bool,
) -> dict[str, Any]:
    """One method's figures: of ours and of the peer with each number of workers."""
    name, overrides = RECIPES[method]
    recipe = load_recipe(name, overrides=[*overrides, *(QUICK if quick else [])])
    parts = build_pretraining(recipe, data, device="cpu")
    batch = parts.recipe.train.patients()
    ours = Ours(parts)
    flops = ours.flops()
    sides: dict[str, Side] = {"ours": ours}
    peer_flops = None
    if _has_peer():
        from pretrain_peers import cohort_arrays, make_peer

        arrays = cohort_arrays(parts.crops.cache, parts.crops.patients)
        peers = {n: make_peer(method, parts.recipe, arrays, workers=n) for n in workers}
        peer_flops = peers[workers[0]].flops()
        sides |= {f"lightly, {n} workers": peer for n, peer in peers.items()}
        sides[OUR_LAYERS] = make_peer(method, parts.recipe, arrays, workers=workers[0], plain=False)
    seconds = take_turns(sides, rounds=rounds, steps=steps)
    found = {side: _row(taken, batch) for side, taken in seconds.items()}
    peak = peaks["bf16" if _bf16(parts) else "float32"]
    for row in found.values():
        row["share_of_floor"] = round(flops / peak / row["median_step_s"], 3)
    rivals = {side: row["scans_per_s"] for side, row in found.items() if side not in ("ours", OUR_LAYERS)}
    best = max(rivals, key=lambda side: rivals[side]) if rivals else None
    print(f"{method}: {flops / 1e9:.0f} GFLOP a step, floor {flops / peak:.3f} s")
    for side, row in found.items():
        print(
            f"  {side:<22}{row['median_step_s']:.3f} s a step [{row['p25_step_s']:.3f}, {row['p75_step_s']:.3f}], "
            f"{row['scans_per_s']:.2f} scans/s, {row['share_of_floor']:.0%} of the floor"
        )
    lines = profile_lines(ours, steps)
    print("\n".join(lines))
    return {
        "recipe": name,
        "overrides": overrides,
        "batch": batch,
        "flops": flops,
        "peer_flops": peer_flops,
        "floor_s": round(flops / peak, 4),
        "best_peer": best,
        "ratio": None if best is None else round(found["ours"]["scans_per_s"] / rivals[best], 2),
        "ratio_on_our_layers": None
        if best is None
        else round(found["ours"]["scans_per_s"] / found[OUR_LAYERS]["scans_per_s"], 2),
        **found,
        "profile": lines,
    }


def take_turns(sides: dict[str, Side], *, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each step of each side, a block of `steps` at a time in turn; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            side = sides[name]
            for _ in range(side.prefetched + 1):
                side.step()
            for _ in range(steps):
                began = time.perf_counter()
                side.step()
                if turn > 0:
                    seconds[name].append(time.perf_counter() - began)
    return seconds


def matmul_peaks() -> dict[str, float]:
    """FLOP/s of the fastest square product measured, of bf16 and of float32."""
    peaks = {}
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        best = 0.0
        for side in (1024, 2048, 4096):
            a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
            call: Callable[[], torch.Tensor] = lambda a=a, b=b: a @ b  # noqa: E731
            best = max(best, 2 * side**3 / min(timings({"product": call}, repeats=5, device="cpu")["product"]))
        peaks[name] = best
    return peaks


def profile_lines(ours: Ours, steps: int) -> list[str]:
    """What `lungssl pretrain --profile` would say of so many steps."""
    import tempfile

    said: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        profiler = StepProfiler(steps, Path(folder), ours.parts.device, module=ours.parts.method, say=said.append)
        for _ in range(steps + 2):
            with profiler.step():
                ours.step()
        profiler.finish()
    return said[0].splitlines()[:-1]


def _row(seconds: list[float], batch: int) -> dict[str, Any]:
    p25, median, p75 = statistics.quantiles(seconds, n=4)
    return {
        "median_step_s": round(median, 4),
        "p25_step_s": round(p25, 4),
        "p75_step_s": round(p75, 4),
        "scans_per_s": round(2 * batch / median, 3),
        "steps": len(seconds),
    }


def _bf16(parts: Pretraining) -> bool:
    with autocast(parts.device, parts.recipe.train.precision, parts.method):
        return torch.is_autocast_enabled("cpu")


def _has_peer() -> bool:
    missing = [name for name in ("lightly", "monai") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{' and '.join(missing)} not installed: no peer; pip install lightly==1.6.0 torchvision monai")
    return not missing


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    found = (name for name in ("torch", "lightly", "monai", "timm") if importlib.util.find_spec(name) is not None)
    return {name: version(name) for name in found}


if __name__ == "__main__":
    main()
