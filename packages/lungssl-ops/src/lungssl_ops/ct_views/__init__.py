"""All views of a training step from int16 CT volumes, in one call: geometry, sampling, noise, window, gamma.

For voxel v = (x, y, z) of a view, with A its affine, e its elastic lattice and I the volume in HU,

    p(v)   = A v + e(v)                                               in voxels of the volume, (x, y, z)
    hu(v)  = I(p(v)) + noise_hu * n(v) + shift_hu                     trilinear; n: normal numbers of `philox.py`
    out(v) = clamp((hu(v) - low) / (high - low), 0, 1) ^ gamma        in [0, 1]

HU are interpolated before the window clips them: the other way round, edges between air and tissue would move. Where a
step of the view is longer than 1.5 voxels of the volume, I(p) is a mean of several samples per voxel (`antialias`).
The result does not depend on the number of threads, the other views of the call, or the layout; between the backends it
differs by rounding only, because the random words are the same everywhere. Views have no gradients.

    table = ViewTable(
        volume=torch.tensor([0, 0]),
        affine=view_affine((48, 48, 48), centre_vox, rotation * zoom),
        noise_hu=torch.tensor([10.0, 20.0]),
        seed=torch.tensor([7, 8]),
    )
    image = ct_views(ct_hu, table, (48, 48, 48))                                  # [2, 1, 48, 48, 48]
    tokens = ct_views(ct_hu, table, (48, 48, 48), patch_vox=(8, 8, 8))            # [2, 216, 512]
    lung = mask_views(lung_masks, table, (48, 48, 48))                            # [2, 48, 48, 48]
    where = view_coords_mm(table, (48, 48, 48), voxel_to_mm)                      # [2, 3, 48, 48, 48]
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Float32, Int16, UInt8
from torch import Tensor

from lungssl_ops.cpp import cpp_problem
from lungssl_ops.ct_views.reference import apply_affine, positions
from lungssl_ops.ct_views.table import HU_WINDOW, ViewTable, check_size, view_affine
from lungssl_ops.dispatch import Backend, Dispatch, Implementation, triton_problem

__all__ = ["HU_WINDOW", "ViewTable", "ct_views", "mask_views", "view_affine", "view_coords_mm", "view_points_mm"]

SOURCE = Path(__file__).with_name("ct_views.cpp")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FOLDER = "lungssl_ops.ct_views"


def _triton(function: str) -> Implementation:
    name = f"{_FOLDER}.triton:{function}_triton"
    return Implementation(backend="triton", function=name, devices=("cuda",), problem=triton_problem)


def _cpp(function: str) -> Implementation:
    name, problem = f"{_FOLDER}.cpu:{function}_cpp", partial(cpp_problem, SOURCE)
    return Implementation(backend="cpp", function=name, devices=("cpu",), problem=problem)


def _reference(function: str) -> Implementation:
    return Implementation(backend="reference", function=f"{_FOLDER}.reference:{function}_reference")


_views = Dispatch("ct_views", _triton("ct_views"), _cpp("ct_views"), _reference("ct_views"))
_views_float64 = Dispatch("ct_views_float64", _reference("ct_views"))
_masks = Dispatch("mask_views", _triton("mask_views"), _cpp("mask_views"), _reference("mask_views"))
_coords = Dispatch("view_coords_mm", _triton("view_coords_mm"), _cpp("view_coords_mm"), _reference("view_coords_mm"))


def ct_views(
    volumes: Int16[Tensor, "b z y x"] | Sequence[Int16[Tensor, "_z _y _x"]],
    table: ViewTable,
    size_vox: tuple[int, int, int],
    *,
    patch_vox: tuple[int, int, int] | None = None,
    fill_hu: float | None = -1000.0,
    antialias: bool = True,
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> Float[Tensor, "_v 1 _z _y _x"] | Float[Tensor, "_v _n _p"]:
    """Views of `size_vox` (z, y, x) voxels, each as its row of `table` says; the formulas stand above.

    `volumes` hold HU; a list may hold different sizes, all on one device, where the result is, too.
    `patch_vox` gives rows of patches as `lungssl_ops.patches.patchify` does, ready for a linear patch embedding.
    `fill_hu` lies beyond the volume's outermost voxel centres (within a voxel of them it is blended in); None repeats
    the outermost voxels instead. `antialias` averages, along each axis of the view, as many samples as its step has
    voxels (halves rounded down), spread evenly; up to a step of 1.5 that is one.
    `dtype` may be float16, bfloat16, float32, or float64, which the definition computes on any device and LUNGSSL_OPS
    knows as `ct_views_float64`; all others are computed in float32.

    Raises ValueError for tables, sizes or volumes that don't go together, RuntimeError for a forced backend that can't
    run here.
    """
    parts = _parts("ct_views", volumes, torch.int16)
    check_size(size_vox, patch_vox or ())
    if dtype not in DTYPES:
        raise ValueError(f"ct_views can't give {dtype}; it gives {', '.join(str(d) for d in DTYPES)}")
    if fill_hu is not None and not abs(fill_hu) <= 2**15:
        raise ValueError(f"fill_hu is {fill_hu}; expected HU of int16, or None to repeat the outermost voxels")
    dispatch = _views_float64 if dtype == torch.float64 else _views
    return dispatch(parts[0], backend=backend)(
        parts,
        table.packed(),
        list(size_vox),
        patch_vox=list(patch_vox or ()),
        fill_hu=fill_hu,
        antialias=antialias,
        dtype=dtype,
    )


def mask_views(
    masks: UInt8[Tensor, "b z y x"] | Sequence[UInt8[Tensor, "_z _y _x"]],
    table: ViewTable,
    size_vox: tuple[int, int, int],
    *,
    rule: Literal["nearest", "wholly"] = "nearest",
    antialias: bool = True,
    backend: Backend = "auto",
) -> UInt8[Tensor, "_v _z _y _x"]:
    """Masks at the positions of the same table's `ct_views`; volumes, sizes and errors as there. 0 beyond the volume.

    rule="nearest" reads the label of the nearest voxel (halves go up) at the centre of each of the view's. For
    "wholly", a voxel is 1 where over 99.9 % of the weights that `ct_views` would use lie on nonzero voxels, else 0:
    from a mask of what was measured, the voxels of the view that saw nothing else.
    """
    parts = _parts("mask_views", masks, torch.uint8)
    check_size(size_vox, ())
    if rule not in ("nearest", "wholly"):
        raise ValueError(f"mask_views has no rule {rule!r}; expected 'nearest' or 'wholly'")
    implementation = _masks(parts[0], backend=backend)
    return implementation(parts, table.packed(), list(size_vox), wholly=rule == "wholly", antialias=antialias)


def view_coords_mm(
    table: ViewTable,
    size_vox: tuple[int, int, int],
    voxel_to_mm: Float32[Tensor, "v 3 4"],
    *,
    backend: Backend = "auto",
) -> Float32[Tensor, "v 3 _z _y _x"]:
    """Where every voxel of the views was sampled, in mm (x, y, z): `voxel_to_mm[v]` applied to p of view v.

    `voxel_to_mm` maps voxel indices (x, y, z) of that view's volume to mm; the identity gives p itself. On its device.
    12 bytes a voxel: for a few voxels take `view_points_mm`.
    """
    check_size(size_vox, ())
    _check_map(table, voxel_to_mm)
    return _coords(voxel_to_mm, backend=backend)(table.packed(), list(size_vox), voxel_to_mm)


def view_points_mm(
    table: ViewTable,
    size_vox: tuple[int, int, int],
    voxel_to_mm: Float[Tensor, "v 3 4"],
    voxels: Float[Tensor, "v p 3"],
) -> Float[Tensor, "v p 3"]:
    """As `view_coords_mm`, for some voxels (x, y, z) of each view, which needn't be whole; in their dtype."""
    check_size(size_vox, ())
    _check_map(table, voxel_to_mm)
    packed = table.packed()
    points = torch.empty_like(voxels)
    for view, matrix in enumerate(voxel_to_mm):
        position = positions(packed, view, size_vox, voxels[view].T)
        points[view] = apply_affine(matrix.to(voxels), position).T
    return points


def _check_map(table: ViewTable, voxel_to_mm: Tensor) -> None:
    if voxel_to_mm.shape != (len(table), 3, 4):
        raise ValueError(f"voxel_to_mm has shape {tuple(voxel_to_mm.shape)}; expected [{len(table)}, 3, 4], one a view")


def _parts(op: str, volumes: Tensor | Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The volumes one by one, after checks: kernels are given their addresses."""
    if isinstance(volumes, Tensor) and volumes.dim() != 4:
        raise ValueError(f"{op} got volumes of shape {tuple(volumes.shape)}; expected [b, z, y, x] or a list of them")
    parts = list(volumes)
    if not parts:
        raise ValueError(f"{op} got no volumes")
    for part in parts:
        if part.dtype != dtype or part.dim() != 3 or part.numel() == 0 or part.device != parts[0].device:
            raise ValueError(
                f"{op} got a volume of {part.dtype}, shape {tuple(part.shape)}, on {part.device}; expected {dtype}, "
                f"three sizes above 0, all on {parts[0].device}"
            )
    return parts
