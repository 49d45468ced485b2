"""Prototype cross-entropy in Triton: a row tier over logits, and a flash tier that has none.

Row tier (the blocks of `rows.py`, products by cuBLAS), per logit of float32:

    row_kernel   a program per row: log-sum-exp, and of teachers the entropy     4 bytes read
    fuse_kernel  a program per sample and block of prototypes: the loss, and     4 read, 4 written (bfloat16 rows: 2)
                 the gradient of the student's logits, over them

with 4 bytes written and 4 read by the products, 16 a student's and 12 a teacher's logit, where eager takes some 86 and
40. Flash tier, per row block times prototype tile, all of it in registers and shared memory:

    attend_kernel  a program per block of rows and share of the prototypes: an attention with the prototypes as keys
                   and values. Teachers: m_t = p_t W_s and the entropy. Students: LSE and e_s = softmax(l_s) W_s
    merge_kernel   a program per block of rows: brings the shares together
    prototype_gradient_kernel  a program per tile of prototypes: both logits of all rows again, and
                   dW_s = (P_s^T (a X_s) - P_t^T (sum_s w_st X_s)) / student_temperature

then loss = sum a LSE - sum x_s . M_s / student_temperature with M_s = sum_t w_st m_t, and the rows' gradient is
(a e_s - M_s) / student_temperature. Each logit is computed twice, which at d 256 takes as long as reading it back once
would; what is moved are rows and prototypes, once per block of the other. One program owns a tile of the gradient, no
atomics: equal bits on repetition.

Numerics: logits never leave the float32 accumulator, so a bfloat16 operand's own rounding is all that temperature 0.04
multiplies (eager rounds the logits too). Probabilities are rounded to the operands' dtype before their product with
rows or prototypes. float32 operands follow torch.get_float32_matmul_precision(): highest is ieee, high and medium tf32.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from lungssl_ops.gate import GateCase
from lungssl_ops.prototype_ce import kernels
from lungssl_ops.prototype_ce.flash import ATTEND, GRADIENT, WIDEST, flash_op, precision, run, scales_like
from lungssl_ops.prototype_ce.rows import SMALLEST_BLOCK_BYTES, prototype_cross_entropy_rows
from lungssl_ops.tuning import Config

LANES = 1024
"""Prototypes at a time of the row tier's kernels."""


def prototype_cross_entropy_triton(
    student: Float[Tensor, "s b d"],
    teacher: Float[Tensor, "t b d"],
    student_prototypes: Float[Tensor, "k d"],
    teacher_prototypes: Float[Tensor, "k d"],
    weight: Float[Tensor, "s t b"],
    *,
    bias: Float[Tensor, " k"] | None,
    student_temperature: float,
    teacher_temperature: float,
    tier: str,
    block_bytes: int | None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "t b"]]:
    """Loss and the teachers' entropy. Raises ValueError for tier "flash" with more than 256 features."""
    (s, b, d), t, k = student.shape, len(teacher), len(student_prototypes)
    if tier == "flash" and d > WIDEST:
        raise ValueError(f"prototype_cross_entropy: tier 'flash' takes up to {WIDEST} features, not {d}; use 'row'")
    if tier == "auto":
        room = block_bytes or max(SMALLEST_BLOCK_BYTES["cuda"], k * d * weight.element_size() // 2)
        # Triton's exact float32 products have no matrix units to run on; cuBLAS' are several times as fast.
        fits = d <= WIDEST and precision(student.dtype) != "ieee"
        tier = "flash" if fits and (s + t) * b * k * weight.element_size() > room else "row"
    tensors = (student, teacher, student_prototypes, teacher_prototypes, weight)
    bias = None if bias is None else bias.contiguous()
    if tier == "row":
        return prototype_cross_entropy_rows(
            *tensors,
            bias=bias,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            tier=tier,
            block_bytes=block_bytes,
            fused=True,
        )
    wanted = torch.is_grad_enabled() and (student.requires_grad or student_prototypes.requires_grad)
    return flash_op(*tensors, bias, student_temperature, teacher_temperature, wanted)[:2]


def fuse_rows(
    student_logits: Float[Tensor, "c s k"],
    teacher_logits: Float[Tensor, "c t k"],
    weight: Float[Tensor, "c s t"],
    bias: Float[Tensor, " k"] | None,
    student_temperature: float,
    teacher_temperature: float,
    gradient: torch.dtype | None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "c t"], Float[Tensor, "c s k"]]:
    """What `rows.py` asks of a block; the gradient of float32 logits overwrites them."""
    (c, s, k), t = student_logits.shape, teacher_logits.shape[1]
    scales = scales_like(weight, student_temperature, teacher_temperature)
    student_lse, teacher_lse, entropy = (weight.new_empty((c, views)) for views in (s, t, t))
    given = weight if bias is None else bias  # an absent tensor is never read; any pointer will do
    options = {"BLOCK": LANES, "num_warps": 8}
    run(
        kernels.row_kernel,
        (c * s,),
        student_logits,
        given,
        scales,
        student_lse,
        given,
        k,
        HAS_BIAS=False,
        ENTROPY=False,
        **options,
    )
    run(
        kernels.row_kernel,
        (c * t,),
        teacher_logits,
        given,
        scales[1:],
        teacher_lse,
        entropy,
        k,
        HAS_BIAS=bias is not None,
        ENTROPY=True,
        **options,
    )
    partial = weight.new_empty((c, triton.cdiv(k, LANES)))
    same = gradient in (None, weight.dtype)
    to_logits = student_logits if same else torch.empty_like(student_logits, dtype=gradient)
    run(
        kernels.fuse_kernel,
        tuple(partial.shape),
        student_logits,
        teacher_logits,
        weight,
        given,
        scales,
        student_lse,
        teacher_lse,
        partial,
        to_logits,
        s,
        t,
        k,
        HAS_BIAS=bias is not None,
        GRADIENT=gradient is not None,
        TEACHERS=triton.next_power_of_2(t),
        **options,
    )
    return partial.sum(), entropy, to_logits


def gate_cases() -> list[GateCase]:
    """Both row kernels, and the flash kernels at d 256 in bfloat16 and float32 (tf32, ieee), as they are launched."""
    sizes = {"HAS_BIAS": True, "BLOCK": LANES}
    cases = [
        _gate_case(
            "row", kernels.row_kernel, ("logits", "bias", "scale", "lse", "entropy"), ("k",), sizes | {"ENTROPY": True}
        )
    ]
    fused = ("student", "teacher", "weight", "bias", "scales", "student_lse", "teacher_lse", "partial", "gradient")
    # Triton takes a number that is 1 for a constant: iBOT's one view.
    for name, constants, numbers, to in (
        ("views", {}, ("s", "t", "k"), "fp32"),
        ("one", {"s": 1, "t": 1}, ("k",), "bf16"),
    ):
        switches = sizes | {"GRADIENT": True, "TEACHERS": 1 if constants else 2} | constants
        cases.append(_gate_case(f"fuse_{name}", kernels.fuse_kernel, fused, numbers, switches, {"gradient": to}))
    for products, operand in (("bf16", "bf16"), ("tf32", "fp32"), ("ieee", "fp32")):
        cases += _flash_gate_cases(products, operand, ATTEND[products][0], GRADIENT[products][0])
    return cases


def _flash_gate_cases(products: str, operand: str, attend: Config, gradient: Config) -> list[GateCase]:
    numbers = {"PRECISION": "tf32" if products == "bf16" else products, "DIM": WIDEST}
    rows = {"rows": operand, "keys": operand, "values": operand}
    cases = []
    for name, same, teacher in (("teacher", False, True), ("student", True, False)):
        switches = numbers | {"HAS_BIAS": teacher, "ENTROPY": teacher, "VALUES": True, "SAME": same}
        tensors = ("rows", "keys", "values", "bias", "scale", "tops", "totals", "slopes", "sums")
        sizes = ("n", "k", "d", "per_split")
        cases.append(
            _gate_case(f"attend_{name}_{products}", kernels.attend_kernel, tensors, sizes, switches, rows, attend)
        )
    if operand == "bf16":
        tensors = ("tops", "totals", "slopes", "sums", "lse", "entropy", "means")
        switches = {"ENTROPY": True, "VALUES": True, "DIM": WIDEST, "ROWS": 16}
        cases.append(_gate_case("merge", kernels.merge_kernel, tensors, ("n", "d", "splits"), switches))
        cases.append(_gate_case("merge_one", kernels.merge_kernel, tensors, ("n", "d"), switches | {"splits": 1}))
    operands: dict[str, str] = dict.fromkeys(
        ("student", "student_prototypes", "teacher", "values", "teacher_prototypes"), operand
    )
    tensors = ("student", "factor", "student_lse", "student_prototypes", "teacher", "values", "teacher_lse")
    tensors += ("teacher_prototypes", "bias", "scales", "gradient")
    sizes, switches = ("student_rows", "teacher_rows", "k", "d"), numbers | {"HAS_BIAS": True}
    cases.append(
        _gate_case(
            f"gradient_{products}", kernels.prototype_gradient_kernel, tensors, sizes, switches, operands, gradient
        )
    )
    return cases


def _gate_case(
    name: str,
    kernel: Any,
    tensors: tuple[str, ...],
    sizes: tuple[str, ...],
    constants: Mapping[str, Any],
    types: Mapping[str, str] | None = None,
    config: Config | None = None,
) -> GateCase:
    """float32 tensors but for `types`; a flash kernel where there is a config."""
    blocks = {} if config is None else dict(config.blocks)
    signature = {tensor: f"*{(types or {}).get(tensor, 'fp32')}" for tensor in tensors}
    signature |= dict.fromkeys(sizes, "i32") | dict.fromkeys((*constants, *blocks), "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}  # in the order of the kernel's arguments
    return GateCase(
        name=f"prototype_ce_{name}",
        kernel=kernel,
        signature=signature,
        constants={**constants, **blocks},
        num_warps=8 if config is None else config.num_warps,
        num_stages=2 if config is None else config.num_stages,
        matrix_units=config is not None and constants["PRECISION"] != "ieee",
        divisible_by_16=(*tensors, *(size for size in sizes if size in ("k", "d", "per_split"))),
    )
