import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from lungssl.training.profiling import PARTS, summary
from safetensors.torch import load_file


def test_a_profile_says_where_a_steps_time_went_and_changes_nothing(tmp_path: Path, fake_run: ModuleType) -> None:
    fake_run.train(tmp_path / "plain", steps=6)
    fake_run.train(tmp_path / "profiled", steps=6, profile=3)
    text = (tmp_path / "profiled/profile/summary.txt").read_text()
    lines = text.splitlines()
    assert lines[0].startswith("profile of 3 steps on cpu: ")
    parts = [*PARTS, "rest"]
    shares = {name: float(line.split("%")[0].split()[-1]) for line in lines for name in parts if line.startswith(name)}
    assert list(shares) == parts  # of three steps, the last one with its evaluation and its checkpoint
    assert abs(sum(shares.values()) - 100) < 1  # rounded
    assert "aten::addmm" in text and len(lines) < 40
    events = json.loads((tmp_path / "profiled/profile/trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "lungssl: forward" and event.get("ph") == "X" for event in events) == 3
    one, other = (load_file(tmp_path / run / "checkpoints/step_6/model.safetensors") for run in ("plain", "profiled"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "plain/profile").exists()


def test_a_run_that_is_too_short_profiles_what_there_is(tmp_path: Path, fake_run: ModuleType) -> None:
    fake_run.train(tmp_path / "short", steps=4, profile=50)
    assert (tmp_path / "short/profile/summary.txt").read_text().startswith("profile of 2 steps")


def test_pieces_of_the_forward_and_backward_pass_have_lines_where_they_are_large() -> None:
    times = {"lungssl: step": 1000, "lungssl: forward": 400, "lungssl: backward": 500}
    times |= {"lungssl: forward: encoder": 350, "lungssl: forward: head": 40}
    times |= {
        f"autograd::engine::evaluate_function: {node}": ms for node, ms in {"AddmmBackward0": 300, "B": 49}.items()
    }
    times |= {"aten::mm": 600, "aten::add": 200}
    events = [
        SimpleNamespace(key=key, cpu_time_total=us, self_cpu_time_total=us, device_time_total=0, count=2)
        for key, us in times.items()
    ]
    lines = [line.split() for line in summary(events, 2, torch.device("cpu")) if line]
    shares = {words[0]: words[2] for words in lines[2:]}
    assert shares == {
        "forward": "40.0%",
        "encoder": "35.0%",
        "backward": "50.0%",
        "AddmmBackward0": "30.0%",
        "rest": "10.0%",
        "op,": "its",  # the second table's head
        "aten::mm": "75.0%",
        "aten::add": "25.0%",
    }
