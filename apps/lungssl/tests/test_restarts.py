"""`torchrun --max-restarts`: a rank that dies is started again with the others, and the run ends as if it had not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lungssl.cli import main
from lungssl.training.logs import read_metrics

SMALL = (
    "mae_vit_nano train.steps=60 train.batch=4 train.checkpoint_every=10 train.eval_every=30 train.eval_batches=1 "
    "train.log_every=1 data.crop_vox=[20,24,22] views.global_vox=16 backbone.dim=48 method.decoder_width=24 "
    "method.decoder_depth=1 method.decoder_heads=2 method.mask_unit_tokens=1"
).split()
PATIENCE_S = 300


def rank_of(run: Path, rank: int) -> int:
    """Process id of a rank, by what torchrun put into its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = ((folder / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:  # ended meanwhile
            continue
        if str(run).encode() in words and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"no process is rank {rank}")


@pytest.mark.skipif(sys.platform != "linux", reason="looks for ranks in /proc")
def test_a_killed_rank_is_started_again_with_the_others(
    noise_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train = ["pretrain", *SMALL, "--data", str(noise_cohort), "--device", "cpu"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = str(Path(sys.executable).with_name("lungssl"))
    command = [*launcher, "--max-restarts", "2", "--no-python", program, *train, "--out", str(broken)]
    process = subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE_S
    while not list(broken.glob("checkpoints/step_*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    os.kill(rank_of(broken, 1), signal.SIGKILL)
    said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    assert main([*train, "--out", str(whole)]) == 0
    lines = [read_metrics(run / "metrics.jsonl") for run in (whole, broken)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]  # none lost, none twice
    losses = [[line["loss"] for line in run if "loss" in line] for run in lines]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.02)  # one process and two round otherwise, in bf16
    assert "resuming after step" in (broken / "train.log").read_text() + said
