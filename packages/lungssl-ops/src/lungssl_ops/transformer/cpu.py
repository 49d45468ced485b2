"""Both halves in C++ around torch's products: forward and backward written out, nothing cast or copied twice."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lungssl_ops.cpp import library, pointer, threads
from lungssl_ops.transformer import SOURCE, Affine, Counts, Rotation

_PART, _LANES = 64, 16
"""As in transformer.cpp: rows of a partial sum, and what the widest vectors hold."""
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def residual_attention_cpp(
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
    """See `lungssl_ops.transformer.residual_attention`; of the first tokens alone, it makes all and drops the rest."""
    sizes = _sizes(counts, heads, rows.shape[1] // heads, rotation)
    norm = Affine(*(part.contiguous() for part in norm))
    found: Tensor = _Attention.apply(rows, *norm, *joint, *out, scale, sizes, eps, _products())  # pyright: ignore[reportAssignmentType]
    if first is None:
        return found
    return torch.cat([found[size.rows].unflatten(0, (size.b, size.t))[:, :first].flatten(0, 1) for size in sizes])


def residual_mlp_cpp(
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
    sizes = _sizes(counts, 1, rows.shape[1], None)
    norm = Affine(*(part.contiguous() for part in norm))
    return _Mlp.apply(rows, *norm, *widen, *narrow, scale, sizes, eps, _products())  # pyright: ignore[reportReturnType]


def _products() -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


@dataclass(frozen=True, kw_only=True)
class _Size:
    """Samples of one number of tokens: their rows and scales, and how their heads turn."""

    b: int
    t: int
    heads: int
    width: int
    rows: slice
    samples: slice
    cos: Tensor
    sin: Tensor
    """Of more pairs than turn, the last by 0, so that whole vectors do: [1 or b, t, turned]."""
    pairs: int

    def words(self) -> list[ctypes.c_int64]:
        """`Heads` of transformer.cpp."""
        turned = self.cos.shape[-1]
        stride = 0 if len(self.cos) == 1 else self.t * turned
        return [_int(n) for n in (self.b, self.t, self.heads, self.width, self.pairs, turned, stride)]

    def empty(self, of: Tensor, *more: int) -> Tensor:
        """Heads [*more, b * heads, t, width] of the tensor's type."""
        return of.new_empty((*more, self.b * self.heads, self.t, self.width))


def _sizes(counts: Counts, heads: int, width: int, rotation: Sequence[Rotation] | None) -> list[_Size]:
    sizes, row, sample = [], 0, 0
    for number, (b, t) in enumerate(counts):
        cos = sin = torch.empty((1, t, 0))
        pairs = 0
        if rotation is not None:
            cos, sin = rotation[number]
            pairs = cos.shape[-1]
            fill = (0, min(-(-pairs // _LANES) * _LANES, width - pairs) - pairs)
            cos, sin = F.pad(cos.detach().float(), fill, value=1.0), F.pad(sin.detach().float(), fill)
        sizes.append(
            _Size(
                b=b,
                t=t,
                heads=heads,
                width=width,
                rows=slice(row, row + b * t),
                samples=slice(sample, sample + b),
                cos=cos.contiguous(),
                sin=sin.contiguous(),
                pairs=pairs,
            )
        )
        row, sample = row + b * t, sample + b
    return sizes


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        joint_weight: Tensor,
        joint_bias: Tensor,
        out_weight: Tensor,
        out_bias: Tensor,
        scale: Tensor | None,
        sizes: list[_Size],
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        heads: list[Tensor] = []
        with torch.autocast("cpu", enabled=False):
            x = _Tokens(rows, norm_weight, norm_bias, eps, dtype)
            joint_weight, out_weight = joint_weight.to(dtype), out_weight.to(dtype)
            joint = _linear(x.normed, joint_weight, joint_bias.to(dtype))
            attended = torch.empty_like(x.normed)
            for size in sizes:
                q, k, v = size.empty(joint, 3)
                factor = ctypes.c_float(size.width**-0.5)
                _call("split", dtype, joint[size.rows], size.cos, size.sin, factor, q, k, v, *size.words())
                shares = torch.bmm(q, k.mT)
                scratch = torch.empty((threads().value, -(-size.t // _LANES) * _LANES))
                _call("softmax", dtype, shares, _int(len(q) * size.t), _int(size.t), scratch)
                _call("join", dtype, torch.bmm(shares, v), attended[size.rows], *size.words(), ctypes.c_int(0))
                heads += [q, k, v, shares]
            branch = _linear(attended, out_weight, out_bias.to(dtype))
            result = _plus(x.x, branch, scale, sizes)
        ctx.save_for_backward(*x.saved, norm_weight, joint_weight, out_weight, scale, attended, branch, *heads)
        ctx.dtypes, ctx.sizes = (rows.dtype, dtype), sizes
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, normed, mean, rstd, norm_weight, joint_weight, out_weight, scale, *rest = ctx.saved_tensors
        attended, branch, *heads = rest
        (rows_dtype, dtype), number, d = ctx.dtypes, *x.shape
        grad = grad.float().contiguous()
        grad_branch, grad_out_bias, grad_scale = _through_sum(grad, branch, scale, ctx.sizes)
        grad_out = _product(ctx, 5, grad_branch, attended)
        grad_attended = _times(grad_branch, out_weight)
        grad_joint = normed.new_empty((number, 3 * d))
        grad_joint_bias = grad.new_zeros((3 * d,))
        for place, size in enumerate(ctx.sizes):
            q, k, v, shares = heads[4 * place : 4 * place + 4]
            grad_heads = size.empty(q)
            _call("join", dtype, grad_attended[size.rows], grad_heads, *size.words(), ctypes.c_int(1))
            grad_v = torch.bmm(shares.mT, grad_heads)
            grad_scores = torch.ops.aten._softmax_backward_data(torch.bmm(grad_heads, v.mT), shares, -1, dtype)
            grads = (torch.bmm(grad_scores, k), torch.bmm(grad_scores.mT, q), grad_v)
            factor, bias = ctypes.c_float(size.width**-0.5), grad.new_empty((3 * d,))
            found = (grad_joint[size.rows], _partial(size.b, size.t, 3, d), bias)
            _call("split_backward", dtype, *grads, size.cos, size.sin, factor, *found, *size.words())
            grad_joint_bias += bias
        grad_x, grad_norm = _through_norm(_times(grad_joint, joint_weight), x, mean, rstd, norm_weight, grad)
        grad_weight = _product(ctx, 3, grad_joint, normed)
        return (
            grad_x.to(rows_dtype),
            *(*grad_norm, grad_weight, grad_joint_bias, grad_out, grad_out_bias, grad_scale),
            *(None,) * 3,
        )


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        widen_weight: Tensor,
        widen_bias: Tensor,
        narrow_weight: Tensor,
        narrow_bias: Tensor,
        scale: Tensor | None,
        sizes: list[_Size],
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = _Tokens(rows, norm_weight, norm_bias, eps, dtype)
            widen_weight, narrow_weight = widen_weight.to(dtype), narrow_weight.to(dtype)
            wide = _linear(x.normed, widen_weight, widen_bias.to(dtype))
            active = F.gelu(wide)
            branch = _linear(active, narrow_weight, narrow_bias.to(dtype))
            result = _plus(x.x, branch, scale, sizes)
        ctx.save_for_backward(*x.saved, norm_weight, widen_weight, narrow_weight, scale, wide, active, branch)
        ctx.dtypes, ctx.sizes = (rows.dtype, dtype), sizes
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, normed, mean, rstd, norm_weight, widen_weight, narrow_weight, scale, *rest = ctx.saved_tensors
        wide, active, branch = rest
        (rows_dtype, dtype), (number, hidden) = ctx.dtypes, wide.shape
        grad = grad.float().contiguous()
        grad_branch, grad_narrow_bias, grad_scale = _through_sum(grad, branch, scale, ctx.sizes)
        grad_narrow = _product(ctx, 5, grad_branch, active)
        grad_wide = _times(grad_branch, narrow_weight)
        grad_widen_bias = grad.new_empty((hidden,))
        sums = (_partial(1, number, 1, hidden), grad_widen_bias)
        _call("gelu_backward", dtype, wide, grad_wide, *sums, _int(1), _int(number), _int(hidden))
        grad_x, grad_norm = _through_norm(_times(grad_wide, widen_weight), x, mean, rstd, norm_weight, grad)
        grad_widen = _product(ctx, 3, grad_wide, normed)
        return (
            grad_x.to(rows_dtype),
            *(*grad_norm, grad_widen, grad_widen_bias, grad_narrow, grad_narrow_bias, grad_scale),
            *(None,) * 3,
        )


class _Tokens:
    """The residual stream in float32 and its norm in `dtype`."""

    def __init__(self, rows: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> None:
        self.x = rows.float().contiguous()
        number, d = rows.shape
        self.normed = self.x.new_empty((number, d), dtype=dtype)
        self.mean, self.rstd = self.x.new_empty((2, number))
        out = (self.normed, self.mean, self.rstd)
        _call("norm", dtype, self.x, weight, bias, ctypes.c_float(eps), *out, _int(number), _int(d))

    @property
    def saved(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.normed, self.mean, self.rstd


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear by oneDNN, which in bf16 doesn't write the bias to the whole result first."""
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; in float32 by oneDNN, as MKL, which torch takes, doesn't use AVX-512 on other makers' CPUs: a layer's
    products take 8.3 ms for 19 on an EPYC (1768 x 384 by 1536, one core)."""
    return _linear(a, b.T, None) if a.dtype == torch.float32 else a @ b


def _plus(x: Tensor, branch: Tensor, scale: Tensor | None, sizes: list[_Size]) -> Tensor:
    """x + scale * branch."""
    result = torch.empty_like(x)
    for part, by, b, t, stride in _scaled(scale, sizes, len(x)):
        words = (by, _int(stride), result[part], _int(b), _int(t), _int(x.shape[1]))
        _call("add", branch.dtype, x[part], branch[part], *words)
    return result


def _through_sum(
    grad: Tensor, branch: Tensor, scale: Tensor | None, sizes: list[_Size]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the branch, of the bias that ends it, and of its scale."""
    d, found, bias, scales = grad.shape[1], torch.empty_like(branch), [], []
    for part, by, b, t, stride in _scaled(scale, sizes, len(grad)):
        sums = grad.new_empty((b if stride else 1, 2, d))
        words = (by, _int(stride), found[part], _partial(b, t, 2, d), sums, _int(b), _int(t), _int(d))
        _call("add_backward", branch.dtype, grad[part], branch[part], *words)
        bias.append(sums[:, 0].sum(dim=0))
        scales.append(sums[:, 1])
    return found, torch.stack(bias).sum(dim=0), None if scale is None else torch.cat(scales)


def _scaled(scale: Tensor | None, sizes: list[_Size], number: int) -> list[tuple[slice, Tensor | None, int, int, int]]:
    """Rows that have the same scale or one for each of b samples of t tokens, that scale, b, t and its stride."""
    if scale is None or len(scale) == 1:
        return [(slice(0, number), None if scale is None else scale.contiguous(), 1, number, 0)]
    scale = scale.contiguous()
    return [(size.rows, scale[size.samples], size.b, size.t, scale.shape[1]) for size in sizes]


def _through_norm(
    grad_normed: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of the tokens, `grad` past the branch included, and those of the norm's weight and bias [2, d]."""
    number, d = x.shape
    found, sums = torch.empty_like(x), x.new_empty((2, d))
    given = (grad_normed, x, mean, rstd, weight, grad)
    words = (found, _partial(1, number, 2, d), sums, _int(1), _int(number), _int(d))
    _call("norm_backward", grad_normed.dtype, *given, *words)
    return found, sums


def _product(ctx: Any, index: int, grad: Tensor, given: Tensor) -> Tensor | None:
    """The gradient of a linear layer's weight, where that input is to have one."""
    return _times(grad.T, given).float() if ctx.needs_input_grad[index] else None


def _partial(b: int, t: int, sums: int, d: int) -> Tensor:
    return torch.empty((b * -(-t // _PART), sums, d))


_int = ctypes.c_int64


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """One of the kernels for products of `dtype`; tensors become addresses."""
    function = getattr(library(SOURCE), f"{name}_{_NAMES[dtype]}")
    words = [pointer(one) if one is None or isinstance(one, Tensor) else one for one in arguments]
    function(*words, threads())
