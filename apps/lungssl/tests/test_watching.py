import json
import os
from pathlib import Path

import pytest
import yaml
from lungssl.cli import main
from lungssl.watching import chart, ended, frame, series


def _run(folder: Path, *, steps: int = 40, done: int = 20) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"steps": steps}}))
    lines = [{"step": 0, "val/loss": 9.0}]
    for step in range(1, done + 1):
        timing = {"step_s": 0.5, "data_wait_s": 0.1, "time_s": 1000.0 + 2 * step}
        lines.append({"step": step, "loss": 10.0 / step, "lr": 0.001, "timing": timing})
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 21, "lo')  # a line that is being written
    (folder / "train.log").write_text("".join(f"2026-11-28 10:00:0{i} line {i}\n" for i in range(5)))
    return folder


def test_a_frame_shows_state_chart_figures_and_the_log(tmp_path: Path) -> None:
    lines = frame(_run(tmp_path / "run"), width=100, now_s=1047.0)
    # A step every 2 s, 20 to go; a fifth of each step waited for data.
    assert lines[1] == "step 20/40  0.50 steps/s  40 s left  data wait 20%  last line 7 s ago"
    assert "loss, steps 1 to 20" in lines
    loss = next(line for line in lines if line.startswith("loss  "))
    assert loss.split()[1:6] == ["0.5", "least", "0.5", "most", "10"]
    assert loss.endswith("▁▁") and "█" in loss
    assert [line.split()[-1] for line in lines[-3:]] == ["2", "3", "4"]
    assert all(len(line) <= 100 for line in lines)


def test_a_chart_rises_and_falls_with_its_values() -> None:
    assert chart([0.0, 1.0, 2.0, 3.0], 4, 1) == ["▁▃▆█"]
    assert chart([5.0, 5.0], 8, 2) == ["  ", "▁▁"]
    # Six values in three columns, by their means 0, 7 and 15, on two rows: eighths 1, 8 and 16.
    assert chart([-1.0, 1.0, 6.0, 8.0, 14.0, 16.0], 3, 2) == ["  █", "▁██"]


def test_values_that_are_no_numbers_are_left_out() -> None:
    lines = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf")}, {"step": 3, "loss": 1.0}]
    assert series(lines, "loss") == [(3, 1.0)]


def test_a_run_that_has_just_begun_and_one_that_has_ended(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("train: {steps: 5}\n")
    assert frame(run)[1] == "step 0/5  no step logged yet"
    summary = run / "summary.json"
    summary.write_text(json.dumps({"step": 5, "stopped_by": None, "verdict": "Learning: much."}))
    assert ended(run) and frame(run)[1] == "step 0/5  finished  Learning: much."
    summary.write_text(json.dumps({"step": 3, "stopped_by": "SIGTERM"}))
    assert frame(run)[1] == "step 0/5  stopped by SIGTERM"
    os.utime(summary, (0, 0))  # older than config.yaml: the run goes on again
    assert not ended(run)


def test_the_command_prints_one_frame_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(_run(tmp_path / "run"))]) == 0
    assert "step 20/40" in capsys.readouterr().out
    assert main(["watch", str(tmp_path)]) == 3
    assert "no run here (no config.yaml)" in capsys.readouterr().err
