"""Runs as jobs: queued again with the signal that SLURM gives, they end as if they had never been stopped."""

import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
from lungssl.cli import main
from lungssl.submitting import CommandJob, submit
from lungssl.training.logs import read_metrics
from safetensors.torch import load_file

SMALL = (
    "dino_vit_nano train.steps=60 train.batch=2 train.checkpoint_every=30 train.eval_every=30 train.eval_batches=1 "
    "train.log_every=1 data.crop_vox=[20,24,22] views.global_vox=16 views.local_vox=8 backbone.dim=48 "
    "method.prototypes=32 method.head_hidden=16 method.head_bottleneck=8"
).split()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the job's process in /proc")
# Jobs outlive the command that started them, of which Python warns.
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_a_job_that_is_preempted_is_queued_again_and_loses_nothing(
    noise_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    common = ["pretrain", *SMALL, "--data", str(noise_cohort), "--device", "cpu"]
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
    noise_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pretrain", *SMALL, "--data", str(noise_cohort), "--out", str(tmp_path / "a run"), "--launcher", "slurm"]
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
        (["--launcher", "slurm", "--print", "--job", "timeout_min=soon"], "timeout_min=soon: expected whole minutes"),
        (
            ["--launcher", "slurm", "--print", "--job", "timeout_min=0"],
            "timeout_min=0: expected whole minutes",
        ),
        (["--launcher", "slurm", "--print", "--job", "timeout_min=true"], "timeout_min=True: expected whole minutes"),
        (["--launcher", "local", "--job", "timeout_min=1.5"], "timeout_min=1.5: expected whole minutes"),
        (["--launcher", "slurm", "--print", "--job", "slurm_time=10:00:00"], "say --job timeout_min=MINUTES"),
    ],
)
def test_what_does_not_fit_is_said(
    extra: list[str], message: str, noise_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", *SMALL, "--data", str(noise_cohort), "--out", str(tmp_path / "run"), *extra]) == 2
    assert message in capsys.readouterr().err


def test_a_job_has_a_day_where_nothing_is_said(
    noise_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(noise_cohort), "--out", str(tmp_path / "run"), "--launcher", "slurm", "--print"]
    assert main(["pretrain", *SMALL, *words]) == 0
    assert "#SBATCH --time=1440" in capsys.readouterr().out.splitlines()


def test_fine_tuning_is_handed_in_as_it_was_asked_for(
    noise_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train.steps=3", "--data", str(noise_cohort), "--out", str(tmp_path / "run"), "--labels", "2"]
    assert main(["finetune", "segment", *words, "--overwrite", "--launcher", "slurm", "--print"]) == 0
    script = capsys.readouterr().out.strip().splitlines()
    assert "#SBATCH --job-name=lungssl-run" in script
    handed_in = shlex.split(script[-1])
    assert handed_in[handed_in.index("finetune") :][:3] == ["finetune", "segment", "train.steps=3"]
    options = {"--data": str(noise_cohort), "--out": str(tmp_path / "run"), "--labels": "2", "--draw": "0"}
    assert all(handed_in[handed_in.index(name) + 1] == value for name, value in options.items())
    assert handed_in[-1] == "--overwrite" and "--encoder" not in handed_in and not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", ["segment", "register", "joint", "cosegment"])
def test_fine_tuning_refuses_several_processes(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["finetune", task, "--out", str(tmp_path / "run")]) == 2
    assert (
        "fine-tuning is for one process, but torchrun started 4; start it without torchrun" in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
