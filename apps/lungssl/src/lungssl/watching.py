"""A run as it goes on, in a terminal: curves of its figures, read from the run folder alone.

It needs nothing of the process that trains: the run may be on another machine that shares the folder.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lungssl.errors import DataError
from lungssl.training.logs import read_metrics
from lungssl.training.progress import duration

_BLOCKS = " ▁▂▃▄▅▆▇█"
_CHART_ROWS = 6
_SHOWN = (
    *("loss", "val/loss", "teacher_entropy_lnk", "teacher_kl_lnk", "grad_norm", "lr"),
    *("probe/effective_rank", "probe/embedding_std", "probe/landmark_mm", "dice", "val/dice"),
)
"""One line each, where a run has them."""
_RECENT = 50
"""Training lines that the rate is of."""
_LAST_LINES = 3


def frame(run: Path, *, width: int = 80, now_s: float | None = None) -> list[str]:
    """What there is to see of a run: state, a chart of the training loss, a line per figure, the log's last lines.

    `now_s`: seconds since the epoch, by which a run's last line is old. Raises DataError for a folder that is no run.
    """
    if not (run / "config.yaml").is_file():
        raise DataError(f"{run}: no run here (no config.yaml); name the folder given to --out")
    metrics = run / "metrics.jsonl"
    history = read_metrics(metrics) if metrics.is_file() else []
    steps = yaml.safe_load((run / "config.yaml").read_text("utf-8"))["train"]["steps"]
    lines = [f"{run}", _state(run, history, steps, time.time() if now_s is None else now_s)]
    loss = series(history, "loss")
    if loss:
        lines += [
            "",
            f"loss, steps {loss[0][0]} to {loss[-1][0]}",
            *chart([v for _, v in loss], width - 2, _CHART_ROWS),
        ]
    named = [(name, series(history, name)) for name in _SHOWN]
    named = [(name, points) for name, points in named if points]
    if named:
        lines.append("")
    wide = max((len(name) for name, _ in named), default=0)
    for name, points in named:
        values = [value for _, value in points]
        figures = f"{values[-1]:>10.4g}  least {min(values):<10.4g} most {max(values):<10.4g}"
        curve = chart(values, max(8, width - wide - len(figures) - 4), 1)[0]
        lines.append(f"{name:<{wide}}  {figures}{curve}"[:width])
    log = run / "train.log"
    if log.is_file():
        lines += ["", *(line[:width] for line in log.read_text("utf-8").splitlines()[-_LAST_LINES:])]
    return lines


def series(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of the lines that have a figure, but for values that are no numbers."""
    found = [(int(line["step"]), float(line[name])) for line in history if name in line]
    return [(step, value) for step, value in found if abs(value) < float("inf")]


def chart(values: Sequence[float], width: int, rows: int) -> list[str]:
    """A curve of block characters, `width` at most, `rows` high, top row first: each column the mean of its values.

    The lowest column is an eighth of a row high, the highest fills all rows; of equal values, all are the lowest.
    """
    columns = min(width, len(values))
    parts = [values[i * len(values) // columns : (i + 1) * len(values) // columns] for i in range(columns)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    levels = 8 * rows - 1
    heights = [1 + round((mean - low) / (high - low) * levels) if high > low else 1 for mean in means]
    return ["".join(_BLOCKS[min(8, max(0, height - 8 * row))] for height in heights) for row in range(rows - 1, -1, -1)]


def ended(run: Path) -> bool:
    """Whether the run has made all its steps, or was stopped, since it was last started."""
    summary, config = run / "summary.json", run / "config.yaml"
    return summary.is_file() and summary.stat().st_mtime >= config.stat().st_mtime


def _state(run: Path, history: Sequence[Mapping[str, Any]], steps: int, now_s: float) -> str:
    trained = [line for line in history if "timing" in line]
    done = int(history[-1]["step"]) if history else 0
    if ended(run):
        summary = json.loads((run / "summary.json").read_text("utf-8"))
        why = f"stopped by {summary['stopped_by']}" if summary.get("stopped_by") else "finished"
        return f"step {done}/{steps}  {why}  {summary.get('verdict', '')}".rstrip()
    if not trained:
        return f"step {done}/{steps}  no step logged yet"
    recent = trained[-_RECENT:]
    parts = [f"step {done}/{steps}"]
    made = int(recent[-1]["step"]) - int(recent[0]["step"])
    took_s = recent[-1]["timing"]["time_s"] - recent[0]["timing"]["time_s"]
    if made > 0 and took_s > 0:
        waited = sum(line["timing"]["data_wait_s"] for line in recent) / max(
            sum(line["timing"]["step_s"] for line in recent), 1e-9
        )
        parts += [f"{made / took_s:.2f} steps/s", f"{duration((steps - done) * took_s / made)} left"]
        parts.append(f"data wait {waited:.0%}")
    age_s = now_s - recent[-1]["timing"]["time_s"]
    parts.append(f"last line {duration(max(0.0, age_s))} ago")
    return "  ".join(parts)
