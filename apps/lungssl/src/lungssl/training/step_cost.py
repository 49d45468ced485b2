"""What a step costs on this machine, for dry runs and for benchmarks that are given minutes."""

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lungssl.training.config import TrainConfig
from lungssl.training.loop import make_optimizer, train_step
from lungssl.training.progress import duration
from lungssl.training.read_ahead import read_ahead


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What `measure_steps` found."""

    losses: tuple[float, float]
    step_s: float
    """Of the second step: the first one compiles, allocates and opens files."""
    wait_s: float
    """Part of it that waited for data."""
    peak_bytes: int
    """On an accelerator its allocator's peak, on the CPU the process's."""

    def lines(self, config: TrainConfig, device: torch.device) -> list[str]:
        """For a person: the cost of the run of `config`."""
        return [
            f"first losses   {self.losses[0]:.4f}, {self.losses[1]:.4f}",
            f"step           {self.step_s:.2f} s, of which {self.wait_s:.2f} s waiting for data",
            f"peak memory    {self.peak_bytes / 2**30:.2f} GiB ({device.type})",
            f"{config.steps} steps".ljust(15) + f"{duration(self.step_s * config.steps)} without held-out evaluation",
            "dry run: nothing was written",
        ]


def measure_steps(
    module: nn.Module,
    *,
    read: Callable[[int], Any],
    prepare: Callable[[Any, int], Any],
    config: TrainConfig,
    seed: int,
    device: torch.device,
) -> StepCost:
    """Two real steps of `module`, which change it."""
    optimizer = make_optimizer(module, config)
    stream = read_ahead(read, 0, 2 * config.accumulate, workers=config.workers)
    module.train()
    first, second = (
        train_step(module, optimizer, stream, prepare, step=step, config=config, seed=seed, device=device)
        for step in (0, min(1, config.steps - 1))
    )
    stream.close()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        # Linux counts in KiB, macOS in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return StepCost(
        losses=(first[0]["loss"], second[0]["loss"]),
        step_s=second[1]["step_s"],
        wait_s=second[1]["data_wait_s"],
        peak_bytes=peak,
    )
