"""How well a segmentation agrees with the truth: overlap, surfaces in mm, volume.

Surface figures follow DeepMind's definition (see `surface.py`). A structure that both maps lack is a perfect match; one
that only one of them has scores Dice 0, NSD 0 and surface distances of the image's diagonal, and `empty` says so: it is
never dropped, which would reward a model for losing a lobe.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray

from lungssl_tasks.surface import surface_distances

LUNG_TOLERANCE_MM = 1.0
"""NSD tolerance of the lung in the COVID-19-CT-Seg-Benchmark (Ma et al. 2021, doi:10.1002/mp.14676)."""
LESION_TOLERANCE_MM = 3.0
"""NSD tolerance of lesions in the same benchmark."""
VESSEL_TOLERANCE_MM = 1.0
"""NSD tolerance of airways and vessels: ours."""
LOBE_TOLERANCE_MM = 2.0
"""NSD tolerance of lobes: ours, there is no standard; fissures are drawn less exactly than the lung's edge."""


@dataclass(frozen=True, kw_only=True)
class LabelScore:
    """One structure of one scan; the fields are the columns of a results table."""

    label: int
    name: str
    dice: float
    nsd: float
    """Normalised surface distance (surface Dice) at `tolerance_mm`."""
    tolerance_mm: float
    hd95_mm: float
    assd_mm: float
    truth_ml: float
    volume_error_ml: float
    """Predicted minus true volume."""
    empty: Literal["neither", "both", "prediction", "truth"]
    """Which map lacks the structure."""


def segmentation_scores(
    pred: UInt8[ndarray, "z y x"],
    truth: UInt8[ndarray, "_z _y _x"],
    *,
    spacing_mm: tuple[float, float, float],
    labels: Mapping[int, str],
    tolerance_mm: float = LOBE_TOLERANCE_MM,
) -> list[LabelScore]:
    """One row per label, in the order of `labels` (code -> name).

    `spacing_mm` is (x, y, z); `tolerance_mm` is for the NSD: LUNG_, LOBE_ or LESION_TOLERANCE_MM.
    Raises ValueError where the shapes differ.
    """
    if pred.shape != truth.shape:
        raise ValueError(
            f"prediction {pred.shape} and truth {truth.shape} are on different grids; resample one to the other"
        )
    return [
        _score(pred == label, truth == label, spacing_mm, tolerance_mm, label=label, name=name)
        for label, name in labels.items()
    ]


def dice(pred: Bool[ndarray, "z y x"], truth: Bool[ndarray, "z y x"]) -> float:
    """2 |A and B| / (|A| + |B|); 1 where both are empty."""
    total = int(pred.sum()) + int(truth.sum())
    return 2 * int((pred & truth).sum()) / total if total else 1.0


def nsd(
    pred: Bool[ndarray, "z y x"],
    truth: Bool[ndarray, "z y x"],
    *,
    spacing_mm: tuple[float, float, float],
    tolerance_mm: float,
) -> float:
    """Share of both surfaces' area within `tolerance_mm` of the other surface; 1 where both are empty, 0 where one is.

    `spacing_mm` is (x, y, z). Nikolov et al. 2021, doi:10.2196/26151.
    """
    if pred.any() and truth.any():
        return surface_distances(pred, truth, spacing_mm).nsd(tolerance_mm)
    return float(pred.any() == truth.any())


def hd95_mm(
    pred: Bool[ndarray, "z y x"], truth: Bool[ndarray, "z y x"], *, spacing_mm: tuple[float, float, float]
) -> float:
    """The larger of the two directed 95th percentiles of surface distance, weighted by surface area.

    `spacing_mm` is (x, y, z). 0 where both masks are empty; the image's diagonal where one is (then ask for
    `segmentation_scores`, whose `empty` flags it).
    """
    if pred.any() and truth.any():
        return surface_distances(pred, truth, spacing_mm).hausdorff_mm(95.0)
    return _empty_distance_mm(pred, truth, spacing_mm)


def assd_mm(
    pred: Bool[ndarray, "z y x"], truth: Bool[ndarray, "z y x"], *, spacing_mm: tuple[float, float, float]
) -> float:
    """Average symmetric surface distance: the mean over both surfaces' area. Empty masks as in `hd95_mm`."""
    if pred.any() and truth.any():
        return surface_distances(pred, truth, spacing_mm).assd_mm()
    return _empty_distance_mm(pred, truth, spacing_mm)


def volume_error_ml(
    pred: Bool[ndarray, "z y x"], truth: Bool[ndarray, "z y x"], *, spacing_mm: tuple[float, float, float]
) -> float:
    """Predicted minus true volume in millilitres."""
    return (int(pred.sum()) - int(truth.sum())) * math.prod(spacing_mm) / 1000


def _score(
    pred: Bool[ndarray, "z y x"],
    truth: Bool[ndarray, "z y x"],
    spacing_mm: tuple[float, float, float],
    tolerance_mm: float,
    *,
    label: int,
    name: str,
) -> LabelScore:
    has_pred, has_truth = bool(pred.any()), bool(truth.any())
    if has_pred and has_truth:
        surfaces = surface_distances(pred, truth, spacing_mm)
        figures = (surfaces.nsd(tolerance_mm), surfaces.hausdorff_mm(95.0), surfaces.assd_mm())
        empty = "neither"
    else:
        distance_mm = _empty_distance_mm(pred, truth, spacing_mm)
        figures = (float(has_pred == has_truth), distance_mm, distance_mm)
        empty = "truth" if has_pred else "prediction" if has_truth else "both"
    return LabelScore(
        label=label,
        name=name,
        dice=dice(pred, truth),
        nsd=figures[0],
        tolerance_mm=tolerance_mm,
        hd95_mm=figures[1],
        assd_mm=figures[2],
        truth_ml=int(truth.sum()) * math.prod(spacing_mm) / 1000,
        volume_error_ml=volume_error_ml(pred, truth, spacing_mm=spacing_mm),
        empty=empty,
    )


def _empty_distance_mm(
    pred: Bool[ndarray, "z y x"], truth: Bool[ndarray, "z y x"], spacing_mm: tuple[float, float, float]
) -> float:
    """0 for two empty masks, the image's diagonal for one."""
    if pred.any() == truth.any():
        return 0.0
    return float(np.linalg.norm(np.asarray(pred.shape) * np.asarray(spacing_mm[::-1])))
