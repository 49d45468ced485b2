"""MIND-SSC in C++: two sweeps over the image, nothing stored in between but one sum per plane."""

import ctypes

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from lungssl_ops.cpp import library, pointer, threads
from lungssl_ops.mind import SOURCE
from lungssl_ops.mind.reference import LEAST_VARIANCE, MOST_VARIANCE

_LANES = 8
"""Voxels that the kernel takes at once: rows are padded to a multiple."""
_STORES = {torch.float32: 0, torch.float16: 1, torch.uint8: 2}
"""What the kernel writes from float32, and its number for it."""


def mind_ssc_cpp(
    image: Float[Tensor, "b 1 z y x"], *, radius: int, dilation: int, dtype: torch.dtype
) -> Float[Tensor, "b 12 z y x"] | UInt8[Tensor, "b 12 z y x"]:
    """`mind_ssc_reference` without a gradient."""
    work = torch.promote_types(image.dtype, torch.float32)
    # From float32 the kernel itself writes float16 and uint8; the rest is rare and converted here.
    direct = dtype if work == torch.float32 and dtype in _STORES else work
    similarity = _mind_ssc(image.to(work), radius, dilation, direct)
    if dtype == torch.uint8 and direct != dtype:
        similarity = torch.round(255 * similarity)
    return similarity.to(dtype)


@torch.library.custom_op("lungssl_ops::mind_ssc_cpp", mutates_args=())
def _mind_ssc(image: Tensor, radius: int, dilation: int, dtype: torch.dtype) -> Tensor:
    b, _, z, y, x = image.shape
    rows = -(-x // _LANES) * _LANES
    # Along x only: rows and planes beyond the border are found by their clamped index.
    padded = F.pad(image, (dilation, dilation + rows - x, 0, 0, 0, 0), mode="replicate").contiguous()
    number = threads()
    out = torch.empty((b, 12, z, y, x), dtype=dtype)
    sums = torch.empty((b, z), dtype=torch.float64)
    # Per thread: twelve rings of 2 radius + 1 rows, one row with its borders, twelve rows of distances.
    scratch = torch.empty((number.value, (12 * (2 * radius + 2) + 1) * rows + 2 * radius), dtype=image.dtype)
    function = library(SOURCE).mind_ssc_f64 if image.dtype == torch.float64 else library(SOURCE).mind_ssc_f32
    sizes = [ctypes.c_int64(size) for size in (b, z, y, x, radius, dilation, scratch.shape[1])]
    function(
        pointer(padded),
        *sizes,
        ctypes.c_double(LEAST_VARIANCE),
        ctypes.c_double(MOST_VARIANCE),
        pointer(scratch),
        pointer(sums),
        pointer(out),
        ctypes.c_int(_STORES.get(dtype, 0)),
        number,
    )
    return out


@_mind_ssc.register_fake
def _(image: Tensor, radius: int, dilation: int, dtype: torch.dtype) -> Tensor:
    b, _, z, y, x = image.shape
    return image.new_empty((b, 12, z, y, x), dtype=dtype)
