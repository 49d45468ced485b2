"""Weights shared out over two gloo ranks, beside whole ones on each; see `sharded_runs.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lungssl.cli import main
from lungssl.errors import ConfigError
from lungssl.training.ranks import ALONE, Ranks
from lungssl.training.sharding import blocks_of, check_shardable, is_sharded, sharded, whole_encoder, whole_state
from lungssl_backbones import create_backbone
from torch import nn

CASES = ["mae_vit_nano", "dino_vit_nano"]
gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `sharded_runs.py` prints."""
    script = Path(__file__).with_name("sharded_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path_factory.mktemp("sharded")), *CASES],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@gloo
@pytest.mark.parametrize("case", CASES)
def test_shared_out_weights_make_the_run_of_whole_ones(case: str, runs: dict[str, Any]) -> None:
    found = runs["compared"][case]
    assert found["keys"] and found["files"] == ["shard", "shard", "state.json"]
    assert found["moved"] > 1e-2  # or nothing was compared
    assert found["figures"] <= 1e-5  # losses, norms before clipping, the teacher's entropy, held-out and probed ones
    # In float32; AdamW makes steps of the rounding of a gradient of 0.
    assert found["parameters"] <= 1e-3 * found["moved"]
    assert found["encoder"] <= 1e-3 * found["moved"]


@gloo
def test_a_sharded_run_that_is_stopped_goes_on_bit_exactly(runs: dict[str, Any]) -> None:
    assert runs["whole"] == [0, 0] and runs["stopped"] == [[0, 0], [0, 0]]
    assert runs["same_figures"] and runs["same_state"] == 0.0


@gloo
def test_blocks_made_again_in_bf16_give_the_same_bits(runs: dict[str, Any]) -> None:
    assert runs["bf16_kept"] == runs["bf16_again"] == [0, 0]
    assert runs["again_same_figures"] and runs["again_same_state"] == 0.0


@gloo
def test_a_sharded_run_moves_to_one_process_and_back_where_it_is_told_to(runs: dict[str, Any]) -> None:
    assert runs["moved"] == [[0, 0], [2], [0], [0, 0]]
    assert "this is one; start several with torchrun, or set train.shard=none" in runs["stderr"]
    assert runs["moved_loss"] < 1e-4  # as in test_ranks.py


@gloo
def test_a_damaged_part_of_one_rank_is_seen_and_the_checkpoint_before_taken(runs: dict[str, Any]) -> None:
    assert runs["damaged"] == [0, 0]
    log = runs["damaged_log"]
    assert "checkpoint step_5 is damaged (shard-00002-" in log and "falling back to the one before it" in log
    assert "resuming after step 4" in log


@gloo
def test_a_full_disk_on_one_rank_ends_both_and_leaves_no_half_checkpoint(runs: dict[str, Any]) -> None:
    assert runs["full"] == {"codes": [1, 1], "left": ["step_2"]}
    assert "step_4: the checkpoint can't be written (rank 1: " in runs["stderr"]


@gloo
def test_a_step_without_a_number_is_kept_whole_and_gone_back_from(runs: dict[str, Any]) -> None:
    assert runs["nan"] == [1, 1]  # it comes again each time; the script read the step into a method of one process
    assert "after 3 returns to a checkpoint with half the rate each time it came again" in runs["stderr"]


def test_one_process_has_nobody_to_share_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="this is one; start several with torchrun, or set train"):
        check_shardable(ALONE)
    words = ["train.shard=full", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main(["pretrain", "mae_vit_nano", *words]) == 2
    assert "train.shard: full" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_encoders_without_transformer_blocks_are_refused() -> None:
    holder = nn.ModuleList([create_backbone("resenc_tiny", widths=(8, 12), depths=(1, 1))])
    with pytest.raises(ConfigError, match="blocks one by one, and resenc_tiny has none; take a vit3d_"):
        sharded(holder, Ranks(size=2), torch.device("cpu"))


@pytest.mark.parametrize("name", ["vit3d_nano", "primus_ti"])
def test_blocks_are_found_in_their_order(name: str) -> None:
    encoder = create_backbone(name, depth=3)
    found = [one for one, module in encoder.named_modules() if any(module is block for block in blocks_of(encoder))]
    assert [one.rpartition(".")[2] for one in found] == ["0", "1", "2"]


def test_what_is_not_shared_out_stays_itself() -> None:
    encoder = create_backbone("vit3d_nano", depth=1)
    assert not is_sharded(encoder) and whole_encoder(encoder, ALONE, torch.device("cpu")) is encoder
    assert all(value.data_ptr() for value in whole_state(encoder, ALONE).values())
