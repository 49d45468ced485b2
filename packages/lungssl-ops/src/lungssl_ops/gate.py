"""Compiles every Triton kernel for GPUs that are not here, and looks at what came out.

Run: python -m lungssl_ops.gate [--arch 80 90 100] [--only OP] [--jobs 4]

The rules: it compiles, spills nothing (no stack, no local memory), and its shared memory fits the GPU. Where a kernel's
products should run on the matrix units, their instructions must be there. What Triton's wheel brings does it all:
ptxas (ptxas-blackwell for sm_100) and cuobjdump. Triton keeps what it has compiled, so a second run takes seconds.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Most shared memory of one block, by compute capability (CUDA C++ programming guide, technical specifications)."""
MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma", "mma.sync")
"""Of sm_100, sm_90 and sm_80; blocks too small for a GPU's own take an older one's."""
OPS = ("prototype_ce", "ct_views", "lncc", "warp", "mind", "cost_volume")
"""Folders whose `triton.py` has `gate_cases() -> list[GateCase]`."""


@dataclass(frozen=True, kw_only=True)
class GateCase:
    """One kernel as it is launched."""

    name: str
    kernel: Any
    """What `@triton.jit` made."""
    signature: dict[str, str]
    """Triton's type of each argument, e.g. `*fp32`, `i32`, `fp32`; `constexpr` for compile-time ones."""
    constants: dict[str, Any]
    """Values of the compile-time arguments."""
    num_warps: int = 4
    num_stages: int = 2
    matrix_units: bool = False
    """Whether products must come out as one of MATRIX_INSTRUCTIONS; the result says which."""
    divisible_by_16: tuple[str, ...] = field(default=())
    """Arguments (addresses, strides) that launches of whole tensors have as multiples of 16."""


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """What one kernel takes on one GPU."""

    name: str
    arch: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instruction: str
    """Of MATRIX_INSTRUCTIONS; empty where the kernel has no product on the matrix units."""
    problems: tuple[str, ...]


def gate_cases(only: str = "") -> Iterator[GateCase]:
    """The cases of all ops whose name holds `only`."""
    for op in (op for op in OPS if only in op):
        yield from import_module(f"lungssl_ops.{op}.triton").gate_cases()


def check(case: GateCase, arch: int) -> GateResult:
    """Compile one kernel for compute capability `arch` (90: 9.0) and read the usage from the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.signature)
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16}
    source = ASTSource(fn=case.kernel, signature=case.signature, constexprs=case.constants, attrs=attrs)
    # The default of fp fusion changes with Triton 3.10; launches say the same.
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # the compiler's own types differ between versions
        lines = str(error).strip().splitlines() or [""]
        told = [line for word in ("fatal", "error") for line in lines if word in line] or lines[-1:]
        problem = f"doesn't compile: {type(error).__name__}: {told[0].strip()}"
        return GateResult(
            name=case.name,
            arch=arch,
            registers=0,
            spilled_bytes=0,
            shared_bytes=0,
            matrix_instruction="",
            problems=(problem,),
        )
    usage = _usage(compiled.asm["cubin"])
    instruction = next((name for name in MATRIX_INSTRUCTIONS if name in compiled.asm["ptx"]), "")
    spilled, shared = usage["STACK"] + usage["LOCAL"], compiled.metadata.shared
    problems = []
    if spilled:
        problems.append(f"spills {spilled} bytes a thread; use smaller blocks or more warps")
    if shared > SHARED_BYTES[arch]:
        problems.append(f"takes {shared} bytes of shared memory of {SHARED_BYTES[arch]}; use smaller blocks or stages")
    if case.matrix_units and not instruction:
        problems.append("its products don't use the matrix units")
    return GateResult(
        name=case.name,
        arch=arch,
        registers=usage["REG"],
        spilled_bytes=spilled,
        shared_bytes=shared,
        matrix_instruction=instruction,
        problems=tuple(problems),
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line: a line per kernel and GPU; exit status 1 where a rule is broken."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for GPUs that are not here.")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_BYTES), default=sorted(SHARED_BYTES))
    parser.add_argument("--only", default="", help="ops whose name holds this text")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile at once")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: expected at least 1")
    names = [case.name for case in gate_cases(options.only)]
    assert len(set(names)) == len(names), f"two gate cases have one name: {sorted(names)}"
    tasks = [(options.only, name, arch) for name in names for arch in options.arch]
    if not tasks:
        parser.error(f"--only {options.only}: no op's name holds this text; the ops are {', '.join(OPS)}")
    bad = 0
    # Spawned: a forked child of a process with threads may hang.
    with ProcessPoolExecutor(min(options.jobs, len(tasks)), mp_context=get_context("spawn")) as pool:
        for result in pool.map(_check_named, *zip(*tasks, strict=True)):
            bad += bool(result.problems)
            print(
                f"{result.name} sm_{result.arch}: {result.registers} registers, {result.spilled_bytes} bytes spilled, "
                f"{result.shared_bytes} bytes shared, {result.matrix_instruction or 'no products'}; "
                f"{'; '.join(result.problems) or 'ok'}",
                flush=True,
            )
    print(json.dumps({"gate": "failed" if bad else "passed", "kernels": len(tasks), "broken": bad}))
    sys.exit(bool(bad))


def _check_named(only: str, name: str, arch: int) -> GateResult:
    """By name: a kernel can't be sent to another process."""
    return check(next(case for case in gate_cases(only) if case.name == name), arch)


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of a kernel, as cuobjdump from Triton's wheel reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if "REG:" in line)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}


if __name__ == "__main__":
    main()
