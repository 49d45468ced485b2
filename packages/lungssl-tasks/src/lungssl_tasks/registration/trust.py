"""Whether a registration is to be believed: figures that need no truth, and what they speak against it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from jaxtyping import Bool, Float
from lungssl_data.pair import PhaseScan
from lungssl_ops.lncc import lncc
from lungssl_ops.warp import jacobian_determinant, warp
from torch import Tensor

from lungssl_tasks.registration.common_grid import CommonGrid
from lungssl_tasks.registration.descent import EPS

WINDOW = 7
"""LNCC's, in voxels: LEAST_SIMILARITY was measured with it."""
LEAST_OVERLAP = 0.9
"""Registered phantoms and the open pairs have 0.97 to 0.995; a scan that lacks a lung 0.68, a third of it 0.79."""
MOST_UNSEEN = 0.02
"""Ours: the edge of a scan that just holds the lungs costs less."""
LEAST_SIMILARITY = 0.42
"""Phantoms of 2 and 4 mm have 0.69 to 0.79, real lungs 0.53 to 0.60; strangers' lungs 0.17 to 0.34 (docs/log.md)."""
MOST_DISAGREEMENT_MM = 3.0
"""Pairs have 0.0 to 0.7, strangers 0.9 to 1.8: it sees failures of the search, not mixed-up patients."""
LEAST_RATIO = 0.97
"""Moving by fixed lung, below which they are called swapped. Ours: a scan and its copy have 1, up to rounding."""
CUT_SHARE = 0.01
"""Of the lung's surface voxels at the edge of what was measured; a whole lung has none. Ours."""
LUNGS = {1: "right", 2: "left"}


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Figures of a registration, in the fixed lung."""

    overlap: float
    """Dice of the lungs after it, where the moving scan has voxels."""
    unseen_share: float
    """Of the fixed lung, what lies beyond the moving scan."""
    similarity: float
    """Mean squared local correlation of the lungs' insides, 0 to 1; their edges don't count."""
    disagreement_mm: float
    """Median of how far the search there and back missed its start, before the two were made consistent."""
    folded_share: float
    """Of the lung's voxels, where volume doesn't stay positive."""
    jacobian_sd: float
    """Standard deviation of ln J, J clipped to 1e-9 .. 1e9 as Learn2Reg does."""
    volume_ratio: float
    """Moving by fixed lung: the mean Jacobian in what both scans show of it, whatever either cuts off."""
    doubts: tuple[str, ...]
    """Sentences; empty where nothing speaks against it."""


def judge(
    pair: CommonGrid,
    v_vox: Float[Tensor, "1 3 z y x"],
    disagreement_mm: float,
    *,
    affine: Float[np.ndarray, "3 4"],
    fixed: PhaseScan,
    moving: PhaseScan,
    descended: bool = True,
) -> Trust:
    """Judge the field v of a pair. `descended`: whether descent made it: LEAST_SIMILARITY asks nothing of a search."""
    near, far = pair.lungs()
    seen = warp(pair.moving_seen, v_vox) > 0.99
    unseen_share = 1 - float((pair.fixed_lung * seen).sum() / pair.fixed_lung.sum())
    lung = (pair.fixed_lung > 0) & seen
    inner = 1 - F.max_pool3d(1 - pair.fixed_lung, 3, stride=1, padding=1)
    warped_lung = (warp(pair.moving_lung, v_vox) > 0.5) & seen
    both = inner * warped_lung
    similarity = float(lncc(near, warp(far, v_vox), window=WINDOW, eps=EPS, mask=both)) if both.any() else 0.0
    overlap = 2 * float((warped_lung & lung).sum()) / max(1.0, float(warped_lung.sum() + lung.sum()))
    whole = jacobian_determinant(v_vox)[0].double() * float(np.linalg.det(affine[:, :3]))
    jacobian = whole[inner[0, 0] > 0]
    shared = whole[(inner * seen)[0, 0] > 0]
    figures = {
        "overlap": overlap,
        "unseen_share": unseen_share,
        "similarity": similarity,
        "disagreement_mm": disagreement_mm,
        "folded_share": float((jacobian <= 0).double().mean()) if len(jacobian) else 0.0,
        "jacobian_sd": float(jacobian.clamp(1e-9, 1e9).log().std()) if len(jacobian) > 1 else 0.0,
        "volume_ratio": float(shared.mean()) if len(shared) else float("nan"),
    }
    return Trust(**figures, doubts=tuple(_doubts(figures, fixed, moving, descended=descended)))


def _doubts(figures: dict[str, float], fixed: PhaseScan, moving: PhaseScan, *, descended: bool) -> Iterator[str]:
    if unknown := [name for name, value in figures.items() if not np.isfinite(value)]:
        yield f"{', '.join(unknown)} can't be told: hardly any lung is left to look at"
    if (cut := cut_share(fixed)) > CUT_SHARE:
        yield (
            f"the fixed scan cuts the lungs ({cut:.0%} of their surface lies at its edge); what it doesn't show isn't "
            f"registered, and near the cut the field is less exact"
        )
    here, there = (set(np.unique(scan.lung)) & set(LUNGS) for scan in (fixed, moving))
    for name, ours, others in (("fixed", here, there), ("moving", there, here)):
        if alone := sorted(LUNGS[side] for side in ours - others):
            yield f"only the {name} scan shows a {' and a '.join(alone)} lung, of which the field says nothing"
    if figures["unseen_share"] > MOST_UNSEEN:
        yield (
            f"{figures['unseen_share']:.0%} of the fixed lung lies beyond the moving scan; there the field is a guess "
            f"from what is around it"
        )
    if figures["overlap"] < LEAST_OVERLAP:
        yield (
            f"the lungs overlap by {figures['overlap']:.2f} (Dice) after registration, expected at least "
            f"{LEAST_OVERLAP}; one scan may cut the lungs, or a mask is wrong"
        )
    if descended and figures["similarity"] < LEAST_SIMILARITY:
        yield (
            f"the insides of the lungs correlate by {figures['similarity']:.2f}, expected at least {LEAST_SIMILARITY}; "
            f"look whether both scans are of one patient"
        )
    if figures["disagreement_mm"] > MOST_DISAGREEMENT_MM:
        yield (
            f"there and back disagree by {figures['disagreement_mm']:.1f} mm, expected at most "
            f"{MOST_DISAGREEMENT_MM:g}; the motion may be beyond reach"
        )
    if figures["folded_share"] > 0:
        yield f"{figures['folded_share']:.2%} of the lung's voxels fold: volumes are not to be had from them"
    if figures["volume_ratio"] < LEAST_RATIO:
        yield (
            f"the moving lung has {figures['volume_ratio']:.2f} times the volume of the fixed one: expected exhale as "
            f"fixed and inhale as moving; are they swapped?"
        )


def cut_share(scan: PhaseScan) -> float:
    """Of the lung's surface voxels, those that touch what wasn't measured or the end of the scan."""
    lung, measured = scan.lung > 0, scan.valid > 0
    surface = edge = 0
    for axis in range(3):
        for turn in (1, -1):
            beside_lung, beside_measured = (_shifted(mask, axis, turn) for mask in (lung, measured))
            outer = lung & ~beside_lung
            surface += int(outer.sum())
            edge += int((outer & ~beside_measured).sum())
    return edge / max(surface, 1)


def _shifted(mask: Bool[np.ndarray, "z y x"], axis: int, turn: int) -> Bool[np.ndarray, "z y x"]:
    """Each voxel's neighbour along an axis; False beyond the array."""
    moved = np.roll(mask, turn, axis)
    end = [slice(None)] * 3
    end[axis] = slice(0, 1) if turn == 1 else slice(-1, None)
    moved[tuple(end)] = False
    return moved
