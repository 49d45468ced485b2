"""Gas, tissue and compartments of lung on one scan (`domain.md` A1, A2).

HU to gas and tissue by the convention of intensive care: a voxel's gas share is clip(-HU / 1000, 0, 1), the rest is
tissue of 1 g/ml (Gattinoni et al. 2001, https://doi.org/10.1164/ajrccm.164.9.2103121). The lung must include what is
not aerated: of a mask of aerated lung only, `non` means nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Int16, Shaped
from numpy import ndarray

COMPARTMENTS_HU: dict[str, tuple[float, float]] = {
    "hyper": (-1000.0, -900.0),
    "normal": (-900.0, -500.0),
    "poor": (-500.0, -100.0),
    "non": (-100.0, 100.0),
}
"""From low to below high; `non` includes 100. Lower values are `hyper`; above lie contrast, drains and bone, which are
not counted."""
MOST_HU = COMPARTMENTS_HU["non"][1]


@dataclass(frozen=True, kw_only=True)
class Aeration:
    """What some lung holds."""

    volume_ml: float
    """Gas and tissue, without what lies above 100 HU."""
    excluded_ml: float
    """Above 100 HU."""
    gas_ml: float
    mass_g: float
    compartment_ml: Mapping[str, float]
    """By the names of COMPARTMENTS_HU."""
    compartment_g: Mapping[str, float]

    def volume_percent(self, compartment: str) -> float:
        """Share of the volume; NaN where there is none."""
        return 100.0 * self.compartment_ml[compartment] / self.volume_ml if self.volume_ml else math.nan

    def mass_percent(self, compartment: str) -> float:
        """Share of the mass; NaN where there is none."""
        return 100.0 * self.compartment_g[compartment] / self.mass_g if self.mass_g else math.nan

    def as_dict(self, *, non_aerated: bool = True) -> dict[str, float | None]:
        """Flat, for a table: `non_g`, `non_mass_percent`, ... beside the totals; None for what can't be told.

        `non_aerated`: whether the mask includes non-aerated lung; if not, neither masses nor `non` are told.
        """
        values: dict[str, float | None] = {
            name: value for name, value in asdict(self).items() if isinstance(value, float)
        }
        for name in COMPARTMENTS_HU:
            values |= {
                f"{name}_ml": self.compartment_ml[name],
                f"{name}_g": self.compartment_g[name],
                f"{name}_volume_percent": self.volume_percent(name),
                f"{name}_mass_percent": self.mass_percent(name),
            }
        if not non_aerated:
            untold = [name for name in values if name.startswith("non_") or "_mass_" in name or name.endswith("_g")]
            values |= dict.fromkeys(untold)
        return {name: None if value is None or not math.isfinite(value) else value for name, value in values.items()}


def aeration(hu: Shaped[ndarray, " n"], voxel_ml: float) -> Aeration:
    """Of lung voxels with these HU."""
    values = np.maximum(np.asarray(hu, np.float64), COMPARTMENTS_HU["hyper"][0])
    counted = values <= MOST_HU
    values = values[counted]
    gas = np.clip(-values / 1000.0, 0.0, 1.0)
    where = {name: (values >= low) & (values < high) for name, (low, high) in COMPARTMENTS_HU.items()}
    where["non"] |= values == MOST_HU
    return Aeration(
        volume_ml=len(values) * voxel_ml,
        excluded_ml=float((~counted).sum()) * voxel_ml,
        gas_ml=float(gas.sum()) * voxel_ml,
        mass_g=float((1.0 - gas).sum()) * voxel_ml,
        compartment_ml={name: float(inside.sum()) * voxel_ml for name, inside in where.items()},
        compartment_g={name: float((1.0 - gas[inside]).sum()) * voxel_ml for name, inside in where.items()},
    )


def non_aerated_mass_g(
    ct_hu: Int16[ndarray, "z y x"], lung: Bool[ndarray, "z y x"], spacing_mm: tuple[float, float, float]
) -> float:
    """Mass of the lung's voxels without air."""
    low, high = COMPARTMENTS_HU["non"]
    found = ct_hu[lung & (ct_hu >= low) & (ct_hu <= high)]
    return aeration(found, float(np.prod(spacing_mm)) / 1000.0).mass_g
