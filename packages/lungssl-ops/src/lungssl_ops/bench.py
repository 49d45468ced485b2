"""Times the ops beside their rivals, in one process, in turn.

Each case is run forward and backward. A row states the floor: the bytes that any implementation must move at the memory
bandwidth, or the arithmetic at the speed of a matrix product, both measured in the same run. Peak memory is what the
call allocates beyond its inputs, from the profiler's allocation events on a CPU and the caching allocator on a GPU.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from lungssl_ops.measure import Case, bandwidth, commit, flops_per_s, machine, peak_mb, timings

OPS = ("multicrop_ce", "prototype_ce", "ct_views", "lncc", "warp", "mind", "cost_volume", "patches", "ema")
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
    """All cases as {"benchmark", "ratios", "checks", "machine", "commit", "rows"}; ratios above 1: ours is better."""
    speeds = bandwidth(device), flops_per_s(device)
    rows, ratios, checks = [], {}, {}
    for case in _cases(only, quick=quick, device=device, compiled=compiled):
        found = _rows(case, device=device, repeats=5 if quick else 25, speeds=speeds)
        rows += found.values()
        ratios |= _ratios(case, found)
        checks |= _checks(case, found)
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
    """Command line: prints a table, writes the full JSON, and ends with one JSON line."""
    parser = argparse.ArgumentParser(description="Time lungssl-ops beside its rivals.")
    parser.add_argument("--quick", action="store_true", help="small sizes, 5 repeats, a few seconds")
    parser.add_argument("--device", default="cpu", help="torch device, e.g. cuda")
    parser.add_argument("--compile", action="store_true", help="add torch.compile of the rivals (needs a C++ compiler)")
    parser.add_argument("--only", default="", help="ops whose folder's name holds this text, e.g. lncc")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the full table")
    options = parser.parse_args(arguments)
    result = run(quick=options.quick, device=options.device, compiled=options.compile, only=options.only)
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


def _cases(only: str, *, quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    for op in (op for op in OPS if only in op):
        yield from import_module(f"lungssl_ops.{op}.bench").cases(quick=quick, device=device, compiled=compiled)


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
