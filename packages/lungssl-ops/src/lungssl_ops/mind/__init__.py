"""MIND-SSC: what a voxel's surroundings look like to themselves, the same in both phases although the HU differ.

Heinrich et al. 2013, Towards realtime multimodal fusion for image-guided interventions using self-similarities, MICCAI,
https://doi.org/10.1007/978-3-642-40811-3_24. With n_0 .. n_5 the six voxels at `dilation` along the axes around voxel v
and I_a the image around voxel a:

    D_p(v) = mean over a box of (2 radius + 1)^3 voxels of (I_i - I_j)^2       12 pairs p = (i, j), not opposite
    d_p(v) = D_p(v) - min_q D_q(v)
    var(v) = mean_p d_p(v), held between 0.001 and 1000 times its mean over the image
    MIND_p(v) = exp(-d_p(v) / var(v))

Beyond the border the image repeats its last voxel, and so do the squared differences. The order of the channels is that
of the authors' code (channel p compares `reference.NEIGHBOURS[i]` and `[j]` of `reference.PAIRS[p]`), with its tensor
axes called z, y, x. It differs from that code in two things: the mean variance is of each image, not of the batch, and
a constant image gives ones, not NaN.
"""

from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lungssl_ops.cpp import cpp_problem
from lungssl_ops.dispatch import Backend, Dispatch, Implementation, triton_problem

SOURCE = Path(__file__).with_name("mind.cpp")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_REACH = 2047
"""Voxels; no volume is so wide that boxes further away would be inside."""
_reference = Implementation(backend="reference", function="lungssl_ops.mind.reference:mind_ssc_reference")
_dispatch = Dispatch(
    "mind_ssc",
    Implementation(
        backend="triton",
        function="lungssl_ops.mind.triton:mind_ssc_triton",
        devices=("cuda",),
        dtypes=DTYPES,
        problem=triton_problem,
    ),
    Implementation(
        backend="cpp",
        function="lungssl_ops.mind.cpu:mind_ssc_cpp",
        devices=("cpu",),
        dtypes=DTYPES,
        problem=partial(cpp_problem, SOURCE),
    ),
    _reference,
)
_differentiable = Dispatch("mind_ssc_with_gradient", _reference)


def mind_ssc(
    image: Float[Tensor, "b 1 z y x"],
    *,
    radius: int = 1,
    dilation: int = 2,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "b 12 z y x"] | UInt8[Tensor, "b 12 z y x"]:
    """Twelve self-similarities of each voxel's surroundings, in [0, 1]; one of them is 1 at every voxel.

    The intensities may have any unit: adding a constant changes nothing, nor does a factor. `radius` (of the compared
    boxes) and `dilation` (distance of the compared boxes from the voxel) are in voxels: resample to one spacing first.
    `dtype` of the result is float32 (float64 for such an image) unless given as float16, bfloat16, float32, float64,
    or uint8: 255 x the similarity, rounded. Computed in float32, or in float64 for such an image; float16 loses at
    most 2^-12, uint8 2^-9. Nothing but the result and a copy of the image is held in memory.

    An image that requires a gradient is computed by the definition, which holds some 40 volumes; detach() features.
    LUNGSSL_OPS knows that case as `mind_ssc_with_gradient`.
    Repeats are bit-equal, with any number of threads. The device is never waited for.

    Voxels must be finite: the variance is over the whole image, so that one NaN or infinite voxel spoils all of it.

    Raises ValueError for shapes and sizes that don't fit, and RuntimeError for a forced backend that can't run.
    """
    if not (0 <= radius <= MOST_REACH and 1 <= dilation <= MOST_REACH):
        raise ValueError(
            f"mind_ssc needs a radius from 0 and a dilation from 1 to {MOST_REACH} voxels, got {radius} and {dilation}"
        )
    if image.ndim != 5 or image.shape[1] != 1 or not image.is_floating_point():
        raise ValueError(
            f"mind_ssc got an image of shape {tuple(image.shape)}, {image.dtype}; expected [b, 1, z, y, x] of a "
            f"floating type, as image.float()"
        )
    if image.numel() == 0:
        raise ValueError(f"mind_ssc got an image of no voxels, shape {tuple(image.shape)}; every size must be positive")
    dtype = dtype or torch.promote_types(image.dtype, torch.float32)
    if dtype not in (*DTYPES, torch.uint8):
        raise ValueError(f"mind_ssc can't give {dtype}; it gives {', '.join(str(d) for d in DTYPES)} or torch.uint8")
    dispatch = _differentiable if torch.is_grad_enabled() and image.requires_grad else _dispatch
    return dispatch(image, backend=backend)(image, radius=radius, dilation=dilation, dtype=dtype)
