"""The short version of `benchmarks/bench_faults.py`, which kills two ranks at random moments."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_two_ranks_that_are_killed_and_stopped_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/bench_faults.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == "faults" and result["ratios"] == {}
    checks = result["checks"]
    assert (checks["runs"], checks["lost"], checks["kills"], checks["sigterms"]) == (1, 0, 2, 1)
    assert len(json.loads((tmp_path / "faults_quick.json").read_text())["rows"]) == 1
