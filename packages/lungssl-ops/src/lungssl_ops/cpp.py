"""C++ kernels, compiled on first use: plain C functions called through ctypes, so that g++ takes a second or two.

An op's source has `extern "C"` functions on raw pointers, sizes and a number of threads, and allocates nothing of size:
its scratch memory comes as tensors, which torch counts. `cpp_problem(source)` says why it can't be had.

Kernels share torch's OpenMP threads (the loader takes its libgomp.so.1 for theirs). In a forked process they run on one
thread only: libgomp's other threads stay behind in the parent, and waiting for them has no end (torch's own products
hang there too, unless told to use one thread, as DataLoader's workers are).
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
"""Not -ffast-math: it would let the compiler assume that no voxel is NaN, and reorder compensated sums."""
LONGEST_COMPILATION_S = 300
_LOADED_IN = os.getpid()


class CppError(RuntimeError):
    """A C++ kernel can't be had; the message says why."""


@functools.cache
def library(source: Path) -> ctypes.CDLL:
    """The compiled source, from the user's cache if the same compiler made it from the same text for the same CPU.

    Raises CppError where there is no compiler, it fails, or the cache folder could be written by others.
    """
    command = [*_compiler(), *FLAGS]
    target = cache_folder() / f"{source.stem}_{_key(command, source)}.so"
    if not target.exists():
        _compile(command, source, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError:
        _compile(command, source, target)  # the file was damaged
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise CppError(f"{target.name} can't be loaded: {error}") from error


@functools.cache
def cpp_problem(source: Path) -> str:
    """Why a source can't be used, or nothing; compiles it."""
    try:
        library(source)
    except CppError as error:
        return str(error)
    return ""


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """The address of a contiguous tensor's data, 0 for None. It keeps the tensor, as in `pointer(x.contiguous())`."""
    if tensor is None:
        return ctypes.c_void_p(0)
    assert tensor.is_contiguous() and tensor.device.type == "cpu", "C++ kernels take contiguous tensors on the CPU"
    address = _Address(tensor.data_ptr())
    address.tensor = tensor
    return address


class _Address(ctypes.c_void_p):
    tensor: Tensor
    """Named nowhere else, a tensor's memory would be free again before the kernel runs."""


def threads() -> ctypes.c_int:
    """How many threads torch uses: a kernel takes as many, and one in a forked process."""
    return ctypes.c_int(1 if os.getpid() != _LOADED_IN else torch.get_num_threads())


def _compiler() -> list[str]:
    """$CXX, which may be more than one word (`ccache g++`), else g++, else clang++."""
    words = shlex.split(os.environ.get("CXX", ""))
    found = shutil.which("g++") or shutil.which("clang++")
    if not words and found is None:
        raise CppError("no C++ compiler (g++ or clang++) on the PATH")
    return words or [str(found)]


def _compile(command: list[str], source: Path, target: Path) -> None:
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".so")
        os.close(descriptor)
    except OSError as error:
        raise CppError(f"no place for a compiled {source.name} in {target.parent}: {error}") from error
    temporary = Path(name)
    try:
        done = subprocess.run(
            [*command, str(source), "-o", str(temporary)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=LONGEST_COMPILATION_S,
            env=os.environ | {"LC_ALL": "C"},  # the word `error` is looked for below
        )
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            errors = [line for line in lines if "error: " in line] or lines[-1:]
            raise CppError(f"{shlex.join(command[:1])} fails on {source.name}: {errors[0]}")
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # loading a file cut short by a power failure could end the process
        os.replace(temporary, target)  # two processes that compile at once each put the same file there
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CppError(f"{command[0]} can't compile {source.name}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _key(command: list[str], source: Path) -> str:
    # -march=native: a home folder may be shared by machines with other CPUs.
    program = tuple(command[: -len(FLAGS)])
    parts = [*command, _compiler_version(program), _cpu(), source.read_text(encoding="utf-8")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _compiler_version(program: tuple[str, ...]) -> str:
    try:
        done = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise CppError(f"the C++ compiler {shlex.join(program)} doesn't run: {error}") from error
    return done.stdout


@functools.cache
def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join(sorted(kept))


def cache_folder() -> Path:
    """Of compiled kernels and tuned launches: $LUNGSSL_OPS_CACHE, else in the user's cache; CppError if unsafe."""
    named, base = os.environ.get("LUNGSSL_OPS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(named) if named else (Path(base) if base else Path.home() / ".cache") / "lungssl-ops"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        raise CppError(f"no cache folder for compiled kernels ({error}); name one in LUNGSSL_OPS_CACHE") from error
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise CppError(f"others could put code into {folder}; chmod go-w it, or name another in LUNGSSL_OPS_CACHE")
    return folder
