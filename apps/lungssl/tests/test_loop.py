import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lungssl.errors import TrainingError
from lungssl.training.checkpoint import checkpoints, load_checkpoint
from lungssl.training.config import TrainConfig
from lungssl.training.logs import read_metrics
from lungssl.training.loop import clip_gradients, make_optimizer, micro_seed, train_step
from safetensors.torch import load_file


def _tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step_{step}"
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def _untimed(run: Path) -> list[dict[str, Any]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "timing"} for line in lines]


def _assert_equal_runs(a: Path, b: Path, step: int) -> None:
    first, second = _tensors(a, step), _tensors(b, step)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first), "a state tensor differs"
    assert _untimed(a) == _untimed(b)


def test_a_run_that_is_resumed_equals_one_that_was_not(tmp_path: Path, fake_run: ModuleType) -> None:
    fake_run.train(tmp_path / "whole", steps=20, accumulate=2)
    # SIGTERM in the middle of step 8's second micro-batch: the step is finished, then checkpointed.
    result, _ = fake_run.train(tmp_path / "parts", steps=20, accumulate=2, die_at=15, send=signal.SIGTERM)
    assert (result.step, result.stopped_by) == (8, "SIGTERM")
    result, _ = fake_run.train(tmp_path / "parts", steps=20, accumulate=2, resume=True)
    assert (result.step, result.stopped_by) == (20, None)
    _assert_equal_runs(tmp_path / "whole", tmp_path / "parts", 20)


def test_a_killed_process_resumes_bit_exactly(tmp_path: Path, fake_run: ModuleType) -> None:
    script = str(Path(fake_run.__file__ or ""))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, script, str(tmp_path / "killed"), "20", "13", str(int(signal.SIGKILL))]
    killed = subprocess.run(arguments, capture_output=True, env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert read_metrics(tmp_path / "killed/metrics.jsonl")[-1]["step"] == 13  # three steps past the checkpoint
    assert [path.name for path in checkpoints(tmp_path / "killed/checkpoints")] == ["step_5", "step_10"]
    fake_run.train(tmp_path / "killed", steps=20, resume=True)
    fake_run.train(tmp_path / "whole", steps=20)
    _assert_equal_runs(tmp_path / "whole", tmp_path / "killed", 20)


def test_resuming_with_another_seed_of_micro_steps_would_show(tmp_path: Path, fake_run: ModuleType) -> None:
    # The comparison above can fail: one micro-step read otherwise changes the weights.
    fake_run.train(tmp_path / "a", steps=20)
    fake_run.train(tmp_path / "b", steps=20, workers=0, accumulate=2)
    with pytest.raises(AssertionError):
        _assert_equal_runs(tmp_path / "a", tmp_path / "b", 20)


def test_worker_processes_read_the_same_batches(tmp_path: Path, fake_run: ModuleType) -> None:
    fake_run.train(tmp_path / "thread", steps=5)
    fake_run.train(tmp_path / "processes", steps=5, workers=2)
    _assert_equal_runs(tmp_path / "thread", tmp_path / "processes", 5)


def test_a_damaged_newest_checkpoint_falls_back_loudly(
    tmp_path: Path, fake_run: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_run.train(tmp_path / "whole", steps=20)
    fake_run.train(tmp_path / "hurt", steps=20, die_at=12, send=signal.SIGTERM)
    weights = tmp_path / "hurt/checkpoints/step_13/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    capsys.readouterr()
    fake_run.train(tmp_path / "hurt", steps=20, resume=True)
    assert "step_13 is damaged (model.safetensors differs from its checksum)" in capsys.readouterr().err
    _assert_equal_runs(tmp_path / "whole", tmp_path / "hurt", 20)


def test_a_stop_file_ends_the_run_with_a_checkpoint_and_is_consumed(
    tmp_path: Path, fake_run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = tmp_path / "run/STOP"

    class Stopping(fake_run.FakeMethod):
        def after_optimizer_step(self, step: int) -> None:
            super().after_optimizer_step(step)
            if step == 6:
                stop.touch()

    monkeypatch.setattr(fake_run, "FakeMethod", Stopping)
    result, _ = fake_run.train(tmp_path / "run", steps=20)
    assert (result.step, result.stopped_by) == (7, "file STOP")
    assert not stop.exists()
    assert checkpoints(tmp_path / "run/checkpoints")[-1].name == "step_7"


def test_ctrl_c_checkpoints_and_then_interrupts(tmp_path: Path, fake_run: ModuleType) -> None:
    with pytest.raises(KeyboardInterrupt):
        fake_run.train(tmp_path / "run", steps=20, die_at=3, send=signal.SIGINT)
    assert checkpoints(tmp_path / "run/checkpoints")[-1].name == "step_4"


def test_a_loss_that_is_no_number_stops_with_the_step_and_keeps_the_checkpoint(
    tmp_path: Path, fake_run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = fake_run.read

    def poisoned(index: int) -> torch.Tensor:
        return torch.full((4, 6), float("nan")) if index == 7 else healthy(index)

    monkeypatch.setattr(fake_run, "read", poisoned)
    with pytest.raises(TrainingError, match=r"loss is nan at step 8; .* Lower train\.lr"):
        fake_run.train(tmp_path / "run", steps=20)
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == ["step_5"]
    assert all(bool(value.isfinite().all()) for value in _tensors(tmp_path / "run", 5).values())


def test_more_steps_extend_a_finished_run(tmp_path: Path, fake_run: ModuleType) -> None:
    fake_run.train(tmp_path / "run", steps=5)
    result, _ = fake_run.train(tmp_path / "run", steps=10, resume=True)
    assert result.step == 10
    steps = [line["step"] for line in _untimed(tmp_path / "run") if "lr" in line]
    assert steps == list(range(1, 11))


def test_accumulated_micro_batches_make_the_step_of_their_union(
    fake_run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without noise and dropout, a mean loss over two halves has the gradient of the mean over the whole.
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)

    def step(accumulate: int) -> dict[str, torch.Tensor]:
        method = fake_run.FakeMethod().eval()
        method.last_mean = torch.zeros(3)
        config = TrainConfig(steps=2, accumulate=accumulate, warmup=0.0, clip=0.0)
        whole = fake_run.read(0)
        stream = iter(whole.chunk(accumulate))
        clean = {"prepare": lambda batch, index: batch, "step": 0, "config": config, "seed": 0}
        train_step(method, make_optimizer(method, config), stream, device=torch.device("cpu"), **clean)
        return dict(method.state_dict())

    one, two = step(1), step(2)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert not torch.equal(one["student.0.weight"], fake_run.FakeMethod().student[0].weight)


def test_learning_rate_and_decay_follow_their_schedules(tmp_path: Path, fake_run: ModuleType) -> None:
    fake_run.train(
        tmp_path / "run", steps=20, warmup=0.25, lr=1e-2, final_lr=1e-4, weight_decay=0.1, final_weight_decay=0.3
    )
    lines = [line for line in _untimed(tmp_path / "run") if "lr" in line]
    # Warm-up of 5 steps: 1/5 of the peak at the first, the peak at the fifth and sixth; the cosine ends at final_lr.
    assert [lines[i]["lr"] for i in (0, 4, 5, 19)] == pytest.approx([2e-3, 1e-2, 1e-2, 1e-4])
    assert [lines[i]["weight_decay"] for i in (0, 19)] == pytest.approx([0.1, 0.3])


def test_a_zero_learning_rate_moves_no_trained_weight(tmp_path: Path, fake_run: ModuleType) -> None:
    _, method = fake_run.train(tmp_path / "run", steps=5, lr=0.0, final_lr=0.0)
    assert torch.equal(method.student[0].weight, fake_run.FakeMethod().student[0].weight)


def test_metrics_lines_are_json_with_timing_apart(tmp_path: Path, fake_run: ModuleType) -> None:
    fake_run.train(tmp_path / "run", steps=5)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 5]  # held out before the first and after the last
    assert lines[0].keys() == {"step", "val/loss"}
    assert lines[1].keys() == {"step", "loss", "target_std", "lr", "weight_decay", "grad_norm", "timing"}
    assert list((tmp_path / "run/tb").glob("events.out.tfevents.*"))


def test_evaluation_does_not_disturb_training(tmp_path: Path, fake_run: ModuleType) -> None:
    fake_run.train(tmp_path / "often", steps=10, eval_every=1)
    fake_run.train(tmp_path / "seldom", steps=10, eval_every=10)
    often, seldom = _tensors(tmp_path / "often", 10), _tensors(tmp_path / "seldom", 10)
    assert all(torch.equal(often[name], seldom[name]) for name in often)


def test_micro_seeds_differ_in_the_bits_that_torch_uses() -> None:
    seeds = {micro_seed(seed, index) for seed in range(10) for index in range(1000)}
    assert len(seeds) >= 9_998 and max(seeds) < 2**32  # two collisions among 10^4 of 2^32 would be odd


def test_a_checkpoint_of_another_model_is_refused_with_the_reason(tmp_path: Path, fake_run: ModuleType) -> None:
    fake_run.train(tmp_path / "run", steps=5)
    with pytest.raises(ValueError, match="made by another model than this configuration builds"):
        load_checkpoint(tmp_path / "run/checkpoints/step_5", torch.nn.Linear(2, 2))


@pytest.mark.parametrize("most", [0.0, 1e-3, 1.0, 1e3])
def test_clipping_is_torchs_bit_for_bit(most: float) -> None:
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.zeros(7, n)) for n in (3, 5)] for _ in range(2))
    unused = torch.nn.Parameter(torch.zeros(2))
    for one, other in zip(ours, theirs, strict=True):
        one.grad = torch.randn_like(one) * 0.3
        other.grad = one.grad.clone()
    norm = clip_gradients([*ours, unused], most)
    assert norm == float(torch.nn.utils.clip_grad_norm_([*theirs, unused], most or torch.inf))
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad)
