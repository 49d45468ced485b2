"""The definitions: where a view's voxels lie in the volume, and what is read there. A view at a time, any device."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int16, Int32, UInt8
from torch import Tensor

from lungssl_ops.ct_views.philox import normals
from lungssl_ops.ct_views.table import Packed, check_values, samples_per_voxel
from lungssl_ops.patches.reference import patchify

WHOLLY = 0.999
"""Share of the weights that must lie on the mask; the rest is rounding."""


def ct_views_reference(
    volumes: list[Int16[Tensor, "_z _y _x"]],
    packed: Packed,
    size_vox: Sequence[int],
    *,
    patch_vox: Sequence[int],
    fill_hu: float | None,
    antialias: bool,
    dtype: torch.dtype,
) -> Float[Tensor, "v 1 z y x"] | Float[Tensor, "v n p"]:
    """See `lungssl_ops.ct_views.ct_views`; computed in float64 for that dtype, else in float32."""
    check_values(packed, len(volumes))
    device, work = volumes[0].device, torch.promote_types(dtype, torch.float32)
    samples = samples_per_voxel(packed.numbers, antialias=antialias)
    out = torch.empty((len(packed.volume), 1, *size_vox), dtype=dtype, device=device)
    for view, volume in enumerate(packed.volume.tolist()):
        low, high, shift, gamma, noise_hu = packed.numbers[view, 12:].to(work).tolist()
        hu = _average(volumes[volume].to(work), packed, view, size_vox, samples[view], fill_hu)
        if noise_hu > 0:
            hu = hu + noise_hu * normals(packed.seed[view : view + 1].to(device), hu.numel(), work)[0]
        windowed = ((hu + shift - low) / (high - low)).clamp(0, 1)
        out[view, 0] = (windowed**gamma).reshape(*size_vox).to(dtype)
    if not patch_vox:
        return out
    pz, py, px = patch_vox
    return patchify(out, (pz, py, px))


def mask_views_reference(
    masks: list[UInt8[Tensor, "_z _y _x"]],
    packed: Packed,
    size_vox: Sequence[int],
    *,
    wholly: bool,
    antialias: bool,
) -> UInt8[Tensor, "v z y x"]:
    """See `lungssl_ops.ct_views.mask_views`."""
    check_values(packed, len(masks))
    samples = samples_per_voxel(packed.numbers, antialias=antialias)
    out = torch.empty((len(packed.volume), *size_vox), dtype=torch.uint8, device=masks[0].device)
    for view, index in enumerate(packed.volume.tolist()):
        mask = masks[index]
        if wholly:
            share = _average((mask != 0).float(), packed, view, size_vox, samples[view], 0.0)
            out[view] = (share > WHOLLY).reshape(*size_vox)
            continue
        position = positions(packed, view, size_vox, _voxels(size_vox, mask.device, torch.float32))
        x, y, z = (_whole(p + 0.5, side) for p, side in zip(position, mask.shape[::-1], strict=True))
        out[view] = _read(mask, z, y, x, 0.0).reshape(*size_vox)
    return out


def view_coords_mm_reference(
    packed: Packed, size_vox: Sequence[int], voxel_to_mm: Float[Tensor, "v 3 4"]
) -> Float[Tensor, "v 3 z y x"]:
    """See `lungssl_ops.ct_views.view_coords_mm`."""
    voxels = _voxels(size_vox, voxel_to_mm.device, voxel_to_mm.dtype)
    out = voxel_to_mm.new_empty((len(voxel_to_mm), 3, *size_vox))
    for view, matrix in enumerate(voxel_to_mm):
        out[view] = apply_affine(matrix, positions(packed, view, size_vox, voxels)).reshape(3, *size_vox)
    return out


def positions(packed: Packed, view: int, size_vox: Sequence[int], voxels: Float[Tensor, "3 p"]) -> Float[Tensor, "3 p"]:
    """Where voxels (x, y, z) of a view, whole or not, lie in its volume, in its voxels (x, y, z)."""
    position = apply_affine(packed.numbers[view, :12].reshape(3, 4).to(voxels), voxels)
    if packed.lattice is not None:
        position = position + _displacement(packed.lattice[view].to(voxels), size_vox, voxels)
    return position


def apply_affine(affine: Float[Tensor, "3 4"], points: Float[Tensor, "3 p"]) -> Float[Tensor, "3 p"]:
    """Not as a matrix product: on a GPU that may run in TF32, which is off by tenths of a voxel."""
    x, y, z = points
    return torch.stack([row[0] * x + row[1] * y + row[2] * z + row[3] for row in affine])


def _voxels(size_vox: Sequence[int], device: torch.device, dtype: torch.dtype) -> Float[Tensor, "3 p"]:
    """Indices (x, y, z) of all voxels of a view, x fastest."""
    axes = [torch.arange(side, device=device, dtype=dtype) for side in size_vox]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([x, y, z]).flatten(1)


def _displacement(
    lattice: Float[Tensor, "3 n n n"], size_vox: Sequence[int], voxels: Float[Tensor, "3 p"]
) -> Float[Tensor, "3 p"]:
    """Trilinear between the nodes; beyond the first and the last voxel, as there."""
    n = lattice.shape[-1]
    lower, upper = [], []
    for voxel, side in zip(voxels, size_vox[::-1], strict=True):
        place = (voxel * ((n - 1) / max(side - 1, 1))).clamp(0, n - 1)
        cell = place.floor().clamp_max(n - 2)
        lower.append((cell.long(), 1 - (place - cell)))
        upper.append((cell.long() + 1, place - cell))
    result = torch.zeros_like(voxels)
    for corner in range(8):
        (x, wx), (y, wy), (z, wz) = ((upper if corner >> axis & 1 else lower)[axis] for axis in range(3))
        result += wx * wy * wz * lattice[:, z, y, x]
    return result


def _average(
    volume: Float[Tensor, "z y x"],
    packed: Packed,
    view: int,
    size_vox: Sequence[int],
    samples: Int32[Tensor, "3"],
    fill: float | None,
) -> Float[Tensor, " p"]:
    """Mean of trilinear samples spread evenly over each voxel; all of a voxel's samples are displaced alike."""
    voxels = _voxels(size_vox, volume.device, volume.dtype)
    centre = positions(packed, view, size_vox, voxels)
    linear = packed.numbers[view, :12].reshape(3, 4)[:, :3].to(volume)
    nx, ny, nz = samples.tolist()
    total = torch.zeros_like(centre[0])
    for k in range(nx * ny * nz):
        offset = [(i + 0.5) / n - 0.5 for i, n in ((k % nx, nx), (k // nx % ny, ny), (k // (nx * ny), nz))]
        step = linear[:, 0] * offset[0] + linear[:, 1] * offset[1] + linear[:, 2] * offset[2]
        total += _trilinear(volume, centre + step[:, None], fill)
    return total / (nx * ny * nz)


def _trilinear(
    volume: Float[Tensor, "z y x"], position: Float[Tensor, "3 p"], fill: float | None
) -> Float[Tensor, " p"]:
    """Beyond the border voxels' centres lie voxels of `fill`, or with None the nearest voxel of the border."""
    lower, upper = [], []
    for p, side in zip(position, volume.shape[::-1], strict=True):
        # A comparison with NaN is false: such a position, too, is outside.
        p = torch.where(p > -1, p, -1.0).clamp_max(side) if fill is not None else _held(p, side)
        floor = p.floor()
        index = floor.long()
        lower.append((index, 1 - (p - floor)))
        upper.append((index + 1 if fill is not None else (index + 1).clamp_max(side - 1), p - floor))
    result = torch.zeros_like(position[0])
    for corner in range(8):
        (x, wx), (y, wy), (z, wz) = ((upper if corner >> axis & 1 else lower)[axis] for axis in range(3))
        result += wx * wy * wz * _read(volume, z, y, x, 0.0 if fill is None else fill)
    return result


def _held(p: Float[Tensor, " p"], side: int) -> Float[Tensor, " p"]:
    return torch.where(p > 0, p, 0.0).clamp_max(side - 1)


def _whole(p: Float[Tensor, " p"], side: int) -> Tensor:
    """The index below a position, -1 or `side` for all that lie outside."""
    return torch.where(p > -1, p, -1.0).clamp_max(side).floor().long()


def _read(volume: Tensor, z: Tensor, y: Tensor, x: Tensor, fill: float) -> Tensor:
    """The voxels at these indices, or `fill` outside."""
    inside = torch.ones_like(x, dtype=torch.bool)
    for index, side in zip((z, y, x), volume.shape, strict=True):
        inside &= (index >= 0) & (index < side)
    _, sy, sx = volume.shape
    flat = torch.where(inside, (z * sy + y) * sx + x, 0)
    return torch.where(inside, volume.flatten()[flat], fill).to(volume.dtype)
