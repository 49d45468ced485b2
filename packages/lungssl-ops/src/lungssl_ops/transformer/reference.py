"""The definitions: pre-norm attention and MLP with their residual sums, in plain PyTorch."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lungssl_ops.transformer import Affine, Counts, Rotation, add_branch
from lungssl_ops.transformer.attention import attend


def residual_attention_reference(
    rows: Float[Tensor, "r d"],
    norm: Affine,
    joint: Affine,
    out: Affine,
    *,
    counts: Counts,
    heads: int,
    rotation: Sequence[Rotation] | None,
    scale: Float[Tensor, "_s d"] | None,
    first: int | None,
    eps: float,
) -> Float[Tensor, "_r d"]:
    """See `lungssl_ops.transformer.residual_attention`."""
    rows = rows.to(torch.promote_types(rows.dtype, norm.weight.dtype))
    normed = F.layer_norm(rows, norm.weight.shape, *norm, eps)
    if first is None:
        queries, others = F.linear(normed, *joint).split([rows.shape[1], 2 * rows.shape[1]], dim=1)
    else:
        d, of_first = rows.shape[1], torch.cat([_first(part, first) for part in _apart(normed, counts)])
        queries = F.linear(of_first, joint.weight[:d], joint.bias[:d])
        others = F.linear(normed, joint.weight[d:], joint.bias[d:])
        rows = torch.cat([_first(part, first) for part in _apart(rows, counts)])
    asked = counts if first is None else [torch.Size([b, first]) for b, _ in counts]
    attended = []
    for number, (query, other) in enumerate(zip(_apart(queries, asked), _apart(others, counts), strict=True)):
        q = query.unflatten(-1, (heads, -1)).transpose(1, 2)
        k, v = other.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            cos, sin = rotation[number]
            q, k = rotate(q, cos[:, : q.shape[2]], sin[:, : q.shape[2]]), rotate(k, cos, sin)
        attended.append(attend(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))
    return add_branch(rows, F.linear(torch.cat(attended), *out), asked, scale)


def residual_mlp_reference(
    rows: Float[Tensor, "r d"],
    norm: Affine,
    widen: Affine,
    narrow: Affine,
    *,
    counts: Counts,
    scale: Float[Tensor, "_s d"] | None,
    eps: float,
) -> Float[Tensor, "r d"]:
    """See `lungssl_ops.transformer.residual_mlp`."""
    rows = rows.to(torch.promote_types(rows.dtype, norm.weight.dtype))
    normed = F.layer_norm(rows, norm.weight.shape, *norm, eps)
    return add_branch(rows, F.linear(F.gelu(F.linear(normed, *widen)), *narrow), counts, scale)


def _apart(rows: Float[Tensor, "r d"], counts: Counts) -> list[Float[Tensor, "_b _t d"]]:
    """The samples of each size."""
    parts = rows.split([b * t for b, t in counts])
    return [part.unflatten(0, count) for part, count in zip(parts, counts, strict=True)]


def _first(samples: Float[Tensor, "b t d"], number: int) -> Float[Tensor, "_r d"]:
    return samples[:, :number].flatten(0, 1)


def rotate(
    x: Float[Tensor, "b h t c"], cos: Float[Tensor, "_b t f"], sin: Float[Tensor, "_b t f"]
) -> Float[Tensor, "b h t c"]:
    """Turn channel pairs (i, i + f); channels from 2f on stay."""
    rest = (0, x.shape[-1] - 2 * cos.shape[-1])
    whole_cos = F.pad(torch.cat([cos, cos], dim=-1), rest, value=1.0).to(x.dtype)[:, None]
    whole_sin = F.pad(torch.cat([-sin, sin], dim=-1), rest).to(x.dtype)[:, None]
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotation.apply(x, whole_cos, whole_sin, cos.shape[-1])  # pyright: ignore[reportReturnType]
    return _turned(x, whole_cos, whole_sin, cos.shape[-1])


class _Rotation(torch.autograd.Function):
    """`_turned`, whose gradient is turned back: autograd's own fills slices with zeros and adds them up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, pairs: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.pairs = pairs
        return _turned(x, cos, sin, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, ctx.pairs, sign=-1), None, None, None


def _turned(
    x: Float[Tensor, "b h t c"],
    cos: Float[Tensor, "_b 1 t c"],
    sin: Float[Tensor, "_b 1 t c"],
    pairs: int,
    *,
    sign: int = 1,
) -> Float[Tensor, "b h t c"]:
    """x cos + sign * swapped(x) sin, over all channels at once: passes over 30 of 64 channels are not vectorised."""
    swapped = torch.cat([x[..., pairs : 2 * pairs], x[..., :pairs], x[..., 2 * pairs :]], dim=-1)
    return swapped.mul_(sign * sin).addcmul_(x, cos)
