"""The row tier: logits of a block of samples at a time, and all that is wanted of them before the next block.

The loss is a scalar, so its gradient is known but for one factor while the logits are there. With p = softmax(z_t),

    d loss / d l_s = (a_s softmax(l_s) - sum_t w_st p_t) / student_temperature,    a_s = sum_t w_st

overwrites the student's logits, and two products give the gradients of rows and prototypes: four products in all, as
many as eager PyTorch takes, and no logit is computed twice. The prototypes' gradient is the one large tensor besides
the block; the backward multiplies it by the incoming factor in place. Used once, it is gone, and a second backward of
a retained graph computes it again.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALLEST_BLOCK_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
PIECE_BYTES = 2**20
"""What the elementwise passes of the CPU path work on at a time: it stays in a core's L2 cache."""


def prototype_cross_entropy_rows(
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
    fused: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, "t b"]]:
    """Loss and the teachers' entropy in plain PyTorch, or with `fused` by the row kernels of `triton.py`.

    Raises ValueError for the tier "flash", which needs Triton.
    """
    if tier == "flash":
        raise ValueError("prototype_cross_entropy: tier 'flash' needs backend 'triton'; use tier='row' or 'auto'")
    if not fused:
        student, teacher = student.to(weight.dtype), teacher.to(weight.dtype)
        student_prototypes = student_prototypes.to(weight.dtype)
        teacher_prototypes = teacher_prototypes.to(weight.dtype)
    if block_bytes is None:
        gradient_bytes = student_prototypes.numel() * weight.element_size()
        block_bytes = max(SMALLEST_BLOCK_BYTES["cuda" if student.is_cuda else "cpu"], gradient_bytes // 2)
    enabled = torch.is_grad_enabled()
    loss, entropy, _, _ = _rows_op(
        student,
        teacher,
        student_prototypes,
        teacher_prototypes,
        weight,
        bias,
        student_temperature,
        teacher_temperature,
        block_bytes,
        fused,
        enabled and student.requires_grad,
        enabled and student_prototypes.requires_grad,
    )
    return loss, entropy


@torch.library.custom_op("lungssl_ops::prototype_ce_rows", mutates_args=())
def _rows_op(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    block_bytes: int,
    fused: bool,
    grad_student: bool,
    grad_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, entropy [t b] and both gradients, which have no element where they aren't wanted."""
    (s, b, d), t, k = student.shape, len(teacher), len(student_prototypes)
    entropy, loss = weight.new_empty((t, b)), weight.new_zeros(())
    to_student = weight.new_empty((s, b, d) if grad_student else (0,))
    to_prototypes = weight.new_empty((k, d) if grad_prototypes else (0,))
    samples = max(1, min(b, block_bytes // ((s + t) * k * weight.element_size())))
    student_block, teacher_block = (weight.new_empty((samples * views, k)) for views in (s, t))
    fuse = _fuse
    if fused:
        from lungssl_ops.prototype_ce.triton import fuse_rows as fuse
    with torch.autocast(student.device.type, enabled=False):
        for start in range(0, b, samples):
            block = slice(start, min(start + samples, b))
            x, y = (rows[:, block].transpose(0, 1).reshape(-1, d) for rows in (student, teacher))
            x_logits, y_logits = student_block[: len(x)], teacher_block[: len(y)]
            _product(x, student_prototypes.T, x_logits)
            _product(y, teacher_prototypes.T, y_logits)
            w = weight[:, :, block].permute(2, 0, 1).contiguous()
            block_loss, block_entropy, to_logits = fuse(
                x_logits.view(-1, s, k),
                y_logits.view(-1, t, k),
                w,
                bias,
                student_temperature,
                teacher_temperature,
                student.dtype if grad_student or grad_prototypes else None,
            )
            loss += block_loss
            entropy[:, block] = block_entropy.T
            if grad_student:
                found = weight.new_empty(x.shape)
                _product(to_logits.view(-1, k), student_prototypes, found)
                to_student[:, block] = found.view(-1, s, d).transpose(0, 1)
            if grad_prototypes:
                _product(to_logits.view(-1, k).T, x, to_prototypes, add=start > 0)
    return loss, entropy, to_student, to_prototypes


@_rows_op.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    block_bytes: int,
    fused: bool,
    grad_student: bool,
    grad_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        weight.new_empty(()),
        weight.new_empty(teacher.shape[:2]),
        weight.new_empty(student.shape if grad_student else (0,)),
        weight.new_empty(student_prototypes.shape if grad_prototypes else (0,)),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:6])
    ctx.numbers, ctx.wanted = inputs[6:10], inputs[10:]
    ctx.gradients = output[2:]  # not saved: saved ones would still be held while the backward makes others of them


@once_differentiable
def _scale(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 12
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        gradients = _rows_op(*ctx.saved_tensors, *ctx.numbers, *ctx.wanted)[2:]
    found = [_times(g, upstream) if wanted else None for g, wanted in zip(gradients, ctx.wanted, strict=True)]
    return (found[0], None, found[1], *(None,) * 9)


def _times(gradient: Tensor, factor: Float[Tensor, ""]) -> Tensor:
    # Not in place while it is traced, where an op's output may also be the graph's.
    return gradient.mul_(factor) if type(gradient) is Tensor else gradient * factor


_rows_op.register_autograd(_scale, setup_context=_keep)


def _product(a: Float[Tensor, "m n"], b: Float[Tensor, "n p"], out: Float[Tensor, "m p"], *, add: bool = False) -> None:
    """`out = a @ b`, or `out += a @ b`. Half precision is multiplied into float32, without rounding on the way."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=float(add), out=out)
        return
    product = torch.mm(a, b, out_dtype=out.dtype) if a.is_cuda else torch.mm(a.to(out.dtype), b.to(out.dtype))
    if add:
        out += product
    else:
        out.copy_(product)


def _fuse(
    student_logits: Float[Tensor, "c s k"],
    teacher_logits: Float[Tensor, "c t k"],
    weight: Float[Tensor, "c s t"],
    bias: Float[Tensor, " k"] | None,
    student_temperature: float,
    teacher_temperature: float,
    gradient: torch.dtype | None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "c t"], Float[Tensor, "c s k"]]:
    """Loss, entropy, and with a `gradient` that of the logits, over the student's. No logits survive."""
    (samples, s, k), t = student_logits.shape, teacher_logits.shape[1]
    entropy, loss = weight.new_empty((samples, t)), weight.new_zeros(())
    count = max(1, PIECE_BYTES // ((s + t) * k * weight.element_size()))
    for start in range(0, samples, count):
        piece = slice(start, min(start + count, samples))
        v, z, w = student_logits[piece], teacher_logits[piece], weight[piece]
        if bias is None:
            z.mul_(1 / teacher_temperature)
        else:
            torch.add(bias, z, alpha=1 / teacher_temperature, out=z)
        z.sub_(z.amax(dim=-1, keepdim=True))
        e = z.exp()
        total = e.sum(dim=-1)  # c t
        entropy[piece] = total.log() - z.mul_(e).sum(dim=-1) / total
        v.sub_(v.amax(dim=-1, keepdim=True)).mul_(1 / student_temperature)
        w_of_e = w / total[:, None]
        loss -= (w_of_e * torch.bmm(v, e.mT)).sum()
        student_total = v.exp_().sum(dim=-1)  # c s
        share = w.sum(dim=-1)
        loss += (share * student_total.log()).sum()
        if gradient is not None:
            v.mul_((share / (student_total * student_temperature))[..., None])
            for teacher in range(t):
                v.addcmul_(e[:, teacher, None], w_of_e[..., teacher, None], value=-1 / student_temperature)
    return loss, entropy, student_logits
