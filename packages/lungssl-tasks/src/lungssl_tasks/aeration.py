"""Mass of lung without air, the figure that recruitment is the change of (`domain.md` A)."""

import numpy as np
from jaxtyping import Bool, Int16
from numpy import ndarray

NON_AERATED_HU = (-100, 100)
"""Both included (Gattinoni et al. 2001, https://doi.org/10.1164/ajrccm.164.9.2103121); above lie contrast, drains and
bone."""


def non_aerated_mass_g(
    ct_hu: Int16[ndarray, "z y x"], lung: Bool[ndarray, "z y x"], spacing_mm: tuple[float, float, float]
) -> float:
    """Mass of the lung's voxels without air: volume times tissue fraction, (HU + 1000) / 1000, at 1 g/ml.

    `lung` must hold the non-aerated lung as well: of a mask of aerated lung only, the answer means nothing.
    """
    low, high = NON_AERATED_HU
    found = ct_hu[lung & (ct_hu >= low) & (ct_hu <= high)]
    return float((found.astype(np.float64) + 1000.0).sum() / 1000.0 * np.prod(spacing_mm) / 1000.0)
