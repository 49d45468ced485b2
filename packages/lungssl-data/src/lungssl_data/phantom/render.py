"""Renders one phase from material space. One thread per slab of slices and no sums across threads, so the bytes do not
depend on the number of threads."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import no_type_check

import numpy as np
from jaxtyping import Float32, UInt8
from numba import njit
from numpy import ndarray

from lungssl_data.phantom import anatomy as _anatomy
from lungssl_data.phantom import ffd, motion, parenchyma, pathology
from lungssl_data.phantom.anatomy import Anatomy, outside_body, tissue_hu
from lungssl_data.phantom.motion import (
    EFFUSION,
    LEFT_LUNG,
    OUTSIDE,
    SPINE,
    WALL,
    Breath,
    Chest,
    diaphragm,
    locate,
    lung_top,
    place,
)
from lungssl_data.phantom.parenchyma import (
    MOST_TISSUE,
    TISSUE_HU,
    Parenchyma,
    lobe_of,
    mean_tissue,
    sample,
    tissue_at_exhale,
)
from lungssl_data.phantom.pathology import (
    COLLAPSE,
    CONSOLIDATED,
    CONSOLIDATION,
    EFFUSION_HU,
    EMPHYSEMA,
    EMPHYSEMATOUS,
    GROUND_GLASS,
    SEPTUM_TISSUE,
    effused,
    lesion_at,
    septum_share,
)
from lungssl_data.phantom.points import callees
from lungssl_data.volume import Geometry

NON_AERATED_HU = -100.0
"""Lower bound of non-aerated lung (`domain.md` A2)."""
_CALLEES = callees(motion, _anatomy, ffd, parenchyma, pathology)


@njit(nogil=True)
@no_type_check
def _sick(tissue: float, kind: int, weight: float, added: float, ragged: float) -> float:
    """Tissue fraction at exhale of a place with a lesion; consolidation comes later, since it gains mass."""
    if kind == GROUND_GLASS:
        return tissue + weight * added * (1.0 + 0.25 * min(max(ragged, -2.0), 2.0)) * (1.0 - tissue)
    if kind == EMPHYSEMA:
        return tissue + weight * (min(tissue, EMPHYSEMATOUS) - tissue)
    return tissue


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
    texture_there: ndarray,
    one_texture: bool,
    edges: ndarray,
    blur_mm: float,
    origin: ndarray,
    spacing: float,
    first: int,
    last: int,
    hu: ndarray,
    hu_there: ndarray,
    region: ndarray,
    lobes: ndarray,
    lesion: ndarray,
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
                if kind == WALL or kind == SPINE:
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
                if effused(lung.effusion, q, depth, v):
                    region[k, j, i] = EFFUSION
                    hu[k, j, i] = EFFUSION_HU
                    continue
                jacobian[k, j, i] = det_there / det
                expansion = det_there / det if at_exhale else det / det_there
                lobe, oblique, minor = lobe_of(lung, kind, q, depth, v)
                lobes[k, j, i] = lobe
                height = lung_top(chest, q, depth) - diaphragm(chest, exhale, q, depth)
                sick, weight, added, ragged, paved = 0, 0.0, 0.0, 0.0, False
                if lung.blobs.shape[0] > 0:
                    ragged = 0.8 * sample(edges, 0.3 * x_e, 0.3 * y_e, 0.3 * z_e) + 0.6 * sample(edges, x_e, y_e, z_e)
                    sick, weight, added, paved = lesion_at(lung.blobs, ragged, x_e, y_e, z_e)
                for phase in range(2):
                    if phase == 0 or not one_texture:
                        tissue = tissue_at_exhale(
                            chest, exhale, lung, texture if phase == 0 else texture_there, blur_mm, height,
                            oblique, minor, q, depth, x_e, y_e, z_e,
                        )  # fmt: skip
                        tissue = _sick(tissue, sick, weight, added, ragged)
                        if paved and sick == GROUND_GLASS:
                            septum = weight * septum_share(x_e, y_e, z_e, blur_mm)
                            tissue += septum * max(SEPTUM_TISSUE - tissue, 0.0)
                        # Kept below this in both phases, so that no phase has to clip.
                        tissue = min(tissue, MOST_TISSUE * min(1.0, expansion))
                    fraction = tissue if (phase == 0) == at_exhale else tissue / expansion
                    if sick == CONSOLIDATION:
                        fraction += weight * (CONSOLIDATED - fraction)
                    if phase == 0:
                        hu[k, j, i] = -1000.0 + (1000.0 + TISSUE_HU) * fraction
                    else:
                        hu_there[k, j, i] = -1000.0 + (1000.0 + TISSUE_HU) * fraction
                if weight >= 0.5:
                    lesion[k, j, i] = sick
                elif hu[k, j, i] >= NON_AERATED_HU and mean_tissue(lung, depth) > 0.5:
                    lesion[k, j, i] = COLLAPSE


@dataclass(frozen=True, kw_only=True, eq=False)
class Rendering:
    """One phase on its grid, free of noise, blur and trees."""

    hu: Float32[ndarray, "z y x"]
    hu_there: Float32[ndarray, "z y x"]
    """In lungs, the same tissue's HU in the other phase; 0 elsewhere."""
    region: UInt8[ndarray, "z y x"]
    lobes: UInt8[ndarray, "z y x"]
    lesion: UInt8[ndarray, "z y x"]
    """Codes of `pathology`."""
    jacobian: Float32[ndarray, "z y x"]
    """det of the map to the other phase; 0 outside the lungs."""
    displacement_mm: Float32[ndarray, "3 z y x"]
    """To the other phase; 0 outside the body."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Textures:
    """Random fields of one phase's parenchyma, of the other phase's, and of lesions' edges; they may be one."""

    here: Float32[ndarray, "z y x"]
    there: Float32[ndarray, "z y x"]
    edges: Float32[ndarray, "z y x"]


def render(
    chest: Chest,
    anatomy: Anatomy,
    lung: Parenchyma,
    exhale: Breath,
    here: Breath,
    there: Breath,
    textures: Textures,
    geometry: Geometry,
) -> Rendering:
    """Phase `here` (the exhale or the inhale breath) on an axis-aligned isotropic grid."""
    shape, spacing = geometry.shape, geometry.spacing_mm[0]
    hu, hu_there, jacobian = np.empty(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    region = np.full(shape, OUTSIDE, np.uint8)
    lobes, lesion = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    displacement = np.zeros((3, *shape), np.float32)
    # A sheet thinner than a voxel would be hit or missed: its tissue is spread over a voxel's width instead.
    blur_mm = max(0.5, 0.45 * spacing)
    origin = np.asarray(geometry.origin_mm, np.float64)

    def slab(first: int) -> None:
        _render_slab(
            chest, anatomy, lung, exhale, here, there, here is exhale, textures.here, textures.there,
            textures.here is textures.there, textures.edges, blur_mm, origin, spacing, first, min(first + 8, shape[0]),
            hu, hu_there, region, lobes, lesion, jacobian, displacement, _CALLEES,
        )  # fmt: skip

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(slab, range(0, shape[0], 8)))
    return Rendering(
        hu=hu, hu_there=hu_there, region=region, lobes=lobes, lesion=lesion, jacobian=jacobian,
        displacement_mm=displacement,
    )  # fmt: skip
