"""What corresponds to what between two views: always in LPS mm, always with what is not known left out.

Two views of one scan correspond by the position that each voxel was sampled at (SAM's coordinate mesh: Yan et al. 2022,
https://arxiv.org/abs/2012.02383); views of two phases through `View.partner_mm`, which the cache's displacement gives.
Where both slots are crops of one scan, `partner_mm` is the position itself.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32
from lungssl_data.batch import PairBatch, View
from torch import Tensor

from lungssl_methods.method import Gather, LocalGather, own_rows

_NEWTON_STEPS = 6
"""Each squares the error of a smooth map; views are affine but for 3 mm of elastic displacement."""
_MOST_RESIDUAL_MM = 2e-3
"""Left after them, or the point is not in the view."""


@dataclass(frozen=True, kw_only=True)
class Matches:
    """Points of one view and where they are in another."""

    first_vox: Float32[Tensor, "b k 3"]
    """(x, y, z) index, fractions included, in the first view."""
    second_vox: Float32[Tensor, "b k 3"]
    """The same points in the second view."""
    second_mm: Float32[Tensor, "b k 3"]
    """Their LPS position in the second view's scan."""
    valid: Bool[Tensor, "b k"]
    """False for points that are not known to be in both views, measured and, if asked for, in the lung."""


def token_mean(voxels: Float[Tensor, "b c z y x"], stride_vox: int) -> Float[Tensor, "b n c"]:
    """Mean of each token's voxels, in (z, y, x) token order; NaN where one voxel is."""
    return F.avg_pool3d(voxels.float(), stride_vox).flatten(2).mT


def token_centres_mm(view: View, stride_vox: int) -> Float32[Tensor, "b n 3"]:
    """LPS position (x, y, z) of tokens in the view's own scan; NaN where half or more of the token is not measured."""
    measured = token_mean(view.valid[:, None].float(), stride_vox) > 0.5
    return torch.where(measured, token_mean(view.coords_mm, stride_vox), torch.nan)


def places_in(view: View, other: View, stride_vox: int) -> Float32[Tensor, "b n 3"]:
    """Where the tokens of `view` are in the scan of `other`, LPS mm; NaN where it is not known.

    Raises ValueError for views of two slots of which the first is slot 1, or that were read without correspondences.
    """
    own = token_centres_mm(view, stride_vox)
    if view.slot == other.slot:
        return own
    return torch.where(own.isnan(), torch.nan, token_mean(_partner(view), stride_vox))


def token_matches(first: View, second: View, stride_vox: int, *, sigma_mm: float) -> Float32[Tensor, "b n m"]:
    """For each token of `first` (rows), weights of the tokens of `second` (columns) that show the same place.

    Gaussian in their distance, of standard deviation `sigma_mm`; rows sum to 1, or to 0 for tokens whose place is not
    known or has no token of `second` within a token's half diagonal. Slots in either order.
    """
    if first.slot == 1 and second.slot == 0:  # the map is known from slot 0 on: compare in slot 1's scan
        here, there = token_centres_mm(first, stride_vox), places_in(second, first, stride_vox)
    else:
        here, there = places_in(first, second, stride_vox), token_centres_mm(second, stride_vox)
    distance = torch.cdist(here.nan_to_num(0.0), there.nan_to_num(0.0))
    known = ~(here.isnan().any(-1)[:, :, None] | there.isnan().any(-1)[:, None])
    distance = distance.masked_fill(~known, torch.inf)
    nearest = distance.amin(dim=2, keepdim=True)
    # Softmax of -d^2 / 2 s^2 relative to the nearest: far ones underflow to 0, the nearest never does.
    weight = torch.exp((nearest.nan_to_num(posinf=0.0).square() - distance.square()) / (2 * sigma_mm**2))
    weight = weight / weight.sum(dim=2, keepdim=True).clamp_min(1e-12)
    return torch.where(nearest <= half_diagonal_mm(second, stride_vox), weight, 0.0)


def sample_matches(
    first: View,
    second: View,
    count: int,
    *,
    generator: torch.Generator | None = None,
    in_lung: bool = True,
    gather: Gather | None = None,
) -> Matches:
    """`count` random voxels per sample of `first`, and where they are in `second`, to a small part of a voxel.

    The second view's map from voxels to mm is inverted by Newton's method from the nearest voxel of a coarse grid.
    Drawn from the CPU generator (None: torch's own) among measured voxels, in the lung if `in_lung`, with replacement;
    a sample without any gets none that is valid. With a `gather`, a sample's are those that one process would draw.
    Raises ValueError as `places_in`.
    """
    b, _, _, y, x = first.image.shape
    device = first.image.device
    wanted = (first.valid & first.lung) if in_lung else first.valid
    flat = wanted.flatten(1).float()
    # A share of the sorted voxels, so that the draw is the same on every device.
    order = flat.argsort(dim=1, descending=True, stable=True)
    number = flat.sum(dim=1).long()
    gather = gather or LocalGather()
    draw = own_rows(torch.rand(b * gather.ranks, count, generator=generator), gather).to(device)
    index = order.gather(1, (draw * number[:, None]).long().clamp(max=order.shape[1] - 1))
    position = first.coords_mm if first.slot == second.slot else _partner(first)
    second_mm = position.flatten(2).gather(2, index[:, None].expand(-1, 3, -1)).mT
    first_vox = torch.stack([index % x, index // x % y, index // (x * y)], dim=-1).float()
    second_vox, found = voxel_of(second, second_mm)
    target = (second.valid & second.lung) if in_lung else second.valid
    there = _nearest(target, second_vox)
    valid = (number > 0)[:, None] & found & there
    return Matches(first_vox=first_vox, second_vox=second_vox, second_mm=second_mm, valid=valid)


def features_at(
    features: Float[Tensor, "b c z y x"], vox: Float[Tensor, "b k 3"], stride_vox: int
) -> Float[Tensor, "b k c"]:
    """A feature map at voxel positions (x, y, z) of its view: linear between the centres of cells of `stride_vox`."""
    size = torch.tensor(features.shape[:1:-1], device=vox.device, dtype=vox.dtype) * stride_vox
    where = 2 * (vox + 0.5) / size - 1
    found = F.grid_sample(
        features, where[:, :, None, None].to(features.dtype), align_corners=False, padding_mode="border"
    )
    return found[..., 0, 0].mT


def pairs_of_slots(batch: PairBatch) -> list[tuple[View, View]]:
    """Each global view of slot 0 with each of slot 1."""
    views = batch.global_views()
    return [(a, b) for a in views if a.slot == 0 for b in views if b.slot == 1]


def check_correspondences(batch: PairBatch, method: str) -> None:
    """ValueError where the crops were read without correspondences."""
    if any(view.partner_mm is None for view in batch.views if view.slot == 0):
        raise ValueError(
            f"{method} needs to know where exhale points are in the inhale scan, and the crops don't say; "
            f"set data.correspondences: true"
        )


def _partner(view: View) -> Float32[Tensor, "b 3 z y x"]:
    if view.partner_mm is None:
        raise ValueError(
            f"a view of slot {view.slot} doesn't say where its points are in the other slot; start from slot 0, and "
            f"read crops with CropConfig(correspondences=True)"
        )
    return view.partner_mm


def half_diagonal_mm(view: View, stride_vox: int) -> Float32[Tensor, "b 1 1"]:
    """Half the diagonal of a token, by the mean size of the view's voxels along its own axes."""
    steps = [torch.diff(view.coords_mm, dim=axis).square().sum(1).sqrt().flatten(1).mean(1) for axis in (2, 3, 4)]
    return (torch.stack(steps).square().sum(0).sqrt() * stride_vox / 2)[:, None, None]


def voxel_of(view: View, mm: Float32[Tensor, "b k 3"]) -> tuple[Float32[Tensor, "b k 3"], Bool[Tensor, "b k"]]:
    """Index (x, y, z) in the view of LPS positions in its scan, and whether it is in the view; NaN is nowhere."""
    coords = view.coords_mm
    size = torch.tensor(coords.shape[:1:-1], device=coords.device)
    step = max(1, min(coords.shape[2:]) // 8)
    coarse = coords[:, :, ::step, ::step, ::step]
    _, _, _, cy, cx = coarse.shape
    nearest = torch.cdist(mm.nan_to_num(0.0), coarse.flatten(2).mT).argmin(dim=2)
    vox = torch.stack([nearest % cx, nearest // cx % cy, nearest // (cx * cy)], dim=-1).float() * step
    last = (size - 1).float()
    inside = ~mm.isnan().any(dim=-1)
    target = mm.nan_to_num(0.0)
    for _ in range(_NEWTON_STEPS):
        # The slopes of the linear interpolation at this point, so that steps within a cell end on it.
        low = vox.floor().clamp(min=torch.zeros_like(last), max=last - 1)
        slopes = []
        for axis in range(3):
            ends = vox.clone(), vox.clone()
            ends[0][..., axis], ends[1][..., axis] = low[..., axis], low[..., axis] + 1
            slopes.append(features_at(coords, ends[1], 1) - features_at(coords, ends[0], 1))
        away = (target - features_at(coords, vox, 1))[..., None]
        step_vox = torch.linalg.solve_ex(torch.stack(slopes, dim=-1), away)[0][..., 0]
        vox = vox + step_vox.nan_to_num(0.0, 0.0, 0.0)
        vox = vox.clamp(min=torch.full_like(last, -1.0), max=last + 1)
    inside &= ((vox >= 0) & (vox <= last)).all(dim=-1)
    residual = torch.linalg.vector_norm(features_at(coords, vox, 1) - target, dim=-1)
    return vox, inside & (residual < _MOST_RESIDUAL_MM)


def _nearest(mask: Bool[Tensor, "b z y x"], vox: Float32[Tensor, "b k 3"]) -> Bool[Tensor, "b k"]:
    """A mask at the nearest voxels."""
    _, z, y, x = mask.shape
    last = torch.tensor([x - 1, y - 1, z - 1], device=vox.device)
    i, j, k = vox.round().long().clamp(min=torch.zeros_like(last), max=last).unbind(-1)
    return mask.flatten(1).gather(1, (k * y + j) * x + i)
