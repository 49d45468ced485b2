"""The definition of `multicrop_cross_entropy`: a loop over the pairs."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def multicrop_cross_entropy_reference(
    student_logits: Float[Tensor, "s b k"],
    teacher_probs: Float[Tensor, "t b k"],
    weight: Float[Tensor, "s t"] | Float[Tensor, "s t b"],
) -> Float[Tensor, ""]:
    """Weighted mean over pairs (s, t) and samples b of H(p_t, softmax(l_s)) = -sum_k p_t log softmax(l_s), in nats.

    The DINO loss: Caron et al. 2021, https://arxiv.org/abs/2104.14294, algorithm 1, with any pair weights.
    """
    if weight.ndim == 2:
        weight = weight[:, :, None].expand(-1, -1, student_logits.shape[1])
    total = torch.zeros((), dtype=student_logits.dtype, device=student_logits.device)
    for s in range(student_logits.shape[0]):
        for t in range(teacher_probs.shape[0]):
            cross_entropy = -(teacher_probs[t] * F.log_softmax(student_logits[s], dim=-1)).sum(dim=-1)
            total = total + (weight[s, t] * cross_entropy).sum()
    return total / weight.sum()
