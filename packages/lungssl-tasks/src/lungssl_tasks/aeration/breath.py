"""A pair's figures by part of the lungs: what each scan holds, and each definition of recruitment, named (A3 to A5)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lungssl_tasks.aeration.change import Change, Matched, change
from lungssl_tasks.aeration.compartments import Aeration, aeration
from lungssl_tasks.aeration.parts import Down, LungVoxels, parts

OF_NON_AERATED = (
    "exhale_mass_g",
    "inhale_mass_g",
    "net_recruited_g",
    "net_recruited_percent",
    "recruited_gas_ml",
    "recruited_gas_tidal_percent",
    "recruited_g",
    "derecruited_g",
    "tissue_gain_g",
    "tissue_mismatch_ml2",
)
"""What a mask of aerated lung can't give."""
BETWEEN_SCANS = (
    "tidal_volume_ml",
    "strain",
    "net_recruited_g",
    "net_recruited_percent",
    "tidal_hyperinflation_ml",
    "tidal_hyperinflation_percent",
    "recruited_gas_tidal_percent",
)
"""What compares one scan's part with the other's, and means nothing where these are other tissue."""
LEAST_TIDAL_ML = 10.0
"""Of gas that came in, below which nothing is given in per cent of it. Ours."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the lungs in both scans, and what became of its tissue where the scans were registered."""

    exhale: Aeration
    inhale: Aeration
    change: Change | None
    same_tissue: bool = True
    """Whether both scans' parts are the same tissue: lungs and lobes are, slabs along gravity are each scan's own."""

    def figures(self, *, non_aerated: bool = True) -> dict[str, float | None]:
        """Signed, positive for what opens or enters; None where it can't be told.

        `net_recruited_*`: non-aerated mass at exhale less that at inhale, in g and per cent of the mass at exhale
        (Gattinoni et al. 2006; CREATIS 2023), net, without registration (A3.1). `recruited_gas_ml`: gas that entered
        what was poorly or not aerated (Malbouisson et al. 2001, A3.2). `recruited_g`, `derecruited_g`: by place, gross
        (A3.3). `recruited_gas_tidal_percent`: of the tidal volume (A3.4, ours). `tidal_hyperinflation_ml`,
        `_percent`: gain of volume below -900 HU, and by the tidal volume (A4). `tidal_volume_ml`: gain of gas;
        `eelv_ml`, `eilv_ml`: gas; `strain`: tidal volume by EELV (Protti et al. 2011, A5).
        `non_aerated`: whether the masks include non-aerated lung; if not, OF_NON_AERATED are None. Of parts that aren't
        the same tissue, BETWEEN_SCANS are; and per cent of a tidal volume below LEAST_TIDAL_ML.
        """
        low, high, matched = self.exhale, self.inhale, self.change
        tidal = high.gas_ml - low.gas_ml
        breathed = tidal if tidal >= LEAST_TIDAL_ML else math.nan
        net = low.compartment_g["non"] - high.compartment_g["non"]
        hyper = high.compartment_ml["hyper"] - low.compartment_ml["hyper"]
        found: dict[str, float | None] = {
            "eelv_ml": low.gas_ml,
            "eilv_ml": high.gas_ml,
            "tidal_volume_ml": tidal,
            "strain": _share(tidal, low.gas_ml),
            "exhale_mass_g": low.mass_g,
            "inhale_mass_g": high.mass_g,
            "net_recruited_g": net,
            "net_recruited_percent": _percent(net, low.mass_g),
            "tidal_hyperinflation_ml": hyper,
            "tidal_hyperinflation_percent": _percent(hyper, breathed),
        }
        if matched is not None:
            found |= dict(matched.as_dict())
            found["recruited_gas_tidal_percent"] = _percent(matched.recruited_gas_ml, breathed)
        untold = (() if non_aerated else OF_NON_AERATED) + (() if self.same_tissue else BETWEEN_SCANS)
        found |= {name: None for name in untold if name in found}
        return {name: None if value is None or not math.isfinite(value) else value for name, value in found.items()}


def breath(
    exhale: LungVoxels,
    inhale: LungVoxels,
    matched: Matched | None = None,
    *,
    matched_voxels: LungVoxels | None = None,
    down: Down = "back",
) -> Mapping[str, Part]:
    """Parts that both scans have, by name.

    `matched` is the exhale scan's (`change.match`); `matched_voxels` those that it was looked up for, where they aren't
    `exhale` (cubes that were registered beside the scan's own voxels).
    """
    here, there = parts(exhale, down=down), parts(inhale, down=down)
    placed = here if matched_voxels is None else parts(matched_voxels, down=down)
    return {
        name: Part(
            exhale=aeration(exhale.hu[here[name]], exhale.voxel_ml),
            inhale=aeration(inhale.hu[there[name]], inhale.voxel_ml),
            change=None if matched is None or name not in placed else change(matched, placed[name]),
            same_tissue=not name.startswith("gravity"),
        )
        for name in here
        if name in there
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _percent(part: float, whole: float) -> float:
    return 100.0 * _share(part, whole)
