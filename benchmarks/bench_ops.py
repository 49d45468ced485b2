"""The ops of lungssl-ops beside their definitions and eager rivals: time, peak memory, error, share of the floor.

Run: uv run python benchmarks/bench_ops.py [--quick] [--device cuda] [--compile]
"""

import sys
from pathlib import Path

from lungssl_ops.bench import main

if __name__ == "__main__":
    name = "ops_quick.json" if "--quick" in sys.argv else "ops.json"
    main(["--out", str(Path(__file__).parent / "results" / name), *sys.argv[1:]])
