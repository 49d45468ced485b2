"""The flash tier of `triton.py`: launches of its kernels, and the custom ops around them."""

from typing import Any

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lungssl_ops.dispatch import interpreting
from lungssl_ops.prototype_ce import kernels
from lungssl_ops.tuning import Config, pick

WIDEST = 256
"""Features that a flash block can hold beside its logits."""


def _configs(*sizes: tuple[int, int, int, int]) -> tuple[Config, ...]:
    return tuple(
        Config(blocks={"ROWS": rows, "COLUMNS": columns}, num_warps=warps, num_stages=stages)
        for rows, columns, warps, stages in sizes
    )


ATTEND = {
    "bf16": _configs((64, 32, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3)),
    "tf32": _configs((32, 16, 4, 2), (32, 32, 4, 2), (64, 32, 8, 2), (64, 16, 8, 2)),
    "ieee": _configs((32, 16, 8, 1), (16, 16, 4, 1), (16, 32, 8, 1)),
}
"""By how products are computed, see `precision`."""
GRADIENT = {
    "bf16": _configs((32, 64, 8, 2), (64, 64, 8, 2), (32, 128, 8, 2), (64, 128, 8, 2), (32, 64, 4, 2)),
    "tf32": _configs((16, 32, 4, 2), (32, 32, 4, 2), (16, 64, 8, 2), (32, 64, 8, 2)),
    "ieee": _configs((16, 32, 8, 1), (16, 16, 4, 1), (32, 16, 8, 1)),
}


def precision(operand: torch.dtype) -> str:
    """How products of such operands are computed: "bf16" as they are, float32 as torch's own products, or exactly."""
    if operand == torch.bfloat16:
        return "bf16"
    exact = operand == torch.float64 or interpreting() or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


@torch.library.custom_op("lungssl_ops::prototype_ce_flash", mutates_args=())
def flash_op(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, entropy [t b], both LSE [s b] and [t b], and if `wanted` the rows' gradient [s b d]."""
    (s, b, d), t = student.shape, len(teacher)
    x, y = student.reshape(-1, d).contiguous(), teacher.reshape(-1, d).contiguous()
    keys, teacher_keys = student_prototypes.contiguous(), teacher_prototypes.contiguous()
    scales = scales_like(weight, student_temperature, teacher_temperature)
    teacher_lse, entropy, values = _attend(y, teacher_keys, keys, bias, scales[1:], entropy=True)
    student_lse, _, own = _attend(x, keys, keys if wanted else None, None, scales[:1], entropy=False)
    # Not as a matrix product, which could round the values to tf32.
    pull = (weight[..., None] * values.view(t, b, d)).sum(dim=1)
    share = weight.sum(dim=1)
    student_lse = student_lse.view(s, b)
    loss = (share * student_lse).sum() - (student * pull).sum() / student_temperature
    to_student = weight.new_empty(0)
    if wanted:
        to_student = own.view(s, b, d).mul_(share[..., None]).sub_(pull).div_(student_temperature)
    return loss, entropy.view(t, b), student_lse, teacher_lse.view(t, b), to_student


@flash_op.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_teacher = weight.new_empty(teacher.shape[:2])
    of_student = weight.new_empty(student.shape if wanted else (0,))
    return (
        weight.new_empty(()),
        of_teacher,
        weight.new_empty(student.shape[:2]),
        torch.empty_like(of_teacher),
        of_student,
    )


@torch.library.custom_op("lungssl_ops::prototype_ce_flash_backward", mutates_args=())
def flash_backward_op(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    student_lse: Tensor,
    teacher_lse: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """The gradient of the student's prototypes [k d]; `weight` holds the incoming factor."""
    (s, b, d), t, k = student.shape, len(teacher), len(student_prototypes)
    x, y = student.reshape(-1, d).contiguous(), teacher.reshape(-1, d).contiguous()
    keys, teacher_keys = student_prototypes.contiguous(), teacher_prototypes.contiguous()
    scales = scales_like(weight, student_temperature, teacher_temperature)
    factor = (weight.sum(dim=1) / student_temperature).reshape(-1).contiguous()
    values = weight.new_zeros((t, b, d))
    for view in range(s):  # all at once would hold s times as much
        values.addcmul_(weight[view, :, :, None], student[view].to(weight.dtype), value=-1 / student_temperature)
    values = values.view(-1, d).to(student.dtype)
    lse = student_lse.reshape(-1), teacher_lse.reshape(-1)
    gradient = weight.new_empty((k, d))
    dim, products = max(16, triton.next_power_of_2(d)), precision(student.dtype)

    def launch(config: Config) -> None:
        run(
            kernels.prototype_gradient_kernel,
            (triton.cdiv(k, config.blocks["COLUMNS"]),),
            x,
            factor,
            lse[0],
            keys,
            y,
            values,
            lse[1],
            teacher_keys,
            scales if bias is None else bias,  # an absent tensor is never read; any pointer will do
            scales,
            gradient,
            s * b,
            t * b,
            k,
            d,
            HAS_BIAS=bias is not None,
            PRECISION="tf32" if products == "bf16" else products,
            DIM=dim,
            **config.blocks,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    key = f"{products}_d{dim}_k{triton.next_power_of_2(k)}"
    launch(pick("prototype_ce_gradient", key, GRADIENT[products], launch))
    return gradient


@flash_backward_op.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    student_lse: Tensor,
    teacher_lse: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    return weight.new_empty(student_prototypes.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:6], *output[2:])
    ctx.temperatures = inputs[6:8]


@once_differentiable
def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 9
    *tensors, weight, bias, student_lse, teacher_lse, to_student = ctx.saved_tensors
    found_student, found_prototypes = None, None
    if ctx.needs_input_grad[0]:
        found_student = (to_student * upstream).to(tensors[0].dtype)
    if ctx.needs_input_grad[2]:
        found_prototypes = flash_backward_op(
            *tensors, weight * upstream, bias, student_lse, teacher_lse, *ctx.temperatures
        ).to(tensors[2].dtype)
    return (found_student, None, found_prototypes, *(None,) * 6)


flash_op.register_autograd(_backward, setup_context=_keep)


def scales_like(like: Tensor, student_temperature: float, teacher_temperature: float) -> Float[Tensor, "2"]:
    scales = like.new_empty(2)
    scales[0].fill_(1 / student_temperature)  # filled by kernels: a copy from the host would wait for the device
    scales[1].fill_(1 / teacher_temperature)
    return scales


def _attend(
    rows: Float[Tensor, "n d"],
    keys: Float[Tensor, "k d"],
    values: Float[Tensor, "k d"] | None,
    bias: Float[Tensor, " k"] | None,
    scale: Float[Tensor, "1"],
    *,
    entropy: bool,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, "..."]]:
    """LSE, entropy and mean value [n d] of each row's softmax over the keys; what isn't asked for is not written."""
    (n, d), k, dtype = rows.shape, len(keys), scale.dtype
    dim, products = max(16, triton.next_power_of_2(d)), precision(rows.dtype)
    given = scale if bias is None else bias
    switches = {"ENTROPY": entropy, "VALUES": values is not None, "DIM": dim}

    def launch(config: Config) -> tuple[Tensor, ...]:
        blocks, columns = triton.cdiv(n, config.blocks["ROWS"]), config.blocks["COLUMNS"]
        splits = _splits(blocks, triton.cdiv(k, columns), rows.device)
        per_split = triton.cdiv(triton.cdiv(k, columns), splits) * columns
        splits = triton.cdiv(k, per_split)
        tops, totals, slopes = (scale.new_empty((splits, n)) for _ in range(3))
        sums = scale.new_empty((splits, n, d) if values is not None else (1,))
        run(
            kernels.attend_kernel,
            (blocks, splits),
            rows,
            keys,
            keys if values is None else values,
            given,
            scale,
            tops,
            totals,
            slopes,
            sums,
            n,
            k,
            d,
            per_split,
            HAS_BIAS=bias is not None,
            SAME=values is keys,
            PRECISION="tf32" if products == "bf16" else products,
            **switches,
            **config.blocks,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        return tops, totals, slopes, sums

    key = f"{products}_d{dim}_n{triton.next_power_of_2(n)}_v{values is not None}"
    parts = launch(pick("prototype_ce_attend", key, ATTEND[products], launch))
    lse, entropies = (torch.empty(n, dtype=dtype, device=rows.device) for _ in range(2))
    means = torch.empty((n, d) if values is not None else (1,), dtype=dtype, device=rows.device)
    block = 16
    run(
        kernels.merge_kernel,
        (triton.cdiv(n, block),),
        *parts,
        lse,
        entropies,
        means,
        n,
        d,
        len(parts[0]),
        ROWS=block,
        **switches,
        num_warps=4,
    )
    return lse, entropies, means


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel. The default of fp fusion changes with Triton 3.10."""
    kernel[grid](*arguments, **options, enable_fp_fusion=True)


def _splits(blocks: int, tiles: int, device: torch.device) -> int:
    """Shares of the prototypes, so that few rows still fill the GPU twice; at least 4 tiles each, at most 64 shares."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(2 * processors // blocks, tiles // 4, 64))
