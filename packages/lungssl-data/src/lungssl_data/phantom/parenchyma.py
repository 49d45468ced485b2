"""What one subject's lungs are made of, as a function of material and exhale place."""

from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float64, UInt8
from numba import njit
from numpy import ndarray

from lungssl_data.phantom import motion, pathology
from lungssl_data.phantom.motion import LEFT_LUNG, RIGHT_LUNG, Breath, Chest, axes
from lungssl_data.phantom.pathology import effused
from lungssl_data.phantom.points import callees, trace
from lungssl_data.phantom.texture import TEXTURE_SHAPE, TEXTURE_SPACING_MM

TISSUE_HU = 45.0
"""HU of lung tissue without gas (`domain.md` D2)."""
MOST_TISSUE = 0.97
"""Largest tissue fraction in either phase; capping the mass in material space keeps it the same in both (D2)."""
FISSURE_TISSUE = 0.95
LOBULE = 0.3
"""Scale at which the texture, of 2-6 mm, is read for lobules' differences."""


class Parenchyma(NamedTuple):
    """One subject's lungs, in material coordinates."""

    density: ndarray
    """Tissue fraction at exhale at equally spaced Y from -1 to 1."""
    texture_cv: float
    """Relative SD of tissue at a tissue fraction of 0.3; less where there is less gas."""
    lobule_cv: float
    """The same of whole secondary lobules, 10-20 mm."""
    oblique_right: float
    oblique_left: float
    """A point belongs to the lower lobe where v - slope Y - bend (s - 1/2)^2 is below this."""
    oblique_slope: float
    oblique_bend: float
    minor: float
    """A point of the right upper part belongs to the middle lobe where v - minor_slope Y is below this."""
    minor_slope: float
    fissure_mm: float
    fissure_gap: ndarray
    """Of the right oblique, left oblique and minor fissure: the level of `_whole` below which the sheet is missing."""
    fissure_phase: ndarray
    """Of each, two angles that place the gaps."""
    blobs: ndarray
    """Lesions, as `pathology.draw_blobs` returns them."""
    effusion: ndarray
    """Depth of the pleural fluid at right and left, 0 for none."""


@njit(nogil=True)
@no_type_check
def lobe_of(lung: Parenchyma, region: int, q: float, material: float, v: float) -> tuple[int, float, float]:
    """Lobe (1-5), and how far above the oblique and (right, upper part) the minor fissure in units of v."""
    s = abs(q) - 1.0
    level = v - lung.oblique_slope * material - lung.oblique_bend * (s - 0.5) ** 2
    if region == LEFT_LUNG:
        return (4 if level >= lung.oblique_left else 5), level - lung.oblique_left, 1e9
    if level < lung.oblique_right:
        return 3, level - lung.oblique_right, 1e9
    minor = v - lung.minor_slope * material - lung.minor
    return (1 if minor >= 0.0 else 2), level - lung.oblique_right, minor


@njit(nogil=True, cache=True)
@no_type_check
def _lobes_at(lung: Parenchyma, region: ndarray, material: ndarray, callees: ndarray) -> ndarray:
    lobes = np.zeros(region.shape[0], np.uint8)
    for i in range(region.shape[0]):
        q, depth, v = material[i, 0], material[i, 1], material[i, 2]
        if RIGHT_LUNG <= region[i] <= LEFT_LUNG and not effused(lung.effusion, q, depth, v):
            lobes[i], _, _ = lobe_of(lung, region[i], q, depth, v)
    return lobes


@njit(nogil=True)
@no_type_check
def whole(first: float, second: float, s: float, material: float) -> float:
    """How surely a fissure is there: least near the hilum, where most fissures end, with waves across the sheet."""
    return 0.6 * s + 0.25 * np.cos(7.0 * s + first) * np.cos(4.0 * material + second)


@njit(nogil=True)
@no_type_check
def sample(texture: ndarray, x: float, y: float, z: float) -> float:
    """Trilinear value of the periodic texture at a position in mm."""
    fx, fy, fz = x / TEXTURE_SPACING_MM, y / TEXTURE_SPACING_MM, z / TEXTURE_SPACING_MM
    i, j, k = int(np.floor(fx)), int(np.floor(fy)), int(np.floor(fz))
    fx, fy, fz = fx - i, fy - j, fz - k
    value = 0.0
    for dk in range(2):
        for dj in range(2):
            for di in range(2):
                weight = (fx if di else 1.0 - fx) * (fy if dj else 1.0 - fy) * (fz if dk else 1.0 - fz)
                at = texture[(k + dk) % TEXTURE_SHAPE[0], (j + dj) % TEXTURE_SHAPE[1], (i + di) % TEXTURE_SHAPE[2]]
                value += weight * at
    return value


@njit(nogil=True)
@no_type_check
def mean_tissue(lung: Parenchyma, material: float) -> float:
    """The density profile: tissue fraction at exhale without texture, fissures and lesions."""
    n = lung.density.shape[0] - 1
    i = min(max(int((material + 1.0) * 0.5 * n), 0), n - 1)
    rest = (material + 1.0) * 0.5 * n - i
    return lung.density[i] + rest * (lung.density[i + 1] - lung.density[i])


@njit(nogil=True)
@no_type_check
def tissue_at_exhale(
    chest: Chest,
    exhale: Breath,
    lung: Parenchyma,
    texture: ndarray,
    blur_mm: float,
    height_mm: float,
    oblique: float,
    minor: float,
    q: float,
    material: float,
    x: float,
    y: float,
    z: float,
) -> float:
    """Tissue fraction of healthy lung and its fissures."""
    mean = mean_tissue(lung, material)
    less = (1.0 - mean) / 0.7
    fine, coarse = lung.texture_cv * less, lung.lobule_cv * less
    uneven = fine * sample(texture, x, y, z) + coarse * sample(texture, LOBULE * x, LOBULE * y, LOBULE * z)
    tissue = mean * np.exp(uneven - 0.5 * (fine * fine + coarse * coarse))
    _, b, _, _ = axes(chest, exhale, z)
    for n in range(2):
        level, slope = (minor, lung.minor_slope) if n else (oblique, lung.oblique_slope)
        away = level * height_mm / np.sqrt(1.0 + (slope * height_mm / b) ** 2)
        if abs(away) < 4.0 * blur_mm:
            which = 2 if n else (1 if q > 0 else 0)
            there = whole(lung.fissure_phase[which, 0], lung.fissure_phase[which, 1], abs(q) - 1.0, material)
            there = min(max(0.5 + (there - lung.fissure_gap[which]) / 0.1, 0.0), 1.0)
            sheet = there * lung.fissure_mm * np.exp(-0.5 * (away / blur_mm) ** 2) / (blur_mm * 2.5066)
            tissue += min(sheet, 1.0) * max(FISSURE_TISSUE - tissue, 0.0)
    return tissue


_CALLEES = callees(pathology, motion)


def lobes_at(lung: Parenchyma, region: UInt8[ndarray, " n"], material: Float64[ndarray, "n 3"]) -> UInt8[ndarray, " n"]:
    """Lobe (1-5) of points as `trace` finds them; 0 outside the lungs and in pleural fluid."""
    return _lobes_at(lung, region, material, _CALLEES)


def to_phase(
    chest: Chest, lung: Parenchyma, exhale: Breath, here: Breath, there: Breath, points_mm: Float64[ndarray, "n 3"]
) -> Float64[ndarray, "n 3"]:
    """Lung points of phase `here` to their place in phase `there`; NaN for points that are not in a lung."""
    region, material, moved = trace(chest, exhale, here, there, points_mm)
    return np.where((lobes_at(lung, region, material) > 0)[:, None], moved, np.nan)
