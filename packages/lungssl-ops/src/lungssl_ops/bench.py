"""Times the ops beside their rivals, in one process, in turn.

Each case is run forward and backward. A row states the floor: the bytes that any implementation must move, at the
memory bandwidth measured in the same run. Peak memory is what the call allocates beyond its inputs, from the profiler's
allocation events on a CPU and from the caching allocator on a GPU.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lungssl_ops.ema import ema_update_
from lungssl_ops.ema.reference import ema_update_reference_
from lungssl_ops.multicrop_ce import multicrop_cross_entropy
from lungssl_ops.multicrop_ce.reference import multicrop_cross_entropy_reference
from lungssl_ops.patches import masked_patch_mse


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one size: ours first, then its rivals."""

    op: str
    size: str
    floor_bytes: int
    runs: dict[str, Callable[[], Tensor]]
    """Each returns what the `checks` compare: a loss' gradient, or the updated tensor."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    op: str
    size: str
    run: str
    min_ms: float
    """The time without other users of the machine."""
    median_ms: float
    p25_ms: float
    p75_ms: float
    peak_mb: float
    floor_ms: float
    floor_share: float
    """Floor over the shortest time: 1 is as fast as memory allows, more where caches hold the data."""
    error: float
    """Norm of the difference to the reference over the reference's norm."""


def run(*, quick: bool, device: str, compiled: bool) -> dict[str, object]:
    """All cases as {"benchmark", "ratios", "checks", "machine", "commit", "rows"}; ratios above 1: ours is better."""
    repeats = 5 if quick else 25
    bandwidth = _bandwidth(device)
    rows, ratios, checks = [], {}, {}
    for case in _cases(quick=quick, device=device, compiled=compiled):
        # Before the timings, while every run starts from the same state.
        outputs = {name: call().detach().double() for name, call in case.runs.items()}
        timings = _time(case.runs, repeats=repeats, device=device)
        peaks = {name: _peak_mb(call, device) for name, call in case.runs.items()}
        floor_ms = case.floor_bytes / bandwidth * 1e3
        for name in case.runs:
            p25, median, p75 = (1e3 * q for q in statistics.quantiles(timings[name], n=4))
            error = ((outputs[name] - outputs["reference"]).norm() / outputs["reference"].norm()).item()
            rows.append(
                Row(
                    op=case.op,
                    size=case.size,
                    run=name,
                    min_ms=1e3 * min(timings[name]),
                    median_ms=median,
                    p25_ms=p25,
                    p75_ms=p75,
                    peak_mb=peaks[name],
                    floor_ms=floor_ms,
                    floor_share=floor_ms / (1e3 * min(timings[name])),
                    error=error,
                )
            )
            checks[f"{case.op}_{case.size}_{name}_error_below_1e-5"] = error < 1e-5
        ours = "ours" if "ours" in case.runs else "reference"
        for name in case.runs.keys() - {ours}:
            stem = f"{case.op}_{case.size}"
            ratio = statistics.median(timings[name]) / statistics.median(timings[ours])
            ratios[f"{stem}_vs_{name}"] = round(ratio, 2)
            ratios[f"{stem}_memory_vs_{name}"] = round(max(peaks[name], 0.01) / max(peaks[ours], 0.01), 2)
    return {
        "benchmark": "ops",
        "ratios": dict(sorted(ratios.items())),
        "checks": checks,
        "machine": _machine(device) | {"gb_per_s": round(bandwidth / 1e9, 1), "quick": quick},
        "commit": _commit(),
        "rows": [asdict(row) for row in rows],
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line: prints a table, writes the full JSON, and ends with one JSON line."""
    parser = argparse.ArgumentParser(description="Time lungssl-ops beside its rivals.")
    parser.add_argument("--quick", action="store_true", help="small sizes, 5 repeats, a few seconds")
    parser.add_argument("--device", default="cpu", help="torch device, e.g. cuda")
    parser.add_argument("--compile", action="store_true", help="add torch.compile of the rivals (needs a C++ compiler)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the full table")
    options = parser.parse_args(arguments)
    result = run(quick=options.quick, device=options.device, compiled=options.compile)
    print(markdown_table(result["rows"]))  # pyright: ignore[reportArgumentType]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}))


def markdown_table(rows: list[dict[str, object]]) -> str:
    """The rows as a markdown table."""
    lines = [
        "| op | size | run | median [p25, p75] ms | min ms | peak MB | floor ms | share of floor | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = "{median_ms:.2f} [{p25_ms:.2f}, {p75_ms:.2f}]".format_map(row)
        cells = "{min_ms:.2f} | {peak_mb:.1f} | {floor_ms:.2f} | {floor_share:.2f} | {error:.0e}".format_map(row)
        lines.append(f"| {row['op']} | {row['size']} | {row['run']} | {spread} | {cells} |")
    return "\n".join(lines)


def _cases(*, quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    sizes = [(6, 2, 4, 512)] if quick else [(6, 2, 16, 4096), (10, 2, 32, 8192), (10, 2, 8, 65536)]
    for s, t, b, k in sizes:
        yield _multicrop_case(s, t, b, k, device, compiled=compiled)
    for millions in [0.3] if quick else [5.5, 22.0]:
        yield _ema_case(millions, device)
    yield _mse_case(*((2, 64, 512) if quick else (8, 1728, 512)), device, compiled=compiled)


def _multicrop_case(s: int, t: int, b: int, k: int, device: str, *, compiled: bool) -> Case:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(s, b, k, generator=generator) * 0.6).to(device).requires_grad_()
    probs = torch.softmax(torch.randn(t, b, k, generator=generator), dim=-1).to(device)
    weight = (torch.ones(s, t) - torch.eye(s, t)).to(device)

    def eager(logits: Tensor, probs: Tensor, weight: Tensor) -> Tensor:
        # DINOv3's form (dinov3/loss/dino_clstoken_loss.py): all pairs by einsum, the diagonal taken out afterwards.
        pairs = -torch.einsum("sbk,tbk->st", F.log_softmax(logits.float(), dim=-1), probs)
        return (pairs * weight).sum() / (weight.sum() * logits.shape[1])

    def run(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(function(logits, probs, weight), logits)[0]

    runs = {
        "ours": run(multicrop_cross_entropy),
        "reference": run(multicrop_cross_entropy_reference),
        "eager": run(eager),
    }
    if compiled:
        runs["compile"] = run(torch.compile(eager))
    # Forward reads the logits and probabilities, backward reads both again and writes the gradient.
    floor = 4 * (3 * s + 2 * t) * b * k
    return Case(op="multicrop_ce", size=f"S{s}_T{t}_B{b}_K{k}", floor_bytes=floor, runs=runs)


def _ema_case(millions: float, device: str) -> Case:
    # The tensors of a ViT: a few small ones for each big one.
    width = 384
    block = [(width,), (3 * width, width), (width,), (width, width), (width,), (4 * width, width), (4 * width,)]
    count = max(1, round(millions * 1e6 / sum(torch.Size(shape).numel() for shape in block)))
    shapes = block * count
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    start = [torch.randn(shape, generator=generator).to(device) for shape in shapes]

    def multiply_add(teacher: list[Tensor], student: list[Tensor], momentum: float) -> None:
        torch._foreach_mul_(teacher, momentum)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(teacher, student, alpha=1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]

    def run(update: Callable[[list[Tensor], list[Tensor], float], None]) -> Callable[[], Tensor]:
        teacher = [p.clone() for p in start]

        def call() -> Tensor:
            update(teacher, student, 0.996)
            return teacher[1]

        return call

    runs = {
        "ours": run(ema_update_),  # pyright: ignore[reportArgumentType]
        "reference": run(ema_update_reference_),  # pyright: ignore[reportArgumentType]
        "foreach_mul_add": run(multiply_add),
    }
    numel = sum(p.numel() for p in student)
    return Case(op="ema", size=f"{numel / 1e6:.1f}M", floor_bytes=12 * numel, runs=runs)


def _mse_case(b: int, n: int, p: int, device: str, *, compiled: bool) -> Case:
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(b, n, p, generator=generator).to(device).requires_grad_()
    target = torch.rand(b, n, p, generator=generator).to(device)
    weight = torch.ones(b, n, p, device=device)
    mask = (torch.rand(b, n, generator=generator) < 0.75).to(device)

    def eager(pred: Tensor, target: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        # The MAE repository's form (models_mae.py, forward_loss); it has no voxel weights.
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
        return (((pred - target) ** 2).mean(dim=-1) * mask).sum() / mask.sum()

    def run(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(function(pred, target, mask, weight), pred)[0]

    runs = {"reference": run(masked_patch_mse), "mae_repository": run(eager)}
    if compiled:
        runs["compile"] = run(torch.compile(masked_patch_mse))
    # Forward and backward read prediction, target and weight of masked rows; backward writes the whole gradient.
    floor = 4 * p * (6 * int(mask.sum()) + b * n)
    return Case(op="masked_patch_mse", size=f"B{b}_N{n}_P{p}", floor_bytes=floor, runs=runs)


def _time(runs: dict[str, Callable[[], Tensor]], *, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds per call; the runs take turns, so that a slow moment of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):
        for name, call in runs.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _peak_mb(call: Callable[[], Tensor], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with _silenced_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        profiler.export_chrome_trace(str(trace))
        events = [
            e for e in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"] if e.get("name") == "[memory]"
        ]
    held, peak = 0, 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / 2**20


@contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Kineto's C++ writes start and stop lines past Python's `sys.stderr`."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _bandwidth(device: str) -> float:
    """Bytes per second of an in-place addition of 256 MB: two reads and a write, which no cache holds.

    Not of a copy: on a CPU that also reads the lines it overwrites, unseen.
    """
    source, target = torch.ones(2**26, device=device), torch.ones(2**26, device=device)
    seconds = _time({"add": lambda: target.add_(source)}, repeats=15, device=device)["add"]
    return 3 * source.numel() * 4 / min(seconds)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _machine(device: str) -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = torch.cuda.get_device_name() if device.startswith("cuda") else (names or [platform.processor()])[0]
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _commit() -> str:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"
