"""Kernels that run the charts over points and grids. One thread per slab of slices and no sums across threads, so the
bytes do not depend on the number of threads."""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from numba import njit
from numpy import ndarray

from lungssl_data.phantom import anatomy as _anatomy
from lungssl_data.phantom import motion as _motion
from lungssl_data.phantom.anatomy import Anatomy, outside_body, tissue_hu
from lungssl_data.phantom.motion import LEFT_LUNG, OUTSIDE, RIGHT_LUNG, WALL, Breath, Chest, axes, locate, place
from lungssl_data.phantom.texture import TEXTURE_SHAPE, TEXTURE_SPACING_MM
from lungssl_data.volume import Geometry

TISSUE_HU = 45.0
"""HU of lung tissue without gas (`domain.md` D2)."""
MOST_TISSUE = 0.97
"""Largest tissue fraction in either phase; capping the mass in material space keeps it the same in both (D2)."""
FISSURE_TISSUE = 0.95

_CALLEES = np.empty(
    0, [(f"crc_{zlib.crc32(b''.join(Path(str(m.__file__)).read_bytes() for m in (_motion, _anatomy))):08x}", np.uint8)]
)
"""numba's cache on disk watches a kernel's own file only. Passed to a kernel, this array's type, and with it the key of
the cache, holds a checksum of the files with the functions that it calls: an edit there recompiles."""


class Parenchyma(NamedTuple):
    """One subject's lungs, in material coordinates."""

    density: ndarray
    """Tissue fraction at exhale at equally spaced Y from -1 to 1."""
    texture_cv: float
    """Relative SD of tissue at a tissue fraction of 0.3; less where there is less gas."""
    oblique_right: float
    oblique_left: float
    """A point belongs to the lower lobe where v - slope Y - bend (s - 1/2)^2 is below this."""
    oblique_slope: float
    oblique_bend: float
    minor: float
    """A point of the right upper part belongs to the middle lobe where v - minor_slope Y is below this."""
    minor_slope: float
    fissure_mm: float


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


@njit(nogil=True)
@no_type_check
def _sample(texture: ndarray, x: float, y: float, z: float) -> float:
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
def _tissue_at_exhale(
    chest: Chest,
    exhale: Breath,
    lung: Parenchyma,
    texture: ndarray,
    blur_mm: float,
    height_mm: float,
    oblique: float,
    minor: float,
    material: float,
    x: float,
    y: float,
    z: float,
) -> float:
    n = lung.density.shape[0] - 1
    i = min(max(int((material + 1.0) * 0.5 * n), 0), n - 1)
    rest = (material + 1.0) * 0.5 * n - i
    mean = lung.density[i] + rest * (lung.density[i + 1] - lung.density[i])
    cv = lung.texture_cv * (1.0 - mean) / 0.7
    tissue = mean * np.exp(cv * _sample(texture, x, y, z) - 0.5 * cv * cv)
    _, b, _, _ = axes(chest, exhale, z)
    for level, slope in ((oblique, lung.oblique_slope), (minor, lung.minor_slope)):
        away = level * height_mm / np.sqrt(1.0 + (slope * height_mm / b) ** 2)
        if abs(away) < 4.0 * blur_mm:
            sheet = lung.fissure_mm * np.exp(-0.5 * (away / blur_mm) ** 2) / (blur_mm * 2.5066)
            tissue += min(sheet, 1.0) * max(FISSURE_TISSUE - tissue, 0.0)
    return tissue


@njit(nogil=True, cache=True)
@no_type_check
def _trace(
    chest: Chest, exhale: Breath, here: Breath, there: Breath, points_mm: ndarray, callees: ndarray
) -> tuple[ndarray, ndarray, ndarray]:
    n = points_mm.shape[0]
    region, material, moved = np.empty(n, np.uint8), np.empty((n, 3)), np.empty((n, 3))
    for i in range(n):
        kind, q, depth, v, _ = locate(chest, exhale, here, points_mm[i, 0], points_mm[i, 1], points_mm[i, 2])
        x, y, z, _ = place(chest, exhale, there, kind, q, depth, v)
        region[i] = kind
        material[i, 0], material[i, 1], material[i, 2] = q, depth, v
        moved[i, 0], moved[i, 1], moved[i, 2] = x, y, z
    return region, material, moved


@njit(nogil=True, cache=True)
@no_type_check
def _place_lung(
    chest: Chest, exhale: Breath, there: Breath, material: ndarray, callees: ndarray
) -> tuple[ndarray, ndarray]:
    n = material.shape[0]
    moved, det = np.empty((n, 3)), np.empty(n)
    for i in range(n):
        region = LEFT_LUNG if material[i, 0] > 0 else RIGHT_LUNG
        x, y, z, d = place(chest, exhale, there, region, material[i, 0], material[i, 1], material[i, 2])
        moved[i, 0], moved[i, 1], moved[i, 2] = x, y, z
        det[i] = d
    return moved, det


@njit(nogil=True, cache=True)
@no_type_check
def _render_slab(
    chest: Chest,
    anatomy: Anatomy,
    lung: Parenchyma,
    exhale: Breath,
    here: Breath,
    there: Breath,
    at_exhale: bool,
    texture: ndarray,
    blur_mm: float,
    origin: ndarray,
    spacing: float,
    first: int,
    last: int,
    hu: ndarray,
    region: ndarray,
    lobes: ndarray,
    jacobian: ndarray,
    displacement: ndarray,
    callees: ndarray,
) -> None:
    widest = chest.half_width_mm + here.lateral_mm + 120.0
    for k in range(first, last):
        z = origin[2] + k * spacing
        for j in range(hu.shape[1]):
            y = origin[1] + j * spacing
            for i in range(hu.shape[2]):
                x = origin[0] + i * spacing
                hu[k, j, i] = -1000.0
                if abs(x) > widest:
                    continue
                kind, q, depth, v, det = locate(chest, exhale, here, x, y, z)
                if kind >= WALL:
                    z_exhale = v
                    if outside_body(chest, anatomy, exhale, q, depth, z_exhale) > 0.0:
                        continue
                x_there, y_there, z_there, det_there = place(chest, exhale, there, kind, q, depth, v)
                region[k, j, i] = kind
                displacement[0, k, j, i] = x_there - x
                displacement[1, k, j, i] = y_there - y
                displacement[2, k, j, i] = z_there - z
                x_e, y_e, z_e = (x, y, z) if at_exhale else (x_there, y_there, z_there)
                if kind > LEFT_LUNG:
                    hu[k, j, i] = tissue_hu(chest, anatomy, exhale, kind, q, depth, x_e, y_e, z_e)
                    continue
                jacobian[k, j, i] = det_there / det
                expansion = det_there / det if at_exhale else det / det_there
                lobe, oblique, minor = lobe_of(lung, kind, q, depth, v)
                lobes[k, j, i] = lobe
                low = _motion.diaphragm(chest, exhale, q, depth)
                height = _motion.lung_top(chest, q, depth) - low
                tissue = _tissue_at_exhale(
                    chest, exhale, lung, texture, blur_mm, height, oblique, minor, depth, x_e, y_e, z_e
                )
                tissue = min(tissue, MOST_TISSUE * min(1.0, expansion))
                if not at_exhale:
                    tissue /= expansion
                hu[k, j, i] = -1000.0 + (1000.0 + TISSUE_HU) * tissue


@dataclass(frozen=True, kw_only=True, eq=False)
class Rendering:
    """One phase on its grid, free of noise and blur."""

    hu: Float32[ndarray, "z y x"]
    region: UInt8[ndarray, "z y x"]
    lobes: UInt8[ndarray, "z y x"]
    jacobian: Float32[ndarray, "z y x"]
    """det of the map to the other phase; 0 outside the lungs."""
    displacement_mm: Float32[ndarray, "3 z y x"]
    """To the other phase; 0 outside the body."""


def render(
    chest: Chest,
    anatomy: Anatomy,
    lung: Parenchyma,
    exhale: Breath,
    here: Breath,
    there: Breath,
    texture: Float32[ndarray, "z y x"],
    geometry: Geometry,
) -> Rendering:
    """Phase `here` (the exhale or the inhale breath) on an axis-aligned isotropic grid."""
    shape, spacing = geometry.shape, geometry.spacing_mm[0]
    hu, jacobian = np.empty(shape, np.float32), np.zeros(shape, np.float32)
    region, lobes = np.full(shape, OUTSIDE, np.uint8), np.zeros(shape, np.uint8)
    displacement = np.zeros((3, *shape), np.float32)
    # A sheet thinner than a voxel would be hit or missed: its tissue is spread over a voxel's width instead.
    blur_mm = max(0.5, 0.45 * spacing)
    origin = np.asarray(geometry.origin_mm, np.float64)

    def slab(first: int) -> None:
        _render_slab(
            chest, anatomy, lung, exhale, here, there, here is exhale, texture, blur_mm, origin, spacing,
            first, min(first + 8, shape[0]), hu, region, lobes, jacobian, displacement, _CALLEES,
        )  # fmt: skip

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(slab, range(0, shape[0], 8)))
    return Rendering(hu=hu, region=region, lobes=lobes, jacobian=jacobian, displacement_mm=displacement)


def trace(
    chest: Chest, exhale: Breath, here: Breath, there: Breath, points_mm: Float64[ndarray, "n 3"]
) -> tuple[UInt8[ndarray, " n"], Float64[ndarray, "n 3"], Float64[ndarray, "n 3"]]:
    """Points of phase `here` to region, material (q, Y, v) and place in phase `there`."""
    return _trace(chest, exhale, here, there, np.ascontiguousarray(points_mm), _CALLEES)


def place_lung(
    chest: Chest, exhale: Breath, there: Breath, material: Float64[ndarray, "n 3"]
) -> tuple[Float64[ndarray, "n 3"], Float64[ndarray, " n"]]:
    """Lung material (q, Y, v) to points in phase `there`, and det in mm3 per material unit."""
    return _place_lung(chest, exhale, there, material, _CALLEES)


def to_phase(
    chest: Chest, exhale: Breath, here: Breath, there: Breath, points_mm: Float64[ndarray, "n 3"]
) -> Float64[ndarray, "n 3"]:
    """Lung points of phase `here` to their place in phase `there`; NaN for points that are not in a lung."""
    region, _, moved = trace(chest, exhale, here, there, points_mm)
    return np.where(((region == RIGHT_LUNG) | (region == LEFT_LUNG))[:, None], moved, np.nan)
