"""Times the ops beside their rivals, in one process, in turn.

Each case is run forward and backward. A row states the floor: the bytes that any implementation must move at the memory
bandwidth, or the arithmetic at the speed of a matrix product, both measured in the same run. Peak memory is what the
call allocates beyond its inputs, from the profiler's allocation events on a CPU and the caching allocator on a GPU.
"""

import argparse
import json
import statistics
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import torch

from lungssl_ops.bench_tables import markdown_table, write_block
from lungssl_ops.measure import Case, bandwidth, commit, flops_per_s, machine, peak_mb, timings

OPS = (
    "multicrop_ce",
    "prototype_ce",
    "ct_views",
    "lncc",
    "warp",
    "mind",
    "cost_volume",
    "patches",
    "transformer",
    "ema",
)
"""Folders whose `bench.py` has `cases(quick=, device=, compiled=)`."""
TOLERANCE = 1e-5
"""Of float32 against the definition in float64 (`ops.md` section 3), unless a case says otherwise."""


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


def run(*, quick: bool, device: str, compiled: bool, only: str = "") -> dict[str, object]:
    """All cases as {"benchmark", "ratios", "checks", "machine", "commit", "rows"}; ratios above 1: ours is better.

    An op whose case fails has the check `<op>_ran` false; the others go on, because a GPU may be lent for minutes.
    """
    speeds = bandwidth(device), flops_per_s(device)
    rows, ratios, checks = [], {}, {}
    for op in (op for op in OPS if only in op):
        try:
            for case in _cases(op, quick=quick, device=device, compiled=compiled):
                found = _rows(case, device=device, repeats=5 if quick else 25, speeds=speeds)
                rows += found.values()
                ratios |= _ratios(case, found)
                checks |= _checks(case, found)
                print(f"{case.op} {case.size}: {len(found)} runs timed", file=sys.stderr)
            checks[f"{op}_ran"] = True
        except Exception:
            traceback.print_exc()
            checks[f"{op}_ran"] = False
    speed = {"gb_per_s": round(speeds[0] / 1e9, 1), "gflop_per_s": round(speeds[1] / 1e9), "quick": quick}
    return {
        "benchmark": "ops",
        "ratios": dict(sorted(ratios.items())),
        "checks": checks,
        "machine": machine(device) | speed,
        "commit": commit(),
        "rows": [asdict(row) for row in rows],
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line: prints a table, writes the full JSON, and ends with one JSON line; exit status 1 if a check fails.

    With --readme it writes the table of an earlier run into a README instead.
    """
    parser = argparse.ArgumentParser(prog="lungssl_ops.bench", description="Time lungssl-ops beside its rivals.")
    parser.add_argument("--quick", action="store_true", help="small sizes, 5 repeats, a few seconds")
    parser.add_argument("--device", default="cpu", help="torch device, e.g. cuda")
    parser.add_argument("--compile", action="store_true", help="add torch.compile of the rivals (needs a C++ compiler)")
    parser.add_argument("--only", default="", help="ops whose folder's name holds this text, e.g. lncc")
    parser.add_argument("--out", type=Path, help="JSON file for the full table")
    parser.add_argument("--readme", type=Path, help="time nothing: write the table of --from into this README")
    parser.add_argument("--from", type=Path, dest="source", help="JSON file of an earlier run, for --readme")
    options = parser.parse_args(arguments)
    if (options.readme is None) != (options.source is None):
        parser.error("--readme and --from go together: the README to write and the JSON file of an earlier run")
    if options.readme:
        write_block(options.readme, json.loads(options.source.read_text(encoding="utf-8")))
        return
    if options.out is None:
        parser.error("--out FILE.json is missing: where the full table goes")
    if not any(options.only in op for op in OPS):
        parser.error(f"--only {options.only}: no op's name holds this text; the ops are {', '.join(OPS)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch sees no CUDA device here")
    result = run(quick=options.quick, device=options.device, compiled=options.compile, only=options.only)
    result["command"] = _command(options)
    print(markdown_table(result["rows"]))  # pyright: ignore[reportArgumentType]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key not in ("rows", "command")}))
    if not all(result["checks"].values()):  # pyright: ignore[reportAttributeAccessIssue]
        sys.exit(1)


def _command(options: argparse.Namespace) -> str:
    """What to type for the same run."""
    words = [f"OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/bench_ops.py"]
    words += ["--quick"] * options.quick + ["--compile"] * options.compile
    words += [f"--device {options.device}"] * (options.device != "cpu") + [f"--only {options.only}"] * bool(
        options.only
    )
    return " ".join(words)


def _cases(op: str, *, quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    return import_module(f"lungssl_ops.{op}.bench").cases(quick=quick, device=device, compiled=compiled)


def _rows(case: Case, *, device: str, repeats: int, speeds: tuple[float, float]) -> dict[str, Row]:
    # Before the timings, while every run starts from the same state.
    outputs = {name: call().detach().double() for name, call in case.runs.items()}
    expected = case.expected().detach().double() if case.expected else outputs["reference"]
    seconds = timings(case.runs, repeats=repeats, device=device, slow=case.slow)
    floor_ms = 1e3 * max(case.floor_bytes / speeds[0], case.floor_flops / speeds[1])
    rows = {}
    for name, call in case.runs.items():
        p25, median, p75 = (1e3 * q for q in statistics.quantiles(seconds[name], n=4))
        shortest_ms = 1e3 * min(seconds[name])
        rows[name] = Row(
            op=case.op,
            size=case.size,
            run=name,
            min_ms=shortest_ms,
            median_ms=median,
            p25_ms=p25,
            p75_ms=p75,
            peak_mb=peak_mb(call, device),
            floor_ms=floor_ms,
            floor_share=floor_ms / shortest_ms,
            error=((outputs[name] - expected).norm() / expected.norm()).item(),
        )
    return rows


def _ratios(case: Case, rows: dict[str, Row]) -> dict[str, float]:
    stem = case.stem or f"{case.op}_{case.size}"
    ours = rows.get("ours") or rows["reference"]
    ratios = {}
    for name, row in rows.items():
        if row is not ours:
            ratios[f"{stem}{case.time_word}_vs_{name}"] = round(row.median_ms / ours.median_ms, 2)
            ratios[f"{stem}_memory_vs_{name}"] = round(max(row.peak_mb, 0.01) / max(ours.peak_mb, 0.01), 2)
    return ratios


def _checks(case: Case, rows: dict[str, Row]) -> dict[str, bool]:
    limits = case.tolerance or dict.fromkeys(rows, TOLERANCE)
    return {
        f"{case.op}_{case.size}_{name}_error_below_{limit:.0e}": rows[name].error < limit
        for name, limit in limits.items()
        if name in rows
    }


if __name__ == "__main__":
    main()
