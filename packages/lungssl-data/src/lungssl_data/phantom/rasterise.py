"""Trees as partial-volume capsules on one phase's grid. One thread per slab of slices, as in `render`."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import no_type_check

import numpy as np
from jaxtyping import Float32, UInt8
from numba import njit
from numpy import ndarray

from lungssl_data.phantom.motion import LEFT_LUNG, MEDIASTINUM, NECK, OUTSIDE
from lungssl_data.phantom.trees import AIRWAY, ARTERY, VEIN, WALL_MM, WALL_SHARE, Pieces
from lungssl_data.volume import Geometry

VESSEL_HU, WALL_HU, LUMEN_HU = 45.0, 35.0, -1000.0
"""Blood and airway wall: `domain.md` D3."""
LEAST_VOX = 0.12
"""Radius in voxels below which a branch is not drawn: at half its chord it would darken or whiten a voxel by less
than 5 %, 50 HU."""


@njit(nogil=True, cache=True)
@no_type_check
def _cover(
    start: ndarray, end: ndarray, radius: ndarray, origin: ndarray, spacing: float, first: int, cover: ndarray
) -> None:
    """Share of each voxel inside any capsule; a tube's cross-section is right to rounding at any width.

    The edge is a ramp as wide as a voxel to either side of the axis of a tube thinner than that; a radius r' with
    r'^2 = r^2 - h^2 / 12 gives the ramp the tube's area.
    """
    nz, ny, nx = cover.shape
    for n in range(start.shape[0]):
        r = radius[n]
        thin = 3.0 * r * r < spacing * spacing
        peak = 3.0 * r * r / (spacing * spacing) if thin else 1.0
        core = 0.5 * spacing if thin else np.sqrt(r * r - spacing * spacing / 12.0)
        reach = core + 0.5 * spacing
        z0, z1 = start[n, 2], end[n, 2]
        low = int(np.ceil((min(z0, z1) - reach - origin[2]) / spacing)) - first
        high = int(np.floor((max(z0, z1) + reach - origin[2]) / spacing)) - first
        if high < 0 or low >= nz:
            continue
        x0, y0, x1, y1 = start[n, 0], start[n, 1], end[n, 0], end[n, 1]
        dx, dy, dz = x1 - x0, y1 - y0, z1 - z0
        square = max(dx * dx + dy * dy + dz * dz, 1e-12)
        j_low = max(int(np.ceil((min(y0, y1) - reach - origin[1]) / spacing)), 0)
        j_high = min(int(np.floor((max(y0, y1) + reach - origin[1]) / spacing)), ny - 1)
        i_low = max(int(np.ceil((min(x0, x1) - reach - origin[0]) / spacing)), 0)
        i_high = min(int(np.floor((max(x0, x1) + reach - origin[0]) / spacing)), nx - 1)
        for k in range(max(low, 0), min(high, nz - 1) + 1):
            z = origin[2] + (first + k) * spacing - z0
            for j in range(j_low, j_high + 1):
                y = origin[1] + j * spacing - y0
                for i in range(i_low, i_high + 1):
                    x = origin[0] + i * spacing - x0
                    t = min(max((x * dx + y * dy + z * dz) / square, 0.0), 1.0)
                    away = np.sqrt((x - t * dx) ** 2 + (y - t * dy) ** 2 + (z - t * dz) ** 2)
                    share = peak * min(0.5 + (core - away) / spacing, 1.0)
                    if share > cover[k, j, i]:
                        cover[k, j, i] = share


def draw_trees(
    pieces: Pieces, geometry: Geometry, region: UInt8[ndarray, "z y x"], hu: Float32[ndarray, "z y x"]
) -> tuple[Float32[ndarray, "z y x"], UInt8[ndarray, "z y x"]]:
    """`hu` with the trees in it, and their labels: 1 airway lumen, 2 artery, 3 vein, where they fill half a voxel.

    Trees are drawn in lungs and mediastinum; trachea and main bronchi, which `anatomy` draws, get the airway's label.
    """
    spacing = geometry.spacing_mm[0]
    origin = np.asarray(geometry.origin_mm, np.float64)
    shown = np.array(hu)
    labels = np.zeros(geometry.shape, np.uint8)
    by_kind = {}
    for kind in (VEIN, ARTERY, AIRWAY):
        chosen = (pieces.kind == kind) & (pieces.radius_mm >= LEAST_VOX * spacing)
        by_kind[kind] = [np.ascontiguousarray(a[chosen]) for a in (pieces.start_mm, pieces.end_mm, pieces.radius_mm)]

    def slab(first: int) -> None:
        here = slice(first, min(first + 8, geometry.shape[0]))
        kinds, values, label = region[here], shown[here], labels[here]
        lung = (kinds > OUTSIDE) & (kinds <= LEFT_LUNG)
        chest = lung | ((kinds == MEDIASTINUM) & (values > -500.0))
        large = ((kinds == MEDIASTINUM) | (kinds == NECK)) & (values == LUMEN_HU)
        for kind in (VEIN, ARTERY, AIRWAY):
            start, end, radius = by_kind[kind]
            layers = [(radius, VESSEL_HU)]
            if kind == AIRWAY:
                layers = [(radius + WALL_SHARE * 2.0 * radius + WALL_MM, WALL_HU), (radius, LUMEN_HU)]
            for width, layer_hu in layers:
                cover = np.zeros(kinds.shape, np.float32)
                _cover(start, end, width, origin, spacing, first, cover)
                cover *= chest
                values += cover * (np.float32(layer_hu) - values)
                label[cover >= 0.5] = 0 if layer_hu == WALL_HU else kind
        label[large] = AIRWAY

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(slab, range(0, geometry.shape[0], 8)))
    return shown, labels
