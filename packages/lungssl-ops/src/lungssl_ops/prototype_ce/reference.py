"""The definition of `prototype_cross_entropy`: all logits, two softmaxes, a loop over the pairs."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lungssl_ops.multicrop_ce.reference import multicrop_cross_entropy_reference


def prototype_cross_entropy_reference(
    student: Float[Tensor, "s b d"],
    teacher: Float[Tensor, "t b d"],
    student_prototypes: Float[Tensor, "k d"],
    teacher_prototypes: Float[Tensor, "k d"],
    weight: Float[Tensor, "s t b"],
    *,
    bias: Float[Tensor, " k"] | None,
    student_temperature: float,
    teacher_temperature: float,
    tier: str = "auto",
    block_bytes: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "t b"]]:
    """Loss and the teachers' entropy, in nats, in the dtype of `weight`; `tier` and `block_bytes` change nothing.

    The DINO loss over prototypes: Caron et al. 2021, https://arxiv.org/abs/2104.14294, algorithm 1. `bias` is
    -centre / teacher_temperature there, or what Sinkhorn gives (`bias.py`).
    """
    student, teacher = student.to(weight.dtype), teacher.to(weight.dtype)
    student_prototypes = student_prototypes.to(weight.dtype)
    teacher_prototypes = teacher_prototypes.to(weight.dtype)
    with torch.autocast(student.device.type, enabled=False):
        teacher_logits = F.linear(teacher, teacher_prototypes) / teacher_temperature
        probs = torch.softmax(teacher_logits if bias is None else teacher_logits + bias, dim=-1)
        student_logits = F.linear(student, student_prototypes) / student_temperature
    loss = multicrop_cross_entropy_reference(student_logits, probs, weight)
    return loss, torch.special.entr(probs).sum(dim=-1)
