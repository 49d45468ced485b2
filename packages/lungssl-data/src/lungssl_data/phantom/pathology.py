"""Lesions in material space, so that they are the same tissue in both phases (`domain.md` D4).

Dependent collapse is part of the density and transport tables (`subject`); here are blobs of ground glass (in
some with thickened septa between lobules: crazy paving), consolidation and emphysema with ragged edges, and effusions.
"""

from typing import no_type_check

import numpy as np
from jaxtyping import Float64
from numba import njit
from numpy import ndarray
from numpy.random import Generator

from lungssl_data.phantom.motion import Breath, Chest
from lungssl_data.phantom.points import place_lung

GROUND_GLASS, CONSOLIDATION, OTHER, COLLAPSE, EMPHYSEMA = 1, 2, 3, 4, 5
"""Codes of the pathology map: the first three as LESION_CODES has them, OTHER unused here."""
CONSOLIDATED = 0.95
"""Tissue fraction of consolidation, in both phases: what breathing adds to its volume is fluid, not gas."""
EMPHYSEMATOUS = 0.04
"""Tissue fraction at exhale (D4: 0.05 and less)."""
GROUND_GLASS_HU = (150.0, 450.0)
"""Added to healthy lung at exhale (D4)."""
HALO = 0.55
"""Radius within which a reversed halo is ground glass, as a share of the blob's."""
HALO_CHANCE = 0.05
PAVED_CHANCE = 0.25
"""Of ground glass with thickened septa; no source, a minority."""
LOBULE_MM = 15.0
"""Between the centres of secondary lobules: 10-25 mm wide (Hansell et al. 2008, doi:10.1148/radiol.2462070712)."""
SEPTUM_MM = 1.25
"""Thickness of a septum in crazy paving (D4: 1-1.5 mm)."""
SEPTUM_TISSUE = 0.9
RAMP_MM = 3.0
"""Width of a lesion's edge."""
ROUGHNESS = 0.22
"""Standard deviation of the edge's place, as a share of the radius."""
X, Y, Z, RADIUS, KIND, TISSUE, IS_HALO, IS_PAVED = range(8)
"""Columns of the table of blobs: centre at exhale and radius in mm, code, tissue fraction added, 1 for a halo, 1 for
crazy paving."""
SEVERITY: dict[str, tuple[tuple[int, int], tuple[float, float]]] = {
    "ground_glass": ((2, 9), (12.0, 35.0)),
    "consolidation": ((1, 4), (10.0, 28.0)),
    "emphysema": ((15, 70), (3.0, 9.0)),
    "covid": ((5, 40), (5.0, 30.0)),
}
"""Number of blobs, and radius in mm (D4: COVID-like 10-60 mm across)."""
BULLAE = ((0, 4), (8.0, 22.0))
EFFUSION_ML = (100.0, 500.0)
"""Of both sides; D4 names up to 1000 mL, which these chests cannot hold behind a lung that still ventilates."""
EFFUSION_HU = 10.0


@njit(nogil=True)
@no_type_check
def effused(effusion: ndarray, q: float, material: float, v: float) -> bool:
    """Whether a lung chart's point is pleural fluid: a crescent at the back, thinning from the base to the apex."""
    depth = effusion[1 if q > 0 else 0]
    return depth > 0.0 and material > 1.0 - depth * max(1.0 - v, 0.0) ** 0.5


@njit(nogil=True)
@no_type_check
def lesion_at(blobs: ndarray, ragged: float, x: float, y: float, z: float) -> tuple[int, float, float, bool]:
    """Code, weight (0-1), tissue and paving of the strongest lesion at an exhale place; `ragged` is standard normal.

    Consolidation covers ground glass, and either covers emphysema.
    """
    kind, weight, tissue, paved = 0, 0.0, 0.0, False
    for n in range(blobs.shape[0]):
        r = blobs[n, RADIUS]
        square = (x - blobs[n, X]) ** 2 + (y - blobs[n, Y]) ** 2 + (z - blobs[n, Z]) ** 2
        if square > 3.5 * r * r:
            continue
        inside = 1.0 + ROUGHNESS * min(max(ragged, -3.0), 3.0) - np.sqrt(square) / r
        share = min(max(0.5 + inside * r / RAMP_MM, 0.0), 1.0)
        code = int(blobs[n, KIND])
        if code == CONSOLIDATION and blobs[n, IS_HALO] > 0.0 and inside > 1.0 - HALO:
            code = GROUND_GLASS
        rank = share + (2.0 if code == CONSOLIDATION else (1.0 if code == GROUND_GLASS else 0.0)) * (share > 0.5)
        best = weight + (2.0 if kind == CONSOLIDATION else (1.0 if kind == GROUND_GLASS else 0.0)) * (weight > 0.5)
        if share > 0.0 and rank > best:
            kind, weight, tissue, paved = code, share, blobs[n, TISSUE], blobs[n, IS_PAVED] > 0.0
    return kind, weight, tissue, paved


@njit(nogil=True)
@no_type_check
def septum_share(x: float, y: float, z: float, blur_mm: float) -> float:
    """Share of a voxel at an exhale place that is interlobular septum, 0 to 1, blurred by `blur_mm`.

    Lobules are the cells around points of a cubic lattice of LOBULE_MM, each moved at random by up to 0.4 of that.
    """
    cx, cy, cz = np.floor(x / LOBULE_MM), np.floor(y / LOBULE_MM), np.floor(z / LOBULE_MM)
    nearest, second = 1e30, 1e30
    ax, ay, az, bx, by, bz = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for n in range(27):
        i, j, k = cx + n % 3 - 1, cy + (n // 3) % 3 - 1, cz + n // 9 - 1
        px = (i + 0.5 + 0.8 * (_scatter(i, j, k, 0) - 0.5)) * LOBULE_MM
        py = (j + 0.5 + 0.8 * (_scatter(i, j, k, 1) - 0.5)) * LOBULE_MM
        pz = (k + 0.5 + 0.8 * (_scatter(i, j, k, 2) - 0.5)) * LOBULE_MM
        square = (x - px) ** 2 + (y - py) ** 2 + (z - pz) ** 2
        if square < nearest:
            second, bx, by, bz = nearest, ax, ay, az
            nearest, ax, ay, az = square, px, py, pz
        elif square < second:
            second, bx, by, bz = square, px, py, pz
    # Distance to the plane half way between the two nearest centres.
    apart = np.sqrt((ax - bx) ** 2 + (ay - by) ** 2 + (az - bz) ** 2)
    away = (second - nearest) / (2.0 * apart)
    sheet = SEPTUM_MM * np.exp(-0.5 * (away / blur_mm) ** 2) / (blur_mm * 2.5066)
    return min(sheet, 1.0)


@njit(nogil=True)
@no_type_check
def _scatter(i: float, j: float, k: float, axis: int) -> float:
    """A number in [0, 1) that a lattice point always has: the mixing of MurmurHash3's finaliser."""
    h = np.uint32(int(i) * 73856093 & 0xFFFFFFFF) ^ np.uint32(int(j) * 19349663 & 0xFFFFFFFF)
    h = np.uint32(h ^ np.uint32(int(k) * 83492791 & 0xFFFFFFFF) ^ np.uint32((axis + 1) * 0x9E3779B1 & 0xFFFFFFFF))
    h = np.uint32((h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    h = np.uint32((h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return float(np.uint32(h ^ (h >> np.uint32(16)))) / 4294967296.0


def draw_blobs(
    rng: Generator, kinds: tuple[str, ...], chest: Chest, exhale: Breath
) -> tuple[Float64[ndarray, "blobs 8"], dict[str, dict[str, float]]]:
    """Blobs of the named pathologies, and the severity drawn for each."""
    rows: list[ndarray] = []
    severity: dict[str, dict[str, float]] = {}
    for kind in kinds:
        if kind == "effusion":
            continue
        (fewest, most), (small, large) = SEVERITY[kind]
        grade = float(rng.uniform(0.0, 1.0))
        number = round(fewest + grade * (most - fewest))
        rows.append(_blobs(rng, kind, number, (small, small + (0.4 + 0.6 * grade) * (large - small)), chest, exhale))
        if kind == "emphysema":
            bullae = int(rng.integers(BULLAE[0][0], BULLAE[0][1] + 1))
            rows.append(_blobs(rng, kind, bullae, BULLAE[1], chest, exhale))
            number += bullae
        severity[kind] = {"severity": grade, "blobs": float(number)}
    return (np.concatenate(rows) if rows else np.zeros((0, 8))), severity


def _blobs(
    rng: Generator, kind: str, number: int, radii: tuple[float, float], chest: Chest, exhale: Breath
) -> Float64[ndarray, "n 8"]:
    """Places by what each kind prefers: COVID under the pleura and below, emphysema above, others anywhere behind."""
    sign = np.where(rng.uniform(size=number) < 0.5, -1.0, 1.0)
    s, depth, v = rng.uniform(0.15, 0.9, number), rng.uniform(-0.8, 0.85, number), rng.uniform(0.05, 0.9, number)
    if kind == "covid":
        s, v = rng.uniform(0.75, 1.0, number), rng.beta(1.2, 2.2, number)
        depth = rng.uniform(-0.5, 0.9, number)
    elif kind == "emphysema":
        v, depth = rng.beta(2.5, 1.2, number), rng.uniform(-0.85, 0.4, number)
    elif kind == "consolidation":
        depth, v = rng.uniform(0.3, 0.9, number), rng.uniform(0.05, 0.5, number)
    centre, _ = place_lung(chest, exhale, exhale, np.stack([sign * (1.0 + s), depth, v], 1))
    table = np.zeros((number, 8))
    table[:, :3] = centre
    table[:, RADIUS] = rng.uniform(*radii, number)
    dense = rng.uniform(size=number) < {"consolidation": 1.0, "covid": 0.3}.get(kind, 0.0)
    table[:, KIND] = np.where(dense, CONSOLIDATION, EMPHYSEMA if kind == "emphysema" else GROUND_GLASS)
    table[:, TISSUE] = rng.uniform(*GROUND_GLASS_HU, number) / 1045.0
    # A stream of its own, so that all else is drawn as it was before there was paving.
    paved = rng.spawn(1)[0].uniform(size=number) < PAVED_CHANCE
    table[:, IS_PAVED] = paved & (table[:, KIND] == GROUND_GLASS)
    table[:, IS_HALO] = dense & (rng.uniform(size=number) < HALO_CHANCE) & (kind == "covid")
    return table


def draw_effusion(
    rng: Generator, material: Float64[ndarray, "n 3"], volume_ml: Float64[ndarray, " n"]
) -> tuple[Float64[ndarray, " 2"], float]:
    """Depth of the crescent in Y for the right and the left lung, and the volume aimed at in mL.

    `material` and `volume_ml` are cells that fill both lungs.
    """
    wanted = float(rng.uniform(*EFFUSION_ML))
    share = float(rng.uniform(0.3, 0.7))
    depths = []
    for sign, part in ((-1.0, share), (1.0, 1.0 - share)):
        side = np.sign(material[:, 0]) == sign
        # The depth at which each cell becomes fluid.
        needed = (1.0 - material[side, 1]) / np.sqrt(np.maximum(1.0 - material[side, 2], 1e-6))
        order = np.argsort(needed)
        filled = np.cumsum(volume_ml[side][order])
        depths.append(float(np.interp(part * wanted, filled, needed[order])))
    return np.asarray(depths), wanted
