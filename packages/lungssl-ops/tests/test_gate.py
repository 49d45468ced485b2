"""The gate runs in processes of its own: under TRITON_INTERPRET, which the tests set, there is nothing to compile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no triton, or its interpreter has no numpy")
from lungssl_ops import gate

KERNELS = '''
import json
from dataclasses import asdict
import triton
import triton.language as tl
from lungssl_ops.gate import GateCase, check

@triton.jit
def add(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)

@triton.jit
def centre(x, y, BLOCK: tl.constexpr):
    """Holds its block over a sum: too many numbers for the registers of one warp."""
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    total = tl.sum(a * b, 0)
    tl.store(y + i, (a - total) * (b + total))

@triton.jit
def product(x, y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a = tl.load(x + i)
    tl.store(y + i, tl.dot(a, tl.trans(a)))

@triton.jit
def wrong(x, y, n, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), tl.load(nothing_of_this_name))

one_d = {"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}
held = {"x": "*fp32", "y": "*fp32", "BLOCK": "constexpr"}
square = {"x": "*fp16", "y": "*fp32", "SIZE": "constexpr"}
cases = [
    GateCase(name="add", kernel=add, signature=one_d, constants={"BLOCK": 1024}, divisible_by_16=("x", "y")),
    GateCase(name="add is no product", kernel=add, signature=one_d, constants={"BLOCK": 1024}, matrix_units=True),
    GateCase(name="product", kernel=product, signature=square, constants={"SIZE": 64}, matrix_units=True),
    GateCase(name="spills", kernel=centre, signature=held, constants={"BLOCK": 4096}, num_warps=1),
    GateCase(name="shares", kernel=product, signature=square, constants={"SIZE": 256}, num_warps=8),
    GateCase(name="refused", kernel=product, signature=square, constants={"SIZE": 256}, num_warps=16),
    GateCase(name="wrong", kernel=wrong, signature=one_d, constants={"BLOCK": 64}),
]
for name, arch in json.loads(input()):
    case = next(case for case in cases if case.name == name)
    print(json.dumps(asdict(check(case, arch))))
'''


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def _checked(tmp_path: Path, asked: list[tuple[str, int]]) -> dict[tuple[str, int], dict[str, object]]:
    script = tmp_path / "kernels.py"  # a file, because Triton reads a kernel's source
    script.write_text(KERNELS, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script],
        input=json.dumps(asked),
        env=_environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=180,
    )
    # Triton prints what an assembler refuses.
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    return {(result["name"], result["arch"]): result for result in results}


def test_the_rules_are_kept_or_the_broken_one_is_named(tmp_path: Path) -> None:
    asked = [("add", 80), ("add", 90), ("add", 100), ("product", 80), ("product", 90), ("product", 100)]
    asked += [("add is no product", 90), ("spills", 90), ("shares", 90), ("refused", 90), ("wrong", 90)]
    results = _checked(tmp_path, asked)
    for arch in gate.SHARED_BYTES:
        assert results["add", arch]["problems"] == [] and 8 < int(str(results["add", arch]["registers"])) < 64
        assert results["product", arch]["problems"] == []
    instructions = [results["product", arch]["matrix_instruction"] for arch in (80, 90, 100)]
    assert instructions == ["mma.sync", "wgmma", "tcgen05.mma"]
    (problem,) = results["add is no product", 90]["problems"]
    assert problem == "its products don't use the matrix units"
    (problem,) = results["spills", 90]["problems"]
    assert problem.startswith("spills ") and problem.endswith(" bytes a thread; use smaller blocks or more warps")
    problems = " ".join(results["shares", 90]["problems"])
    assert "bytes of shared memory of 232448; use smaller blocks or stages" in problems
    (problem,) = results["refused", 90]["problems"]
    assert problem.startswith("doesn't compile: PTXASError: ptxas") and "Insufficient registers" in problem
    (problem,) = results["wrong", 90]["problems"]
    assert problem.startswith("doesn't compile: ") and "nothing_of_this_name" in problem


def test_every_kernel_of_the_package_passes_on_an_h100() -> None:
    # The other GPUs by hand and in CI: python -m lungssl_ops.gate
    command = [sys.executable, "-m", "lungssl_ops.gate", "--arch", "90", "--jobs", "2"]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert json.loads(lines[-1]) == {"gate": "passed", "kernels": len(lines) - 1, "broken": 0}
    assert len(lines) - 1 >= len(gate.OPS)


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="leaves nothing to compile; unset it"):
        gate.main([])


def test_an_op_that_does_not_exist_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        gate.main(["--only", "lncd"])
    assert "--only lncd: no op's name holds this text; the ops are prototype_ce" in capsys.readouterr().err
