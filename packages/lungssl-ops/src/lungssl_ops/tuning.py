"""Launch parameters of Triton kernels: shipped winners per GPU, measured again with LUNGSSL_AUTOTUNE=1.

Nothing is measured unless asked for: a launch then costs the same every time and may be captured in a CUDA graph.
"""

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import torch

from lungssl_ops.cpp import cache_folder
from lungssl_ops.dispatch import interpreting


@dataclass(frozen=True, kw_only=True)
class Config:
    """Block sizes by the kernel's names for them, and what Triton is told of the launch."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2


def pick(kernel: str, key: str, candidates: Sequence[Config], launch: Callable[[Config], object]) -> Config:
    """The config for a kernel at a size class `key`: the user's own, else the shipped one, else the first candidate.

    With LUNGSSL_AUTOTUNE=1 all candidates are measured, once, and the fastest is kept in the user's cache. `launch`
    runs the kernel and must give the same result however often it is called.
    """
    if interpreting() or not torch.cuda.is_available():
        return candidates[0]
    place, arch = f"{kernel}/{key}", _arch()
    if os.environ.get("LUNGSSL_AUTOTUNE") == "1" and place not in _measured:
        _measured[place] = min(candidates, key=lambda config: _milliseconds(launch, config))
        _keep(place, _measured[place], arch)
    return _measured.get(place) or _known(arch).get(place) or candidates[0]


_measured: dict[str, Config] = {}


def _milliseconds(launch: Callable[[Config], object], config: Config) -> float:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(lambda: launch(config), return_mode="median"))  # pyright: ignore[reportArgumentType]
    except OutOfResources:
        return float("inf")  # too much shared memory for this GPU


@functools.cache
def _arch() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@functools.cache
def _known(arch: str) -> dict[str, Config]:
    """Shipped winners, and over them the user's."""
    shipped = files("lungssl_ops").joinpath("winners", f"{arch}.json")
    found = json.loads(shipped.read_text(encoding="utf-8")) if shipped.is_file() else {}
    own = _own_file(arch)
    found |= json.loads(own.read_text(encoding="utf-8")) if own.exists() else {}
    return {place: Config(**config) for place, config in found.items()}


def _keep(place: str, config: Config, arch: str) -> None:
    path = _own_file(arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(found | {place: asdict(config)}, indent=1, sort_keys=True), encoding="utf-8")
    os.replace(temporary, path)


def _own_file(arch: str) -> Path:
    import triton

    return cache_folder() / f"winners_{arch}_torch{torch.__version__}_triton{triton.__version__}.json"
