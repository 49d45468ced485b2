"""`train.batch: auto` of a pretraining recipe: found by real steps, kept when a run is resumed.

On a GPU steps of 1, 2, 4, ... patients are made here. A CPU raises nothing before the system ends the process, so there
steps of one and of two patients are made by processes of their own (`python -m lungssl.auto_batch`), and what those
held of the machine's memory is counted: of tensors alone torch knows, and a process takes 1.3 to 2.4 times as much for
each patient (crops that are read, kernels' own memory, holes; `mae_resenc_tiny`, `dino_vit_nano`).
"""

import dataclasses
import gc
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lungssl.config import Recipe
from lungssl.errors import ConfigError, TrainingError, out_of_memory
from lungssl.training.allocator import keep_freed_memory
from lungssl.training.memory import batch_by_doubling, batch_by_line, budget_mb
from lungssl.training.ranks import Ranks
from lungssl.training.step_cost import measure_steps

if TYPE_CHECKING:
    from lungssl.pretraining import Pretraining

Build = Callable[[Recipe], "Pretraining"]


def settle_batch(
    recipe: Recipe,
    *,
    data: Path,
    build: Build,
    patients: int,
    device: torch.device,
    ranks: Ranks,
    recorded: Mapping[str, Any] | None = None,
) -> tuple[Recipe, str]:
    """The recipe with a number of patients, and a line that says why. For all ranks.

    `build` makes a run of a recipe on the cache `data` for this process alone, to be thrown away; random numbers are as
    before. No more than the training `patients` (but one for each rank), and on several ranks as many for each as the
    one with the least memory holds; processes of one machine share what is free. `recorded` is the config.yaml of the
    run that is resumed, whose number stays.

    Steps are tried without `train.compile`, and with all weights on each process. Raises what a step of one patient
    raises; ConfigError where that is out of memory and `train.shard: full` was to help.
    """
    before = (recorded or {}).get("train", {}).get("batch")
    if isinstance(before, int):
        return _with(recipe, before), f"train.batch: {before}  (as the run that is resumed has it)"
    most = max(1, patients // ranks.size)
    budget = budget_mb(device)
    try:
        if device.type == "cuda":
            found = batch_by_doubling(_gpu_peaks(recipe, build, device), budget_mb=budget, most=most)
        else:
            budget /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            found = batch_by_line(
                lambda number: _cpu_peak_mb(_with(recipe, number), data, device), budget_mb=budget, most=most
            )
    except Exception as error:
        if out_of_memory(error) and recipe.train.shard == "full":
            raise ConfigError(
                "train.batch: auto tries a step with all weights on each process, which doesn't fit; give a number of "
                "patients with train.shard=full"
            ) from error
        raise
    each = min(ranks.all(found.batch))
    reason = found.reason if each == found.batch else f"{found.reason}; another rank has room for {each}"
    return _with(recipe, each * ranks.size), f"train.batch: {each * ranks.size}  ({reason})"


def _with(recipe: Recipe, batch: int, **more: Any) -> Recipe:
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, batch=batch, **more))


def _steps(parts: "Pretraining") -> None:
    measure_steps(
        parts.method,
        read=parts.read,
        prepare=parts.prepare,
        config=parts.recipe.train,
        seed=parts.recipe.seed,
        device=parts.device,
    )


def _gpu_peaks(recipe: Recipe, build: Build, device: torch.device) -> Callable[[int], float]:
    """MiB that torch has taken of the GPU, holes included, since now."""
    torch.cuda.empty_cache()
    begun = torch.cuda.memory_reserved(device)

    def peak_mb(number: int) -> float:
        gc.collect()
        torch.cuda.empty_cache()  # of the try before
        torch.cuda.reset_peak_memory_stats(device)
        try:
            with torch.random.fork_rng(devices=[device]):
                _steps(build(_with(recipe, number, compile=False)))
            return (torch.cuda.max_memory_reserved(device) - begun) / 2**20
        finally:
            torch.cuda.empty_cache()

    return peak_mb


def _cpu_peak_mb(recipe: Recipe, data: Path, device: torch.device) -> float:
    """MiB that a process grows by in two steps; raises what it raises, MemoryError where the system ends it."""
    done = subprocess.run(
        [sys.executable, "-m", "lungssl.auto_batch"],
        input=pickle.dumps((recipe, data, str(device), torch.get_num_threads())),
        capture_output=True,
    )
    patients = recipe.train.patients()
    if done.returncode == -signal.SIGKILL:
        raise MemoryError(f"a process that tried a step with train.batch={patients} was killed")
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise TrainingError(
            f"train.batch: auto; a process that tried a step with {patients} patients ended with {done.returncode} "
            f"({' '.join(told)[:200]}); give a number of patients"
        )
    answer = pickle.loads(done.stdout)  # of our own process
    if isinstance(answer, Exception):
        raise answer
    return answer


def _tried() -> float | Exception:
    """What this process grows by in the steps that it reads from stdin, MiB; or what went wrong."""
    from lungssl.pretraining import build_pretraining

    recipe, data, device, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    keep_freed_memory()  # as `fit` does
    begun = _resident_mb()[0]
    try:
        _steps(build_pretraining(_with(recipe, recipe.train.batch, compile=False), data, device=device))
    except Exception as error:
        return error
    return _resident_mb()[1] - begun


def _resident_mb() -> tuple[float, float]:
    """This process's memory now and at its peak, MiB; only the peak where the system doesn't say.

    Not by getrusage on Linux, whose peak is at first that of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        sizes = dict(line.split(":", 1) for line in status.read_text("utf-8").splitlines())
        now, peak = (int(sizes[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes
    return peak, peak


if __name__ == "__main__":
    answers = os.dup(1)
    os.dup2(2, 1)  # what is printed meanwhile is no answer
    told = _tried()
    try:
        words = pickle.dumps(told)
        pickle.loads(words)
    except Exception:  # an error that doesn't survive it
        words = pickle.dumps(TrainingError(f"{type(told).__name__}: {told}"))
    with os.fdopen(answers, "wb") as out:
        out.write(words)
