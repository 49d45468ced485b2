import json
import os
from pathlib import Path

import pytest
import torch
from lungssl.errors import DataError, TrainingError
from lungssl.training import checkpoint as module_under_test
from lungssl.training.checkpoint import checkpoints, load_checkpoint, newest_valid, problem, save_checkpoint
from torch import nn


def _model() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_everything_comes_back(tmp_path: Path) -> None:
    model, optimizer = _model()
    saved = save_checkpoint(tmp_path, 7, model, optimizer, keep=2)
    expected = torch.rand(3)
    other, empty = nn.Linear(3, 2), None
    empty = torch.optim.AdamW(other.parameters(), lr=0.1)
    assert load_checkpoint(saved, other, empty) == 7
    assert torch.equal(torch.rand(3), expected)  # torch's generator is where it was
    assert torch.equal(other.weight, model.weight)
    for a, b in zip(empty.state_dict()["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_no_pickle_is_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, *_model(), keep=1)
    assert {path.name for path in (tmp_path / "step_1").iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    }


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        save_checkpoint(tmp_path, step, *_model(), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_9", "step_10"]  # by number, not by name


def test_a_writer_that_dies_leaves_the_old_checkpoint_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = _model()
    save_checkpoint(tmp_path, 1, model, optimizer, keep=2)

    def dies(source: object, target: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module_under_test.os, "replace", dies)
    with pytest.raises(TrainingError, match=r"step_2: .* can't be written \(disk full\); those before it stay"):
        save_checkpoint(tmp_path, 2, model, optimizer, keep=2)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["step_1"]  # and room is made again
    assert newest_valid(tmp_path, say=print) == tmp_path / "step_1"


def test_every_file_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    original = os.replace
    monkeypatch.setattr(module_under_test, "_fsync", lambda path: order.append(path.name))
    monkeypatch.setattr(module_under_test.os, "replace", lambda a, b: (order.append("rename"), original(a, b)) and None)
    save_checkpoint(tmp_path, 1, *_model(), keep=1)
    assert set(order[:3]) == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert order[4:] == ["rename", tmp_path.name]


@pytest.mark.parametrize("damage", ["cut", "missing", "state"])
def test_damage_is_seen(tmp_path: Path, damage: str) -> None:
    saved = save_checkpoint(tmp_path, 1, *_model(), keep=1)
    assert problem(saved) is None
    if damage == "cut":
        weights = saved / "optimizer.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "missing":
        (saved / "model.safetensors").unlink()
    else:
        (saved / "state.json").write_text('{"format": 1')
    assert problem(saved) is not None


def test_all_damaged_is_an_error_and_none_at_all_is_not(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "nowhere", say=print) is None
    saved = save_checkpoint(tmp_path, 1, *_model(), keep=1)
    state = json.loads((saved / "state.json").read_text(encoding="utf-8"))
    (saved / "state.json").write_text(json.dumps(state | {"format": 99}))
    said: list[str] = []
    with pytest.raises(DataError, match="all 1 checkpoints are damaged; start anew with --overwrite"):
        newest_valid(tmp_path, say=said.append)
    assert "format 99, this lungssl reads 1" in said[0]
