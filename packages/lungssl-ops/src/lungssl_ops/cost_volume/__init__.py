"""Discrete registration on a coarse grid: feature cost volume, and coupled-convex optimisation over it.

Coupled convex: Heinrich, Papież, Schnabel, Handels 2014, Non-parametric discrete registration with convex optimisation,
WBIR, https://doi.org/10.1007/978-3-319-08554-8_6. With two box means and the six weights: Siebert, Hansen, Heinrich
2021, Fast 3D registration with accurate optimisation and little learning for Learn2Reg 2021,
https://doi.org/10.1007/978-3-030-97281-3_25, and ConvexAdam, Siebert et al. 2024, IEEE Transactions on Medical Imaging
44(2), 738-748, https://ieeexplore.ieee.org/document/10681158.

A label l stands for the displacement d = (l % n - reach, l // n % n - reach, l // n^2 - reach), components (x, y, z) in
voxels of the coarse grid, n = 2 reach + 1: x runs fastest. A voxel v of the fixed grid corresponds to v + d in the
moving one.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lungssl_ops.cost_volume.consistency import inverse_consistent
from lungssl_ops.cost_volume.reference import Padding, box_mean, side_of
from lungssl_ops.cpp import cpp_problem
from lungssl_ops.dispatch import Backend, Dispatch, Implementation, triton_problem

__all__ = ["PUBLISHED_WEIGHTS", "cost_volume", "coupled_convex", "inverse_consistent", "label_displacements"]

CORRELATE, ARGMIN = Path(__file__).with_name("cost_volume.cpp"), Path(__file__).with_name("coupled_argmin.cpp")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PUBLISHED_WEIGHTS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Of the coupling, from loose to tight: ConvexAdam's, for costs that are sums over the 12 channels of MIND-SSC."""


def _implementations(name: str, source: Path) -> tuple[Implementation, ...]:
    place = "lungssl_ops.cost_volume"
    return (
        Implementation(
            backend="triton",
            function=f"{place}.triton:{name}_triton",
            devices=("cuda",),
            dtypes=DTYPES,
            problem=triton_problem,
        ),
        Implementation(
            backend="cpp",
            function=f"{place}.cpu:{name}_cpp",
            devices=("cpu",),
            dtypes=DTYPES,
            problem=partial(cpp_problem, source),
        ),
        Implementation(backend="reference", function=f"{place}.reference:{name}_reference"),
    )


_cost_volume = Dispatch("cost_volume", *_implementations("cost_volume", CORRELATE))
_differentiable = Dispatch("cost_volume_with_gradient", _implementations("cost_volume", CORRELATE)[-1])
_coupled_argmin = Dispatch("coupled_convex", *_implementations("coupled_argmin", ARGMIN))


def label_displacements(reach: int) -> Float[Tensor, "l 3"]:
    """The displacement (x, y, z) in voxels of each of the (2 reach + 1)^3 labels."""
    steps = torch.arange(-reach, reach + 1, dtype=torch.float32)
    return torch.cartesian_prod(steps, steps, steps).flip(1)


def cost_volume(
    fixed: Float[Tensor, "b c z y x"],
    moving: Float[Tensor, "b c z y x"],
    *,
    reach: int,
    smoothing: int = 1,
    passes: int = 2,
    padding: Padding = "replicate",
    reduction: Literal["sum", "mean"] = "sum",
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "b l z y x"]:
    """Squared distance of each fixed voxel's features to those of the (2 reach + 1)^3 moving voxels around it.

    Entry (l, v) is sum_c (fixed_c(v) - moving_c(v + d_l))^2, or the mean over c, then the mean over a box of
    (2 smoothing + 1)^3 voxels, `passes` times. Both volumes have the same grid; features may be MIND-SSC, or an
    encoder's. `padding` is what lies beyond the border, of the moving features and of the box: the nearest voxel again,
    or zeros, as in ConvexAdam's code, which makes costs near the border smaller.

    The result takes (2 reach + 1)^3 volumes of `dtype`: float32 unless given (float64 for such features); float16
    halves it, and is infinite beyond 65504. Computed as |f|^2 + |m|^2 - 2 f.m around the mean features, in float32: an
    error of 1e-6 of the features' spread. The differences of all channels are never held.

    Features that require a gradient go through the definition, which keeps all differences: for tests and tiny grids
    (LUNGSSL_OPS knows that case as `cost_volume_with_gradient`).
    Repeats are bit-equal, with any number of threads.

    Raises ValueError for shapes or sizes that don't fit and RuntimeError for a forced backend that can't run.
    """
    alike = fixed.shape == moving.shape and fixed.dtype == moving.dtype
    if not alike or fixed.numel() == 0 or fixed.ndim != 5 or not fixed.is_floating_point():
        raise ValueError(
            f"cost_volume needs two non-empty feature volumes [b, c, z, y, x] of one shape and floating type, got "
            f"{tuple(fixed.shape)} {fixed.dtype} and {tuple(moving.shape)} {moving.dtype}; resample to one grid first"
        )
    if reach < 0 or smoothing < 0 or passes < 0:
        raise ValueError(
            f"cost_volume needs reach, smoothing and passes of 0 or more, got {reach}, {smoothing} and {passes}"
        )
    if padding not in ("replicate", "zero") or reduction not in ("sum", "mean"):
        raise ValueError(
            f"padding must be 'replicate' or 'zero' and reduction 'sum' or 'mean', got {padding!r} and {reduction!r}"
        )
    dtype = dtype or torch.promote_types(fixed.dtype, torch.float32)
    if dtype not in DTYPES:
        raise ValueError(f"cost_volume can't give {dtype}; it gives {', '.join(str(d) for d in DTYPES)}")
    wants_gradient = torch.is_grad_enabled() and (fixed.requires_grad or moving.requires_grad)
    function = (_differentiable if wants_gradient else _cost_volume)(fixed, moving, backend=backend)
    return function(
        fixed,
        moving,
        reach=reach,
        smoothing=smoothing,
        passes=passes,
        padding=padding,
        mean=reduction == "mean",
        dtype=dtype,
    )


def coupled_convex(
    cost: Float[Tensor, "b l z y x"],
    *,
    weights: Sequence[float] = PUBLISHED_WEIGHTS,
    smoothing: int = 1,
    padding: Padding = "replicate",
    backend: Backend = "auto",
) -> Float[Tensor, "b 3 z y x"]:
    """The smooth displacement field that a cost volume supports, components (x, y, z) in voxels of its grid.

    Starts from the displacement of least cost at each voxel; then, for each weight w, smooths the field by the mean s
    over a box of (2 smoothing + 1)^3 voxels and takes the displacement of least cost + w |d - s|^2; smooths once more.
    Of equal labels the lowest wins, in every backend: all give the same bits. Weights are in units of cost per squared
    voxel: the published ones suit sums over MIND-SSC's 12 channels; scale them with other features. `padding` as in
    `cost_volume`; zeros, as in ConvexAdam's code, pull the field towards 0 at the border.

    Reads the cost once per weight and once before, and holds a few volumes beside it. Costs must not be NaN. There is
    no gradient: the smallest label has none.

    Raises ValueError for a number of labels that isn't (2 reach + 1)^3 and for a cost that requires a gradient, and
    RuntimeError for a forced backend that can't run.
    """
    side_of(cost.shape[1])
    if cost.numel() == 0 or smoothing < 0 or padding not in ("replicate", "zero"):
        raise ValueError(
            f"coupled_convex needs a non-empty cost, smoothing of 0 or more and padding 'replicate' or 'zero', got "
            f"shape {tuple(cost.shape)}, {smoothing} and {padding!r}"
        )
    if torch.is_grad_enabled() and cost.requires_grad:
        raise ValueError("coupled_convex has no gradient, but the cost requires one; detach() it")
    step = _coupled_argmin(cost, backend=backend)
    b, _, z, y, x = cost.shape
    work = torch.promote_types(cost.dtype, torch.float32)
    field = step(cost, torch.zeros((b, 3, z, y, x), dtype=work, device=cost.device), weight=0.0)
    for weight in weights:
        smooth = box_mean(field, radius=smoothing, passes=1, padding=padding)
        field = step(cost, smooth, weight=float(weight))
    return box_mean(field, radius=smoothing, passes=1, padding=padding)
