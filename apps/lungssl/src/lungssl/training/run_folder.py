"""The folder of one run.

config.yaml      the resolved recipe; `lungssl pretrain <run>/config.yaml` repeats the run
env.json         versions, machine, ranks, commit, command line and data fingerprint; no patient data
train.log        what was printed, with times
metrics.jsonl    one line per logged step; see `logs.py`
tb/              the same for TensorBoard
checkpoints/     step_<n>/; see `checkpoint.py`
export/          what others load: the encoder's weights
profile/         trace.json and summary.txt of profiled steps; see `profiling.py`
nan/             steps that gave no number, to be replayed; see `watch.py`
summary.json     final figures and verdict
report.html      pictures, where a command makes them
STOP             make this file to have the run checkpoint and end
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml

from lungssl.errors import ConfigError
from lungssl.training.config import RESUME_MAY_CHANGE

_OURS = (
    *("config.yaml", "env.json", "train.log", "metrics.jsonl", "tb", "checkpoints", "export", "nan", "summary.json"),
    *("report.html", "STOP", "profile"),
)
_RECORDED = ("torch", "numpy", "triton", "pydantic", "h5py", "hdf5plugin", "safetensors", "monai", "simpleitk")


class RunFolder:
    """Paths and small files of a run. `RunFolder.start` makes one or continues one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.quiet = False
        """True on all ranks but the first of a distributed run: nothing is said, nothing written."""
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tb"
        self.export = path / "export"
        self.nan = path / "nan"
        self.stop = path / "STOP"

    @classmethod
    def start(
        cls,
        path: Path,
        config: Mapping[str, Any],
        *,
        data_fingerprint: str = "",
        comments: Sequence[str] = (),
        ranks: int = 1,
        resume: bool = False,
        overwrite: bool = False,
    ) -> "RunFolder":
        """Make the folder, or continue or replace the run in it.

        `config` is the resolved recipe as plain values; `comments` are lines to put above it; `ranks` is how many
        processes train. Raises ConfigError for a
        used folder without `resume` or `overwrite`, for a folder that is no run, and for a resumed run whose
        configuration or data differ.
        """
        run = cls(path)
        # But for a first config.yaml that was never finished.
        used = path.is_dir() and any(not one.match(".config.yaml.*.tmp") for one in path.iterdir())
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--out {path} is a file; name a folder")
        if used and not (path / "config.yaml").is_file():
            raise ConfigError(f"--out {path} is not empty and holds no run (no config.yaml); name another folder")
        if used and not resume and not overwrite:
            raise ConfigError(
                f"--out {path} holds a run already; continue it with --resume, replace it with --overwrite, or name "
                f"another folder"
            )
        if used and overwrite and not resume:
            run._clear()
        elif used:
            run._check_unchanged(config, data_fingerprint)
        path.mkdir(parents=True, exist_ok=True)
        # config.yaml first: it marks the folder as a run, so that a run killed here can be resumed or replaced.
        above = "".join(f"# {line}\n" for line in comments)
        write_atomic(path / "config.yaml", above + yaml.safe_dump(dict(config), sort_keys=False))
        run.stop.unlink(missing_ok=True)
        for folder in (run.checkpoints, run.export):
            folder.mkdir(exist_ok=True)
        write_atomic(
            path / "env.json", json.dumps(environment() | {"ranks": ranks, "data": data_fingerprint}, indent=1)
        )
        return run

    def say(self, text: str) -> None:
        """Print a line to stderr and keep it in train.log."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)
        self.note(text)

    def note(self, text: str) -> None:
        """Keep a line in train.log only."""
        if self.quiet:
            return
        with open(self.path / "train.log", "a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def write_summary(self, values: Mapping[str, Any]) -> None:
        """Write summary.json."""
        write_atomic(self.path / "summary.json", json.dumps(values, indent=1))

    def _clear(self) -> None:
        for name in _OURS:
            item = self.path / name
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            else:
                item.unlink(missing_ok=True)

    def _check_unchanged(self, config: Mapping[str, Any], data_fingerprint: str) -> None:
        before = dict(_flat(yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))))
        now = dict(_flat(config))
        for key in [*before, *(key for key in now if key not in before)]:
            if before.get(key) == now.get(key) or key in RESUME_MAY_CHANGE:
                continue
            if key not in before:
                raise ConfigError(
                    f"{key}: the run in {self.path} was begun without this setting, by another lungssl (its commit is "
                    f"in env.json); resume with that one, or start anew with --overwrite"
                )
            raise ConfigError(
                f"{key}: the run in {self.path} has {before.get(key)!r}, this command {now.get(key)!r}; resume "
                f"with {self.path / 'config.yaml'} as the recipe, or start anew with --overwrite"
            )
        env = self.path / "env.json"
        known = json.loads(env.read_text(encoding="utf-8")).get("data", "") if env.is_file() else ""
        if known and data_fingerprint and known != data_fingerprint:
            raise ConfigError(
                f"--data: the run in {self.path} was made from a cache with fingerprint {known}, this one has "
                f"{data_fingerprint}; name that cache, or start anew with --overwrite"
            )


def environment() -> dict[str, Any]:
    """Versions, machine, commit and command line of this process."""
    installed = {d.name.lower(): d.version for d in distributions() if d.name}
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": cores(),
        "versions": {name: v for name, v in sorted(installed.items()) if name in _RECORDED or "lungssl" in name},
        "commit": _commit(),
    }


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _commit() -> str | None:
    """Commit of the source tree that this file is in, `-dirty` where it was changed; None for an installed wheel."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        state = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine
        return None
    return head.stdout.strip() + ("-dirty" if state.stdout.strip() else "") if head.returncode == 0 else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
