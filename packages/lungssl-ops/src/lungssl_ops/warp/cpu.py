"""The C++ path: one pass forward, one pass backward, each result written once.

The warped image and the three sums come from the same rows while these are in the first cache. Nothing is kept for the
backward but the inputs: it finds coordinates, weights and differences again, which costs less than to read them back.
Every result has the same bits for any number of threads. No double backward.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lungssl_ops.cpp import library, pointer, threads
from lungssl_ops.warp.reference import over_weight

SOURCE = Path(__file__).with_name("warp.cpp")
TERMS = {"none": 0, "first": 1, "bending": 3}
"""What is summed beside the warp: nothing, folding and diffusion, or bending as well."""


def warp_cpp(image: Tensor, u_vox: Tensor, *, fill: float | None) -> Tensor:
    """`warp_reference`, of contiguous or other inputs on a CPU."""
    return _warp(image.contiguous(), u_vox.contiguous(), None, fill, (1.0, 1.0, 1.0), TERMS["none"])[0]


def warp_terms_cpp(
    image: Tensor,
    u_vox: Tensor,
    weight: Tensor | None,
    *,
    fill: float | None,
    spacing_mm: tuple[float, float, float],
    with_bending: bool,
) -> tuple[Tensor, Tensor]:
    """`warp_terms_reference`."""
    weight = None if weight is None else weight.contiguous()
    terms = TERMS["bending" if with_bending else "first"]
    warped, sums = _warp(image.contiguous(), u_vox.contiguous(), weight, fill, spacing_mm, terms)
    return warped, over_weight(sums, weight, u_vox)


@torch.library.custom_op("lungssl_ops::warp_cpp", mutates_args=(), device_types="cpu")
def _warp(
    image: Tensor, u_vox: Tensor, weight: Tensor | None, fill: float | None, spacing_mm: Sequence[float], terms: int
) -> tuple[Tensor, Tensor]:
    warped = torch.empty_like(image)
    # One row per plane, added in one order whatever the threads.
    sums = torch.empty(image.shape[0], image.shape[2], 3, dtype=torch.float64)
    _function("forward", image)(
        pointer(image),
        pointer(u_vox),
        pointer(weight),
        *_padding(fill),
        _doubles(spacing_mm),
        ctypes.c_int(terms),
        _sizes(image),
        pointer(warped),
        pointer(sums),
        threads(),
    )
    return warped, sums.sum(dim=1).to(u_vox.dtype)


@_warp.register_fake
def _(
    image: Tensor, u_vox: Tensor, weight: Tensor | None, fill: float | None, spacing_mm: Sequence[float], terms: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(image), u_vox.new_empty(image.shape[0], 3)


@torch.library.custom_op("lungssl_ops::warp_cpp_field_gradient", mutates_args=(), device_types="cpu")
def _field_gradient(
    image: Tensor,
    u_vox: Tensor,
    weight: Tensor | None,
    grad_warped: Tensor,
    grad_sums: Tensor,
    fill: float | None,
    spacing_mm: Sequence[float],
    terms: int,
) -> Tensor:
    gradient = torch.empty_like(u_vox)
    _function("backward_field", u_vox)(
        pointer(image),
        pointer(u_vox),
        pointer(weight),
        pointer(grad_warped),
        pointer(grad_sums.double().contiguous()),
        *_padding(fill),
        _doubles(spacing_mm),
        ctypes.c_int(terms),
        _sizes(image),
        pointer(gradient),
        threads(),
    )
    return gradient


@_field_gradient.register_fake
def _(
    image: Tensor,
    u_vox: Tensor,
    weight: Tensor | None,
    grad_warped: Tensor,
    grad_sums: Tensor,
    fill: float | None,
    spacing_mm: Sequence[float],
    terms: int,
) -> Tensor:
    return torch.empty_like(u_vox)


@torch.library.custom_op("lungssl_ops::warp_cpp_image_gradient", mutates_args=(), device_types="cpu")
def _image_gradient(u_vox: Tensor, grad_warped: Tensor, fill: float | None) -> Tensor:
    gradient = torch.empty_like(grad_warped)
    reach = torch.empty(u_vox.shape[0], u_vox.shape[2], 2, dtype=torch.int64)
    _function("backward_image", u_vox)(
        pointer(u_vox),
        pointer(grad_warped),
        _padding(fill)[0],
        _sizes(grad_warped),
        pointer(gradient),
        pointer(reach),
        threads(),
    )
    return gradient


@_image_gradient.register_fake
def _(u_vox: Tensor, grad_warped: Tensor, fill: float | None) -> Tensor:
    return torch.empty_like(grad_warped)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    image, u_vox, weight, ctx.fill, ctx.spacing_mm, ctx.terms = inputs
    ctx.save_for_backward(image, u_vox, weight)


def _backward(ctx: Any, grad_warped: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
    image, u_vox, weight = ctx.saved_tensors
    grad_image = grad_u = None
    grad_warped = grad_warped.contiguous()
    if ctx.needs_input_grad[0]:
        grad_image = _image_gradient(u_vox, grad_warped, ctx.fill)
    if ctx.needs_input_grad[1]:
        grad_u = _field_gradient(image, u_vox, weight, grad_warped, grad_sums, ctx.fill, ctx.spacing_mm, ctx.terms)
    return grad_image, grad_u, None, None, None, None


_warp.register_autograd(_backward, setup_context=_keep)


def _function(name: str, like: Tensor) -> Any:
    return getattr(library(SOURCE), f"{name}_{str(like.dtype).removeprefix('torch.')}")


def _padding(fill: float | None) -> tuple[ctypes.c_int, ctypes.c_double]:
    return ctypes.c_int(fill is None), ctypes.c_double(0.0 if fill is None else fill)


def _doubles(values: Sequence[float]) -> ctypes.Array[ctypes.c_double]:
    return (ctypes.c_double * len(values))(*values)


def _sizes(image: Tensor) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * 5)(*image.shape)
