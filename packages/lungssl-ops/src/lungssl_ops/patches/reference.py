"""The definitions: volumes as rows of patches, and the masked reconstruction error on them."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def patchify(volume: Float[Tensor, "b c z y x"], patch_vox: tuple[int, int, int]) -> Float[Tensor, "b n p"]:
    """Cut volumes into patches of `patch_vox` (z, y, x) voxels.

    Patches run in (z, y, x) order with x fastest; inside a patch so do the voxels, after the channel. So the rows match
    `weight.flatten(1)` of a Conv3d whose stride is its kernel.

    Raises ValueError where a side isn't a multiple of the patch.
    """
    b, c, *sides = volume.shape
    if any(side % patch for side, patch in zip(sides, patch_vox, strict=True)):
        raise ValueError(
            f"volume sides (z, y, x) {tuple(sides)} must be multiples of the patch {patch_vox}; crop or pad first"
        )
    (pz, py, px), (gz, gy, gx) = patch_vox, (side // patch for side, patch in zip(sides, patch_vox, strict=True))
    blocks = volume.reshape(b, c, gz, pz, gy, py, gx, px).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return blocks.reshape(b, gz * gy * gx, c * pz * py * px)


def unpatchify(
    patches: Float[Tensor, "b n p"], grid: tuple[int, int, int], patch_vox: tuple[int, int, int]
) -> Float[Tensor, "b c z y x"]:
    """The inverse of `patchify`; `grid` is the number of patches along (z, y, x).

    Raises ValueError where the rows don't fill the grid with whole patches.
    """
    b, n, p = patches.shape
    (gz, gy, gx), (pz, py, px) = grid, patch_vox
    if n != gz * gy * gx or p % (pz * py * px):
        raise ValueError(f"{n} rows of {p} values don't fill a grid of {grid} patches of {patch_vox} voxels")
    c = p // (pz * py * px)
    blocks = patches.reshape(b, gz, gy, gx, c, pz, py, px).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return blocks.reshape(b, c, gz * pz, gy * py, gx * px)


def masked_patch_mse_reference(
    pred: Float[Tensor, "b n p"],
    target_patches: Float[Tensor, "b n p"],
    mask: Bool[Tensor, "b n"],
    weight: Float[Tensor, "b n p"],
    *,
    norm: Literal["patch", "none"] = "patch",
    variance_floor: float = 1e-6,
) -> Float[Tensor, ""]:
    """See `lungssl_ops.patches.masked_patch_mse`."""
    dtype = torch.promote_types(pred.dtype, torch.float32)
    pred, target, weight = pred.to(dtype), target_patches.to(dtype), weight.to(dtype)
    if norm == "patch":
        counted = (weight > 0).to(dtype)
        count = counted.sum(dim=-1, keepdim=True)
        centred = target - (target * counted).sum(dim=-1, keepdim=True) / count.clamp_min(1.0)
        # Two passes: mean of squares minus squared mean cancels in flat patches.
        variance = (centred.square() * counted).sum(dim=-1, keepdim=True) / (count - 1.0).clamp_min(1.0)
        target = centred / variance.clamp_min(variance_floor).sqrt()
    weight = weight * mask[..., None]
    return (weight * (pred - target).square()).sum() / weight.sum()
