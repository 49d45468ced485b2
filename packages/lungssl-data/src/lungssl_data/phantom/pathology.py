"""Lesions in material space, so that they are the same tissue in both phases (`domain.md` D4).

Dependent collapse is part of the density and transport tables (`subject`); here are blobs of ground glass,
consolidation and emphysema with ragged edges, and pleural effusions.
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
RAMP_MM = 3.0
"""Width of a lesion's edge."""
ROUGHNESS = 0.22
"""Standard deviation of the edge's place, as a share of the radius."""
X, Y, Z, RADIUS, KIND, TISSUE, IS_HALO = range(7)
"""Columns of the table of blobs: centre at exhale and radius in mm, code, tissue fraction added, 1 where a halo."""
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
def lesion_at(blobs: ndarray, ragged: float, x: float, y: float, z: float) -> tuple[int, float, float]:
    """Code, weight (0-1) and tissue of the strongest lesion at an exhale place; `ragged` is standard normal noise.

    Consolidation covers ground glass, and either covers emphysema.
    """
    kind, weight, tissue = 0, 0.0, 0.0
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
            kind, weight, tissue = code, share, blobs[n, TISSUE]
    return kind, weight, tissue


def draw_blobs(
    rng: Generator, kinds: tuple[str, ...], chest: Chest, exhale: Breath
) -> tuple[Float64[ndarray, "blobs 7"], dict[str, dict[str, float]]]:
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
    return (np.concatenate(rows) if rows else np.zeros((0, 7))), severity


def _blobs(
    rng: Generator, kind: str, number: int, radii: tuple[float, float], chest: Chest, exhale: Breath
) -> Float64[ndarray, "n 7"]:
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
    table = np.zeros((number, 7))
    table[:, :3] = centre
    table[:, RADIUS] = rng.uniform(*radii, number)
    dense = rng.uniform(size=number) < {"consolidation": 1.0, "covid": 0.3}.get(kind, 0.0)
    table[:, KIND] = np.where(dense, CONSOLIDATION, EMPHYSEMA if kind == "emphysema" else GROUND_GLASS)
    table[:, TISSUE] = rng.uniform(*GROUND_GLASS_HU, number) / 1045.0
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
