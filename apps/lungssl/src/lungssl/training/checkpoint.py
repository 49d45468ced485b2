"""Checkpoints: `checkpoints/step_<n>/`, whole or not there.

    model.safetensors      the module's state: weights, teacher, centres, every buffer
    optimizer.safetensors  `<parameter index>/<name>` for AdamW's moments and counters, `rng/cpu`, `rng/cuda`
    state.json             step, parameter count, format, SHA-256 of the two files above, what `watch` knows

No pickle. Written to a temporary folder, each file synced, then renamed; a reader checks the hashes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lungssl.errors import ConfigError, DataError, TrainingError

FORMAT_VERSION = 1


def save_checkpoint(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    keep: int,
    watch: Mapping[str, Any] | None = None,
) -> Path:
    """Write `folder/step_<step>` and drop all but the `keep` newest checkpoints. `watch`: plain values to add.

    Raises TrainingError where the disk is full or the folder can't be written: earlier checkpoints are as they were.
    """
    target = folder / f"step_{step}"
    temporary = folder / f".step_{step}.{os.getpid()}.tmp"
    try:
        _write(temporary, step, module, optimizer, watch or {})
        shutil.rmtree(target, ignore_errors=True)  # a damaged one that a resumed run passed again
        os.replace(temporary, target)
        _fsync(folder)
    except (OSError, SafetensorError) as error:  # safetensors' own where the disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        raise TrainingError(
            f"{target}: the checkpoint can't be written ({error}); those before it stay. Make room, or lower "
            f"train.keep_checkpoints, and go on with --resume"
        ) from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def _write(
    temporary: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, watch: Mapping[str, Any]
) -> None:
    """All files of a checkpoint, on the disk."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # clone: safetensors refuses tensors that share memory, as tied weights do.
    model = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    save_file(model, temporary / "model.safetensors")
    save_file(_optimizer_tensors(optimizer) | _rng_tensors(), temporary / "optimizer.safetensors")
    state: dict[str, Any] = {"format": FORMAT_VERSION, "step": step, "watch": dict(watch)}
    state["parameters"] = sum(len(group["params"]) for group in optimizer.param_groups)
    state["sha256"] = {name: _sha256(temporary / name) for name in ("model.safetensors", "optimizer.safetensors")}
    (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for file in temporary.iterdir():
        _fsync(file)
    _fsync(temporary)


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, oldest first, whether valid or not. Leftovers of killed writers are removed."""
    if not folder.is_dir():
        return []
    for leftover in folder.glob(".step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    found = [path for path in folder.glob("step_*") if path.name[5:].isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done, of the folder's name."""
    return int(checkpoint.name.removeprefix("step_"))


def problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing is."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT_VERSION:
            return f"format {state['format']}, this lungssl reads {FORMAT_VERSION}"
        for name, expected in state["sha256"].items():
            if _sha256(checkpoint / name) != expected:
                return f"{name} differs from its checksum"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"unreadable ({type(error).__name__})"
    return None


def newest_valid(folder: Path, *, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that reads back, None where there are none. `say` is told of every damaged one.

    Raises DataError where there are checkpoints and all are damaged.
    """
    found = checkpoints(folder)
    for checkpoint in reversed(found):
        fault = problem(checkpoint)
        if fault is None:
            return checkpoint
        say(f"WARNING: checkpoint {checkpoint.name} is damaged ({fault}); falling back to the one before it")
    if found:
        raise DataError(f"{folder}: all {len(found)} checkpoints are damaged; start anew with --overwrite")
    return None


def load_checkpoint(checkpoint: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Put the saved state into `module` and, where given, `optimizer` and torch's generators; returns the step.

    Raises ConfigError where the checkpoint is of another model.
    """
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    try:
        module.load_state_dict(load_file(checkpoint / "model.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{checkpoint}: made by another model than this configuration builds ({reason})") from error
    if optimizer is not None:
        tensors = load_file(checkpoint / "optimizer.safetensors")
        _restore_optimizer(optimizer, tensors, state["parameters"], checkpoint)
        torch.set_rng_state(tensors["rng/cpu"])
        if "rng/cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng/cuda"])
    return int(state["step"])


def watch_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `watch`; empty for checkpoints of before there was one."""
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8")).get("watch", {})


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}/{name}": value.detach().cpu().contiguous().clone()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], count: int, path: Path) -> None:
    current = optimizer.state_dict()
    if sum(len(group["params"]) for group in current["param_groups"]) != count:
        raise ConfigError(f"{path}: optimizer state of {count} parameters does not fit this configuration")
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        if index != "rng":
            entries.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": entries, "param_groups": current["param_groups"]})


def _rng_tensors() -> dict[str, Tensor]:
    tensors = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
