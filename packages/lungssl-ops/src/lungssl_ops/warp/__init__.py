"""Warp of a volume by a displacement field, with the folding, diffusion and bending of the field from the same pass.

A displacement is a tensor `u_vox` of [b, 3, z, y, x]: components (x, y, z), in voxels of the grid it lives on. It
pulls: the warped image at voxel v is the image at v + u(v), so `u_vox` lives on the fixed grid and points into the
moving image, which has the same grid. A field in mm is divided by its spacing first:

    u_vox = u_mm / torch.tensor(spacing_mm).reshape(3, 1, 1, 1)        # both (x, y, z)

Outside the image its border repeats (`padding="border"`), or a constant lies there: 0 (`padding="zeros"`) or a number,
-1000 for HU. Where neither voxel next to a coordinate is in the image,
the value doesn't change with u: no gradient. A NaN displacement gives NaN at its
voxel, whatever the padding: a field that has diverged shows.

Values and gradients equal `torch.nn.functional.grid_sample(align_corners=True)`, to rounding; coordinates are in voxels
and at least float32 (half precision is computed in float32), where grid_sample's normalised ones lose 1e-5 voxel.
Gradients in u and in the image; no double backward. On a CPU they have the same bits in every run and for any number of
threads, on a GPU as `warp` says.
"""

import math
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lungssl_ops.cpp import cpp_problem
from lungssl_ops.dispatch import Backend, Dispatch, Implementation, compiled_problem, triton_problem
from lungssl_ops.warp.cpu import SOURCE
from lungssl_ops.warp.reference import bending, diffusion, folding, jacobian_determinant

__all__ = [
    "WarpTerms",
    "bending",
    "compose",
    "diffusion",
    "exponential",
    "folding",
    "jacobian_determinant",
    "warp",
    "warp_loss_terms",
]

Padding = Literal["border", "zeros"] | float | int
_FLOATS = (torch.float32, torch.float64)


def _dispatch_of(op: str) -> Dispatch:
    return Dispatch(
        op,
        Implementation(
            backend="triton",
            function=f"lungssl_ops.warp.triton:{op}_triton",
            devices=("cuda",),
            dtypes=_FLOATS,
            problem=triton_problem,
        ),
        Implementation(
            backend="cpp",
            function=f"lungssl_ops.warp.cpu:{op}_cpp",
            devices=("cpu",),
            dtypes=_FLOATS,
            problem=partial(cpp_problem, SOURCE),
        ),
        Implementation(
            backend="compiled",
            function=f"lungssl_ops.warp.compiled:{op}_compiled",
            devices=("cpu", "cuda"),
            problem=compiled_problem,
        ),
        Implementation(backend="reference", function=f"lungssl_ops.warp.reference:{op}_reference"),
    )


_warp, _warp_terms = _dispatch_of("warp"), _dispatch_of("warp_terms")


class WarpTerms(NamedTuple):
    """What `warp_loss_terms` gives."""

    warped: Float[Tensor, "b c z y x"]
    """The image at v + u(v)."""
    folding: Float[Tensor, " b"]
    """Mean of relu(-det(I + grad u)); no unit."""
    diffusion: Float[Tensor, " b"]
    """Mean of |grad u|^2, u in mm by mm; no unit."""
    bending: Float[Tensor, " b"] | None
    """Mean of the bending energy of u, in 1/mm^2; None unless asked for."""


def warp(
    image: Float[Tensor, "b c z y x"],
    u_vox: Float[Tensor, "b 3 z y x"],
    *,
    padding: Padding = "border",
    backend: Backend = "auto",
) -> Float[Tensor, "b c z y x"]:
    """The image at v + u(v), trilinear, in the wider dtype of the two; conventions as above.

    The gradient in u is gathered: no atomic additions. That in the image is too on a GPU while |u| is at most 2 voxels,
    as in the first steps of `exponential`; beyond, atomic additions make its last bits differ from run to run, unless
    `torch.use_deterministic_algorithms(True)` asks for the gather at any price ((2 |u| + 1)^3 reads a voxel).

    Raises ValueError where the two are on different grids, or the padding is unknown.
    """
    _check(image, u_vox)
    fill = _fill(padding)
    image, u_vox = _promoted(image, u_vox)
    return _warp(image, u_vox, backend=backend)(image, u_vox, fill=fill)


def warp_loss_terms(
    image: Float[Tensor, "b c z y x"],
    u_vox: Float[Tensor, "b 3 z y x"],
    *,
    weight: Float[Tensor, "b 1 z y x"] | None = None,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    with_bending: bool = False,
    padding: Padding = "border",
    backend: Backend = "auto",
) -> WarpTerms:
    """`warp`, and the regularisers of u per sample, in one pass; the backward is one pass too.

    The regularisers are those of `folding`, `diffusion` and `bending`, whose docstrings say which differences they
    take. `weight`, none below 0, says how much each voxel counts in them (a lung mask as 0 and 1); the warped image is
    not weighted. A sample whose weights are all 0 has terms and gradients of 0. Weights and
    u must be finite everywhere; neither is checked, for which the host would wait. `spacing_mm` is (x, y, z).

    Raises ValueError where grids differ, the weight requires a gradient, the spacing isn't positive, or the padding is
    unknown.
    """
    _check(image, u_vox)
    if weight is not None:
        if weight.shape != (u_vox.shape[0], 1, *u_vox.shape[2:]):
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}, expected {(u_vox.shape[0], 1, *u_vox.shape[2:])}: "
                f"one channel on the grid of u_vox"
            )
        if weight.requires_grad:
            raise ValueError(
                "warp_loss_terms doesn't differentiate the weight, but it requires a gradient; detach() it"
            )
    if len(spacing_mm) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing_mm):
        raise ValueError(f"spacing_mm is {spacing_mm}, expected three positive numbers (x, y, z)")
    fill = _fill(padding)
    image, u_vox = _promoted(image, u_vox)
    weight = None if weight is None else weight.to(u_vox.dtype)
    tensors = (image, u_vox) if weight is None else (image, u_vox, weight)
    function = _warp_terms(*tensors, backend=backend)
    warped, terms = function(
        image, u_vox, weight, fill=fill, spacing_mm=tuple(map(float, spacing_mm)), with_bending=with_bending
    )
    return WarpTerms(warped, terms[:, 0], terms[:, 1], terms[:, 2] if with_bending else None)


def compose(
    u_vox: Float[Tensor, "b 3 z y x"], v_vox: Float[Tensor, "b 3 z y x"], *, backend: Backend = "auto"
) -> Float[Tensor, "b 3 z y x"]:
    """The displacement of "first v, then u": w(p) = v(p) + u(p + v(p)); u repeats its border outside.

    So warp(image, compose(u, v)) is warp(warp(image, u), v), but for one interpolation instead of two.
    """
    return v_vox + warp(u_vox, v_vox, backend=backend)


def exponential(
    velocity_vox: Float[Tensor, "b 3 z y x"], *, steps: int = 7, backend: Backend = "auto"
) -> Float[Tensor, "b 3 z y x"]:
    """The displacement of exp(v), a stationary velocity followed for one unit of time.

    Scaling and squaring, Arsigny et al. 2006, doi:10.1007/11866565_113: v / 2^steps composed with itself `steps` times.
    exp(-v) is its inverse up to interpolation. The backward holds `steps` fields. 2^steps should be several times the
    largest |v| in voxels, so that the first step stays well below one.

    Raises ValueError for negative `steps`.
    """
    if steps < 0:
        raise ValueError(f"exponential takes {steps} squaring steps, expected 0 or more; 7 suits up to some 50 voxels")
    u_vox = velocity_vox / 2**steps
    for _ in range(steps):
        u_vox = compose(u_vox, u_vox, backend=backend)
    return u_vox


def _check(image: Tensor, u_vox: Tensor) -> None:
    expected = (image.shape[0], 3, *image.shape[2:])
    if image.ndim != 5 or u_vox.shape != expected:
        raise ValueError(
            f"u_vox has shape {tuple(u_vox.shape)}, expected {expected} for an image [b, c, z, y, x] of "
            f"{tuple(image.shape)}; resample one to the other's grid"
        )
    if not image.is_floating_point() or not u_vox.is_floating_point():
        raise ValueError(
            f"image is {image.dtype} and u_vox {u_vox.dtype}, expected floating point; convert with .float()"
        )
    if math.prod(image.shape[2:]) >= 2**31 or 0 in image.shape:
        raise ValueError(f"image has shape {tuple(image.shape)}, expected 1 to 2**31 - 1 voxels a volume; crop it")


def _fill(padding: Padding) -> float | None:
    if padding == "border":
        return None
    if padding == "zeros":
        return 0.0
    if isinstance(padding, str) or not math.isfinite(padding):
        raise ValueError(f"padding {padding!r} is unknown, expected 'border', 'zeros' or a finite number")
    return float(padding)


def _promoted(image: Tensor, u_vox: Tensor) -> tuple[Tensor, Tensor]:
    # float32 at least: at coordinate 160 one fp16 step is 0.125 voxel, one bf16 step a whole one.
    dtype = torch.promote_types(torch.promote_types(image.dtype, u_vox.dtype), torch.float32)
    return image.to(dtype), u_vox.to(dtype)
