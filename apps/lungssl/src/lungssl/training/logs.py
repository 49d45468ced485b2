"""metrics.jsonl and TensorBoard.

metrics.jsonl: one JSON object a line, `step` (optimizer steps done) first. Training lines hold `loss`, the method's
metrics, `lr`, `weight_decay`, `grad_norm` of that step, and `timing` {step_s, data_wait_s, time_s}, the only values
that differ between two runs of one configuration on one machine. Held-out lines hold the same names after `val/`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lungssl.training.run_folder import write_atomic


class MetricsLog:
    """Appends to metrics.jsonl and to TensorBoard's files. `after_step` cuts what a resumed run will write again."""

    def __init__(self, path: Path, tensorboard: Path, *, after_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        if path.is_file():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= after_step]
            write_atomic(path, "".join(f"{line}\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")
        self._board = SummaryWriter(str(tensorboard), purge_step=after_step + 1)

    def write(self, step: int, values: Mapping[str, float], timing: Mapping[str, float] | None = None) -> None:
        """One line of figures after `step` optimizer steps."""
        record: dict[str, Any] = {"step": step, **values}
        if timing is not None:
            record["timing"] = {name: round(value, 4) for name, value in timing.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Have everything written so far on the disk: called before a checkpoint that relies on it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        """Close both files."""
        self._file.close()
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
