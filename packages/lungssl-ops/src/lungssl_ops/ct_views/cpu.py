"""The views in C++: one pass over the output, each row by one thread; nothing is held in memory but the result."""

import ctypes

import torch
from jaxtyping import Float, Float32, Int16, UInt8
from torch import Tensor

from lungssl_ops.cpp import library, pointer, threads
from lungssl_ops.ct_views import SOURCE
from lungssl_ops.ct_views.fakes import masks_fake, views_fake
from lungssl_ops.ct_views.table import Packed, check_values, samples_per_voxel, views_shape


def ct_views_cpp(
    volumes: list[Int16[Tensor, "_z _y _x"]],
    packed: Packed,
    size_vox: list[int],
    *,
    patch_vox: list[int],
    fill_hu: float | None,
    antialias: bool,
    dtype: torch.dtype,
) -> Float[Tensor, "v 1 z y x"] | Float[Tensor, "v n p"]:
    """`ct_views_reference` in float32."""
    # float16 is rare on a CPU, and is converted here.
    direct = torch.float32 if dtype == torch.float16 else dtype
    return _ct_views(volumes, *packed, size_vox, patch_vox, fill_hu, antialias, direct).to(dtype)


def mask_views_cpp(
    masks: list[UInt8[Tensor, "_z _y _x"]], packed: Packed, size_vox: list[int], *, wholly: bool, antialias: bool
) -> UInt8[Tensor, "v z y x"]:
    """`mask_views_reference`."""
    return _mask_views(masks, *packed, size_vox, wholly, antialias)


def view_coords_mm_cpp(
    packed: Packed, size_vox: list[int], voxel_to_mm: Float32[Tensor, "v 3 4"]
) -> Float32[Tensor, "v 3 z y x"]:
    """`view_coords_mm_reference`."""
    return _view_coords_mm(packed.numbers, packed.lattice, size_vox, voxel_to_mm)


@torch.library.custom_op("lungssl_ops::ct_views_cpp", mutates_args=())
def _ct_views(
    volumes: list[Tensor],
    volume: Tensor,
    numbers: Tensor,
    seed: Tensor,
    lattice: Tensor | None,
    size_vox: list[int],
    patch_vox: list[int],
    fill_hu: float | None,
    antialias: bool,
    dtype: torch.dtype,
) -> Tensor:
    check_values(Packed(volume, numbers, seed, lattice), len(volumes))
    out = torch.empty(views_shape(len(volume), size_vox, patch_vox), dtype=dtype)
    sources = _sources(volumes, volume)
    library(SOURCE).ct_views(
        pointer(sources[0]),
        *_geometry(numbers, lattice, size_vox),
        pointer(samples_per_voxel(numbers, antialias=antialias)),
        pointer(seed.contiguous()),
        *(ctypes.c_int64(side) for side in patch_vox or size_vox),
        ctypes.c_int(fill_hu is None),
        ctypes.c_float(fill_hu or 0.0),
        ctypes.c_int(dtype == torch.bfloat16),
        pointer(out),
        threads(),
    )
    return out


_ct_views.register_fake(views_fake)


@torch.library.custom_op("lungssl_ops::mask_views_cpp", mutates_args=())
def _mask_views(
    masks: list[Tensor],
    volume: Tensor,
    numbers: Tensor,
    seed: Tensor,
    lattice: Tensor | None,
    size_vox: list[int],
    wholly: bool,
    antialias: bool,
) -> Tensor:
    check_values(Packed(volume, numbers, seed, lattice), len(masks))
    out = torch.empty((len(volume), *size_vox), dtype=torch.uint8)
    sources = _sources(masks, volume)
    library(SOURCE).mask_views(
        pointer(sources[0]),
        *_geometry(numbers, lattice, size_vox),
        pointer(samples_per_voxel(numbers, antialias=antialias)),
        ctypes.c_int(wholly),
        pointer(out),
        threads(),
    )
    return out


_mask_views.register_fake(masks_fake)


@torch.library.custom_op("lungssl_ops::view_coords_mm_cpp", mutates_args=())
def _view_coords_mm(numbers: Tensor, lattice: Tensor | None, size_vox: list[int], voxel_to_mm: Tensor) -> Tensor:
    out = torch.empty((len(numbers), 3, *size_vox), dtype=torch.float32)
    to_mm = pointer(voxel_to_mm.contiguous())
    library(SOURCE).view_coords(*_geometry(numbers, lattice, size_vox), to_mm, pointer(out), threads())
    return out


@_view_coords_mm.register_fake
def _(numbers: Tensor, lattice: Tensor | None, size_vox: list[int], voxel_to_mm: Tensor) -> Tensor:
    return numbers.new_empty((len(numbers), 3, *size_vox))


def _geometry(numbers: Tensor, lattice: Tensor | None, size_vox: list[int]) -> list[object]:
    """The kernels' arguments for where the views lie."""
    nodes = 0 if lattice is None else lattice.shape[-1]
    sizes = [ctypes.c_int64(number) for number in (nodes, len(numbers), *size_vox)]
    return [pointer(numbers.contiguous()), pointer(None if lattice is None else lattice.contiguous()), *sizes]


def _sources(volumes: list[Tensor], volume: Tensor) -> list[Tensor]:
    """An address and three sizes per view, and the volumes they belong to: whoever has the first must hold the rest."""
    contiguous = [part.contiguous() for part in volumes]
    table = torch.tensor([[part.data_ptr(), *part.shape] for part in contiguous])
    return [table[volume].contiguous(), *contiguous]
