"""The ops of lungssl-ops beside their definitions and eager rivals: time, peak memory, error, share of the floor.

Run: uv run python benchmarks/bench_ops.py [--quick] [--device cuda] [--compile] [--only lncc] [--out FILE.json]

Without --out, a part of the table (--only), quick figures and a GPU's have files of their own beside `ops.json`.
"""

import argparse
import sys
from pathlib import Path

from lungssl_ops.bench import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--device", default="cpu")
    known, _ = parser.parse_known_args()
    parts = ["ops", *([known.device.split(":")[0]] if known.device != "cpu" else [])]
    parts += [part for part in (known.only, "quick" * known.quick) if part]
    main(["--out", str(Path(__file__).parent / "results" / f"{'_'.join(parts)}.json"), *sys.argv[1:]])
