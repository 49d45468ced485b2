"""What a benchmark case is, and how its runs are timed and weighed."""

import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one size: `reference`, `ours` (unless the definition is all there is), and rivals."""

    op: str
    size: str
    floor_bytes: int
    """Bytes that any implementation must move."""
    floor_flops: int = 0
    """Products and sums that any implementation must do; the floor is the longer of the two times."""
    runs: dict[str, Callable[[], Tensor]]
    """Each returns what the errors compare: a loss' gradient, or the updated tensor."""
    expected: Callable[[], Tensor] | None = None
    """In float64, what `error` is measured against; without it, the run `reference`."""
    tolerance: dict[str, float] = field(default_factory=dict)
    """Largest error of each run that is checked; others are shown, not checked. Empty: 1e-5 for all."""
    stem: str = ""
    """What its ratios are called by; without it, the op and the size."""
    time_word: str = ""
    """Before `_vs_` in the ratios of times, e.g. `_time` where that of memory is the headline."""
    slow: tuple[str, ...] = ()
    """Runs so much slower that a fifth of the repeats must do."""


def timings(
    runs: dict[str, Callable[[], Tensor]], *, repeats: int, device: str, slow: tuple[str, ...] = ()
) -> dict[str, list[float]]:
    """Seconds per call; the runs take turns, so that a slow moment of the machine hits all alike.

    On a GPU its own clock is read, and each call finds an L2 cache full of zeros, as in triton.testing.do_bench.
    """
    clock = _gpu_seconds if device.startswith("cuda") else _cpu_seconds
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + WARM_UP):
        for name, call in runs.items():
            if name in slow and turn >= WARM_UP + max(3, repeats // 5):
                continue
            taken_s = clock(call, device)
            if turn >= WARM_UP:
                seconds[name].append(taken_s)
    return seconds


WARM_UP = 2
"""Calls of each run before those that count."""


def _cpu_seconds(call: Callable[[], Tensor], device: str) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_seconds(call: Callable[[], Tensor], device: str) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # Larger than any L2 cache (50 MB on an H100); while it is filled, Python goes ahead with the launches.
    torch.empty(256 * 2**20, dtype=torch.int8, device=device).zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def peak_mb(call: Callable[[], Tensor], device: str) -> float:
    """MiB that a call holds at its peak beyond what was there before. What C++ allocates itself is not seen."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with _silenced_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        profiler.export_chrome_trace(str(trace))
        events = [
            e for e in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"] if e.get("name") == "[memory]"
        ]
    held, peak = 0, 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / 2**20


@contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Kineto's C++ writes start and stop lines past Python's `sys.stderr`."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def bandwidth(device: str) -> float:
    """Bytes per second of an in-place addition of 256 MB: two reads and a write, which no cache holds.

    Not of a copy: on a CPU that also reads the lines it overwrites, unseen.
    """
    source, target = torch.ones(2**26, device=device), torch.ones(2**26, device=device)
    seconds = timings({"add": lambda: target.add_(source)}, repeats=15, device=device)["add"]
    return 3 * source.numel() * 4 / min(seconds)


def flops_per_s(device: str) -> float:
    """Speed of a float32 matrix product (bfloat16 on a GPU) of 2048 rows, columns and terms."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    seconds = timings({"product": lambda: a @ a}, repeats=5, device=device)["product"]
    return 2 * 2048**3 / min(seconds)


def machine(device: str) -> dict[str, object]:
    """Name of the processor or GPU, number of threads, version of torch."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else (names or [platform.processor()])[0]
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def commit() -> str:
    """The commit of this package's checkout, with `-dirty` where files differ from it; else the installed version."""
    here = Path(__file__)
    # Asked for by name: a virtual environment may lie in the checkout of something else.
    commands = (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty", "--exclude", "*"])
    answer = ""
    for command in commands:
        try:
            done = subprocess.run(["git", *command], cwd=here.parent, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return f"lungssl-ops {version('lungssl-ops')}"
        answer = done.stdout.strip()
    return answer
