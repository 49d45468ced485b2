"""`train.batch: auto`: how many patients a micro-step of a method can hold, from real steps with one and with two.

What a step holds grows with its samples by the same amount each, beside what it holds anyway (gradients, moments), so
that two steps tell the line. Tensors are counted, by torch's own events; the Python process, open files and what
libraries allocate themselves are not, which is what the margin is for.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lungssl_ops.measure import peak_mb
from torch import Tensor

CPU_SHARE, GPU_SHARE = 0.33, 0.85
"""Of the free memory that tensors may take. On a CPU a third: a process took 1.3 to 2.4 times as much for each patient
as its tensors (`mae_resenc_tiny`, `dino_vit_nano`: crops that are read, kernels' own memory, holes), and others want
some; on a GPU all but what fragments, and what cuBLAS and cuDNN take for themselves."""
MOST = 256
"""Patients of a micro-step: beyond, more of them teach a small encoder little."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What `largest_batch` found."""

    batch: int
    one_mb: float
    """Held by a step of one patient, and `more_mb` by each further one."""
    more_mb: float
    budget_mb: float

    def reason(self) -> str:
        """For the log."""
        return (
            f"a step holds {self.one_mb:.0f} MiB with one patient and {self.more_mb:.0f} more with each; of the free "
            f"memory it may take {self.budget_mb:.0f} MiB"
        )


def largest_batch(
    step: Callable[[int], Callable[[], Tensor]], *, device: torch.device, budget_mb: float, most: int
) -> Fit:
    """The most patients whose step stays within the budget; at least 1.

    `step(n)` makes a step of n patients, which may change what it was made of. Raises what the step raises: with one
    patient too many for the memory that is out of memory, whose message says what else to change.
    """
    one_mb = peak_mb(step(1), str(device))
    try:
        two_mb = peak_mb(step(2), str(device))
    except torch.OutOfMemoryError:
        two_mb = math.inf
    more_mb = max(two_mb - one_mb, 1e-3)
    fits = 1 + int(max(budget_mb - one_mb, 0.0) / more_mb)
    return Fit(batch=max(1, min(fits, most, MOST)), one_mb=one_mb, more_mb=more_mb, budget_mb=budget_mb)


def budget_mb(device: torch.device) -> float:
    """MiB that a step's tensors may take here and now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return GPU_SHARE * free / 2**20
    return CPU_SHARE * free_bytes() / 2**20


def free_bytes() -> int:
    """Memory that the CPU's processes can still have: the machine's, or what is left of a container's limit."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = (line.split() for line in meminfo.read_text("utf-8").splitlines())
        free = next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # macOS doesn't say; half may be taken
    return max(0, min([free, *_container_bytes(Path("/sys/fs/cgroup"))]))


def _container_bytes(folder: Path) -> list[int]:
    """Left below the limit of cgroups, version 2 or 1, where there is one."""
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            words = (folder / most).read_text("utf-8").strip()
            return [] if words == "max" else [int(words) - int((folder / used).read_text("utf-8"))]
        except (OSError, ValueError):
            continue
    return []
