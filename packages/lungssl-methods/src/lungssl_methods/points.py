"""Points that two views share, with what the encoder's pyramid says of them in each."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float32, Int64
from lungssl_backbones.encoder import Encoder, Features
from lungssl_data.batch import View
from torch import Tensor

from lungssl_methods.correspondence import Matches, features_at, sample_matches
from lungssl_methods.method import Gather


@dataclass(frozen=True, kw_only=True)
class PointPairs:
    """Points of all samples one after the other: row i of `first` and `second` is one place, seen in two views."""

    first: Float32[Tensor, "n c"]
    """The pyramid at the points in the first view, all levels side by side."""
    second: Float32[Tensor, "n c"]
    """The same in the second view."""
    distance_mm: Float32[Tensor, "n n"]
    """Between the points in the second view's scan; NaN between samples, and where a place isn't known."""
    sample: Int64[Tensor, " n"]
    """Index of each point's sample in the batch."""
    valid: Bool[Tensor, " n"]
    """False for points that are not known to be in both views; their rows mean nothing."""


def point_pairs(
    views: tuple[View, View],
    features: tuple[Features, Features],
    strides_vox: Sequence[int],
    count: int,
    *,
    generator: torch.Generator | None = None,
    gather: Gather | None = None,
) -> PointPairs:
    """`count` random points in the lung per sample of the first view, matched in mm; n = samples * count.

    `generator`, `gather` and what is raised are those of `correspondence.sample_matches`.
    """
    return matched_points(sample_matches(*views, count, generator=generator, gather=gather), features, strides_vox)


def matched_points(matches: Matches, features: tuple[Features, Features], strides_vox: Sequence[int]) -> PointPairs:
    """What two views' pyramids say at matches of their own."""
    count = matches.valid.shape[1]
    place = torch.where(matches.valid[..., None], matches.second_mm, torch.nan)
    sample = torch.arange(len(place), device=place.device).repeat_interleave(count)
    # Not by matrix products: at 300 mm from the origin they make a point 0.1 mm from itself.
    distance = torch.cdist(place.flatten(0, 1), place.flatten(0, 1), compute_mode="donot_use_mm_for_euclid_dist")
    return PointPairs(
        first=pyramid_at(features[0], strides_vox, matches.first_vox).flatten(0, 1),
        second=pyramid_at(features[1], strides_vox, matches.second_vox).flatten(0, 1),
        distance_mm=distance.masked_fill(sample[:, None] != sample[None], torch.nan),
        sample=sample,
        valid=matches.valid.flatten(),
    )


def over_ranks(
    points: PointPairs, groups: Int64[Tensor, " n"], gather: Gather
) -> tuple[PointPairs, Int64[Tensor, " m"]]:
    """The points of all ranks, and the patients (`groups`) that they are of."""
    distance = gather.rows(points.distance_mm)
    n, ranks = len(points.valid), len(distance) // len(points.valid)
    if ranks == 1:
        return points, groups
    rank_of = torch.arange(ranks, device=distance.device).repeat_interleave(n)
    # Each rank's rows hold distances to its own points; those to other ranks' points are to other samples: not known.
    distance = distance.repeat(1, ranks).masked_fill(rank_of[:, None] != rank_of[None], torch.nan)
    together = PointPairs(
        first=gather.rows(points.first),
        second=gather.rows(points.second),
        distance_mm=distance,
        sample=gather.rows(points.sample) + rank_of * (int(points.sample.max()) + 1),
        valid=gather.rows(points.valid),
    )
    return together, gather.rows(groups)


def pyramid_at(
    features: Features, strides_vox: Sequence[int], vox: Float32[Tensor, "b k 3"]
) -> Float32[Tensor, "b k c"]:
    """All levels of the pyramid, side by side, at voxel positions (x, y, z); each is interpolated at its own stride."""
    # float32: in bf16 a place in a crop of 96 voxels is rounded to a quarter of a voxel.
    levels = zip(features.pyramid, strides_vox, strict=True)
    return torch.cat([features_at(level.float(), vox, stride) for level, stride in levels], dim=-1)


def neighbours(views: tuple[View, ...]) -> list[tuple[int, int]]:
    """Indices of views next to each other among those of one slot: as many pairs as views but one, in each slot.

    Raises ValueError without any.
    """
    of_slot = [[i for i, view in enumerate(views) if view.slot == slot] for slot in (0, 1)]
    pairs = [pair for indices in of_slot for pair in pairwise(indices)]
    if not pairs:
        raise ValueError(
            f"two global views of one slot are needed, got views of slots {[view.slot for view in views]}; "
            f"set globals_per_slot to 2"
        )
    return pairs


def slot_pairs(views: tuple[View, ...]) -> list[tuple[int, int]]:
    """Indices of the first views of both slots, of the second ones, and so on: slot 0 first, each view in one pair.

    Raises ValueError where one slot has more views than the other.
    """
    of_slot = [[i for i, view in enumerate(views) if view.slot == slot] for slot in (0, 1)]
    return list(zip(*of_slot, strict=True))


def check_pyramid(encoder: Encoder, method: str) -> None:
    """ValueError for an encoder without feature maps."""
    if not encoder.pyramid_channels:
        raise ValueError(
            f"{method} compares points in the encoder's feature maps, and {encoder.name} has none; take an encoder "
            f"with pyramid_channels, such as resenc_tiny or vit3d_nano"
        )
