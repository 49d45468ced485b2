"""From a volume as the scanner wrote it to a scan as the cache holds it.

Padding becomes air and is marked, the grid becomes axis-aligned with LPS at one spacing, the field of view is cut to
the lungs and a margin (which also keeps the face out of the cache), and the two phases get a coarse affine.
"""

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float, UInt8
from numpy import ndarray

from lungssl_data.lung_mask import VOLUME_ML, LungMaskError, lung_mask, plausibility
from lungssl_data.pair import AIR_HU, PhaseScan
from lungssl_data.volume import Geometry, LabelMap, Volume


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How volumes are brought onto the cache's grid."""

    spacing_mm: float = 2.0
    """Isotropic voxel size; `registration.md` and `ssl.md` B.1 work at 1.5-2 mm."""
    margin_mm: float = 20.0
    """Kept around the lungs: chest wall and diaphragm, below the 30 mm above the apex at which a face can begin."""


def prepare_scan(
    volume: Volume,
    *,
    config: PrepareConfig,
    lung: LabelMap | None = None,
    lobes: LabelMap | None = None,
    source_sha256: str = "",
) -> PhaseScan:
    """Resample, mask and crop one phase.

    `lung` (1 right, 2 left) replaces the training-free mask, `lobes` has the cache's codes. Both may lie on any grid.
    Raises LungMaskError where no plausible lung is found, or the given mask has other codes or is absurdly large.
    """
    if lung is None:
        lung = LabelMap(labels=lung_mask(volume), geometry=volume.geometry)
        problem = plausibility(lung.labels, lung.geometry)
    else:
        problem = _given_mask_problem(lung)
    if problem:
        raise LungMaskError(problem)
    inside = lung_box_mm(lung)
    target = _target_grid(inside, volume.geometry, config)
    valid = volume.valid()
    hu = np.where(valid, np.maximum(volume.hu, AIR_HU), AIR_HU).astype(np.int16)
    measured = resample_labels(LabelMap(labels=valid.astype(np.uint8), geometry=volume.geometry), target)
    ct = resample_hu(Volume(hu=hu, geometry=volume.geometry), target)
    return PhaseScan(
        ct_hu=np.where(measured, ct, np.int16(AIR_HU)),  # resampling clamps at the edge, however far outside
        valid=measured,
        lung=resample_labels(lung, target),
        lobes=resample_labels(lobes, target) if lobes is not None else None,
        spacing_mm=target.spacing_mm,
        origin_mm=target.origin_mm,
        source_sha256=source_sha256,
    )


def lung_box_mm(lung: LabelMap) -> Float[ndarray, "2 3"]:
    """Smallest LPS box (low and high corner) around all labelled voxel centres."""
    index = np.argwhere(lung.labels > 0)[:, ::-1]
    if not len(index):
        raise ValueError("the lung mask is empty; give a mask of the lungs or leave it out to have one made")
    corners = np.stack(np.meshgrid(*zip(index.min(0), index.max(0), strict=True), indexing="ij"), -1).reshape(-1, 3)
    affine = lung.geometry.index_to_mm()
    if not np.allclose(np.abs(lung.geometry.direction).max(0), 1.0):  # oblique: the index box is wider than the lungs
        corners = index
    points = corners @ affine[:, :3].T + affine[:, 3]
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
        index = np.argwhere(np.isin(scan.lung, sides))[:, ::-1]
        points = index * np.asarray(scan.spacing_mm) + np.asarray(scan.origin_mm)
        moments.append((points.mean(0), points.std(0)))
    (centre_ex, spread_ex), (centre_in, spread_in) = moments
    scale = spread_in / spread_ex
    return np.concatenate([np.diag(scale), (centre_in - scale * centre_ex)[:, None]], axis=1)


def resample_hu(volume: Volume, target: Geometry) -> ndarray:
    """int16 HU on another grid: linear, the border value outside, smoothed first along axes that get coarser.

    The Gaussian turns a source box of FWHM s into one of FWHM t: sigma = sqrt(t^2 - s^2) / 2.355 (Cardoso et al. 2015,
    "Scale factor point spread function matching", doi:10.1007/978-3-319-24571-3_81).
    """
    if volume.geometry.same_grid(target):
        return volume.hu
    image = sitk.Cast(_image(volume.hu, volume.geometry), sitk.sitkFloat32)
    reach = np.sqrt(volume.geometry.direction.T**2 @ np.asarray(target.spacing_mm) ** 2)  # target step by source axis
    for axis, (source_mm, target_mm) in enumerate(zip(volume.geometry.spacing_mm, reach, strict=True)):
        if target_mm > source_mm * 1.05 and image.GetSize()[axis] >= 4:  # ITK's recursive filter needs four samples
            sigma = float(np.sqrt(target_mm**2 - source_mm**2) / 2.355)
            image = sitk.RecursiveGaussian(image, sigma=sigma, direction=axis)
    result = _resample(image, target, sitk.sitkLinear)
    return np.rint(result).astype(np.int16)


def resample_labels(labels: LabelMap, target: Geometry) -> UInt8[ndarray, "z y x"]:
    """Labels on another grid by nearest neighbour; background outside."""
    if labels.geometry.same_grid(target):
        return labels.labels
    return _resample(_image(labels.labels, labels.geometry), target, sitk.sitkNearestNeighbor)


def _given_mask_problem(lung: LabelMap) -> str | None:
    codes = set(np.unique(lung.labels).tolist())
    if not codes <= {0, 1, 2}:
        return f"the given lung mask has codes {sorted(codes)[:8]}, expected 0, 1 (right) and 2 (left); recode it"
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


def _image(array: ndarray, geometry: Geometry) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection(geometry.direction.ravel().tolist())
    return image


def _resample(image: sitk.Image, target: Geometry, interpolator: int) -> ndarray:
    filter_ = sitk.ResampleImageFilter()
    filter_.SetSize(target.shape[::-1])
    filter_.SetOutputSpacing(target.spacing_mm)
    filter_.SetOutputOrigin(target.origin_mm)
    filter_.SetOutputDirection(target.direction.ravel().tolist())
    filter_.SetInterpolator(interpolator)
    # Clamp CT at the edge: a grid that ends half a voxel past the last slice must not grow a slice of padding there.
    filter_.SetUseNearestNeighborExtrapolator(interpolator == sitk.sitkLinear)
    return sitk.GetArrayFromImage(filter_.Execute(image))
