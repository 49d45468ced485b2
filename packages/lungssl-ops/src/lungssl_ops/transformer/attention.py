"""Attention as it is trained fastest.

torch's fused attention is written for long sequences: on a CPU its backward pass takes seven times as long as its
forward pass. Up to `LONGEST` tokens the products themselves are faster, with the weights kept for the backward pass.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LONGEST = 512
"""Tokens up to which weights of 2 bytes (4 in float32) are kept for each pair of them and each head. Forward and
backward of 8 x 6 heads of 64 channels, bf16, one Xeon core with AMX, ms of processor time: 216 tokens 52 by the fused
kernel and 23 by products, 59 tokens 18 and 6, 32 tokens 13 and 3 (of 16 samples)."""


def attend(
    q: Float[Tensor, "b h t c"], k: Float[Tensor, "b h s c"], v: Float[Tensor, "b h s c"]
) -> Float[Tensor, "b h t c"]:
    """softmax(q k^T / sqrt(c)) v. By products, half-precision scores are rounded to it before the softmax."""
    short = max(q.shape[-2], k.shape[-2]) <= LONGEST
    if q.device.type == "cpu" and short and torch.is_grad_enabled() and q.requires_grad:
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)
