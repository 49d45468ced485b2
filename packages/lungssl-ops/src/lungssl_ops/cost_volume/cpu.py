"""Cost volume and coupled-convex labelling in C++."""

import ctypes

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lungssl_ops.cost_volume import ARGMIN, CORRELATE
from lungssl_ops.cost_volume.fakes import argmin_fake, costs_fake
from lungssl_ops.cost_volume.reference import Padding, mean_features, pad_volume, side_of
from lungssl_ops.cpp import library, pointer, threads

_LANES = 8
"""Voxels that the kernels take at once: rows are padded to a multiple."""
_GROUP = 8
"""Most displacements along x that are correlated together, one accumulator each."""
_BLOCK = 512
"""Voxels whose least label is searched together: their rows of 2 KB a label fill whole cache lines."""


def cost_volume_cpp(
    fixed: Float[Tensor, "b c z y x"],
    moving: Float[Tensor, "b c z y x"],
    *,
    reach: int,
    smoothing: int,
    passes: int,
    padding: Padding,
    mean: bool,
    dtype: torch.dtype,
) -> Float[Tensor, "b l z y x"]:
    """`cost_volume_reference` without a gradient."""
    work = torch.promote_types(fixed.dtype, torch.float32)
    direct = torch.float16 if dtype == torch.float16 and work == torch.float32 else work
    passes = passes if smoothing else 0
    cost = _correlate(fixed.to(work), moving.to(work), reach, smoothing, passes, padding == "zero", mean, direct)
    return cost.to(dtype)


def coupled_argmin_cpp(
    cost: Float[Tensor, "b l z y x"], smooth: Float[Tensor, "b 3 z y x"], *, weight: float
) -> Float[Tensor, "b 3 z y x"]:
    """`coupled_argmin_reference`, in one read of the cost."""
    return _argmin(cost.float() if cost.dtype == torch.bfloat16 else cost, smooth, weight)


@torch.library.custom_op("lungssl_ops::cost_volume_cpp", mutates_args=())
def _correlate(
    fixed: Tensor,
    moving: Tensor,
    reach: int,
    smoothing: int,
    passes: int,
    zero: bool,
    mean: bool,
    dtype: torch.dtype,
) -> Tensor:
    b, c, z, y, x = fixed.shape
    side, rows = 2 * reach + 1, -(-x // _LANES) * _LANES
    # Around the mean, |f|^2 + |m|^2 - 2 f.m loses the fewest digits; the difference of f and m doesn't change.
    centre = mean_features(fixed)
    padded = pad_volume(moving, (reach, reach + rows - x, reach, reach, reach, reach), "zero" if zero else "replicate")
    padded = (padded - centre).permute(0, 2, 3, 1, 4).contiguous()  # rows of c x voxels
    fixed = F.pad(fixed - centre, (0, rows - x)).permute(0, 2, 3, 1, 4).contiguous()
    groups = -(-side // _GROUP)
    number = threads()
    out = torch.empty((b, side**3, z, y, x), dtype=dtype)
    # Per thread: the costs of a group of labels and one smoothed volume, and a row with its borders.
    volume = z * y * rows
    scratch = torch.empty((number.value, (-(-side // groups) + 1) * volume + rows + 2 * smoothing), dtype=fixed.dtype)
    source = library(CORRELATE)
    function = source.cost_volume_f64 if fixed.dtype == torch.float64 else source.cost_volume_f32
    sizes = [ctypes.c_int64(size) for size in (b, c, z, y, x, reach, groups, smoothing, passes, scratch.shape[1])]
    function(
        pointer(fixed),
        pointer(padded),
        pointer(fixed.square().sum(dim=3).contiguous()),
        pointer(padded.square().sum(dim=3).contiguous()),
        *sizes,
        ctypes.c_int(zero),
        ctypes.c_double(1 / c if mean else 1.0),
        pointer(scratch),
        pointer(out),
        ctypes.c_int(dtype == torch.float16),
        number,
    )
    return out


_correlate.register_fake(costs_fake)


@torch.library.custom_op("lungssl_ops::coupled_argmin_cpp", mutates_args=())
def _argmin(cost: Tensor, smooth: Tensor, weight: float) -> Tensor:
    b, labels, z, y, x = cost.shape
    side = side_of(labels)
    number = threads()
    out = torch.empty_like(smooth, memory_format=torch.contiguous_format)
    # Per thread: penalties of each step along x, y, z.
    scratch = torch.empty((number.value, 3 * side * _BLOCK), dtype=smooth.dtype)
    source = library(ARGMIN)
    function = {
        torch.float16: source.coupled_argmin_f16,
        torch.float32: source.coupled_argmin_f32,
        torch.float64: source.coupled_argmin_f64,
    }[cost.dtype]
    cost, smooth = cost.contiguous(), smooth.contiguous()
    function(
        pointer(cost),
        pointer(smooth),
        ctypes.c_double(weight),
        *(ctypes.c_int64(size) for size in (b, side, z * y * x)),
        pointer(scratch),
        pointer(out),
        number,
    )
    return out


_argmin.register_fake(argmin_fake)
