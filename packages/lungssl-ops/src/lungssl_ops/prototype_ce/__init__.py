"""Cross-entropy between a student's and a teacher's softmax over prototypes, without the logits of all rows at once.

DINO, iBOT and their like compare rows x (crops, tokens) by their products with k prototypes W:

    p_t = softmax(x_t W_t^T / teacher_temperature + bias),    q_s = softmax(x_s W_s^T / student_temperature)
    loss = sum_stb w_stb H(p_tb, q_sb) / sum_stb w_stb,       H(p, q) = -sum_k p_k log q_k

At k 65536 and 2000 rows, eager PyTorch holds gigabytes of logits. Two identities make that needless: all pairs of a
student row cost one row, because sum_t w_st H(p_t, q_s) = a_s LSE(l_s) - l_s . sum_t w_st p_t with a_s = sum_t w_st;
and l_s . p_t = x_s . (p_t W_s) / student_temperature, an attention with queries x_t, keys W_t and values W_s.
Centring and Sinkhorn are both a bias per prototype: `centering_bias`, `sinkhorn_bias`.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lungssl_ops.dispatch import Backend, Dispatch, Implementation, interpreting, triton_problem
from lungssl_ops.prototype_ce.bias import all_reduce_logsumexp, centering_bias, sinkhorn_bias

_OUT = -1e30
"""A logit whose probability is 0, and 0 times which is still 0."""

__all__ = [
    "PrototypeCrossEntropy",
    "all_reduce_logsumexp",
    "centering_bias",
    "mean_logits",
    "prototype_cross_entropy",
    "sinkhorn_bias",
]


class PrototypeCrossEntropy(NamedTuple):
    """What `prototype_cross_entropy` returns."""

    loss: Float[Tensor, ""]
    """Weighted mean over pairs and samples, in nats: ln k for a uniform student; never below the teachers' entropy."""
    teacher_entropy: Float[Tensor, "t b"]
    """Of each teacher row, in nats: ln k where it says nothing, 0 where it is certain. No gradient."""


def prototype_cross_entropy(
    student: Float[Tensor, "s b d"],
    teacher: Float[Tensor, "t b d"],
    student_prototypes: Float[Tensor, "k d"],
    teacher_prototypes: Float[Tensor, "k d"],
    weight: Float[Tensor, "s t"] | Float[Tensor, "s t b"],
    *,
    bias: Float[Tensor, " k"] | None = None,
    student_temperature: float,
    teacher_temperature: float,
    tier: Literal["auto", "row", "flash"] = "auto",
    block_bytes: int | None = None,
    backend: Backend = "auto",
) -> PrototypeCrossEntropy:
    """Weighted mean over pairs (s, t) and samples b of H(p_t, q_s), and the teachers' entropies, in nats.

    s student and t teacher views of b samples; `weight` is per pair, or per pair and sample, and zeros leave pairs out.
    Its sum must be positive: all zeros give NaN (checking would make the host wait for the device at every step).
    iBOT is s = t = 1 with the masked tokens as samples and weights [1, 1, n]. Prototypes are used as they come:
    normalise them before (DINO's weight norm), so that the gradient goes through. `bias` is added to the teacher's
    logits after their division by the temperature; -inf takes a prototype out. All rows must be finite, those without
    weight too.

    Gradients, once, go to `student` and `student_prototypes` only. Computed in float32 (float64 for float64) whatever
    autocast says, because a temperature of 0.04 multiplies the logits' rounding by 25; products follow
    `torch.set_float32_matmul_precision`, and bfloat16 on a GPU is multiplied as it is, into float32.

    `tier="row"` has the logits of a block of samples at a time, in at most `block_bytes` (one sample at least; None: 8
    MiB on a CPU, 256 MiB on a GPU, or half of the prototypes' gradient if that is more). `"flash"`, by Triton, has none
    at all and computes each twice; up to 256 features. "auto" takes flash where rows would need more than one block and
    products may run on matrix units (bfloat16, or a float32 precision below "highest"). `backend`: "triton" (GPU),
    "torch" (rows, any device), "reference", which ignores the tier and holds all logits.

    Raises ValueError for shapes that don't fit, a temperature not above 0, a gradient that would be lost, or a tier
    that the backend doesn't have.
    """
    _check(student, teacher, student_prototypes, teacher_prototypes, weight, bias)
    for name, temperature in (("student", student_temperature), ("teacher", teacher_temperature)):
        if not 0 < temperature < float("inf"):
            raise ValueError(
                f"prototype_cross_entropy needs a finite {name}_temperature above 0, got {temperature}; "
                f"DINO takes 0.1 for the student and 0.04 to 0.07 for the teacher"
            )
    if tier not in ("auto", "row", "flash"):
        raise ValueError(f"prototype_cross_entropy: tier {tier!r} is unknown; known are 'auto', 'row' and 'flash'")
    if block_bytes is not None and block_bytes < 1:
        raise ValueError(
            f"prototype_cross_entropy: block_bytes {block_bytes} leaves no room for logits; None: as usual"
        )
    operands = _of_one_dtype(student, teacher, student_prototypes, teacher_prototypes)
    dtype = torch.promote_types(operands[0].dtype, torch.float32)
    function = _dispatch(*operands, backend=backend)
    if weight.ndim == 2:
        weight = weight[:, :, None].expand(-1, -1, student.shape[1])
    weight = weight.to(dtype)
    loss, entropy = function(
        *operands,
        weight / weight.sum(),
        bias=None if bias is None else bias.to(dtype).clamp_min(_OUT),
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        tier=tier,
        block_bytes=block_bytes,
    )
    return PrototypeCrossEntropy(loss, entropy)


def mean_logits(rows: Float[Tensor, "*rows d"], prototypes: Float[Tensor, "k d"]) -> Float[Tensor, " k"]:
    """Mean over rows of their logits rows @ prototypes.T: what DINO's centre averages. At the cost of one row.

    Sums in float32 (float64 for float64), whatever autocast says. No rows give NaN, a mean of nothing. Raises
    ValueError for shapes that don't fit.
    """
    if rows.ndim < 2 or prototypes.ndim != 2 or rows.shape[-1] != prototypes.shape[-1]:
        raise ValueError(
            f"mean_logits got rows of shape {tuple(rows.shape)} and prototypes of {tuple(prototypes.shape)}; expected "
            f"[..., d] with at least one axis before, and [k, d]"
        )
    dtype = torch.promote_types(torch.promote_types(rows.dtype, prototypes.dtype), torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        return torch.mv(prototypes.to(dtype), rows.flatten(0, -2).mean(dim=0, dtype=dtype))


def _of_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """bfloat16 if all are; else at least float32, and so is float16, whose range is too small for probabilities."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if not all(tensor.dtype == torch.bfloat16 for tensor in tensors):
        dtype = torch.promote_types(dtype, torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _check(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> None:
    shapes = (
        f"student {list(student.shape)}, teacher {list(teacher.shape)}, prototypes {list(student_prototypes.shape)} "
        f"and {list(teacher_prototypes.shape)}, weight {list(weight.shape)}"
        + ("" if bias is None else f", bias {list(bias.shape)}")
    )
    if student.ndim != 3 or teacher.ndim != 3 or student_prototypes.ndim != 2 or student.shape[1:] != teacher.shape[1:]:
        raise ValueError(
            f"prototype_cross_entropy takes student [s b d], teacher [t b d] and prototypes [k d]: {shapes}"
        )
    (s, b, d), t, k = student.shape, len(teacher), len(student_prototypes)
    if student_prototypes.shape != (k, d) or teacher_prototypes.shape != (k, d):
        raise ValueError(
            f"prototype_cross_entropy: both prototypes must be [k, {d}], as many for student and teacher: {shapes}"
        )
    if tuple(weight.shape) not in ((s, t), (s, t, b)):
        raise ValueError(f"prototype_cross_entropy: weight must be [{s}, {t}] or [{s}, {t}, {b}]: {shapes}")
    if bias is not None and tuple(bias.shape) != (k,):
        raise ValueError(f"prototype_cross_entropy: bias must be [{k}]: {shapes}")
    if not s * t * b * k * d:
        raise ValueError(f"prototype_cross_entropy needs at least one view, sample, prototype and feature: {shapes}")
    fixed = {"teacher": teacher, "teacher_prototypes": teacher_prototypes, "weight": weight, "bias": bias}
    for name, tensor in fixed.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"prototype_cross_entropy differentiates student and student_prototypes only, but {name} requires a "
                f"gradient; compute it under torch.no_grad() or detach() it"
            )


_ROWS = "lungssl_ops.prototype_ce.rows:prototype_cross_entropy_rows"
# Triton's float64 products are for tests in its interpreter: a GPU of this decade has no units for them.
_TRITON_DTYPES = (torch.float32, torch.bfloat16, *((torch.float64,) if interpreting() else ()))
_dispatch = Dispatch(
    "prototype_ce",
    Implementation(
        backend="triton",
        function="lungssl_ops.prototype_ce.triton:prototype_cross_entropy_triton",
        devices=("cuda",),
        dtypes=_TRITON_DTYPES,
        problem=triton_problem,
    ),
    Implementation(backend="torch", function=_ROWS),
    Implementation(
        backend="reference", function="lungssl_ops.prototype_ce.reference:prototype_cross_entropy_reference"
    ),
)
