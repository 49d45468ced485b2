"""Which implementation of an op runs: Triton on a GPU, C++ on a CPU, else what torch compiles, else the definition.

`LUNGSSL_OPS=reference` (or triton, cpp, compiled) forces one for all ops, `backend=...` for one call; a forced one that
can't run raises RuntimeError with the reason. Left to itself, an op that has to do without its fast path says so once.
"""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "cpp", "compiled", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "cpp", "compiled", "reference")
_log = logging.getLogger("lungssl_ops")


def always() -> str:
    """The `problem` of an implementation that needs nothing."""
    return ""


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to compute an op."""

    backend: Backend
    function: str
    """`module:name`; imported when first used."""
    devices: tuple[str, ...] = ()
    """Types of the devices that it runs on; empty: any."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Of the first tensor; empty: any."""
    problem: Callable[[], str] = always
    """Why this machine can't run it, e.g. `no C++ compiler`; empty: it can. Asked once."""


class Dispatch:
    """The implementations of one op, best first; calling it gives the function to use for some tensors."""

    def __init__(self, op: str, *implementations: Implementation) -> None:
        self.op, self.implementations = op, implementations

    def __call__(self, *tensors: Tensor, backend: Backend = "auto") -> Callable[..., Any]:
        """The implementation for these tensors.

        Raises ValueError for a backend that doesn't exist and RuntimeError for a forced one that can't run here.
        """
        forced = backend if backend != "auto" else _forced_by_environment()
        if forced not in BACKENDS:
            raise ValueError(f"backend {forced!r} of {self.op} is unknown; known are {', '.join(BACKENDS)}")
        if forced != "auto":
            return self._forced(forced, tensors)
        reasons = []
        for implementation in self.implementations:
            reason = _mismatch(implementation, tensors, forced=False)
            if not reason:
                reason = _ask(implementation.problem)
                if not reason:
                    if reasons:
                        _say_once(self.op, implementation.backend, "; ".join(reasons))
                    return _load(implementation.function)
                # Only what the machine lacks is worth a word; that a CPU tensor isn't on a GPU is nobody's fault.
                reasons.append(f"{implementation.backend}: {reason}")
        raise RuntimeError(f"{self.op} has no implementation for {_describe(tensors)}; {'; '.join(reasons)}")

    def available(self, *tensors: Tensor) -> list[Backend]:
        """The backends that could be forced for such tensors: what tests and benchmarks go through."""
        return [i.backend for i in self.implementations if not (_mismatch(i, tensors, forced=True) or _ask(i.problem))]

    def _forced(self, backend: Backend, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        for implementation in self.implementations:
            if implementation.backend == backend:
                reason = _mismatch(implementation, tensors, forced=True) or _ask(implementation.problem)
                if reason:
                    raise RuntimeError(
                        f"{self.op}: backend {backend!r} was asked for and can't run: {reason}; "
                        f"use backend='auto', or unset LUNGSSL_OPS"
                    )
                return _load(implementation.function)
        known = ", ".join(i.backend for i in self.implementations)
        raise RuntimeError(
            f"{self.op} has no backend {backend!r}; it has {known}; unset LUNGSSL_OPS or name one of them"
        )


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU: `TRITON_INTERPRET=1`, set before import, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
@functools.cache
def triton_problem() -> str:
    """Why Triton can't be used, or nothing."""
    try:
        import_module("triton")
    except ImportError as error:
        return f"triton can't be imported ({error})"
    if interpreting():
        try:
            import_module("numpy")
        except ImportError:
            return "Triton's interpreter needs numpy"
        return ""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability()} is below 8.0"
    return ""


def _mismatch(implementation: Implementation, tensors: tuple[Tensor, ...], *, forced: bool) -> str:
    devices, dtypes = implementation.devices, implementation.dtypes
    if implementation.backend == "triton" and forced and interpreting():
        devices = (*devices, "cpu")
    if devices and any(t.device.type not in devices for t in tensors):
        return f"it runs on {' and '.join(devices)}, the tensors are on {tensors[0].device.type}"
    if dtypes and tensors[0].dtype not in dtypes:
        return f"it takes {', '.join(str(d) for d in dtypes)}, not {tensors[0].dtype}"
    return ""


def _describe(tensors: tuple[Tensor, ...]) -> str:
    return ", ".join(f"{t.dtype} on {t.device.type}" for t in tensors)


@torch.compiler.assume_constant_result
def _forced_by_environment() -> str:
    return os.environ.get("LUNGSSL_OPS", "auto")


@torch.compiler.assume_constant_result
def _ask(problem: Callable[[], str]) -> str:
    return problem()


@torch.compiler.assume_constant_result
@functools.cache
def _load(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


@torch.compiler.assume_constant_result
@functools.cache
def _say_once(op: str, backend: str, reasons: str) -> None:
    _log.warning("%s runs as %r: %s", op, backend, reasons)
