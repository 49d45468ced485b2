"""What became of the same tissue from exhale to inhale: recruitment, hyperinflation, ventilation (`domain.md` A3-A6).

Everything is on the exhale grid: a voxel's HU, the HU of the same tissue at inhale, and the Jacobian J, its volume at
inhale by that at exhale. Where tissue mass is told apart by place, the convention of registration holds, tissue share
f = (HU + 1000) / 1055 at 1 g/ml (Yin et al. 2009, tissue of 55 HU); where gas is, that of `compartments`.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32
from lungssl_data.pair import PhaseScan
from numpy import ndarray
from scipy import ndimage

from lungssl_tasks.aeration.compartments import COMPARTMENTS_HU

TISSUE_HU = 55.0
"""Of blood and tissue without air (`domain.md` A1, after Yin et al. 2009)."""
NON_HU = COMPARTMENTS_HU["non"][0]
POOR_HU = COMPARTMENTS_HU["poor"][0]
HYPER_HU = COMPARTMENTS_HU["hyper"][1]
LEAST_GAS = 0.1
"""Of a voxel at exhale, below which its relative gain of gas says nothing (`domain.md` A6)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Matched:
    """Lung voxels of the exhale scan, and their tissue at inhale."""

    exhale_hu: Float[ndarray, " n"]
    inhale_hu: Float[ndarray, " n"]
    """NaN where the tissue would lie outside of the inhale lung or of what was measured: not counted."""
    jacobian: Float[ndarray, " n"]
    voxel_ml: float
    """At exhale."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Figures of matched tissue; masses and volumes are gross sums over voxels."""

    recruited_g: float
    """Tissue without air (-100 HU and more) at exhale, with air at inhale (A3.3)."""
    derecruited_g: float
    """The other way round; their difference is the net recruitment by place."""
    recruited_gas_ml: float
    """Gas that entered what was poorly or not aerated at exhale (Malbouisson et al. 2001, A3.2)."""
    hyperinflated_ml: float
    """Volume at inhale of what came below -900 HU (A4)."""
    tissue_gain_g: float
    """Tissue at inhale less tissue at exhale, of the same voxels: 0 where mass is conserved (A6)."""
    tissue_mismatch_ml2: float
    """SSTVD: the sum of squared differences of tissue volume (Yin et al. 2009), of whole voxels."""
    jacobian_mean: float
    ventilation_mean: float
    """J - 1 (Reinhardt et al. 2008): specific volume change by place."""
    corrected_ventilation_mean: float
    """J g_inhale / g_exhale - 1 (SACJ, Ding et al. 2012): specific change of gas, where there is a tenth at exhale."""
    unmatched_percent: float
    """Of the exhale lung, whose tissue would lie outside of the inhale lung or of what was measured."""

    def as_dict(self) -> dict[str, float]:
        """For a table."""
        return asdict(self)


def match(
    exhale: PhaseScan,
    inhale: PhaseScan,
    u_mm: Float32[ndarray, "3 z y x"],
    jacobian: Float[ndarray, "z y x"],
) -> Matched:
    """Look up the tissue of exhale lung voxels at inhale: at p + u(p), between the inhale lung's measured voxels alone,
    so that neither the chest wall nor padding mixes in.

    `u_mm`, `jacobian`: on the exhale scan's grid, u's components (x, y, z) in LPS mm. ValueError for other sizes.
    """
    inside = exhale.lung > 0
    if jacobian.shape != inside.shape:
        raise ValueError(f"u_mm is on a grid of {jacobian.shape}, the exhale scan has {inside.shape}")
    grid = exhale.geometry().index_to_mm()
    index = np.argwhere(inside)[:, ::-1]
    places = index @ grid[:, :3].T + grid[:, 3] + u_mm[:, inside].T
    other = inhale.geometry().index_to_mm()
    there = ((places - other[:, 3]) @ np.linalg.inv(other[:, :3]).T)[:, ::-1].T
    lung = ((inhale.lung > 0) & (inhale.valid > 0)).astype(np.float32)
    weight = ndimage.map_coordinates(lung, there, order=1, mode="constant", prefilter=False)
    total = ndimage.map_coordinates(lung * inhale.ct_hu, there, order=1, mode="constant", prefilter=False)
    known = weight > 1e-6
    return Matched(
        exhale_hu=exhale.ct_hu[inside].astype(np.float64),
        inhale_hu=np.where(known, total / np.where(known, weight, 1.0), np.nan).astype(np.float64),
        jacobian=jacobian[inside].astype(np.float64),
        voxel_ml=exhale.geometry().voxel_ml(),
    )


def change(matched: Matched, where: Bool[ndarray, " n"] | None = None) -> Change:
    """Figures of matched voxels, or of those of a part; NaN but for `unmatched_percent` where none is matched."""
    some = np.ones(len(matched.exhale_hu), bool) if where is None else where
    known = some & np.isfinite(matched.inhale_hu)
    before, after, growth = (a[known] for a in (matched.exhale_hu, matched.inhale_hu, matched.jacobian))
    ml = matched.voxel_ml
    tissue, later = ((a + 1000.0) / (1000.0 + TISSUE_HU) for a in (before, after))
    gas, gas_later = (np.clip(-a / 1000.0, 0.0, 1.0) for a in (before, after))
    opened, closed = (before >= NON_HU) & (after < NON_HU), (before < NON_HU) & (after >= NON_HU)
    inflated = (before >= HYPER_HU) & (after < HYPER_HU)
    weak = before >= POOR_HU
    gained = (growth * later - tissue) * ml
    aerated = gas >= LEAST_GAS
    unmatched_percent = 100.0 * float((some & ~known).sum()) / max(int(some.sum()), 1)
    if not known.any():
        return Change(**{name: math.nan for name in Change.__dataclass_fields__} | {"unmatched_percent": 100.0})
    return Change(
        recruited_g=float(tissue[opened].sum()) * ml,
        derecruited_g=float(tissue[closed].sum()) * ml,
        recruited_gas_ml=float((growth * gas_later - gas)[weak].sum()) * ml,
        hyperinflated_ml=float(growth[inflated].sum()) * ml,
        tissue_gain_g=float(gained.sum()),
        tissue_mismatch_ml2=float((gained**2).sum()),
        jacobian_mean=float(growth.mean()),
        ventilation_mean=float(growth.mean() - 1.0),
        corrected_ventilation_mean=float(np.mean(corrected_ventilation(matched)[known][aerated]))
        if aerated.any()
        else float("nan"),
        unmatched_percent=unmatched_percent,
    )


def corrected_ventilation(matched: Matched) -> Float[ndarray, " n"]:
    """SACJ at every voxel: J g_inhale / g_exhale - 1; NaN where less than a tenth is gas at exhale (A6)."""
    gas, later = (np.clip(-a / 1000.0, 0.0, 1.0) for a in (matched.exhale_hu, matched.inhale_hu))
    return np.where(gas >= LEAST_GAS, matched.jacobian * later / np.maximum(gas, LEAST_GAS) - 1.0, np.nan)


def intensity_ventilation(matched: Matched) -> Float[ndarray, " n"]:
    """SAI at every voxel, from densities alone: 1000 (HU_in - HU_ex) / (HU_ex (HU_in + 1000)) (Simon 2000; Guerrero et
    al. 2005, A6). Equals SACJ where tissue is conserved, J (1 - g_in) = 1 - g_ex. NaN as there.
    """
    before, after = matched.exhale_hu, matched.inhale_hu
    aerated = (-before / 1000.0 >= LEAST_GAS) & (after > -1000.0)
    below = np.where(aerated, before * (after + 1000.0), 1.0)
    return np.where(aerated, 1000.0 * (after - before) / below, np.nan)
