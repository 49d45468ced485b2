"""Where a step's time goes: some steps under torch's profiler, a trace to look into and one screen to read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PARTS = ("wait for data", "prepare", "forward", "backward", "optimizer", "after the step")
"""Of a step, in the order in which they come; `train_step` names them to the profiler."""
_PREFIX = "lungssl: "
_UNPROFILED = 2
"""First steps of a process, which open files, compile and allocate."""
_OPS = 12


def part(name: str) -> torch.profiler.record_function:
    """A `with` block that is one of the PARTS. About a microsecond where nobody profiles."""
    return torch.profiler.record_function(_PREFIX + name)


class StepProfiler:
    """Profiles `steps` steps of a run, from the third of this process on; none for 0.

    Writes `folder/trace.json` (for chrome://tracing or perfetto.dev) and `folder/summary.txt`, which it also says.
    """

    def __init__(self, steps: int, folder: Path, device: torch.device, *, say: Callable[[str], None]) -> None:
        self._left, self._first, self._folder, self._device, self._say = steps, _UNPROFILED, folder, device, say
        self._steps = 0
        self._profile: Any = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step."""
        if self._left and self._first == 0 and self._profile is None:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=kinds)
            self._profile.start()
        yield
        self._first = max(0, self._first - 1)
        if self._profile is not None:
            self._steps += 1
            self._left -= 1
            if self._left == 0:
                self.finish()

    def finish(self) -> None:
        """Write what was profiled, if anything was: at the end of a run that is shorter than was asked for."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        self._left = 0
        profile.stop()
        if self._steps == 0:
            return
        self._folder.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(self._folder / "trace.json"))
        text = "\n".join(summary(profile.key_averages(), self._steps, self._device))
        (self._folder / "summary.txt").write_text(text + "\n", encoding="utf-8")
        self._say(f"{text}\ntrace: {self._folder / 'trace.json'} (open it at https://ui.perfetto.dev)")


def summary(events: Any, steps: int, device: torch.device) -> list[str]:
    """One screen: milliseconds a step of each of the PARTS, then the ops that take most of themselves.

    `events`: of `profile.key_averages()`, over `steps` steps. On a GPU with the time of its kernels beside that of the
    host, which runs ahead of it.
    """
    gpu = device.type == "cuda"
    known = {event.key: event for event in events}
    parts = [(name, known.get(_PREFIX + name)) for name in PARTS]
    total = sum(event.cpu_time_total for _, event in parts if event is not None)
    lines = [f"profile of {steps} steps on {device.type}: {total / steps / 1000:.2f} ms a step on the host", ""]
    lines.append(f"{'part of a step':<40}{'host ms':>10}{'share':>8}" + (f"{'gpu ms':>10}" if gpu else ""))
    for name, event in parts:
        if event is not None:
            line = f"{name:<40}{event.cpu_time_total / steps / 1000:>10.2f}{event.cpu_time_total / total:>8.1%}"
            lines.append(line + (f"{event.device_time_total / steps / 1000:>10.2f}" if gpu else ""))

    def own(event: Any) -> float:
        return event.self_device_time_total if gpu else event.self_cpu_time_total

    ops = sorted((event for event in events if not event.key.startswith(_PREFIX)), key=own, reverse=True)[:_OPS]
    lines += ["", f"{'op, by its own time on the ' + ('gpu' if gpu else 'host'):<50}{'ms':>10}{'calls':>8}"]
    lines += [f"{event.key[:49]:<50}{own(event) / steps / 1000:>10.2f}{event.count / steps:>8.1f}" for event in ops]
    return lines
