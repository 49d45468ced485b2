"""Cross-entropy of all student x teacher view pairs at the cost of one pass over the logits.

With m_s = sum_t w_st p_t and n_s = sum_k m_sk, the sum over pairs collapses to

    sum_st w_st H(p_t, softmax(l_s)) = sum_s ( n_s LSE(l_s) - l_s . m_s ),    d/dl_s = n_s softmax(l_s) - m_s

so 2 x 10 - 2 = 18 pairs of multi-crop DINO cost 10 rows. The products with the teachers are one small matrix product
per sample, and m_s is never formed: the backward holds one buffer, the gradient.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def multicrop_cross_entropy(
    student_logits: Float[Tensor, "s b k"],
    teacher_probs: Float[Tensor, "t b k"],
    weight: Float[Tensor, "s t"] | Float[Tensor, "s t b"],
) -> Float[Tensor, ""]:
    """Weighted mean over pairs (s, t) and samples b of H(p_t, softmax(l_s)), in nats; ln k for a uniform student.

    `student_logits` are already divided by the student's temperature; `teacher_probs` are distributions over k.
    `weight` is per pair, or per pair and sample; zeros leave pairs out. Its sum must be positive: all zeros give NaN
    (checking would make the host wait for the device at every step). Half precision is computed in float32.
    Gradients go to `student_logits` only.

    Raises ValueError where `teacher_probs` or `weight` require a gradient, or shapes don't fit.
    """
    (s, b, k), t = student_logits.shape, len(teacher_probs)
    if teacher_probs.shape != (t, b, k) or weight.shape not in ((s, t), (s, t, b)) or not b * t * s * k:
        raise ValueError(
            f"multicrop_cross_entropy got student_logits {tuple(student_logits.shape)}, teacher_probs "
            f"{tuple(teacher_probs.shape)} and weight {tuple(weight.shape)}; expected [s, b, k], [t, b, k], and [s, t] "
            f"or [s, t, b], none of size 0"
        )
    if teacher_probs.requires_grad or weight.requires_grad:
        raise ValueError(
            "multicrop_cross_entropy differentiates student_logits only, but teacher_probs or weight require a "
            "gradient; compute them under torch.no_grad() or detach() them"
        )
    if weight.ndim == 2:
        weight = weight[:, :, None].expand(-1, -1, student_logits.shape[1])
    # fp32: at student temperature 0.1 logits reach 10, where one bf16 step is 0.06.
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    weight = weight.to(dtype)
    return _PairSum.apply(student_logits.to(dtype), teacher_probs.to(dtype), weight / weight.sum())


class _PairSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "s b k"],
        probs: Float[Tensor, "t b k"],
        weight: Float[Tensor, "s t b"],
    ) -> Float[Tensor, ""]:
        ctx.save_for_backward(logits, probs, weight)
        # Autocast would run the product in bf16.
        with torch.autocast(logits.device.type, enabled=False):
            # LSE apart from the product, not a log-softmax in it: sums of k terms near ln k lose 6e-5 at k 65536.
            share = torch.einsum("stb,tb->sb", weight, probs.sum(dim=-1))
            product = torch.bmm(logits.transpose(0, 1), probs.permute(1, 2, 0))  # b s t
            return (share * logits.logsumexp(dim=-1)).sum() - (weight.permute(2, 0, 1) * product).sum()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, "s b k"], None, None]:
        logits, probs, weight = ctx.saved_tensors
        weight = weight * grad_output
        with torch.autocast(logits.device.type, enabled=False):
            share = torch.einsum("stb,tb->sb", weight, probs.sum(dim=-1))
            grad = logits.softmax(dim=-1).mul_(share[..., None])
            grad.transpose(0, 1).baddbmm_(weight.permute(2, 0, 1), probs.transpose(0, 1), alpha=-1.0)
        return grad, None, None
