"""What an encoder's features know of places: points of one phase looked up in the other, and a registration of them.

Features of a point are all levels of the pyramid, each of unit length, side by side; a point is found at the place
whose features have the highest cosine. Places are LPS mm.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from lungssl_backbones.encoder import Encoder
from lungssl_data.cache import PairCache
from lungssl_data.pair import PhasePair, PhaseScan
from lungssl_data.views import scale_hu
from lungssl_methods.correspondence import features_at
from torch import Tensor, nn

from lungssl.errors import DataError

GRID_MM = 4.0
"""Pitch of the places among which points are looked up: its own error is 1.9 mm."""
NEAR_MM = 20.0
"""How far a registration looks around the coarse affine's place. Farther than the affine errs: at most 18.9 mm for
3,900 landmarks of 13 phantoms, 99 % of them 11.9 mm."""
POINTS = 300
"""Looked up per patient, as many as phantoms have landmarks: a patient's mean errs by a seventeenth of their spread."""
WINDOWS_AT_ONCE = 4
"""With one thread torch convolves a single small volume by its own code: 8 channels of 48 voxels at 4.6 GFLOP/s, and at
28 GFLOP/s four together (EPYC, torch 2.15)."""
SMOOTH_MM = 15.0
"""Standard deviation of the kernel that makes a field of single matches. Not tuned."""


@dataclass(frozen=True, kw_only=True)
class PairPoints:
    """A patient's scans, points whose partners are known, and where partners are looked for."""

    exhale: PhaseScan
    inhale: PhaseScan
    query_mm: Float[Tensor, "q 3"]
    truth_mm: Float[Tensor, "q 3"] | None
    """Of the query points, in inhale; None where the cache has no displacement."""
    affine: Float[Tensor, "3 4"]
    """Exhale mm to inhale mm."""
    candidates_mm: Float[Tensor, "c 3"]

    def affine_places(self) -> Float[Tensor, "q 3"]:
        """Where the coarse affine says that the points are in inhale."""
        return self.query_mm @ self.affine[:, :3].T + self.affine[:, 3]


@dataclass(frozen=True, kw_only=True)
class Found:
    """How far from their true places a patient's points are found."""

    mean_mm: float
    median_mm: float
    far_share: float
    """Share found more than NEAR_MM off."""
    near_mm: float
    """Mean error where only places within NEAR_MM of the affine's are looked at."""
    registered_mm: float
    """Mean error of a field smoothed from these matches, each point's own left out."""


def points_of(cache: PairCache, patient: str) -> PairPoints:
    """Lung points of a pair, with their partners where the cache has a displacement. Raises DataError for one phase, or
    a displacement that isn't known in the lung.
    """
    pair = cache[patient]
    if pair.exhale_to_inhale is None or len(pair.phases()) < 2:
        raise DataError(f"{cache.folder}: patient {patient} has one phase, so nothing can be looked up in it")
    field = pair.displacement
    if field is None:
        lung = lung_grid_mm(pair.scan("exhale")).numpy()
        return with_points(pair, lung[np.random.default_rng(0).permutation(len(lung))[:POINTS]], None)
    u = np.moveaxis(field.u_mm, 0, -1)
    grid_mm = np.argwhere(np.isfinite(u).all(axis=-1))[:, ::-1] * np.asarray(field.spacing_mm) + field.origin_mm
    scan = pair.scan("exhale")
    lung = grid_mm[in_lung(scan, grid_mm)]
    if not len(lung):
        raise DataError(f"{cache.folder}: patient {patient} has no displacement in the lung")
    chosen = lung[np.random.default_rng(0).permutation(len(lung))[:POINTS]]
    z, y, x = np.rint((chosen - field.origin_mm) / np.asarray(field.spacing_mm)).astype(int)[:, ::-1].T
    return with_points(pair, chosen, chosen + u[z, y, x])


def with_points(
    pair: PhasePair, query_mm: Float[np.ndarray, "q 3"], truth_mm: Float[np.ndarray, "q 3"] | None
) -> PairPoints:
    """A pair with given points."""
    assert pair.exhale_to_inhale is not None
    return PairPoints(
        exhale=pair.scan("exhale"),
        inhale=pair.scan("inhale"),
        query_mm=torch.from_numpy(np.asarray(query_mm)).float(),
        truth_mm=None if truth_mm is None else torch.from_numpy(np.asarray(truth_mm)).float(),
        affine=torch.from_numpy(pair.exhale_to_inhale).float(),
        candidates_mm=lung_grid_mm(pair.scan("inhale")),
    )


def in_lung(scan: PhaseScan, points_mm: Float[np.ndarray, "n 3"]) -> np.ndarray:
    """Whether points lie in the lung of a scan."""
    index = np.rint((points_mm - scan.origin_mm) / np.asarray(scan.spacing_mm)).astype(int)[:, ::-1]
    inside = ((index >= 0) & (index < scan.lung.shape)).all(axis=1)
    z, y, x = np.where(inside[:, None], index, 0).T
    return inside & (scan.lung[z, y, x] > 0)


def lung_grid_mm(scan: PhaseScan, step_mm: float = GRID_MM) -> Float[Tensor, "n 3"]:
    """Points of a grid that lie in the lung."""
    extent_mm = (np.array(scan.ct_hu.shape[::-1]) - 1) * np.array(scan.spacing_mm)
    axes = [np.arange(0, side, step_mm) for side in extent_mm]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3) + scan.origin_mm
    return torch.from_numpy(points[in_lung(scan, points)]).float()


def position_only(pair: PairPoints) -> tuple[float, float]:
    """Mean errors of the grid itself, and of the place nearest to where the coarse affine leads."""
    assert pair.truth_mm is not None
    floor = torch.cdist(pair.truth_mm, pair.candidates_mm).amin(dim=1).mean()
    nearest = torch.cdist(pair.affine_places(), pair.candidates_mm).argmin(dim=1)
    affine = _distance(pair.candidates_mm[nearest], pair.truth_mm).mean()
    return float(floor), float(affine)


def affine_error_mm(pair: PairPoints) -> float:
    """Mean error of the places that the coarse affine says: what `Found.registered_mm` starts from."""
    assert pair.truth_mm is not None
    return float(_distance(pair.affine_places(), pair.truth_mm).mean())


def look_up(encoder: nn.Module, pair: PairPoints, side_vox: int) -> Found:
    """Find every point by features of windows of `side_vox`."""
    return find(pair, *pair_features(encoder, pair, side_vox))


def pair_features(
    encoder: nn.Module, pair: PairPoints, side_vox: int
) -> tuple[Float[Tensor, "q d"], Float[Tensor, "c d"]]:
    """Features at the points in exhale and at the candidates in inhale."""
    return (
        point_features(encoder, pair.exhale, pair.query_mm, side_vox),
        point_features(encoder, pair.inhale, pair.candidates_mm, side_vox),
    )


def find(pair: PairPoints, query: Float[Tensor, "q d"], key: Float[Tensor, "c d"]) -> Found:
    """Each point is found at the candidate whose features have the highest cosine."""
    assert pair.truth_mm is not None
    cosine = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T
    everywhere = _distance(pair.candidates_mm[cosine.argmax(dim=1)], pair.truth_mm)
    distance = torch.cdist(pair.affine_places(), pair.candidates_mm)
    near = distance <= torch.clamp(distance.amin(dim=1, keepdim=True), min=NEAR_MM)
    best = cosine.masked_fill(~near, -torch.inf).argmax(dim=1)
    return Found(
        mean_mm=float(everywhere.mean()),
        median_mm=float(everywhere.median()),
        far_share=float((everywhere > NEAR_MM).float().mean()),
        near_mm=float(_distance(pair.candidates_mm[best], pair.truth_mm).mean()),
        registered_mm=float(_distance(smoothed(pair, pair.candidates_mm[best]), pair.truth_mm).mean()),
    )


def _distance(a: Float[Tensor, "n 3"], b: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
    return torch.linalg.vector_norm(a - b, dim=1)


def smoothed(pair: PairPoints, found_mm: Float[Tensor, "q 3"]) -> Float[Tensor, "q 3"]:
    """Places by the affine and the other points' mean departure from it, weighted by a Gaussian of their distance.

    Nadaraya-Watson regression: a simple registration by matched features, without any image term.
    """
    departure = found_mm - pair.affine_places()
    distance = torch.cdist(pair.query_mm, pair.query_mm)
    weight = torch.exp(-0.5 * (distance / SMOOTH_MM).square()).fill_diagonal_(0.0)
    mean = weight @ departure / weight.sum(dim=1, keepdim=True).clamp_min(1e-6)
    return pair.affine_places() + mean


@torch.inference_mode()
def point_features(
    encoder: nn.Module, scan: PhaseScan, points_mm: Float[Tensor, "n 3"], side_vox: int
) -> Float[Tensor, "n c"]:
    """Features at points of a scan.

    Windows of the size that the encoder was trained on cover the scan evenly, at most three quarters of it apart; where
    several hold a point, their features are averaged with weights that fall to 0 towards the borders.
    """
    assert isinstance(encoder, Encoder)
    encoder.eval()
    shape = scan.ct_hu.shape
    short = [max(0, side_vox - size) for size in shape]
    padding = [0, short[2], 0, short[1], 0, short[0]]  # at the far ends of x, y, z
    image = F.pad(scale_hu(torch.from_numpy(scan.ct_hu).float())[None], padding)
    spacing, origin = torch.tensor(scan.spacing_mm).float(), torch.tensor(scan.origin_mm).float()
    vox = (points_mm - origin) / spacing  # (x, y, z)
    total = torch.zeros(len(vox), sum(encoder.pyramid_channels))
    weights = torch.zeros(len(vox), 1)
    half = (side_vox - 1) / 2
    held = []
    for start in itertools.product(*(window_starts(size, side_vox) for size in image.shape[1:])):
        local = vox - torch.tensor(start[::-1])
        inside = ((local >= 0) & (local <= side_vox - 1)).all(dim=1).nonzero()[:, 0]
        if len(inside):
            held.append((start, inside, local[inside]))
    for first in range(0, len(held), WINDOWS_AT_ONCE):
        some = held[first : first + WINDOWS_AT_ONCE]
        windows = torch.stack([image[(slice(None), *(slice(i, i + side_vox) for i in start))] for start, _, _ in some])
        pyramid = encoder(windows).pyramid
        for place, (_, inside, local) in enumerate(some):
            levels = [
                F.normalize(features_at(level[place][None], local[None], stride)[0], dim=-1)
                for level, stride in zip(pyramid, encoder.pyramid_strides_vox, strict=True)
            ]
            near = (1 - (local - half).abs() / (half + 1)).prod(dim=1, keepdim=True)
            total[inside] += near * torch.cat(levels, dim=1)
            weights[inside] += near
    assert bool((weights > 0).all()), "a point lies in no window"
    return total / weights


def window_starts(size: int, side: int) -> list[int]:
    """First voxels of windows that cover an axis evenly, at most three quarters of a window apart."""
    room = max(0, size - side)
    count = 1 + math.ceil(room / (side * 3 // 4))
    return [round(room * i / max(1, count - 1)) for i in range(count)]
