"""Checkpoints: `checkpoints/step_<n>/`, whole or not there.

    model.safetensors      the module's state: weights, teacher, centres, every buffer
    optimizer.safetensors  `<parameter index>/<name>` for AdamW's moments and counters, `rng/cpu`, `rng/cuda`
    state.json             step, parameter count, format, SHA-256 of the two files above, what `watch` knows

No pickle. Written to a temporary folder, each file synced, then renamed; a reader checks the hashes.
Those of sharded runs (format 2) have a file of each rank in place of the first two, with names that start with `model/`
and `optimizer/`; see `sharded_files.py`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lungssl.errors import ConfigError, DataError, TrainingError
from lungssl.training.ranks import Ranks
from lungssl.training.sharding import laid_out

FORMAT_VERSION = 1
SHARDED_VERSION = 2


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
    temporary = folder / f".step_{step}.{os.getpid()}.tmp"
    with _published(temporary, folder, step, keep=keep):
        _write(temporary, step, module, optimizer, watch or {})
    return folder / f"step_{step}"


def save_sharded(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    keep: int,
    watch: Mapping[str, Any],
    ranks: Ranks,
) -> None:
    """As `save_checkpoint`, of a module that is sharded. For all ranks, and no rank goes on where one fails."""
    from lungssl.training.sharded_files import write_parts

    tensors = {f"model/{name}": value.detach() for name, value in module.state_dict().items()}
    tensors |= {f"optimizer/{name}": value for name, value in (_optimizer_tensors(optimizer) | _rng_tensors()).items()}
    temporary = ranks.from_first(lambda: _made(folder / f".step_{step}.{os.getpid()}.tmp"))
    try:
        write_parts(temporary, tensors)
    except OSError as error:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise _not_written(folder / f"step_{step}", error) from error
    seen = ranks.all(sorted(path.name for path in temporary.iterdir()) if temporary.is_dir() else [])
    names = seen[0]
    if any(other != names for other in seen):
        raise TrainingError(
            f"{temporary.parent}: not all ranks see the same files there; sharded runs need a folder that all machines "
            f"share, put --out on one and go on with --resume"
        )
    try:
        own, problem = {name: _sha256(temporary / name) for name in names[ranks.rank :: ranks.size]}, None
    except OSError as error:
        own, problem = {}, f"rank {ranks.rank}: {error}"
    hashes: dict[str, str] = {}
    for theirs, trouble in ranks.all((own, problem)):
        if trouble is not None:
            raise TrainingError(f"{temporary}: what was just written can't be read ({trouble}); go on with --resume")
        hashes |= theirs

    def publish() -> None:
        with _published(temporary, folder, step, keep=keep):
            _write_state(temporary, SHARDED_VERSION, step, optimizer, hashes, watch)

    ranks.from_first(publish)


@contextmanager
def _published(temporary: Path, folder: Path, step: int, *, keep: int) -> Iterator[None]:
    """Make `temporary`, which the `with` block has filled and synced, `folder/step_<step>`; see `save_checkpoint`."""
    target = folder / f"step_{step}"
    try:
        yield
        shutil.rmtree(target, ignore_errors=True)  # a damaged one that a resumed run passed again
        os.replace(temporary, target)
        _fsync(folder)
    except (OSError, SafetensorError) as error:  # safetensors' own where the disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        raise _not_written(target, error) from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def _not_written(target: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"{target}: the checkpoint can't be written ({error}); those before it stay. Make room, or lower "
        f"train.keep_checkpoints, and go on with --resume"
    )


def _write(
    temporary: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, watch: Mapping[str, Any]
) -> None:
    """All files of a checkpoint, on the disk."""
    _made(temporary)
    # clone: safetensors refuses tensors that share memory, as tied weights do.
    model = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    save_file(model, temporary / "model.safetensors")
    moments = {name: value.cpu().contiguous().clone() for name, value in _optimizer_tensors(optimizer).items()}
    save_file(moments | _rng_tensors(), temporary / "optimizer.safetensors")
    hashes = {name: _sha256(temporary / name) for name in ("model.safetensors", "optimizer.safetensors")}
    _write_state(temporary, FORMAT_VERSION, step, optimizer, hashes, watch)


def _write_state(
    temporary: Path,
    version: int,
    step: int,
    optimizer: torch.optim.Optimizer,
    hashes: Mapping[str, str],
    watch: Mapping[str, Any],
) -> None:
    """state.json beside files of these hashes; all of them on the disk."""
    state: dict[str, Any] = {"format": version, "step": step, "watch": dict(watch), "sha256": dict(hashes)}
    state["parameters"] = sum(len(group["params"]) for group in optimizer.param_groups)
    (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for file in temporary.iterdir():
        _fsync(file)
    _fsync(temporary)


def _made(temporary: Path) -> Path:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


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
        if state["format"] not in (FORMAT_VERSION, SHARDED_VERSION):
            return f"format {state['format']}, this lungssl reads {FORMAT_VERSION} and {SHARDED_VERSION}"
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

    Checkpoints of sharded runs go into modules that aren't, and the other way round, on any number of ranks. Raises
    ConfigError where the checkpoint is of another model.
    """
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    try:
        module.load_state_dict(_read(checkpoint, "model", module.state_dict()))
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{checkpoint}: made by another model than this configuration builds ({reason})") from error
    if optimizer is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if len(parameters) != state["parameters"]:
            raise ConfigError(
                f"{checkpoint}: optimizer state of {state['parameters']} parameters does not fit this configuration"
            )
        moments = {f"{i}/{name}": p for i, p in enumerate(parameters) for name in ("exp_avg", "exp_avg_sq")}
        tensors = _read(checkpoint, "optimizer", moments)
        _restore_optimizer(optimizer, tensors)
        torch.set_rng_state(tensors["rng/cpu"])
        if "rng/cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng/cuda"])
    return int(state["step"])


def _read(checkpoint: Path, part: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `part` (model, optimizer) of a checkpoint of either format, each laid out as in `like`."""
    file = checkpoint / f"{part}.safetensors"
    if file.is_file():
        return {name: laid_out(value, like.get(name)) for name, value in load_file(file).items()}
    from lungssl.training.sharded_files import read_parts  # slow to import, see `sharding.py`

    return read_parts(checkpoint, f"{part}/", like)


def watch_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `watch`; empty for checkpoints of before there was one."""
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8")).get("watch", {})


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments and counters by `<parameter index>/<name>`."""
    return {
        f"{index}/{name}": value.detach()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        if index != "rng":
            entries.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


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
