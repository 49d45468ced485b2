"""Predictors of one scan from the other that learn nothing, and how far attention is from the true place.

`ssl.md` C2: a network that doesn't beat the copy at the same place has learned nothing; between the affine copy and the
copy by the true displacement, it has learned motion.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from lungssl_data.batch import PairBatch, View
from lungssl_data.views import scale_hu
from torch import Tensor

from lungssl_methods.choices import check_choice
from lungssl_methods.correspondence import features_at, voxel_of
from lungssl_methods.physics import compressed_hu, jacobian_of_view_map, to_hu

Copy = Literal["identity", "affine", "warp", "density"]
COPIES: tuple[Copy, ...] = ("identity", "affine", "warp", "density")


def copied(
    batch: PairBatch, first: View, second: View, how: Copy
) -> tuple[Float[Tensor, "b 1 z y x"], Bool[Tensor, "b z y x"]]:
    """Slot 0's view made of slot 1's, in network input, and where that is known and measured.

    "identity": slot 1 at the same LPS mm; "affine": at the coarse map's; "warp": at the cache's displacement;
    "density": that, its tissue pressed into the exhale volume (`physics.compressed_hu`).
    Raises ValueError for other slots.
    """
    if (first.slot, second.slot) != (0, 1):
        raise ValueError(f"slot 0 is copied from slot 1, got slots {first.slot} and {second.slot}")
    place = places_mm(batch, first, how)
    b, _, z, y, x = place.shape
    vox, found = voxel_of(second, place.flatten(2).mT)
    values = features_at(second.image, vox, 1).mT.reshape(b, 1, z, y, x)
    measured = features_at(second.valid[:, None].to(second.image.dtype), vox, 1)[..., 0] > 1 - 1e-3
    known = (found & measured).reshape(b, z, y, x)
    if how == "density":
        jacobian = jacobian_of_view_map(first.coords_mm, place)
        values = scale_hu(compressed_hu(to_hu(values), jacobian.nan_to_num(1.0)[:, None])).to(values)
        known = known & jacobian.isfinite()
    return values, known


def places_mm(batch: PairBatch, first: View, how: Copy) -> Float[Tensor, "b 3 z y x"]:
    """Where each predictor looks in slot 1's scan for slot 0's voxels, LPS mm; NaN where it doesn't know.

    Raises ValueError for an unknown predictor.
    """
    check_choice("places_mm's predictor", how, COPIES)
    if how == "identity":
        return first.coords_mm
    if how == "affine":
        turn = batch.exhale_to_inhale
        moved = torch.einsum("bij,bjzyx->bizyx", turn[:, :, :3], first.coords_mm) + turn[:, :, 3, None, None, None]
        return torch.where(batch.paired()[:, None, None, None, None], moved, first.coords_mm)
    if first.partner_mm is None:
        return torch.full_like(first.coords_mm, torch.nan)
    return first.partner_mm


def attention_tre_mm(
    weights: Float[Tensor, "b n m"], memory_mm: Float[Tensor, "b m 3"], truth_mm: Float[Tensor, "b n 3"]
) -> Float[Tensor, ""]:
    """Median distance of where tokens look, the mean of the memory's places under `weights`, to where they should.

    Over tokens with a finite truth, NaN without any; places of the memory that aren't known (NaN) get no weight.
    """
    known = memory_mm.isfinite().all(dim=-1)[:, None]
    kept = weights * known
    place = (kept @ memory_mm.nan_to_num(0.0)) / kept.sum(dim=-1, keepdim=True).clamp_min(1e-12)
    distance = torch.linalg.vector_norm(place - truth_mm, dim=-1)
    return distance[truth_mm.isfinite().all(dim=-1)].nanmedian()
