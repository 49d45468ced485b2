from pathlib import Path
from types import ModuleType

import pytest
import torch
from lungssl.errors import DataError, TrainingError
from lungssl.training.checkpoint import checkpoints, load_checkpoint, watch_state
from lungssl.training.logs import read_metrics
from lungssl.training.watch import NotFiniteError, Watch, first_bad_modules, read_step
from lungssl_data.batch import StepOutput
from torch import nn


@pytest.fixture
def poisoned(fake_run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Micro-batches that hold no numbers; empty at first."""
    bad: list[int] = []
    healthy = fake_run.read
    monkeypatch.setattr(
        fake_run, "read", lambda index: torch.full((4, 6), float("nan")) if index in bad else healthy(index)
    )
    return bad


CONSTANT_RATE = {
    "steps": 70,
    "warmup": 0.0,
    "weight_decay": 0.0,
    "final_weight_decay": 0.0,
    "lr": 1e-2,
    "final_lr": 1e-2,
}


def _rising(fake_run: ModuleType, monkeypatch: pytest.MonkeyPatch, *, from_step: int, above_rate: float) -> list[float]:
    """A method whose loss is reported as 9 from a step on, as long as its weights moved faster than a bound.

    Returns the norms of weight moves that it saw.
    """
    moves: list[float] = []

    class Rising(fake_run.FakeMethod):
        def forward(self, batch: torch.Tensor, step: int) -> StepOutput:
            weight = self.student[0].weight.detach().clone()
            if self.training:
                moves.append(float((weight - getattr(self, "last", weight)).abs().max()))
                self.last = weight
            output = super().forward(batch, step)
            bad = step >= from_step and moves[-1] > above_rate
            return StepOutput(loss=output.loss, metrics={"loss_lnk": torch.tensor(9.0 if bad else 0.9)})

    monkeypatch.setattr(fake_run, "FakeMethod", Rising)
    return moves


def test_a_step_without_a_number_is_kept_as_it_was_before_it(
    tmp_path: Path, fake_run: ModuleType, poisoned: list[int]
) -> None:
    poisoned.append(7)
    with pytest.raises(NotFiniteError, match="loss is nan at step 8") as caught:
        fake_run.train(tmp_path / "run", steps=20, checkpoint_every=1)
    kept = caught.value.kept
    assert kept == tmp_path / "run/nan/step_8.safetensors"
    step = read_step(kept)
    assert (step.step, step.index, step.what, step.value) == (7, 7, "loss", "nan")
    before = fake_run.FakeMethod()
    load_checkpoint(tmp_path / "run/checkpoints/step_7", before)
    assert step.state.keys() == before.state_dict().keys()
    assert all(torch.equal(step.state[name], value) for name, value in before.state_dict().items())


def test_the_part_that_made_the_first_bad_number_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU())
    with torch.no_grad():
        model[1].bias[0] = torch.inf
    found, hooks = first_bad_modules(model)
    model(torch.ones(1, 3))
    assert found == ["1", "(the method)"]
    for hook in hooks:
        hook.remove()
    model(torch.ones(1, 3))
    assert len(found) == 2


def test_another_file_is_no_kept_step(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a step that a run kept"):
        read_step(tmp_path / "x.safetensors")


def test_warn_says_each_kind_once_and_goes_on() -> None:
    said: list[str] = []
    watch = Watch("warn", say=said.append)
    for step in range(100):
        watch.step(step, {"loss_lnk": 9.0})
    assert len(said) == 1 and "loss_lnk is 9.0000, above 1.5000 (step 50); see train.on_collapse" in said[0]


def test_stop_ends_the_run_with_the_reason_and_writes_no_checkpoint_of_it(
    tmp_path: Path, fake_run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    _rising(fake_run, monkeypatch, from_step=45, above_rate=0.0)
    with pytest.raises(TrainingError, match=r"loss_lnk is .*, above 1\.5.*train\.on_collapse is stop"):
        fake_run.train(tmp_path / "run", steps=100, on_collapse="stop")
    assert checkpoints(tmp_path / "run/checkpoints")[-1].name == "step_45"


def test_rollback_halves_the_rate_until_it_holds(
    tmp_path: Path, fake_run: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moves = _rising(fake_run, monkeypatch, from_step=45, above_rate=4e-3)
    result, _ = fake_run.train(tmp_path / "run", on_collapse="rollback", **CONSTANT_RATE)
    assert result.step == 70
    said = capsys.readouterr().err
    assert "back to step 45 with learning rates times 0.5" in said
    assert result.alarms == () and "back to step 45 with learning rates times 0.5" in result.returns[0]
    assert moves[-1] < 4e-3 < moves[30]
    lines = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if "lr" in line]
    assert [line["step"] for line in lines] == list(range(1, 71))  # what was undone is not told twice
    assert lines[10]["lr"] == 1e-2 and lines[-1]["lr"] in (5e-3, 2.5e-3)
    assert watch_state(tmp_path / "run/checkpoints/step_70")["rate_scale"] == lines[-1]["lr"] / 1e-2


def test_rollback_survives_a_step_without_a_number_and_gives_up_after_three(
    tmp_path: Path, fake_run: ModuleType, poisoned: list[int]
) -> None:
    poisoned.append(7)
    with pytest.raises(TrainingError, match="after 3 returns to a checkpoint"):
        fake_run.train(tmp_path / "run", steps=20, on_collapse="rollback")
    # Twice at the same checkpoint: then the one before it.
    assert checkpoints(tmp_path / "run/checkpoints")[-1].name == "step_0"
    poisoned.clear()
    result, _ = fake_run.train(tmp_path / "run", steps=20, on_collapse="rollback", resume=True)
    assert result.step == 20 and result.alarms == ()


@pytest.mark.parametrize("die_at", [43, 67], ids=["before a return", "after it"])
def test_a_monitored_run_that_is_killed_and_resumed_equals_one_that_was_not(
    tmp_path: Path, fake_run: ModuleType, monkeypatch: pytest.MonkeyPatch, die_at: int
) -> None:
    import signal

    _rising(fake_run, monkeypatch, from_step=45, above_rate=4e-3)
    fake_run.train(tmp_path / "whole", on_collapse="rollback", **CONSTANT_RATE)
    fake_run.train(tmp_path / "parts", on_collapse="rollback", die_at=die_at, send=signal.SIGTERM, **CONSTANT_RATE)
    result, _ = fake_run.train(tmp_path / "parts", on_collapse="rollback", resume=True, **CONSTANT_RATE)
    assert result.returns == tuple(watch_state(tmp_path / "whole/checkpoints/step_70")["returns"]) != ()
    states = [watch_state(tmp_path / name / "checkpoints/step_70") for name in ("whole", "parts")]
    assert states[0] == states[1]


def test_probe_figures_are_logged_with_the_held_out_ones_and_raise_alarms(
    tmp_path: Path, fake_run: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    spreads = iter([1.0, 0.9, 0.1, 0.1, 0.1])
    result, _ = fake_run.train(tmp_path / "run", steps=20, probe=lambda: {"embedding_std": next(spreads)})
    probed = [
        line["probe/embedding_std"] for line in read_metrics(tmp_path / "run/metrics.jsonl") if "val/loss" in line
    ]
    assert probed == [1.0, 0.9, 0.1, 0.1, 0.1]
    assert result.alarms == ("embedding_std fell from 1 to 0.1, below 0.3 of its start (step 10)",)
    assert capsys.readouterr().err.count("WARNING: embedding_std fell") == 1


def test_an_alarm_before_the_first_step_has_nowhere_to_go_back_to(tmp_path: Path, fake_run: ModuleType) -> None:
    with pytest.raises(TrainingError, match=r"embedding_std of the probe set is nan .*no checkpoint to go back to"):
        fake_run.train(tmp_path / "run", on_collapse="rollback", probe=lambda: {"embedding_std": float("nan")})
