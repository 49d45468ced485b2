"""How much memory is free here, and how many patients a micro-step can hold of it (`train.batch: auto`)."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lungssl.errors import out_of_memory

CPU_SHARE, GPU_SHARE = 0.5, 0.85
"""Of the free memory that a step may take. On a CPU half: the rest is for the page cache, other processes, and because
the number is extrapolated. On a GPU all but what fragments, and what CUDA, cuDNN and NCCL take past torch."""
MOST = 256
"""Patients of a micro-step on each rank: where the search ends."""
NOISE_MB = 1.0
"""What the same step's peak of two processes differs by (`vit3d_nano`, three of each: up to 1.2)."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Patients of a micro-step, and why so many, for the log."""

    batch: int
    reason: str


def batch_by_line(peak_mb: Callable[[int], float], *, budget_mb: float, most: int) -> Fit:
    """What fits by steps of one and of two patients, at least 1: what a step holds grows by the same for each.

    `peak_mb(n)` makes steps of n patients and gives the MiB that they held. Where two don't fit it takes one; where one
    doesn't, raises what the step raised.
    """
    one_mb = peak_mb(1)
    budget = f"of the free memory it may take {budget_mb:.0f} MiB"
    try:
        more_mb = max(peak_mb(2) - one_mb, NOISE_MB) if most > 1 else NOISE_MB
    except Exception as error:
        if not out_of_memory(error):
            raise
        return Fit(batch=1, reason=f"a step holds {one_mb:.0f} MiB with one patient and ran out of memory with two")
    batch = max(1, min(1 + int(max(budget_mb - one_mb, 0.0) / more_mb), most, MOST))
    each = f" and {more_mb:.0f} more with each" if most > 1 else ""
    return Fit(batch=batch, reason=f"a step holds {one_mb:.0f} MiB with one patient{each}; {budget}")


def batch_by_doubling(peak_mb: Callable[[int], float], *, budget_mb: float, most: int) -> Fit:
    """The largest of 1, 2, 4, ... and `most` whose step stays within the budget, at least 1; it is made, not foretold.

    `peak_mb` as of `batch_by_line`; stops where it goes over the budget, or out of memory.
    """
    most = min(most, MOST)
    batch, held = 1, peak_mb(1)
    ended = "no more patients to try" if most < MOST else "no more are tried"
    if held > budget_mb:
        ended = "one patient alone goes over it"
    while batch < most and held <= budget_mb:
        tried = min(2 * batch, most)
        try:
            more = peak_mb(tried)
        except Exception as error:
            if not out_of_memory(error):
                raise
            ended = f"{tried} ran out of memory"
            break
        if more > budget_mb:
            ended = f"{tried} hold {more:.0f}"
            break
        batch, held = tried, more
    return Fit(batch=batch, reason=f"a step holds {held:.0f} of the {budget_mb:.0f} MiB that it may take; {ended}")


def budget_mb(device: torch.device) -> float:
    """MiB that a step may take here and now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return GPU_SHARE * free / 2**20
    return CPU_SHARE * free_bytes() / 2**20


def free_bytes() -> int:
    """Memory that the CPU's processes can still have: the machine's, or what is left of a container's or job's."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = (line.split() for line in meminfo.read_text("utf-8").splitlines())
        free = next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # macOS doesn't say; half may be taken
    return max(0, min([free, *_group_bytes()]))


def _group_bytes(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Left below the limits of this process's control groups and of those around them, of version 2 and of 1.

    Files that the kernel can drop at once don't count as taken: reading a cohort fills a group with them.
    """
    if not groups.exists():
        return []
    found = []
    for line in groups.read_text("utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, taken, dropped = mount, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, dropped = mount / "memory", "total_inactive_file"
            limit, taken = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inner = top / path.lstrip("/")  # not there in containers that see the host's names; the top is theirs
        for folder in (inner, *inner.parents):
            if folder == top.parent:
                break
            try:
                most = int((folder / limit).read_text("utf-8"))  # ValueError: "max"
                stat = dict(line.split() for line in (folder / "memory.stat").read_text("utf-8").splitlines())
                found.append(most - int((folder / taken).read_text("utf-8")) + int(stat.get(dropped, "0")))
            except (OSError, ValueError):
                continue
    return found
