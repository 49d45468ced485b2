from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lungssl.training.logs import Logger, read_metrics, run_logs
from lungssl.training.run_folder import RunFolder


class Table:
    """A logger as an adapter for a tracking service is one: it keeps the last value of each step and name."""

    def __init__(self) -> None:
        self.values: dict[tuple[int, str], float] = {}
        self.told: list[str] = []

    def opened(self, run: RunFolder, after_step: int) -> list[Any]:
        self.values = {key: value for key, value in self.values.items() if key[0] <= after_step}
        self.told.append(f"open after {after_step}")
        return [*run_logs(run, after_step), self]

    def write(self, step: int, values: Mapping[str, float], timing: Mapping[str, float] | None = None) -> None:
        self.values |= {(step, name): value for name, value in values.items()}

    def sync(self) -> None:
        self.told.append("sync")

    def close(self) -> None:
        self.told.append("close")


def test_another_logger_is_told_what_metrics_jsonl_holds(tmp_path: Path, fake_run: ModuleType) -> None:
    table = Table()
    assert isinstance(table, Logger)
    fake_run.train(tmp_path / "run", steps=5, logs=table.opened)
    assert table.told == ["open after -1", "sync", "close"]
    fake_run.train(tmp_path / "run", steps=10, resume=True, logs=table.opened)
    assert table.told[3:] == ["open after 5", "sync", "close"]
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    held = {
        (line["step"], name): value for line in lines for name, value in line.items() if name not in ("step", "timing")
    }
    assert table.values == held and len(held) > 40
