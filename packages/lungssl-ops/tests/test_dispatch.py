import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from lungssl_ops import dispatch
from lungssl_ops.dispatch import _KNOWN, OPS, Dispatch, Implementation, triton_problem
from lungssl_ops.lncc import lncc
from torch import Tensor


@pytest.fixture(autouse=True)
def _functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module whose functions say which of them ran, and no choice from outside."""
    module = ModuleType("ops_of_a_test")
    module.fast = lambda x: x * 2  # pyright: ignore[reportAttributeAccessIssue]
    module.slow = lambda x: x * 3  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "ops_of_a_test", module)
    monkeypatch.delenv("LUNGSSL_OPS", raising=False)
    dispatch._say_once.cache_clear()


def _op(problem: Callable[[], str] = dispatch.always, *, op: str = "sums") -> Dispatch:
    return Dispatch(
        op,
        Implementation(backend="triton", function="ops_of_a_test:fast", devices=("cuda",), problem=lambda: "no GPU"),
        Implementation(
            backend="cpp",
            function="ops_of_a_test:fast",
            devices=("cpu",),
            dtypes=(torch.float32, torch.float64),
            problem=problem,
        ),
        Implementation(backend="reference", function="ops_of_a_test:slow"),
    )


def _lacking() -> str:
    return "no C++ compiler"


ONE = torch.ones(1)


def test_the_first_that_suits_the_tensors_runs_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    op = _op()
    assert op(ONE)(ONE).item() == 2
    assert op(ONE.bfloat16())(ONE).item() == 3
    assert not caplog.records


def test_what_a_machine_lacks_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    op = _op(_lacking)
    assert op(ONE)(ONE).item() == op(ONE.double())(ONE).item() == 3
    (record,) = caplog.records
    assert record.getMessage() == "sums runs as 'reference': cpp: no C++ compiler"
    assert record.levelno == logging.WARNING


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"sums: backend 'cpp' was asked for and can't run: no C\+\+ compiler; use"):
        _op(_lacking)(ONE, backend="cpp")
    with pytest.raises(RuntimeError, match=r"it takes torch.float32, torch.float64, not torch.bfloat16"):
        _op()(ONE.bfloat16(), backend="cpp")
    with pytest.raises(RuntimeError, match=r"it runs on cpu, and there are tensors on meta"):
        _op()(ONE, ONE.to("meta"), backend="cpp")
    with pytest.raises(RuntimeError, match=r"sums has no backend 'compiled'.*it has triton, cpp, reference"):
        _op()(ONE, backend="compiled")


def test_a_forced_backend_is_the_one_that_runs() -> None:
    assert _op()(ONE, backend="reference")(ONE).item() == 3
    assert _op()(ONE, backend="cpp")(ONE).item() == 2


def test_the_environment_forces_all_ops_or_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUNGSSL_OPS", "reference")
    assert _op()(ONE)(ONE).item() == 3
    assert _op()(ONE, backend="cpp")(ONE).item() == 2  # the call knows better
    monkeypatch.setenv("LUNGSSL_OPS", "reference, sums=cpp")
    assert _op()(ONE)(ONE).item() == 2
    assert _op(op="others")(ONE)(ONE).item() == 3
    monkeypatch.setenv("LUNGSSL_OPS", "sums=auto,compiled")
    assert _op()(ONE)(ONE).item() == 2
    with pytest.raises(RuntimeError, match="others has no backend 'compiled', which was asked for by LUNGSSL_OPS=sums"):
        _op(op="others")(ONE)
    monkeypatch.setenv("LUNGSSL_OPS", "cpp")
    with pytest.raises(RuntimeError, match="asked for by LUNGSSL_OPS=cpp and can't run: no C"):
        _op(_lacking)(ONE)


def test_an_unknown_backend_is_named_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUNGSSL_OPS", "cuda")
    with pytest.raises(ValueError, match="'cuda' of sums by LUNGSSL_OPS=cuda is unknown; known are auto, "):
        _op()(ONE)


def test_an_op_without_any_implementation_for_a_tensor_says_so() -> None:
    only = Dispatch("sums", Implementation(backend="cpp", function="none:none", devices=("cpu",), problem=_lacking))
    with pytest.raises(RuntimeError, match=r"no implementation for torch.float32 on cpu; cpp: no C\+\+ compiler"):
        only(ONE)


def test_two_implementations_of_a_backend_share_the_dtypes() -> None:
    op = Dispatch(
        "sums",
        Implementation(backend="cpp", function="ops_of_a_test:fast", dtypes=(torch.float32,)),
        Implementation(backend="cpp", function="ops_of_a_test:slow", dtypes=(torch.float64,)),
    )
    assert op(ONE)(ONE).item() == op(ONE, backend="cpp")(ONE).item() == 2
    assert op(ONE.double())(ONE).item() == op(ONE.double(), backend="cpp")(ONE).item() == 3
    assert op.available(ONE) == ["cpp"] and op.available(ONE.bfloat16()) == []


def test_available_names_what_could_be_forced() -> None:
    assert _op().available(ONE) == ["cpp", "reference"]
    assert _op(_lacking).available(ONE) == _op().available(ONE.half()) == ["reference"]


@pytest.mark.usefixtures("unchecked")
def test_the_choice_is_traced_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    op = _op()

    def public(x: Tensor, backend: dispatch.Backend = "auto") -> Tensor:
        return op(x, backend=backend)(x)

    compiled = torch.compile(public, fullgraph=True, backend="eager")
    assert compiled(ONE).item() == 2
    assert compiled(ONE, backend="reference").item() == 3
    monkeypatch.setenv("LUNGSSL_OPS", "reference")
    assert compiled(ONE).item() == 2  # as the module says: what has been traced stays


def test_without_numpy_the_interpreter_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="torch for CPUs only comes without it")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "numpy", None)  # what makes an import fail
    assert triton_problem.__wrapped__() == "Triton's interpreter needs numpy"


def test_without_triton_that_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert triton_problem.__wrapped__().startswith("triton can't be imported (")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_triton_cannot_be_forced() -> None:
    code = (
        "import torch; from lungssl_ops.dispatch import *\n"
        "triton = Implementation(backend='triton', function='m:f', devices=('cuda', 'cpu'), problem=triton_problem)\n"
        "Dispatch('sums', triton)(torch.ones(1), backend='triton')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "RuntimeError: sums: backend 'triton' was asked for and can't run: t" in done.stderr.splitlines()[-1]


def test_a_misspelt_op_in_the_environment_is_named_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cost_volume", "ct_views", "lncc", "mind", "patches", "prototype_ce", "warp"):
        importlib.import_module(f"lungssl_ops.{module}")
    ours = {d.op for d in _KNOWN.values() if d.implementations[0].function.startswith("lungssl_ops.")}
    assert ours == set(OPS)
    monkeypatch.setenv("LUNGSSL_OPS", "lnnc=reference")
    image = torch.zeros(1, 1, 3, 3, 3)
    with pytest.raises(ValueError, match=r"LUNGSSL_OPS names lnnc, which is no op; known are cost_volume, .*, lncc"):
        lncc(image, image)
