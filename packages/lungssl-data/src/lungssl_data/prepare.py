"""From a volume as the scanner wrote it to a scan as the cache holds it.

Padding becomes air and is marked, never mixed into its neighbours; the grid becomes axis-aligned with LPS at one
spacing, the field of view is cut to the lungs and a margin (which also keeps the face out of the cache), and the two
phases get a coarse affine.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from lungssl_data.lung_mask import VOLUME_ML, LungMaskError, lung_mask, lung_sides, plausibility
from lungssl_data.pair import AIR_HU, PhaseScan
from lungssl_data.resample import resample_hu, resample_labels
from lungssl_data.volume import Geometry, LabelMap, Volume

PREPARE_VERSION = 4
"""Raised whenever the same volume, masks and parameters would give another scan."""
SIDE_UNKNOWN = 3
"""Code of a given mask's voxels whose side, right or left, is to be found (`layouts.source.LUNG_CODES`)."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How volumes are brought onto the cache's grid."""

    spacing_mm: float = 2.0
    """Isotropic voxel size; `registration.md` and `ssl.md` B.1 work at 1.5-2 mm."""
    margin_mm: float = 20.0
    """Kept around the lungs: chest wall and diaphragm, below the 30 mm above the apex at which a face can begin."""
    smooth: bool = True
    """Smooth along axes that get coarser (`resample.py`); without it their noise is aliased."""


def prepare_scan(
    volume: Volume,
    *,
    config: PrepareConfig,
    lung: LabelMap | None = None,
    lobes: LabelMap | None = None,
    lesion: LabelMap | None = None,
    vessels: LabelMap | None = None,
    around: LabelMap | None = None,
    source_sha256: str = "",
    threads: int | None = None,
) -> PhaseScan:
    """Resample, mask and crop one phase.

    `lung` (1 right, 2 left, 3 where the side is to be found) replaces the training-free mask; `lobes`, `lesion` and
    `vessels` have the cache's codes. Each may lie on any grid. What is cut out holds
    the lungs, the lobes (airless ones, which masks made from air lack) and `around`, with a margin. Raises
    LungMaskError where no plausible lung is found, or the given mask has other codes or is absurdly large. `threads` is
    for resampling, by default the processor's cores.
    """
    if lung is None:
        lung = LabelMap(labels=lung_mask(volume), geometry=volume.geometry)
        problem = plausibility(lung.labels, lung.geometry)
    else:
        problem = _given_mask_problem(lung)
    if problem:
        raise LungMaskError(problem)
    if (lung.labels == SIDE_UNKNOWN).any():
        lung = _with_sides(lung, volume)
    boxes = [lung_box_mm(one) for one in (lung, lobes, around) if one is not None and one.labels.any()]
    box_mm = np.stack([np.min([low for low, _ in boxes], axis=0), np.max([high for _, high in boxes], axis=0)])
    target = _target_grid(box_mm, volume.geometry, config)
    ct, measured = resample_hu(volume, target, smooth=config.smooth, threads=threads)
    return PhaseScan(
        ct_hu=np.where(measured, ct, np.int16(AIR_HU)),  # resampling clamps at the edge, however far outside
        valid=measured,
        lung=resample_labels(lung, target),
        lobes=resample_labels(lobes, target) if lobes is not None else None,
        lesion=resample_labels(lesion, target) if lesion is not None else None,
        vessels=resample_labels(vessels, target) if vessels is not None else None,
        spacing_mm=target.spacing_mm,
        origin_mm=target.origin_mm,
        source_sha256=source_sha256,
    )


def lung_box_mm(lung: LabelMap) -> Float[ndarray, "2 3"]:
    """Smallest LPS box (low and high corner) around all labelled voxel centres."""
    inside = lung.labels > 0
    z, y = np.nonzero(inside.any(2))
    if not len(z):
        raise ValueError("the lung mask is empty; give a mask of the lungs or leave it out to have one made")
    # A box has its corners at the ends of rows: the first and last voxel of each, whatever the grid's direction.
    rows = inside[z, y]
    first, last = rows.argmax(1), inside.shape[2] - 1 - rows[:, ::-1].argmax(1)
    index = np.concatenate([np.stack([x, y, z], 1) for x in (first, last)])
    affine = lung.geometry.index_to_mm()
    points = index @ affine[:, :3].T + affine[:, 3]
    return np.stack([points.min(0), points.max(0)])


def coarse_affine(exhale: PhaseScan, inhale: PhaseScan) -> Float[ndarray, "3 4"]:
    """Exhale LPS mm to inhale LPS mm: matches the lungs' centres and per-axis spread (first and second moments).

    Moments survive a field of view that cuts the lungs better than bounding boxes do; a side (right or left) that only
    one phase shows is left out.
    """
    sides = sorted(set(np.unique(exhale.lung)) & set(np.unique(inhale.lung)) - {0})
    if not sides:
        raise ValueError("exhale and inhale show no lung of the same side; check that both are scans of one patient")
    moments = []
    for scan in (exhale, inhale):
        inside = np.isin(scan.lung, sides)
        centre, spread = [], []
        for axis in (2, 1, 0):
            counts = np.count_nonzero(inside, axis=tuple({0, 1, 2} - {axis}))
            place = np.arange(len(counts)) * scan.spacing_mm[2 - axis] + scan.origin_mm[2 - axis]
            centre.append(np.average(place, weights=counts))
            spread.append(np.sqrt(np.average((place - centre[-1]) ** 2, weights=counts)))
        moments.append((np.array(centre), np.array(spread)))
    (centre_ex, spread_ex), (centre_in, spread_in) = moments
    scale = spread_in / spread_ex
    return np.concatenate([np.diag(scale), (centre_in - scale * centre_ex)[:, None]], axis=1)


def _with_sides(lung: LabelMap, volume: Volume) -> LabelMap:
    """The mask on the volume's grid with sides for SIDE_UNKNOWN."""
    labels = resample_labels(lung, volume.geometry)
    unknown = labels == SIDE_UNKNOWN
    return LabelMap(labels=np.where(unknown, lung_sides(labels > 0, volume), labels), geometry=volume.geometry)


def _given_mask_problem(lung: LabelMap) -> str | None:
    codes = set(np.unique(lung.labels).tolist())
    if not codes <= {0, 1, 2, SIDE_UNKNOWN}:
        return (
            f"the given lung mask has codes {sorted(codes)[:8]}, expected 0, 1 (right) and 2 (left), or "
            f"{SIDE_UNKNOWN} where the side is to be found; recode it"
        )
    # A given mask may be of a small or flooded lung, but a whole body is none.
    return plausibility(lung.labels, lung.geometry, volume_ml=(0.0, VOLUME_ML[1]))


def _target_grid(box_mm: Float[ndarray, "2 3"], source: Geometry, config: PrepareConfig) -> Geometry:
    affine = source.index_to_mm()
    corners = np.stack(np.meshgrid(*((0, n - 1) for n in source.shape[::-1]), indexing="ij"), -1).reshape(-1, 3)
    extent = corners @ affine[:, :3].T + affine[:, 3]
    low = np.maximum(box_mm[0] - config.margin_mm, extent.min(0))
    high = np.minimum(box_mm[1] + config.margin_mm, extent.max(0))
    size = np.floor((high - low) / config.spacing_mm + 1e-6).astype(int) + 1
    x, y, z = (float(v) for v in low)
    return Geometry(
        shape=(int(size[2]), int(size[1]), int(size[0])),
        spacing_mm=(config.spacing_mm, config.spacing_mm, config.spacing_mm),
        origin_mm=(x, y, z),
        direction=np.eye(3),
    )
