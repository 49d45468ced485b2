import json
from pathlib import Path
from types import ModuleType

import torch
from lungssl.training.profiling import PARTS
from safetensors.torch import load_file


def test_a_profile_says_where_a_steps_time_went_and_changes_nothing(tmp_path: Path, fake_run: ModuleType) -> None:
    fake_run.train(tmp_path / "plain", steps=6)
    fake_run.train(tmp_path / "profiled", steps=6, profile=3)
    text = (tmp_path / "profiled/profile/summary.txt").read_text()
    lines = text.splitlines()
    assert lines[0].startswith("profile of 3 steps on cpu: ")
    shares = {name: float(line.split("%")[0].split()[-1]) for line in lines for name in PARTS if line.startswith(name)}
    assert list(shares) == list(PARTS)
    assert abs(sum(shares.values()) - 100) < 1  # rounded
    assert "aten::addmm" in text and len(lines) < 30
    events = json.loads((tmp_path / "profiled/profile/trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "lungssl: forward" and event.get("ph") == "X" for event in events) == 3
    one, other = (load_file(tmp_path / run / "checkpoints/step_6/model.safetensors") for run in ("plain", "profiled"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "plain/profile").exists()


def test_a_run_that_is_too_short_profiles_what_there_is(tmp_path: Path, fake_run: ModuleType) -> None:
    fake_run.train(tmp_path / "short", steps=4, profile=50)
    assert (tmp_path / "short/profile/summary.txt").read_text().startswith("profile of 2 steps")
