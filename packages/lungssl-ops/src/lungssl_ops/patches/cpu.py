"""The masked patch error in C++: one go over the masked rows for the error, and one for its gradient."""

import ctypes
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lungssl_ops.cpp import library, pointer, threads
from lungssl_ops.patches import SOURCE


def masked_patch_mse_cpp(
    pred: Float[Tensor, "b n p"],
    target_patches: Float[Tensor, "b n p"],
    mask: Bool[Tensor, "b n"],
    weight: Float[Tensor, "b n p"],
    *,
    norm: Literal["patch", "none"],
    variance_floor: float,
) -> Float[Tensor, ""]:
    """See `lungssl_ops.patches.masked_patch_mse`; targets and weights of float32, without gradients of their own."""
    return _masked_patch_mse(pred, target_patches, mask, weight, norm == "patch", variance_floor)[0]


@torch.library.custom_op("lungssl_ops::masked_patch_mse_cpp", mutates_args=())
def _masked_patch_mse(
    pred: Tensor, target: Tensor, mask: Tensor, weight: Tensor, normalise: bool, floor: float
) -> tuple[Tensor, Tensor]:
    """The error, and the sum of the weights that it was divided by."""
    error, total = _call(pred.contiguous(), target, mask, weight, normalise, floor, 0.0, None)
    return (error.sum() / total.sum()).float(), total.sum()


@torch.library.custom_op("lungssl_ops::masked_patch_mse_cpp_backward", mutates_args=())
def _gradient(
    upstream: Tensor,
    whole: Tensor,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    weight: Tensor,
    normalise: bool,
    floor: float,
) -> Tensor:
    pred = pred.contiguous()
    gradient = torch.empty_like(pred)
    _call(pred, target, mask, weight, normalise, floor, float(2 * upstream / whole), gradient)
    return gradient


def _call(
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    weight: Tensor,
    normalise: bool,
    floor: float,
    factor: float,
    gradient: Tensor | None,
) -> Tensor:
    """Weighted squares and weights [2, rows] of the masked rows; fills the gradient, `factor` times the halved one."""
    rows, p = pred.shape[0] * pred.shape[1], pred.shape[2]
    error, total = sums = torch.empty((2, rows), dtype=torch.float64)
    name = "masked_patch_mse_bf16" if pred.dtype == torch.bfloat16 else "masked_patch_mse_f32"
    getattr(library(SOURCE), name)(
        *(pointer(one.contiguous()) for one in (pred, target, mask, weight)),
        ctypes.c_int64(rows),
        ctypes.c_int64(p),
        ctypes.c_int(normalise),
        ctypes.c_float(floor),
        pointer(error),
        pointer(total),
        ctypes.c_float(factor),
        pointer(gradient),
        threads(),
    )
    return sums


@_masked_patch_mse.register_fake
def _(
    pred: Tensor, target: Tensor, mask: Tensor, weight: Tensor, normalise: bool, floor: float
) -> tuple[Tensor, Tensor]:
    return pred.new_empty((), dtype=torch.float32), pred.new_empty((), dtype=torch.float64)


@_gradient.register_fake
def _(
    upstream: Tensor,
    whole: Tensor,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    weight: Tensor,
    normalise: bool,
    floor: float,
) -> Tensor:
    return torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.normalise, ctx.floor = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:
    return (_gradient(upstream, *ctx.saved_tensors, ctx.normalise, ctx.floor), *(None,) * 5)


_masked_patch_mse.register_autograd(_backward, setup_context=_keep)
