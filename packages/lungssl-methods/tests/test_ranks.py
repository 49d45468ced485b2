"""T22, T23, and the parts of T3, T4 and T8 across processes: two ranks, and micro-batches, against one batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lungssl_methods import METHODS
from lungssl_methods.ranks import RanksGather

CASES = [*sorted(METHODS), "barlow_twins", "dino_koleo", "dino_sinkhorn"]
MORE = ["dino_ibot", "phase_dino_ibot", "paired_dense_taught"]
"""Two ranks alone: in micro-batches iBOT masks, and a teacher matches, other tokens."""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What `two_ranks.py` prints: three steps of every method on two gloo processes, on one, and accumulated."""
    script = Path(__file__).with_name("two_ranks.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", [*CASES, *MORE])
def test_two_ranks_train_as_one_process_with_all_samples(case: str, found: dict[str, Any]) -> None:
    ranks = found[case]["ranks"]
    assert ranks["moved"] > 1e-5  # or nothing was compared
    assert ranks["loss"] <= (3e-6 if case in MORE else 1e-6)  # sums of unlike parts, in float32
    assert ranks["parameters"] <= 1e-6 * max(1.0, ranks["moved"])


@pytest.mark.parametrize("case", CASES)
def test_accumulated_micro_batches_are_one_batch_where_the_method_says_so_and_only_there(
    case: str, found: dict[str, Any]
) -> None:
    micro = found[case]["micro"]
    assert found[case]["separable"] == (micro["loss"] <= 1e-6)
    if found[case]["separable"]:
        assert micro["parameters"] <= 1e-6 * max(1.0, micro["moved"])


def test_a_gather_without_a_process_group_says_so() -> None:
    with pytest.raises(ValueError, match="process group has not been initialized"):
        RanksGather().sum(torch.ones(1))
