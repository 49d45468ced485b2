"""The two halves of a pre-norm transformer layer, each added to what it was given.

    tokens + scale * out(attention(joint(norm(tokens))))
    tokens + scale * narrow(gelu(widen(norm(tokens))))

Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, with the norm first (Xiong et al. 2020,
https://arxiv.org/abs/2002.04745); rotary positions, Su et al. 2021, https://arxiv.org/abs/2104.09864; LayerScale,
Touvron et al. 2021, https://arxiv.org/abs/2103.17239. In eager PyTorch half of a step's time on a CPU goes into the
passes around the products: casts, copies of heads, norms, activations, each through memory. Here they are one pass each
way, and the derivative is written out.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lungssl_ops.cpp import cpp_problem
from lungssl_ops.dispatch import Backend, Dispatch, Implementation
from lungssl_ops.transformer.attention import LONGEST, attend

__all__ = ["Affine", "Counts", "Rotation", "add_branch", "attend", "residual_attention", "residual_mlp"]

SOURCE = Path(__file__).with_name("transformer.cpp")


Counts = Sequence[torch.Size]
"""Size by size, the number of samples and of the tokens of each."""
Rotation = tuple[Float[Tensor, "_b _t _f"], Float[Tensor, "_b _t _f"]]
"""Cosine and sine per token and channel pair; of each sample, or one for all."""


class Affine(NamedTuple):
    """Weight and bias of a norm ([d], [d]) or of a linear layer ([to, from], [to])."""

    weight: Tensor
    bias: Tensor


def add_branch(
    rows: Float[Tensor, "r d"], branch: Float[Tensor, "r d"], counts: Counts, scale: Float[Tensor, "_s d"] | None
) -> Float[Tensor, "r d"]:
    """rows + scale * branch, the scale of all samples [1, d] or of each."""
    if scale is None:
        return rows + branch
    if len(scale) == 1:
        return torch.addcmul(rows, branch, scale)
    sizes = [b * t for b, t in counts]
    parts = zip(rows.split(sizes), branch.split(sizes), scale.split([b for b, _ in counts]), counts, strict=True)
    sums = (
        torch.addcmul(row.unflatten(0, count), more.unflatten(0, count), by[:, None]).flatten(0, 1)
        for row, more, by, count in parts
    )
    return torch.cat(list(sums))


def _dispatch(op: str) -> Dispatch:
    return Dispatch(
        op,
        Implementation(
            backend="cpp",
            function=f"lungssl_ops.transformer.cpu:{op}_cpp",
            devices=("cpu",),
            dtypes=(torch.float32,),  # of the norm's weight; products may be of bf16
            problem=partial(cpp_problem, SOURCE),
        ),
        Implementation(backend="reference", function=f"lungssl_ops.transformer.reference:{op}_reference"),
    )


_attention, _mlp = _dispatch("residual_attention"), _dispatch("residual_mlp")


def residual_attention(
    rows: Float[Tensor, "r d"],
    norm: Affine,
    joint: Affine,
    out: Affine,
    *,
    counts: Counts,
    heads: int,
    rotation: Sequence[Rotation] | None = None,
    scale: Float[Tensor, "_s d"] | None = None,
    first: int | None = None,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> Float[Tensor, "_r d"]:
    """Tokens plus attention among those of each sample; of each one's `first` tokens alone, if so many are wanted.

    `rows` are the tokens of all samples one after another, of which `counts` tells how many belong together, so that
    crops of several sizes share the products. `joint` makes queries, keys and values, [3 d, d] in this order, each
    split into `heads`. `rotation`: for each size, by what channels i and i + f of each head's queries and keys turn,
    2 f at most a head's width. `scale`: LayerScale of all samples [1, d], or of each, 0 where it is dropped.

    The result has the wider type of rows and norm; products are of autocast's type, if that is on. In C++ (a CPU,
    weights in float32) the residual stream stays float32 and only what is multiplied is rounded. It keeps the shares of
    attention for the backward pass, so that above `attention.LONGEST` tokens the definition runs, as it does with
    `first` and while torch.compile or an exporter traces. Gradients go to all but `rotation`; there is no second one.

    Raises ValueError for shapes that don't fit, and RuntimeError for a forced backend that can't run.
    """
    d, longest = rows.shape[-1], max(t for _, t in counts)
    _check("residual_attention", rows, counts, scale, norm=norm, joint=(joint, 3 * d, d), out=(out, d, d))
    if d % heads:
        raise ValueError(f"residual_attention: {d} channels don't split into {heads} heads; take a divisor")
    if rotation is not None and any(2 * cos.shape[-1] > d // heads for cos, _ in rotation):
        raise ValueError(
            f"residual_attention: rotation of {max(cos.shape[-1] for cos, _ in rotation)} pairs for heads of "
            f"{d // heads} channels; at most half as many pairs as channels turn"
        )
    if first is not None and not 1 <= first <= longest:
        raise ValueError(f"residual_attention: first {first} of {longest} tokens; expected 1 to {longest}, or None")
    backend = _unless_traced(backend, rows, *norm, *joint, *out, unfit=longest > LONGEST or first is not None)
    return _attention(norm.weight, rows, backend=backend)(
        rows, norm, joint, out, counts=counts, heads=heads, rotation=rotation, scale=scale, first=first, eps=eps
    )


def residual_mlp(
    rows: Float[Tensor, "r d"],
    norm: Affine,
    widen: Affine,
    narrow: Affine,
    *,
    counts: Counts,
    scale: Float[Tensor, "_s d"] | None = None,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> Float[Tensor, "r d"]:
    """Tokens plus an MLP of each with one hidden layer and GELU (the exact one); see `residual_attention`."""
    hidden, d = len(widen.weight), rows.shape[-1]
    layers = {"widen": (widen, hidden, d), "narrow": (narrow, d, hidden)}
    _check("residual_mlp", rows, counts, scale, norm=norm, **layers)
    backend = _unless_traced(backend, rows, *norm, *widen, *narrow)
    return _mlp(norm.weight, rows, backend=backend)(rows, norm, widen, narrow, counts=counts, scale=scale, eps=eps)


def _unless_traced(backend: Backend, *tensors: Tensor, unfit: bool = False) -> Backend:
    """The definition where "auto" would meet what C++ can't: tracing, tensors without memory, mixed types."""
    if backend != "auto":
        return backend
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
    products = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    known = products in (torch.float32, torch.bfloat16)
    alike = all(tensor.dtype == torch.float32 for tensor in tensors[1:]) and tensors[0].dtype != torch.float64
    return "auto" if known and alike and plain and not (tracing or unfit) else "reference"


def _check(
    op: str, rows: Tensor, counts: Counts, scale: Tensor | None, *, norm: Affine, **linear: tuple[Affine, int, int]
) -> None:
    number, d = rows.shape
    if norm.weight.shape != (d,) or norm.bias.shape != (d,):
        raise ValueError(f"{op}: norm of {tuple(norm.weight.shape)} for tokens of {d} channels; expected ({d},)")
    for name, (layer, to, size) in linear.items():
        if layer.weight.shape != (to, size) or layer.bias.shape != (to,):
            raise ValueError(
                f"{op}: {name} has a weight of {tuple(layer.weight.shape)} and a bias of {tuple(layer.bias.shape)}; "
                f"expected ({to}, {size}) and ({to},)"
            )
    if torch.compiler.is_compiling():  # sizes may be symbols
        return
    if number != sum(b * t for b, t in counts):
        raise ValueError(f"{op}: {number} rows for {list(counts)} samples x tokens; expected their products' sum")
    if scale is not None and len(scale) not in (1, samples := sum(b for b, _ in counts)):
        raise ValueError(f"{op}: scale has {len(scale)} rows for {samples} samples; expected one row, or one each")
