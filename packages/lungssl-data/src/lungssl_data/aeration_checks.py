"""Air in a prepared scan or a pair: what is suspicious is looked at by people, lungs without any are refused."""

import numpy as np

from lungssl_data.pair import PhasePair, PhaseScan

LEAST_GAS_ML = 1200.0
"""Gas in both lungs below which they are called white: a healthy adult's residual volume, what is left after breathing
out as far as possible, is about 1.2 l. Patients with ARDS at PEEP 5 hold 0.9 ± 0.6 to 1.3 ± 0.6 l (Chiumello et al.
2020, `domain.md` A2), so about half of them are named, as they should be. Children and crops are named as well."""
LEAST_SIDE_SHARE = 0.25
"""Of both lungs' gas the smaller one holds about 45 %; below 25 % a lung is missing, collapsed, drowned or cut off."""
AIRLESS_HU = -100.0
"""Non-aerated lung lies above (`domain.md` A2)."""
MOST_AIRLESS_SHARE = 0.25
"""Of a given mask's volume; normal lungs hold 7 ± 4 % of their mass there (`domain.md` A2), about 2 % of volume."""

LEAST_GAS_SHARE = 0.01
"""Of the mask's volume, below which the values can't be lungs in HU: whitest lungs on extracorporeal support still hold
several per cent; a scan in other units, of changed sign or with a mask elsewhere holds none."""


def airless(scan: PhaseScan) -> str | None:
    """One sentence where the mask holds practically no gas, with the HU found in it; else None."""
    hu = scan.ct_hu[scan.lung > 0]
    share = float(np.clip(hu, -1000, 0).mean()) / -1000 if len(hu) else 0.0
    if share >= LEAST_GAS_SHARE:
        return None
    low, high = np.percentile(hu, [1, 99]) if len(hu) else (np.nan, np.nan)
    return (
        f"the lung mask holds no air: {low:.0f} to {high:.0f} HU in it (1st to 99th percentile), lungs lie around -900 "
        f"to 100; check that the scan is in Hounsfield units, and that the mask is of this scan"
    )


def gas_ml(scan: PhaseScan) -> float:
    """Gas in the lung mask: the sum of voxel volume times clip(-HU / 1000, 0, 1) (`domain.md` A1, ICU convention)."""
    return _gas_ml(scan, 0)


def scan_warnings(scan: PhaseScan) -> tuple[str, ...]:
    """Sentences on lungs that hold suspiciously little air.

    A training-free mask leaves airless lung out, so white lungs show as little gas or as a missing side; a given mask
    keeps it, so they also show as its share. Healthy children, crops and pneumonectomies are named, too.
    """
    found = []
    total, right, left = (_gas_ml(scan, side) for side in (0, 1, 2))
    if total < LEAST_GAS_ML:
        found.append(
            f"the lungs hold only {total / 1000:.2f} l of gas, healthy adults {LEAST_GAS_ML / 1000:.1f} or more"
        )
    small = min(right, left)
    if small < LEAST_SIDE_SHARE * total:
        side = "right" if right < left else "left"
        found.append(f"the {side} lung holds only {100 * small / total if total else 0:.0f} % of both lungs' gas")
    inside = scan.lung > 0
    airless = np.count_nonzero(scan.ct_hu[inside] > AIRLESS_HU) / max(np.count_nonzero(inside), 1)
    if airless > MOST_AIRLESS_SHARE:
        found.append(f"{100 * airless:.0f} % of the lung mask holds no air")
    return tuple(found)


def swapped_phases(pair: PhasePair) -> str | None:
    """One sentence where inhale doesn't hold more gas than exhale, else None (also where a phase is missing)."""
    if pair.exhale is None or pair.inhale is None:
        return None
    exhale, inhale = gas_ml(pair.exhale), gas_ml(pair.inhale)
    if inhale > exhale:
        return None
    return f"inhale holds {inhale / 1000:.3f} l of gas, exhale {exhale / 1000:.3f} l: inhale should hold more"


def _gas_ml(scan: PhaseScan, side: int) -> float:
    """Of one side, or of both for 0."""
    hu = scan.ct_hu[scan.lung > 0 if side == 0 else scan.lung == side]
    return float(-np.clip(hu, -1000, 0).sum(dtype=np.int64)) / 1000 * scan.geometry().voxel_ml()
