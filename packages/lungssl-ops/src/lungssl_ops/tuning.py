"""Launch parameters of Triton kernels: shipped winners per GPU, measured again with LUNGSSL_AUTOTUNE=1.

Nothing is measured unless asked for: a launch then costs the same every time and may be captured in a CUDA graph.
`python -m lungssl_ops.tuning --export` puts what was measured on this machine into the package's `winners/`.
"""

import argparse
import functools
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lungssl_ops.cpp import CppError, cache_folder
from lungssl_ops.dispatch import interpreting

SHIPPED = Path(__file__).with_name("winners")
"""One JSON file per compute capability, `sm_90.json`: {"kernel/key": config}. Absent where none has been measured."""
_log = logging.getLogger("lungssl_ops")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Block sizes by the kernel's names for them, and what Triton is told of the launch."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2


def pick(kernel: str, key: str, candidates: Sequence[Config], launch: Callable[[Config], object]) -> Config:
    """The config for a kernel at a size class `key`: the user's own, else the shipped one, else the first candidate.

    With LUNGSSL_AUTOTUNE=1 all candidates are measured, once, and the fastest is kept in the user's cache. `launch`
    runs the kernel and must give the same result however often it is called. A winner that is no longer a candidate
    belongs to another version of the kernel and doesn't count.
    """
    arch = "" if interpreting() else _arch()
    if not arch:
        return candidates[0]
    place = f"{kernel}/{key}"
    if os.environ.get("LUNGSSL_AUTOTUNE") == "1" and place not in _measured:
        _measured[place] = min(candidates, key=lambda config: _milliseconds(launch, config))
        _keep(place, _measured[place], arch)
    known = _measured.get(place) or _known(arch).get(place)
    return known if known is not None and known in candidates else candidates[0]


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
    """`sm_90` on an H100; nothing where there is no GPU."""
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@functools.cache
def _known(arch: str) -> dict[str, Config]:
    """Shipped winners, and over them the user's."""
    found = _read(SHIPPED / f"{arch}.json")
    try:
        return found | _read(_own_file(arch))
    except CppError:
        return found  # no cache folder, so nothing in it


def _read(path: Path) -> dict[str, Config]:
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {place: Config(**config) for place, config in table.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no table of launch parameters ({error}); delete it") from error


def _write(path: Path, table: dict[str, Config]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps({place: asdict(config) for place, config in table.items()}, indent=1, sort_keys=True)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _keep(place: str, config: Config, arch: str) -> None:
    try:
        path = _own_file(arch)
        _write(path, _read(path) | {place: config})
    except (CppError, OSError) as error:
        _log.warning("the launch parameters measured for %s last for this process only: %s", place, error)


def _own_file(arch: str) -> Path:
    import triton

    return cache_folder() / f"winners_{arch}_torch{torch.__version__}_triton{triton.__version__}.json"


def export(folder: Path = SHIPPED) -> list[Path]:
    """Put this machine's winners over those in `folder`, a file per compute capability; returns the files written.

    Raises FileNotFoundError where nothing has been measured with this torch and Triton.
    """
    written = []
    for own in sorted(cache_folder().glob(_own_file("sm_*").name)):
        arch = own.name.split("_torch")[0].removeprefix("winners_")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{arch}.json"
        _write(path, _read(path) | _read(own))
        written.append(path)
    if not written:
        raise FileNotFoundError(f"no winners in {cache_folder()}; run the benchmarks with LUNGSSL_AUTOTUNE=1 first")
    return written


def main(arguments: list[str] | None = None) -> None:
    """Command line: exports the winners and names the files."""
    parser = argparse.ArgumentParser(description="Ship the launch parameters that were measured on this machine.")
    parser.add_argument(
        "--export", type=Path, nargs="?", const=SHIPPED, required=True, help="folder; the package's own"
    )
    for path in export(parser.parse_args(arguments).export):
        print(path)


if __name__ == "__main__":
    main()
