"""Runs as jobs: queued again with the signal that SLURM gives, they end as if they had never been stopped."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lungssl.cli import main
from lungssl.submitting import CommandJob, submit
from lungssl.training.logs import read_metrics
from lungssl_data.cache import write_pair
from lungssl_data.pair import PhasePair, PhaseScan, Split
from safetensors.torch import load_file

SMALL = (
    "dino_vit_nano train.steps=60 train.batch=2 train.checkpoint_every=30 train.eval_every=30 train.eval_batches=1 "
    "train.log_every=1 data.crop_vox=[20,24,22] views.global_vox=16 views.local_vox=8 backbone.dim=48 "
    "method.prototypes=32 method.head_hidden=16 method.head_bottleneck=8"
).split()


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    splits: tuple[Split, Split, Split] = ("train", "train", "val")
    for number, split in enumerate(splits):
        scans = [
            PhaseScan(
                ct_hu=random.normal(-700, 200, (26, 28, 30)).clip(-1000, 400).astype(np.int16),
                valid=np.ones((26, 28, 30), np.uint8),
                lung=np.ones((26, 28, 30), np.uint8),
                spacing_mm=(5.0, 5.0, 5.0),
                origin_mm=(0.0, 0.0, 0.0),
            )
            for _ in range(2)
        ]
        affine = np.eye(3, 4)
        pair = PhasePair(patient=f"p{number}", exhale=scans[0], inhale=scans[1], split=split, exhale_to_inhale=affine)
        write_pair(pair, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the job's process in /proc")
# Jobs outlive the command that started them, of which Python warns.
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_a_job_that_is_preempted_is_queued_again_and_loses_nothing(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    common = ["pretrain", *SMALL, "--data", str(cohort), "--device", "cpu"]
    assert main([*common, "--out", str(whole)]) == 0
    command = [*common, "--out", str(broken), "--overwrite"]
    folder = tmp_path / "jobs"
    (job,) = submit([command], cluster="local", folder=folder, name="test", parameters={"timeout_min": 20})

    def said() -> str:
        return "".join(path.read_text() for path in sorted(folder.glob("*_log.*")))

    deadline = time.monotonic() + 240
    while not (broken / "metrics.jsonl").is_file() or len(read_metrics(broken / "metrics.jsonl")) < 5:
        assert time.monotonic() < deadline, said()
        time.sleep(0.02)
    children = Path(f"/proc/{job.job_id}/task/{job.job_id}/children")  # submitit's process waits for the job's
    os.kill(int(children.read_text()), signal.SIGUSR1)  # as SLURM sends it before it takes the machine away
    while not job.paths.result_pickle.exists():
        assert time.monotonic() < deadline, said()
        time.sleep(0.1)
    assert job.exception() is None, said()
    assert "stopped by SIGUSR1" in (broken / "train.log").read_text(), said()
    lines = [read_metrics(run / "metrics.jsonl") for run in (whole, broken)]
    assert [{k: v for k, v in line.items() if k != "timing"} for line in lines[0]] == [
        {k: v for k, v in line.items() if k != "timing"} for line in lines[1]
    ]
    encoders = [load_file(run / "export/encoder.safetensors") for run in (whole, broken)]
    assert all(bool((encoders[0][name] == encoders[1][name]).all()) for name in encoders[0])


def test_what_is_queued_again_goes_on_and_replaces_nothing(tmp_path: Path) -> None:
    fresh = ["pretrain", "r.yaml", "--out", str(tmp_path / "new"), "--overwrite"]
    begun = ["pretrain", "r.yaml", "--out", str(tmp_path), "--overwrite"]
    compare = ["compare", "p.yaml", "--out", str(tmp_path), "--shard", "1/2"]
    again = [CommandJob().checkpoint(command).args[0] for command in (fresh, begun, compare)]
    assert again == [fresh, [*begun[:-1], "--resume"], compare]


def test_the_script_has_the_jobs_wishes_and_the_warning(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pretrain", *SMALL, "--data", str(cohort), "--out", str(tmp_path / "a run"), "--launcher", "slurm"]
    wishes = [
        "mem_gb=64",
        "slurm_account=0123",
        "tasks_per_node=2",
        "gpus_per_node=2",
        "timeout_min=90",
        "slurm_partition=gpu",
    ]
    assert main([*command, "--print", *(word for wish in wishes for word in ("--job", wish))]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    for line in (
        "mem=64GB",
        "account=0123",
        "ntasks-per-node=2",
        "gpus-per-node=2",
        "time=90",
        "partition=gpu",
        "signal=USR1@90",
    ):
        assert f"#SBATCH --{line}" in lines
    assert f"--out '{tmp_path}/a run'" in lines[-1] and not (tmp_path / "a run").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--job", "timeout_min=5"], "add --launcher local or slurm"),
        (["--launcher", "local", "--dry-run"], "leave --dry-run and --replay out"),
        (["--launcher", "local", "--print"], "--launcher local has none"),
        (["--launcher", "slurm", "--print", "--job", "minutes=3"], "minutes"),
        (["--launcher", "local", "--job", "gpus"], "expected KEY=VALUE"),
    ],
)
def test_what_does_not_fit_is_said(
    extra: list[str], message: str, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", *SMALL, "--data", str(cohort), "--out", str(tmp_path / "run"), *extra]) == 2
    assert message in capsys.readouterr().err
