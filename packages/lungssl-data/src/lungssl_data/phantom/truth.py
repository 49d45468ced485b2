"""What recruited, collapsed and hyperinflated between the phases, from noise-free HU of the same tissue.

Definitions: `domain.md` A1-A5. Maps and gross figures compare a place's HU at exhale with those of the same tissue at
inhale (A3.3, A4); mass there is the tissue fraction times volume, 1 g/mL. Trees are left out throughout, airways and
vessels alike: they would be partial-volume non-aerated tissue.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from numpy import ndarray

from lungssl_data.phantom.parenchyma import TISSUE_HU

COMPARTMENTS_HU = {"hyper": (-1000.0, -900.0), "normal": (-900.0, -500.0), "poor": (-500.0, -100.0)}
"""Half-open intervals (A2); `non` is closed, from -100 to 100."""
NON_HU, MOST_HU, HYPER_HU, POOR_HU = -100.0, 100.0, -900.0, -500.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """Maps on the exhale grid, 1 where it happened; 0 outside the lungs."""

    recruited: UInt8[ndarray, "z y x"]
    """Non-aerated (-100 HU and more) at exhale only."""
    derecruited: UInt8[ndarray, "z y x"]
    """Non-aerated at inhale only."""
    hyperinflated: UInt8[ndarray, "z y x"]
    """Below -900 HU at inhale only."""
    figures: dict[str, float]
    """Grams, millilitres and per cent, as `recruitment` names them."""


def compartments(hu: Float32[ndarray, " n"], voxel_ml: float) -> dict[str, float]:
    """Shares of lung volume and of lung mass in per cent by aeration (A2), ICU convention: M = V (1 + HU / 1000)."""
    clipped = np.maximum(np.asarray(hu, float), -1000.0)
    counted = clipped <= MOST_HU
    mass = np.clip(1.0 + clipped / 1000.0, 0.0, 1.0)
    where = {name: (clipped >= low) & (clipped < high) for name, (low, high) in COMPARTMENTS_HU.items()}
    where["non"] = (clipped >= NON_HU) & counted
    total = float(mass[counted].sum())
    shares = {f"{name}_mass_percent": 100.0 * float(mass[w].sum()) / total for name, w in where.items()}
    number = max(int(counted.sum()), 1)
    shares |= {f"{name}_volume_percent": 100.0 * float(w.sum()) / number for name, w in where.items()}
    return shares | {"mass_g": total * voxel_ml, "volume_ml": float(counted.sum()) * voxel_ml}


def recruitment(
    exhale_hu: Float32[ndarray, "z y x"],
    matched_hu: Float32[ndarray, "z y x"],
    jacobian: Float32[ndarray, "z y x"],
    lung: Bool[ndarray, "z y x"],
    inhale_hu: Float32[ndarray, " n"],
    exhale_ml: float,
    inhale_ml: float,
) -> Truth:
    """`matched_hu` is the inhale HU of the tissue at each exhale voxel, `inhale_hu` that of the inhale grid's lung
    voxels; `exhale_ml`, `inhale_ml` are voxel volumes."""
    before, after, growth = (a[lung].astype(float) for a in (exhale_hu, matched_hu, jacobian))
    recruited = (before >= NON_HU) & (after < NON_HU)
    derecruited = (before < NON_HU) & (after >= NON_HU)
    inflated = (before >= HYPER_HU) & (after < HYPER_HU)
    tissue_g = (before + 1000.0) / (1000.0 + TISSUE_HU) * exhale_ml
    gas_before, gas_after = (np.clip(-a / 1000.0, 0.0, 1.0) for a in (before, after))
    opened = before >= POOR_HU
    figures = {
        "lung_g": float(tissue_g.sum()),
        "recruited_g": float(tissue_g[recruited].sum()),
        "derecruited_g": float(tissue_g[derecruited].sum()),
        "recruited_gas_ml": float((growth * gas_after - gas_before)[opened].sum()) * exhale_ml,
        "hyperinflated_ml": float(growth[inflated].sum()) * exhale_ml,
    }
    figures["net_recruited_g"] = figures["recruited_g"] - figures["derecruited_g"]
    figures["net_recruited_percent"] = 100.0 * figures["net_recruited_g"] / figures["lung_g"]
    # The same from either scan alone, without matching: the clinic's figures (A3.1, A4, A5).
    low, high = compartments(exhale_hu[lung], exhale_ml), compartments(inhale_hu, inhale_ml)
    for name, shares in (("exhale", low), ("inhale", high)):
        figures |= {f"{name}_{key}": value for key, value in shares.items()}
    non = [s["non_mass_percent"] * s["mass_g"] / 100.0 for s in (low, high)]
    gas = [
        float(gas_before.sum()) * exhale_ml,
        float(np.clip(-inhale_hu.astype(float) / 1000.0, 0.0, 1.0).sum()) * inhale_ml,
    ]
    hyper = [s["hyper_volume_percent"] * s["volume_ml"] / 100.0 for s in (low, high)]
    figures |= {
        "exhale_gas_ml": gas[0],
        "inhale_gas_ml": gas[1],
        "tidal_volume_ml": gas[1] - gas[0],
        "strain": (gas[1] - gas[0]) / gas[0],
        "unmatched_recruited_percent": 100.0 * (non[0] - non[1]) / low["mass_g"],
        "unmatched_hyperinflated_ml": hyper[1] - hyper[0],
    }
    maps = [np.zeros(lung.shape, np.uint8) for _ in range(3)]
    for image, where in zip(maps, (recruited, derecruited, inflated), strict=True):
        image[lung] = where
    return Truth(recruited=maps[0], derecruited=maps[1], hyperinflated=maps[2], figures=figures)
