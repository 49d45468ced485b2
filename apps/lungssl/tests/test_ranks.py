"""Two gloo ranks against one process, in the whole loop; see `two_rank_runs.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lungssl.errors import ConfigError, OtherRankError, explain
from lungssl.training.ranks import ALONE, Ranks, check_alone
from torch import nn

CASES = ["mae_accumulated", "croco_vit_nano", "dino_sinkhorn_koleo"]
"""One of each kind; `two_ranks.py` of lungssl-methods has all methods."""


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `two_rank_runs.py` prints."""
    script = Path(__file__).with_name("two_rank_runs.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path_factory.mktemp("ranks")), *CASES],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_make_the_run_of_one_process_with_the_global_batch(case: str, troubled: dict[str, Any]) -> None:
    found = troubled["compared"][case]
    assert found["moved"] > 1e-4 and found["lines"] == 5  # or nothing was compared: 3 steps, held out before and after
    assert found["loss"] <= 1e-9
    assert found["parameters"] <= 1e-9 * max(1.0, found["moved"])


def test_sigterm_on_one_rank_stops_both_after_the_same_step_and_they_go_on_bit_exactly(
    troubled: dict[str, Any],
) -> None:
    found = troubled["sigterm"]
    assert found == {"codes": [0, 0], "newest": "step_3", "resumed": [0, 0], "equal": True}


def test_a_killed_rank_ends_the_other_and_nothing_is_lost(troubled: dict[str, Any]) -> None:
    found = troubled["sigkill"]
    assert found == {"codes": [1, -9], "newest": "step_2", "resumed": [0, 0], "equal": True}
    assert "another rank has gone" in troubled["stderr"]


def test_a_loss_that_is_no_number_on_one_rank_ends_both_and_is_kept(troubled: dict[str, Any]) -> None:
    assert troubled["nan"] == {"codes": [1, 1], "newest": "step_2", "kept": ["step_4.safetensors"]}


def test_a_run_moves_from_two_ranks_to_one_and_back(troubled: dict[str, Any]) -> None:
    assert troubled["moved"] == [[0, 0], [0], [0, 0]]
    assert troubled["moved_loss"] < 1e-4  # float32, and AdamW makes steps of the rounding of a gradient of 0


def test_there_is_one_log(troubled: dict[str, Any]) -> None:
    lines = troubled["log"].splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines if "resuming" in line or "stopped" in line] == [
        "stopped by SIGUSR1 after step 2, checkpoint written; continue with --resume",
        "resuming after step 2",
        "stopped by SIGTERM after step 4, checkpoint written; continue with --resume",
        "resuming after step 4",
    ]
    assert sum("; 2 ranks" in line for line in lines) == 2


def test_a_batch_that_does_not_share_out_is_refused_with_one_that_does(troubled: dict[str, Any]) -> None:
    assert troubled["odd"] == [2, 2]
    assert "5 patients don't share out among 2 ranks; take 4" in troubled["stderr"]


def test_an_automatic_batch_shares_out_and_is_no_more_than_the_patients(troubled: dict[str, Any]) -> None:
    codes, log = troubled["auto"]
    assert codes == [0, 0]
    assert log.count("train.batch: 2  (a step holds ") == 1  # of three training patients


def test_batch_norms_across_ranks_need_a_gpu() -> None:
    normed, plain, two = nn.Sequential(nn.BatchNorm3d(2)), nn.Sequential(nn.GroupNorm(1, 2)), Ranks(size=2)
    cpu = ALONE.device("cpu")
    assert ALONE.synchronised(normed, cpu) is normed and two.synchronised(plain, cpu) is plain
    with pytest.raises(ConfigError, match="has 1 batch norms, which several ranks can only share on GPUs"):
        two.synchronised(normed, cpu)


def test_what_is_for_one_process_refuses_several(monkeypatch: pytest.MonkeyPatch) -> None:
    check_alone("fine-tuning")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="fine-tuning is for one process, but torchrun started 4"):
        check_alone("fine-tuning")


def test_a_rank_that_ends_with_the_first_says_so() -> None:
    assert explain(OtherRankError("DataError: gone")) == (1, "ended with the first rank (DataError: gone)")
