"""Where figures go: metrics.jsonl, TensorBoard, and any other `Logger`.

metrics.jsonl: one JSON object a line, `step` (optimizer steps done) first. Training lines hold `loss`, the method's
metrics, `lr`, `weight_decay`, `grad_norm` of that step, and `timing` {step_s, data_wait_s, time_s}, the only values
that differ between two runs of one configuration on one machine. Held-out lines hold the same names after `val/`.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lungssl.training.run_folder import RunFolder, write_atomic


@runtime_checkable
class Logger(Protocol):
    """What the loop tells figures to; an adapter for W&B or MLflow is a class of these three methods.

    Made anew by an `OpenLogs` whenever the loop starts or goes back: what was written of later steps is to be dropped.
    """

    def write(self, step: int, values: Mapping[str, float], timing: Mapping[str, float] | None = None) -> None:
        """Figures after `step` optimizer steps, in the order of steps; held-out ones (`val/`, `probe/`) by themselves.

        `timing`, with training figures alone, holds seconds.
        """
        ...

    def sync(self) -> None:
        """Make everything written so far last: called before a checkpoint that relies on it."""
        ...

    def close(self) -> None:
        """The run ends, or goes back to a checkpoint."""
        ...


OpenLogs = Callable[[RunFolder, int], Sequence[Logger]]
"""Loggers of a run that goes on after so many steps; -1: from before the first evaluation."""


def run_logs(run: RunFolder, after_step: int) -> Sequence[Logger]:
    """metrics.jsonl and TensorBoard: what every run has."""
    return [JsonLog(run.metrics, after_step=after_step), BoardLog(run.tensorboard, after_step=after_step)]


class Together:
    """Several loggers as one, or none."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = loggers

    def write(self, step: int, values: Mapping[str, float], timing: Mapping[str, float] | None = None) -> None:
        """See `Logger`."""
        for logger in self._loggers:
            logger.write(step, values, timing)

    def sync(self) -> None:
        """See `Logger`."""
        for logger in self._loggers:
            logger.sync()

    def close(self) -> None:
        """See `Logger`."""
        for logger in self._loggers:
            logger.close()


class JsonLog:
    """Appends to metrics.jsonl. `after_step` cuts what a resumed run will write again."""

    def __init__(self, path: Path, *, after_step: int) -> None:
        if path.is_file():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= after_step]
            write_atomic(path, "".join(f"{line}\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float], timing: Mapping[str, float] | None = None) -> None:
        """One line."""
        record: dict[str, Any] = {"step": step, **values}
        if timing is not None:
            record["timing"] = {name: round(value, 4) for name, value in timing.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Have all lines on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class BoardLog:
    """Appends to TensorBoard's files, which drop what came after `after_step`. Timing is not for it."""

    def __init__(self, folder: Path, *, after_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._board = SummaryWriter(str(folder), purge_step=after_step + 1)

    def write(self, step: int, values: Mapping[str, float], timing: Mapping[str, float] | None = None) -> None:
        """One scalar each."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Have all on the disk."""
        self._board.flush()

    def close(self) -> None:
        """Close the file."""
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without one that a killed run left unfinished."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if _step(line) < _UNFINISHED]


_UNFINISHED = 2**62


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):  # the half-written last line of a killed run
        return _UNFINISHED
