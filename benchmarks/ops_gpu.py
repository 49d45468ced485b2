"""All that a GPU is needed for, in three calls: tests with bf16, benchmarks with tuning, a profile of the worst op.

Run: uv run python benchmarks/ops_gpu.py --stage correctness|bench|profile --out DIR    (and predictions, without a GPU)

    correctness  every test of lungssl-ops on the GPU        -> correctness.txt; bf16 may not be skipped there
    bench        every case, launches tuned on the way       -> ops_cuda.json, winners/sm_XX.json, predictions.md
    profile      the run of ours that is furthest from its floor -> profile.txt, trace.json
    predictions  the table of `predictions.md` again, from ops_cuda.json

What is kept: `ops_cuda.json` in benchmarks/results/, `winners/*.json` in packages/lungssl-ops/src/lungssl_ops/winners/.
Each stage ends with one JSON line and with status 1 where something failed; a prediction that missed is no failure.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One figure that was written down before any GPU had been seen."""

    what: str
    op: str
    size: str
    """Regular expression for a row's size."""
    run: str
    column: str = "median_ms"
    at_least: float = 0.0
    at_most: float = float("inf")


PREDICTIONS = (
    Prediction(what="prototypes, rows fused", op="prototype_ce", size=r"N2074(?!\d)", run="rows", at_most=1.6),
    Prediction(what="prototypes, nothing [N, K]", op="prototype_ce", size=r"N2074(?!\d)", run="flash", at_most=2.0),
    Prediction(what="its memory", op="prototype_ce", size=r"N2074(?!\d)", run="flash", column="peak_mb", at_most=150.0),
    Prediction(what="prototypes, eager", op="prototype_ce", size=r"N2074(?!\d)", run="eager", at_least=5.0),
    Prediction(
        what="prototypes, flex_attention", op="prototype_ce", size=r"N2074(?!\d)", run="flex", at_least=1.5, at_most=3.0
    ),
    Prediction(what="LNCC", op="lncc", size=r"^160", run="ours", at_most=0.20),
    Prediction(what="LNCC, fused_lncc", op="lncc", size=r"^160", run="fused_lncc", at_least=0.3, at_most=0.5),
    Prediction(what="LNCC, MONAI", op="lncc", size=r"^160", run="monai", at_least=2.5),
    # Predicted for both sizes in one step: 0.6 ms, shared out by their voxels.
    Prediction(what="64 views of 96³", op="ct_views", size=r"^64x96x96x96", run="ours", at_most=0.4),
    Prediction(what="256 views of 48³", op="ct_views", size=r"^256x48x48x48", run="ours", at_most=0.2),
    Prediction(what="warp and Jacobian", op="warp", size=r"^160", run="ours", at_most=0.12),
    Prediction(what="the same, compiled gather", op="warp", size=r"^160", run="compile", at_least=0.2, at_most=0.3),
    Prediction(what="the same, eager", op="warp", size=r"^160", run="eager", at_least=1.2),
    Prediction(what="cost volume of 384 features", op="cost_volume", size=r"C384(?!\d)", run="ours", at_most=1.5),
    Prediction(what="the same, eager", op="cost_volume", size=r"C384(?!\d)", run="eager", at_least=150.0),
)
"""For one H100, forward and backward, from bytes at 3.0 TB/s and products at 790 TFLOP/s; written 2026-11-22."""


def predictions_table(rows: list[dict[str, Any]]) -> str:
    """Predicted against measured as a markdown table; a row that isn't there is said, and neither pass nor miss."""
    lines = ["| what | op | size | run | predicted | measured | |", "|---|---|---|---|---|---|---|"]
    for p in PREDICTIONS:
        found = [r for r in rows if r["op"] == p.op and r["run"] == p.run and re.search(p.size, r["size"])]
        unit = {"median_ms": "ms", "peak_mb": "MB"}[p.column]
        low = f"≥ {p.at_least:g}" if p.at_least else ""
        high = f"≤ {p.at_most:g}" if p.at_most < float("inf") else ""
        predicted = f"{' and '.join(part for part in (low, high) if part)} {unit}"
        for row in found:
            verdict = "pass" if p.at_least <= row[p.column] <= p.at_most else "miss"
            cells = [p.what, p.op, row["size"], p.run, predicted, f"{row[p.column]:.3g} {unit}", verdict]
            lines.append(f"| {' | '.join(cells)} |")
        if not found:
            lines.append(f"| {p.what} | {p.op} | {p.size} | {p.run} | {predicted} | not measured | |")
    return "\n".join(lines)


def worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of ours, the row furthest from its floor. Raises ValueError where no row is ours."""
    ours = [row for row in rows if row["run"] == "ours"]
    if not ours:
        raise ValueError("no row of the results is ours; run --stage bench first")
    return min(ours, key=lambda row: row["floor_share"])


def correctness(out: Path) -> dict[str, Any]:
    """Every test of the package, on the GPU; the names of bf16 checks that were skipped all the same."""
    command = [sys.executable, "-m", "pytest", "packages/lungssl-ops", "-q", "-rs", "--durations=10"]
    status, text = _run(command, out / "correctness.txt", {})
    skipped = [line for line in text.splitlines() if line.startswith("SKIPPED")]
    bf16 = [line for line in skipped if re.search("bf16|bfloat16", line)]
    return {"status": status, "skipped": len(skipped), "bf16_skipped": bf16, "passed": status == 0 and not bf16}


def bench(out: Path) -> dict[str, Any]:
    """Every case with tuned launches, the winners, and the predictions beside what was measured."""
    folder = {"LUNGSSL_AUTOTUNE": "1", "LUNGSSL_OPS_CACHE": str(out / "cache")}
    words = ["--device", "cuda", "--compile", "--out", str(out / "ops_cuda.json")]
    status, _ = _run([sys.executable, "-m", "lungssl_ops.bench", *words], out / "bench.txt", folder)
    words = ["--export", str(out / "winners")]
    exported, _ = _run([sys.executable, "-m", "lungssl_ops.tuning", *words], out / "export.txt", folder)
    return {"status": status, "winners": exported == 0, **predictions(out), "passed": status == exported == 0}


def predictions(out: Path) -> dict[str, Any]:
    """The predictions beside what `bench` measured."""
    table = predictions_table(_rows(out))
    (out / "predictions.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    return {word: table.count(f"| {word} |") for word in ("pass", "miss", "not measured")} | {"passed": True}


def profile(out: Path) -> dict[str, Any]:
    """Kernel by kernel, the run of ours that is furthest from its floor."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    row = worst(_rows(out))
    call = _call(row["op"], row["size"])
    for _ in range(3):
        call()
    with torch_profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(10):
            call()
    profiler.export_chrome_trace(str(out / "trace.json"))
    table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=80)
    (out / "profile.txt").write_text(f"{json.dumps(row)}\n\n{table}\n", encoding="utf-8")
    print(table)
    return {"op": row["op"], "size": row["size"], "floor_share": row["floor_share"], "passed": True}


STAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "correctness": correctness,
    "bench": bench,
    "profile": profile,
    "predictions": predictions,
}


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description="What a GPU is needed for: correctness, benchmarks, a profile.")
    parser.add_argument("--stage", choices=list(STAGES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder; profile and predictions read what bench wrote")
    options = parser.parse_args(arguments)
    if options.stage in ("profile", "predictions") and not (options.out / "ops_cuda.json").exists():
        parser.error(f"--out {options.out} has no ops_cuda.json; run --stage bench into it first")
    if options.stage != "predictions":
        import torch

        if not torch.cuda.is_available():
            parser.error(f"--stage {options.stage}: torch sees no CUDA device here")
    options.out.mkdir(parents=True, exist_ok=True)
    result = STAGES[options.stage](options.out.resolve())
    print(json.dumps({"stage": options.stage} | result))
    sys.exit(not result["passed"])


def _run(command: list[str], log: Path, variables: dict[str, str]) -> tuple[int, str]:
    """A command's exit status and text, shown and kept in a file as it comes, should the time run out."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | variables
    lines = []
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
            file.write(line)
            file.flush()
    return process.returncode, "".join(lines)


def _rows(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "ops_cuda.json").read_text(encoding="utf-8"))["rows"]


def _call(op: str, size: str) -> Callable[[], Any]:
    """The run `ours` of a case, as it was benchmarked."""
    from lungssl_ops.bench import OPS

    for folder in OPS:
        for case in import_module(f"lungssl_ops.{folder}.bench").cases(quick=False, device="cuda", compiled=False):
            if (case.op, case.size) == (op, size):
                return case.runs["ours"]
    raise ValueError(f"no benchmark case is called {op} {size} any more; run --stage bench again")


if __name__ == "__main__":
    main()
