"""Where a step's time goes: some steps under torch's profiler, a trace to look into and one screen to read."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

PARTS = (
    "copy buffers",
    "wait for data",
    "prepare",
    "forward",
    "figures",
    "backward",
    "gradient norm",
    "optimizer",
    "after the step",
    "watch and log",
    "held-out",
    "checkpoint",
)
"""Of a step, in the order in which they come; the loop names them to the profiler. What is in none is the `rest`."""
_PREFIX = "lungssl: "
_STEP = "step"
_NODE = "autograd::engine::evaluate_function: "
_LEAST = 0.05
"""Share of a step from which a piece of its forward or backward pass has a line of its own."""
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

    def __init__(
        self, steps: int, folder: Path, device: torch.device, *, module: nn.Module, say: Callable[[str], None]
    ) -> None:
        """`module`: what is trained; its parts have lines in the forward pass."""
        self._left, self._first, self._folder, self._device, self._say = steps, _UNPROFILED, folder, device, say
        self._module, self._hooks = module, ExitStack()
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
            for name, child in self._module.named_children():
                self._hooks.enter_context(_named(child, f"forward: {name}"))
        with part(_STEP):
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
        self._hooks.close()
        profile.stop()
        if self._steps == 0:
            return
        self._folder.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(self._folder / "trace.json"))
        text = "\n".join(summary(profile.key_averages(), self._steps, self._device))
        (self._folder / "summary.txt").write_text(text + "\n", encoding="utf-8")
        self._say(f"{text}\ntrace: {self._folder / 'trace.json'} (open it at https://ui.perfetto.dev)")


@contextmanager
def _named(module: nn.Module, name: str) -> Iterator[None]:
    """Calls of `module` are a part of that name; not those of a compiled one, which a hook would compile anew."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        yield
        return
    opened: list[torch.profiler.record_function] = []

    def enter(*_: Any) -> None:
        opened.append(part(name))
        opened[-1].__enter__()

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    hooks = module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def summary(events: Any, steps: int, device: torch.device) -> list[str]:
    """One screen: milliseconds a step of each of the PARTS, then the ops that take most of themselves.

    Under the forward pass its modules, under the backward pass its nodes, where they take `_LEAST` of the step.
    `events`: of `profile.key_averages()`, over `steps` steps. On a GPU with the time of its kernels beside that of the
    host, which runs ahead of it.
    """
    gpu = device.type == "cuda"
    known = {event.key: event for event in events}
    total = known[_PREFIX + _STEP].cpu_time_total
    lines = [f"profile of {steps} steps on {device.type}: {total / steps / 1000:.2f} ms a step on the host", ""]
    lines.append(f"{'part of a step':<50}{'host ms':>10}{'share':>8}" + (f"{'gpu ms':>10}" if gpu else ""))

    def row(name: str, host_us: float, gpu_us: float | None = None) -> str:
        line = f"{name:<50}{host_us / steps / 1000:>10.2f}{host_us / total:>8.1%}"
        return line + (f"{gpu_us / steps / 1000:>10.2f}" if gpu and gpu_us is not None else "")

    def inner(prefix: str) -> list[str]:
        found = [event for event in events if event.key.startswith(prefix)]
        largest = sorted(found, key=lambda event: event.cpu_time_total, reverse=True)
        shown = [event for event in largest if event.cpu_time_total >= _LEAST * total]
        return [row(f"  {e.key[len(prefix) :][:46]}", e.cpu_time_total, e.device_time_total) for e in shown]

    rest = total
    for name in PARTS:
        event = known.get(_PREFIX + name)
        if event is not None:
            rest -= event.cpu_time_total
            lines.append(row(name, event.cpu_time_total, event.device_time_total))
            lines += inner({"forward": f"{_PREFIX}forward: ", "backward": _NODE}.get(name, "none"))
    lines.append(row("rest", rest))

    def own(event: Any) -> float:
        return event.self_device_time_total if gpu else event.self_cpu_time_total

    ops = [event for event in events if not event.key.startswith((_PREFIX, _NODE))]
    everything = sum(own(event) for event in ops) or 1.0
    where = "gpu" if gpu else "host"
    lines += ["", f"{'op, by its own time on the ' + where:<50}{'ms':>10}{'share':>8}{'calls':>8}"]
    for event in sorted(ops, key=own, reverse=True)[:_OPS]:
        share = own(event) / everything
        lines.append(f"{event.key[:49]:<50}{own(event) / steps / 1000:>10.2f}{share:>8.1%}{event.count / steps:>8.1f}")
    return lines
