"""3-D local normalised cross-correlation (LNCC): how well two images agree in each small window, up to gain and offset.

With sums S over the cubic window around a voxel, n voxels in it, f fixed and m moving,

    cross = S(fm) - S(f) S(m) / n,    v_f = S(ff) - S(f)^2 / n,    v_m likewise
    lncc  = (cross / n)^2 / ((v_f / n + eps) (v_m / n + eps))

the squared Pearson correlation of the window (Avants et al. 2008, doi:10.1016/j.media.2007.06.004). Such differences
cancel: in plain float32, raw Hounsfield units of air come out wrong by 70 %. Here sums are in float64 on a CPU and of
deviations only on a GPU; float32 images lose nothing. Gradients, of both images, are the exact adjoint.
"""

import math
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int16
from torch import Tensor

from lungssl_ops.cpp import cpp_problem
from lungssl_ops.dispatch import Backend, Dispatch, Implementation, compiled_problem, triton_problem

MOST_WINDOW = 4095
"""Voxels; no volume is so wide, and padding by half of it stays small."""

_FLOATS = (torch.float32, torch.float64)
SOURCE = Path(__file__).with_name("lncc.cpp")


def lncc(
    fixed: Float[Tensor, "b 1 z y x"] | Int16[Tensor, "b 1 z y x"],
    moving: Float[Tensor, "b 1 z y x"] | Int16[Tensor, "b 1 z y x"],
    *,
    window: int = 9,
    eps: float = 1e-5,
    mask: Bool[Tensor, "b 1 z y x"] | Float[Tensor, "b 1 z y x"] | None = None,
    borders: Literal["count", "zeros"] = "count",
    reduction: Literal["mean", "none"] = "mean",
    backend: Backend = "auto",
) -> Float[Tensor, "b"] | Float[Tensor, "b 1 z y x"]:
    """Squared LNCC, from 0 (no local linear relation) to 1 (moving = gain * fixed + offset in every window).

    A similarity: minimise `1 - lncc(...)`. `reduction="mean"` averages over the voxels of each volume, "none" gives the
    map. `window` is the edge of the cube in voxels, odd. Differentiable once in `fixed` and `moving`, not in `mask`.

    `mask` holds weights >= 0, or True for voxels that count. A window sees only those, n is their sum, and the mean is
    over them; what the images hold elsewhere is never used, the map and the gradients are 0 there. An empty mask gives
    NaN, a mean of nothing, and gradients 0. A voxel that counts and is NaN or infinite makes its volume's mean NaN.

    `borders="count"`: a window at the border has fewer voxels. `"zeros"`: images are padded with zeros, n is window**3,
    and `-lncc` is `monai.losses.LocalNormalizedCrossCorrelationLoss(kernel_type="rectangular")`: `eps` is its
    `smooth_dr`, the smallest value of v_f and v_m (sums, not divided by n); no mask.

    `eps` is a variance per voxel in the images' unit squared, and windows of a smaller one hardly count. 1e-5, the
    constant of VoxelMorph and MONAI, is for images in [0, 1]: with -1000 to 400 HU mapped there, it is an sd of 4.4 HU,
    below the noise of a CT. For images in HU the same is eps=20; 1e-5 then only keeps constant windows finite.

    int16 is computed in float32. Raises TypeError for other types (bfloat16 stores 1000 HU in steps of 4, float16 in
    steps of 0.5) and ValueError for a window, eps, shape or mask that makes no sense.
    """
    fixed, moving, mask = _checked(fixed, moving, mask, window=window, eps=eps, borders=borders, reduction=reduction)
    tensors = (fixed, moving) if mask is None else (fixed, moving, mask)
    function = _dispatch(*tensors, backend=backend)
    return function(fixed, moving, mask=mask, window=window, eps=eps, borders=borders, reduction=reduction)


def _checked(
    fixed: Tensor, moving: Tensor, mask: Tensor | None, *, window: int, eps: float, borders: str, reduction: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    if not isinstance(window, int) or not 3 <= window <= MOST_WINDOW or window % 2 == 0:
        raise ValueError(f"lncc needs a whole, odd window of 3 to {MOST_WINDOW} voxels, got {window}; 9 is usual")
    if not 0 < eps < math.inf:
        raise ValueError(f"lncc needs a finite eps > 0, the variance that a constant window is given; got {eps}")
    if borders not in ("count", "zeros"):
        raise ValueError(f"lncc: borders {borders!r} is unknown; known are 'count' and 'zeros'")
    if reduction not in ("mean", "none"):
        raise ValueError(f"lncc: reduction {reduction!r} is unknown; known are 'mean' and 'none'")
    if fixed.ndim != 5 or fixed.shape[1] != 1 or fixed.numel() == 0:
        raise ValueError(f"lncc compares volumes [b, 1, z, y, x] that are not empty, got {list(fixed.shape)}")
    if moving.shape != fixed.shape:
        raise ValueError(f"lncc: fixed is {list(fixed.shape)} and moving {list(moving.shape)}; warp to the fixed grid")
    for name, image in (("fixed", fixed), ("moving", moving)):
        if image.dtype not in (torch.int16, *_FLOATS):
            raise TypeError(
                f"lncc: {name} is {image.dtype}, whose rounding is as large as the differences within a window; "
                f"pass int16, float32 or float64"
            )
    dtype = torch.promote_types(torch.promote_types(fixed.dtype, moving.dtype), torch.float32)
    if mask is not None:
        if borders == "zeros":
            raise ValueError("lncc: borders='zeros' is MONAI's loss, which has no mask; use borders='count' with one")
        if mask.shape != fixed.shape:
            raise ValueError(f"lncc: mask is {list(mask.shape)}, the images are {list(fixed.shape)}; expand it")
        if mask.requires_grad:
            raise ValueError("lncc is not differentiated in mask, but mask requires a gradient; detach() it")
        mask = mask.to(dtype)
    return fixed.to(dtype), moving.to(dtype), mask


_dispatch = Dispatch(
    "lncc",
    Implementation(
        backend="triton",
        function="lungssl_ops.lncc.triton:lncc_triton",
        devices=("cuda",),
        dtypes=_FLOATS,
        problem=triton_problem,
    ),
    Implementation(
        backend="cpp",
        function="lungssl_ops.lncc.cpu:lncc_cpp",
        devices=("cpu",),
        dtypes=_FLOATS,
        problem=partial(cpp_problem, SOURCE),
    ),
    Implementation(
        backend="compiled",
        function="lungssl_ops.lncc.compiled:lncc_compiled",
        devices=("cpu", "cuda"),
        dtypes=_FLOATS,
        problem=compiled_problem,
    ),
    Implementation(backend="reference", function="lungssl_ops.lncc.reference:lncc_reference"),
)
