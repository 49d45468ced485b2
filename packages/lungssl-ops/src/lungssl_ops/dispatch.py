"""Which implementation of an op runs: Triton on a GPU, C++ on a CPU, else what torch compiles, else the definition.

`LUNGSSL_OPS=reference` (or triton, cpp, torch, compiled) forces one for all ops, `LUNGSSL_OPS=lncc=cpp,warp=reference`
for some, `backend=...` for one call; a forced one that can't run raises RuntimeError with the reason. Left to itself,
an op that has to do without its fast path says so once. The choice is a constant under `torch.compile`: what has been
traced doesn't look at LUNGSSL_OPS again.
"""

import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "cpp", "torch", "compiled", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)
OPS = (
    "cost_volume",
    "cost_volume_with_gradient",
    "coupled_convex",
    "ct_views",
    "ct_views_float64",
    "lncc",
    "mask_views",
    "masked_patch_mse",
    "mind_ssc",
    "mind_ssc_with_gradient",
    "prototype_ce",
    "residual_attention",
    "residual_mlp",
    "view_coords_mm",
    "warp",
    "warp_terms",
)
"""Names that LUNGSSL_OPS may have, whether their modules are imported or not."""
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
    """Why this machine can't run it, e.g. `no C++ compiler`; empty: it can. Asked at each call, so it remembers."""


_Facts = tuple[tuple[str, torch.dtype], ...]
"""Device type and dtype of each tensor: all that a choice depends on."""


class Dispatch:
    """The implementations of one op, best first; calling it gives the function to use for some tensors."""

    def __init__(self, op: str, *implementations: Implementation) -> None:
        self.op, self.implementations = op, implementations
        self._name = f"{op}/{len(_KNOWN)}"
        self._functions: dict[str, Callable[..., Any]] = {}
        _KNOWN[self._name] = self

    def __call__(self, *tensors: Tensor, backend: Backend = "auto") -> Callable[..., Any]:
        """The implementation for these tensors.

        Raises ValueError for a backend that doesn't exist and RuntimeError for a forced one that can't run here.
        """
        return self._functions[_choose(self._name, backend, _facts(tensors))]

    def available(self, *tensors: Tensor) -> list[Backend]:
        """The backends that could be forced for such tensors: what tests and benchmarks go through."""
        facts = _facts(tensors)
        able = [i for i in self.implementations if not (_mismatch(i, facts, forced=True) or i.problem())]
        return list(dict.fromkeys(i.backend for i in able))

    def _auto(self, facts: _Facts) -> Implementation:
        reasons = []
        for implementation in self.implementations:
            # Only what the machine lacks is worth a word; that a CPU tensor isn't on a GPU is nobody's fault.
            if _mismatch(implementation, facts, forced=False):
                continue
            reason = implementation.problem()
            if not reason:
                if reasons:
                    _say_once(self.op, implementation.backend, "; ".join(reasons))
                return implementation
            reasons.append(f"{implementation.backend}: {reason}")
        tensors = ", ".join(f"{dtype} on {device}" for device, dtype in facts)
        raise RuntimeError("; ".join([f"{self.op} has no implementation for {tensors}", *reasons]))

    def _forced(self, backend: str, by: str, facts: _Facts) -> Implementation:
        reasons = []
        for implementation in (i for i in self.implementations if i.backend == backend):
            reason = _mismatch(implementation, facts, forced=True) or implementation.problem()
            if not reason:
                return implementation
            reasons.append(reason)
        if reasons:
            raise RuntimeError(
                f"{self.op}: backend {backend!r} was asked for{by} and can't run: {'; '.join(reasons)}; "
                f"use backend='auto', or unset LUNGSSL_OPS"
            )
        has = ", ".join(dict.fromkeys(i.backend for i in self.implementations))
        raise RuntimeError(
            f"{self.op} has no backend {backend!r}, which was asked for{by}; it has {has}: name one of them, or leave "
            f"the choice to 'auto' (LUNGSSL_OPS={self.op}=auto,{backend})"
        )


_KNOWN: dict[str, Dispatch] = {}


@contextmanager
def forced(**backends: Backend) -> Iterator[None]:
    """Inside, LUNGSSL_OPS names these backends too: `with forced(lncc="reference"): ...`. Of the whole process."""
    before = os.environ.get("LUNGSSL_OPS")
    words = [*([before] if before else []), *(f"{op}={backend}" for op, backend in backends.items())]
    os.environ["LUNGSSL_OPS"] = ",".join(words)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LUNGSSL_OPS"]
        else:
            os.environ["LUNGSSL_OPS"] = before


def _choose(name: str, backend: str, facts: _Facts) -> str:
    """All of the choice in one function from constants to a constant, which `torch.compile` calls while it traces."""
    dispatch, by = _KNOWN[name], ""
    if backend == "auto":
        backend, by = _forced_by_environment(dispatch.op), f" by LUNGSSL_OPS={os.environ.get('LUNGSSL_OPS')}"
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} of {dispatch.op}{by} is unknown; known are {', '.join(BACKENDS)}")
    chosen = dispatch._auto(facts) if backend == "auto" else dispatch._forced(backend, by, facts)
    if chosen.function not in dispatch._functions:
        module, _, function = chosen.function.partition(":")
        dispatch._functions[chosen.function] = getattr(import_module(module), function)
    return chosen.function


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes seconds.
_choose._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _forced_by_environment(op: str) -> str:
    """The backend that LUNGSSL_OPS asks for: of `op=backend` words the op's own, else a word without `=`."""
    words = [word.strip() for word in os.environ.get("LUNGSSL_OPS", "").split(",") if word.strip()]
    chosen = {word.rpartition("=")[0]: word.rpartition("=")[2] for word in words}
    unknown = sorted(chosen.keys() - {"", *OPS, *(dispatch.op for dispatch in _KNOWN.values())})
    if unknown:
        raise ValueError(f"LUNGSSL_OPS names {', '.join(unknown)}, which is no op; known are {', '.join(OPS)}")
    return chosen.get(op, chosen.get("", "auto"))


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU: `TRITON_INTERPRET=1`, set before import, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


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
    if torch.version.cuda is None:
        return "it is written for NVIDIA GPUs, and this torch is built for others"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability()} is below 8.0"
    return ""


def compiled_problem() -> str:
    """Why torch.compile can't make kernels here, or nothing. Inductor needs a C++ compiler, and Triton for a GPU."""
    if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler (g++ or clang++) on the PATH"
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton for this GPU"
    return ""


def _facts(tensors: tuple[Tensor, ...]) -> _Facts:
    return tuple((t.device.type, t.dtype) for t in tensors)


def _mismatch(implementation: Implementation, facts: _Facts, *, forced: bool) -> str:
    """Why an implementation isn't for such tensors, or nothing."""
    devices, dtypes = implementation.devices, implementation.dtypes
    if implementation.backend == "triton" and forced and interpreting():
        devices = (*devices, "cpu")
    elsewhere = [device for device, _ in facts if devices and device not in devices]
    if elsewhere:
        return f"it runs on {' and '.join(devices)}, and there are tensors on {elsewhere[0]}"
    if dtypes and facts[0][1] not in dtypes:
        return f"it takes {', '.join(str(d) for d in dtypes)}, not {facts[0][1]}"
    return ""


@functools.cache
def _say_once(op: str, backend: str, reasons: str) -> None:
    _log.warning("%s runs as %r: %s", op, backend, reasons)
