import ctypes
import os
import shutil
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from lungssl_ops import cpp, dispatch
from lungssl_ops.cpp import CppError, cache_folder, cpp_problem, library, pointer
from lungssl_ops.dispatch import Dispatch, Implementation

TWICE = """
extern "C" void twice(const float* from, float* to, long long n, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long long i = 0; i < n; ++i) to[i] = 2 * from[i];
}
"""

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler: the kernels can't be had here"
)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel, a cache folder of its own, and nothing remembered."""
    monkeypatch.setenv("LUNGSSL_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    _forget()
    path = tmp_path / "twice.cpp"
    path.write_text(TWICE, encoding="utf-8")
    return path


def _forget() -> None:
    for remembered in (library, cpp_problem, cpp._compiler_version, dispatch._say_once):
        remembered.cache_clear()


def _twice(source: Path) -> list[float]:
    values = torch.arange(5.0)
    out = torch.full((5,), float("nan"))
    library(source).twice(pointer(values), pointer(out), ctypes.c_int64(5), cpp.threads())
    return out.tolist()


def _compiled(source: Path) -> list[Path]:
    return sorted((source.parent / "cache").iterdir())


@needs_compiler
def test_a_kernel_is_compiled_once_and_kept(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpp_problem(source) == ""
    assert _twice(source) == [0.0, 2.0, 4.0, 6.0, 8.0]
    (kept,) = _compiled(source)
    _forget()
    monkeypatch.setattr(cpp, "_compile", None)  # the next load must do without
    assert _twice(source)[1] == 2.0
    assert _compiled(source) == [kept]


@needs_compiler
def test_another_text_or_other_flags_make_another_file(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(source)
    source.write_text(TWICE.replace("2 *", "3 *"), encoding="utf-8")
    _forget()
    assert _twice(source)[1] == 3.0
    monkeypatch.setattr(cpp, "FLAGS", (*cpp.FLAGS, "-g0"))
    _forget()
    library(source)
    assert len(_compiled(source)) == 3


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"no library at all"])
def test_a_damaged_file_is_made_again(source: Path, damage: bytes) -> None:
    target = cache_folder() / f"twice_{cpp._key([*cpp._compiler(), *cpp.FLAGS], source)}.so"
    target.write_bytes(damage)
    assert _twice(source)[1] == 2.0
    assert _compiled(source) == [target]


@needs_compiler
def test_a_file_that_cannot_be_loaded_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "FLAGS", ("-c",))  # an object file, which is no shared library
    with pytest.raises(CppError, match=r"twice_[0-9a-f]{16}\.so can't be loaded: "):
        library(source)


@needs_compiler
def test_a_compile_error_names_the_line(source: Path) -> None:
    source.write_text(TWICE.replace("to[i] =", "too[i] ="), encoding="utf-8")
    assert "fails on twice.cpp: " in cpp_problem(source)
    assert "twice.cpp:4:" in cpp_problem(source)
    assert _compiled(source) == []  # nor a temporary file


@needs_compiler
def test_flags_that_a_compiler_does_not_know_are_its_error(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As -march=native is on some emulated machines.
    monkeypatch.setattr(cpp, "FLAGS", (*cpp.FLAGS, "-march=abacus"))
    assert "abacus" in cpp_problem(source)


def test_no_compiler_on_the_path_is_said(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(source.parent))
    assert cpp_problem(source) == "no C++ compiler (g++ or clang++) on the PATH"


def test_a_compiler_that_is_not_there_is_said(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(source.parent / "nowhere" / "g++"))
    assert cpp_problem(source).startswith(f"the C++ compiler {source.parent}/nowhere/g++ doesn't run: ")


@needs_compiler
def test_the_compiler_may_be_more_than_one_word(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"env {cpp._compiler()[0]}")
    assert _twice(source)[1] == 2.0


def test_an_op_without_a_compiler_falls_back_and_says_so_once(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("LUNGSSL_OPS", raising=False)
    monkeypatch.setenv("PATH", str(source.parent))
    op = Dispatch(
        "twice",
        Implementation(backend="cpp", function="none:none", problem=partial(cpp_problem, source)),
        Implementation(backend="reference", function="operator:neg"),
    )
    for _ in range(3):
        assert op(torch.ones(1))(torch.ones(1)).item() == -1.0
    (record,) = caplog.records
    assert record.getMessage() == "twice runs as 'reference': cpp: no C++ compiler (g++ or clang++) on the PATH"


def test_a_folder_that_others_may_write_is_refused(source: Path) -> None:
    folder = cache_folder()
    folder.chmod(0o777)
    with pytest.raises(CppError, match=r"others could put code into .*chmod go-w it"):
        cache_folder()
    assert "others could put code into" in cpp_problem(source)
    folder.chmod(0o755)
    assert cache_folder() == folder


def test_a_new_folder_is_the_user_s_own(source: Path) -> None:
    assert cache_folder().stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUNGSSL_OPS_CACHE", str(source / "below a file"))
    with pytest.raises(CppError, match=r"no cache folder.*name one in LUNGSSL_OPS_CACHE"):
        cache_folder()


def test_without_a_name_the_folder_is_in_the_user_s_cache(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUNGSSL_OPS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(source.parent / "xdg"))
    assert cache_folder() == source.parent / "xdg" / "lungssl-ops"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(source.parent / "home"))
    assert cache_folder() == source.parent / "home" / ".cache" / "lungssl-ops"


def test_a_user_without_a_home_is_told_of_the_variable(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LUNGSSL_OPS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert "determine home directory.); name one in LUNGSSL_OPS_CACHE" in cpp_problem(source)


def test_an_address_keeps_its_tensor() -> None:
    tensor = torch.zeros(3)
    seen = weakref.ref(tensor)
    address = pointer(tensor)
    del tensor
    assert seen() is not None and address.value
    del address
    assert seen() is None


def test_kernels_are_given_whole_tensors_on_the_cpu() -> None:
    assert pointer(None).value is None
    with pytest.raises(AssertionError, match="contiguous tensors on the CPU"):
        pointer(torch.zeros(3, 4).T)


_IN_A_PROCESS = """
import ctypes, os, sys, torch
from pathlib import Path
from lungssl_ops.cpp import library, pointer, threads
def twice():
    out = torch.full((1000,), float("nan"))
    library(Path(sys.argv[1])).twice(pointer(torch.ones(1000)), pointer(out), ctypes.c_int64(1000), threads())
    return int(out.sum())
"""


def _start(source: Path, code: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _IN_A_PROCESS + code, str(source)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@needs_compiler
def test_two_processes_may_compile_at_once_and_a_fork_may_run_what_its_parent_loaded(source: Path) -> None:
    # Torch sets one thread in a DataLoader's workers.
    fork = """
torch.set_num_threads(2)
print(twice(), flush=True)
if os.fork() == 0:
    torch.set_num_threads(1)
    print(twice(), flush=True)
    os._exit(0)
os.wait()
"""
    started = [_start(source, "print(twice())"), _start(source, fork)]
    (first, _), (second, _) = (process.communicate(timeout=120) for process in started)
    assert first.split() == ["2000"] and second.split() == ["2000", "2000"]
    assert len(_compiled(source)) == 1


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kernels_share_torch_s_openmp(source: Path) -> None:
    library(source)
    maps = Path(f"/proc/{os.getpid()}/maps").read_text(encoding="utf-8")
    assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line}) == 1
