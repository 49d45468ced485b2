"""What a run does where the machine fails it: the outcome is told, and nothing that was checkpointed is lost."""

import os
import resource
import shutil
import signal
import time
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest
import torch
from lungssl.cli import main
from lungssl.errors import TrainingError, explain
from lungssl.training.checkpoint import checkpoints, problem
from lungssl.training.logs import read_metrics
from lungssl_data.cache import PairCache, write_pair
from safetensors.torch import load_file
from torch.utils.data import get_worker_info


def _assert_equal_runs(a: Path, b: Path) -> None:
    newest = [checkpoints(run / "checkpoints")[-1] for run in (a, b)]
    assert newest[0].name == newest[1].name
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(folder / file) for folder in newest)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    lines = [read_metrics(run / "metrics.jsonl") for run in (a, b)]
    untimed = [[{k: v for k, v in line.items() if k != "timing"} for line in run] for run in lines]
    assert untimed[0] == untimed[1]


# TensorBoard's own thread may meet the full disk first, and dies of it; the run is judged by its own files.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("size", [4096, 1200], ids=["checkpoint", "metrics"])
def test_a_full_disk_ends_the_run_and_a_later_one_goes_on(
    size: int, tmp_path: Path, fake_run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A checkpoint's generator state alone has 5 kB, ten lines of metrics.jsonl have 2.
    fake_run.train(tmp_path / "whole", steps=10)
    healthy, (soft, hard) = fake_run.read, resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(index: int) -> torch.Tensor:
        if index == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        return healthy(index)

    with monkeypatch.context() as patch:
        patch.setattr(fake_run, "read", filling)
        try:
            with pytest.raises((TrainingError, OSError)) as raised:
                fake_run.train(tmp_path / "full", steps=10)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    code, text = explain(raised.value)
    assert code == 1 and "make room" in text.lower() and "--resume" in text
    assert ("step_10: the checkpoint can't be written" in text) == (size == 4096)
    assert os.listdir(tmp_path / "full/checkpoints") == ["step_5"]
    assert problem(tmp_path / "full/checkpoints/step_5") is None
    fake_run.train(tmp_path / "full", steps=10, resume=True)
    _assert_equal_runs(tmp_path / "whole", tmp_path / "full")


def test_a_killed_reader_ends_the_run_and_a_later_one_goes_on(
    tmp_path: Path, fake_run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_run.train(tmp_path / "whole", steps=10)
    healthy = fake_run.read

    def dies(index: int) -> torch.Tensor:
        if index == 7 and get_worker_info() is not None:
            while not (tmp_path / "hurt/checkpoints/step_5").exists():  # it reads ahead of the steps
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return healthy(index)

    monkeypatch.setattr(fake_run, "read", dies)
    with pytest.raises(TrainingError, match=r"a process that reads crops has died .* --resume"):
        fake_run.train(tmp_path / "hurt", steps=10, workers=2)
    assert [path.name for path in checkpoints(tmp_path / "hurt/checkpoints")] == ["step_5"]
    fake_run.train(tmp_path / "hurt", steps=10, resume=True)
    _assert_equal_runs(tmp_path / "whole", tmp_path / "hurt")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_cache_entry_is_named_and_the_run_goes_on_once_it_is_mended(
    workers: int, tmp_path: Path, recipe_words: list[str], tiny_pair: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "cache"
    for patient in ("a", "b"):
        write_pair(tiny_pair._pair(patient, "train", (3.0, 3.0, 3.0), ("exhale", "inhale")), data)
    PairCache(data).close()
    arguments = ["pretrain", "mae_vit_nano", *recipe_words, f"train.workers={workers}", "--data", str(data)]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    file, kept = data / "b.h5", tmp_path / "b.h5"
    shutil.copy2(file, kept)
    with h5py.File(file) as stored:
        places = [
            int(place) for phase in ("exhale", "inhale") for place in np.unique(stored[f"chunks/{phase}"][..., 0])
        ]
    hurt = bytearray(file.read_bytes())
    for place in places:
        hurt[place : place + 20] = bytes(20)
    file.write_bytes(hurt)
    shutil.copystat(kept, file)
    capsys.readouterr()
    assert main([*arguments, "--out", str(tmp_path / "hurt")]) == 3
    said = capsys.readouterr().err
    assert "patient b" in said and "damaged" in said
    shutil.copy2(kept, file)
    assert main([*arguments, "--out", str(tmp_path / "hurt"), "--resume"]) == 0
    _assert_equal_runs(tmp_path / "whole", tmp_path / "hurt")
