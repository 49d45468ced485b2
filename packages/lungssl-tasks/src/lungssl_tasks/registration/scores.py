"""How good a displacement field is: landmarks in mm, folding and roughness, each by a named definition.

Figures of other definitions are not to be compared: TRE with predictions rounded to voxels (`snapped_mm`; DIR-Lab's
rule, IDIR, pTVreg) is another number than without, and Learn2Reg's SD of ln(J + 3) is about a quarter of that of ln J
(`domain.md` B). Fields are (3, z, y, x) in mm with components (x, y, z), on a grid along their own index axes.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from lungssl_data.volume import Geometry
from numpy import ndarray
from scipy import ndimage

WORST_SHARE = 0.3
"""Of the landmarks, for `tre30_mm` (Learn2Reg's robustness)."""
LEAST_J, MOST_J = 1e-9, 1e9
"""ln J is taken between them, as Learn2Reg's older scores and `registration.md` have it."""
L2R_CROP_VOX, L2R_SHIFT = 2, 3.0
"""Learn2Reg's evaluation (MDL-UzL/L2R) leaves out two voxels at each border and takes ln(J + 3)."""


@dataclass(frozen=True, kw_only=True)
class LandmarkErrors:
    """Target registration error of one pair, mm."""

    points: int
    mean_mm: float
    sd_mm: float
    median_mm: float
    p95_mm: float
    max_mm: float
    tre30_mm: float
    """Mean over the worst 30 % of the landmarks."""
    identity_mm: float
    """Mean distance before registration."""


def landmark_errors(
    predicted_mm: Float[ndarray, "n 3"], true_mm: Float[ndarray, "n 3"], fixed_mm: Float[ndarray, "n 3"]
) -> LandmarkErrors:
    """Of points p + u(p) against where they are; `fixed_mm` are the points p. Raises ValueError without points."""
    if not len(true_mm):
        raise ValueError("there are no landmarks; give at least one")
    error = np.sort(np.linalg.norm(predicted_mm - true_mm, axis=1))
    worst = error[-max(1, round(WORST_SHARE * len(error))) :]
    return LandmarkErrors(
        points=len(error),
        mean_mm=float(error.mean()),
        sd_mm=float(error.std()),
        median_mm=float(np.median(error)),
        p95_mm=float(np.percentile(error, 95)),
        max_mm=float(error[-1]),
        tre30_mm=float(worst.mean()),
        identity_mm=float(np.linalg.norm(fixed_mm - true_mm, axis=1).mean()),
    )


def snapped_mm(points_mm: Float[ndarray, "n 3"], grid: Geometry) -> Float[ndarray, "n 3"]:
    """Points moved to the nearest voxel centre of the moving scan, as DIR-Lab's rule has it for predictions."""
    affine = grid.index_to_mm()
    index = np.rint((points_mm - affine[:, 3]) @ np.linalg.inv(affine[:, :3]).T)
    return index @ affine[:, :3].T + affine[:, 3]


@dataclass(frozen=True, kw_only=True)
class FieldScores:
    """Regularity of a field in a region."""

    folded_share: float
    """Of the region's voxels, where J <= 0."""
    least_j: float
    sdlogj: float
    """Standard deviation of ln J."""
    sdlogj_l2r: float
    """Learn2Reg's: of ln(J + 3), two voxels away from the grid's borders."""


def field_scores(
    u_mm: Float[ndarray, "3 z y x"], region: Bool[ndarray, "z y x"], spacing_mm: tuple[float, float, float]
) -> FieldScores:
    """Of the region's inside, one voxel away from its edge: across a pleura that slides, differences would find folds.

    Raises ValueError where nothing is left of the region.
    """
    inside = ndimage.binary_erosion(region)
    if not inside.any():
        raise ValueError("nothing is left of the region one voxel within its edge; give a mask of the lungs")
    determinant = jacobian(u_mm, spacing_mm)
    here = determinant[inside]
    cropped = np.zeros_like(inside)
    cropped[(slice(L2R_CROP_VOX, -L2R_CROP_VOX),) * 3] = True
    far = determinant[inside & cropped] if (inside & cropped).any() else here
    return FieldScores(
        folded_share=float((here <= 0).mean()),
        least_j=float(here.min()),
        sdlogj=float(np.log(np.clip(here, LEAST_J, MOST_J)).std()),
        sdlogj_l2r=float(np.log(np.clip(far + L2R_SHIFT, LEAST_J, MOST_J)).std()),
    )


def jacobian(u_mm: Float[ndarray, "3 z y x"], spacing_mm: tuple[float, float, float]) -> Float[ndarray, "z y x"]:
    """det(I + grad u), differences as in `deformation_gradient`."""
    return np.linalg.det(deformation_gradient(u_mm, spacing_mm))


def deformation_gradient(
    u_mm: Float[ndarray, "3 z y x"], spacing_mm: tuple[float, float, float]
) -> Float[ndarray, "z y x 3 3"]:
    """I + grad u by `numpy.gradient`: central differences, one-sided at the grid's border; rows are u's components."""
    sx, sy, sz = spacing_mm
    rows = [np.gradient(component.astype(np.float64), sz, sy, sx)[::-1] for component in u_mm]  # d/dx, d/dy, d/dz
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2) + np.eye(3)
