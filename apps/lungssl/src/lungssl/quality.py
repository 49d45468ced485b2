"""Whether a pair's figures are to be believed: what was looked at, what was found, what is usual."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from lungssl_data.aeration_checks import scan_warnings
from lungssl_data.pair import PhaseScan
from lungssl_data.volume import Volume
from lungssl_tasks.aeration import Part
from lungssl_tasks.registration import Trust

THICKEST_MM = 3.0
"""Thicker slices blur non-aerated into aerated lung. Ours: quantitative studies ask for slices of 1 to 2 mm."""
CUT_SHARE = 0.01
"""Of the lung's surface voxels at the edge of what was measured; a whole lung has none."""
TISSUE_HU = (0, 120)
"""Where the peak of blood and muscle is looked for; unenhanced it lies at 30 to 60, after contrast above."""
USUAL_PEAK_HU = (20, 80)
MASS_CHANGE = 0.15
"""Lungs keep their tissue between the phases but for blood: 10 % is usual, ours with a margin."""
MOST_EXCLUDED = 0.02
"""Share of the masks above 100 HU: bone, contrast and drains, or a mask that leaks."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    found: str
    usual: str
    doubt: str | None
    """What speaks against believing the figures; None where nothing does."""


def checks(
    volumes: Mapping[str, Volume], scans: Mapping[str, PhaseScan], parts: Mapping[str, Part], trust: Trust
) -> list[Check]:
    """All checks of a pair, by phase `exhale` and `inhale`."""
    found: list[Check] = []
    for phase, volume in volumes.items():
        found += _of_scan(phase, volume, scans[phase])
    return [*found, *_of_pair(parts["lungs"], trust)]


def _of_scan(phase: str, volume: Volume, scan: PhaseScan) -> Iterator[Check]:
    spacing = volume.geometry.spacing_mm
    yield Check(
        name=f"{phase}: voxels",
        found=" x ".join(f"{mm:.2f}" for mm in spacing) + " mm",
        usual=f"at most {THICKEST_MM:g} mm",
        doubt=f"slices of {max(spacing):.1f} mm blur small airless regions" if max(spacing) > THICKEST_MM else None,
    )
    cut = cut_share(scan)
    yield Check(
        name=f"{phase}: field of view",
        found=f"{cut:.1%} of the lung's surface lies at its edge",
        usual=f"below {CUT_SHARE:.0%}",
        doubt="the scan cuts the lungs: volumes and masses are too small" if cut > CUT_SHARE else None,
    )
    peak = tissue_peak_hu(scan)
    low, high = USUAL_PEAK_HU
    yield Check(
        name=f"{phase}: blood and muscle",
        found="no tissue" if peak is None else f"peak at {peak:.0f} HU",
        usual=f"{low} to {high} HU",
        doubt=None
        if peak is not None and low <= peak <= high
        else "HU may be off, or contrast was given: masses and the non-aerated compartment shift",
    )
    for warning in scan_warnings(scan):
        yield Check(name=f"{phase}: gas", found="", usual="", doubt=warning)


def _of_pair(lungs: Part, trust: Trust) -> Iterator[Check]:
    gas = lungs.exhale.gas_ml, lungs.inhale.gas_ml
    yield Check(
        name="gas, exhale and inhale",
        found=f"{gas[0]:.0f} and {gas[1]:.0f} ml",
        usual="more at inhale",
        doubt=None if gas[1] > gas[0] else "inhale holds no more gas than exhale: are the scans swapped?",
    )
    mass = lungs.exhale.mass_g, lungs.inhale.mass_g
    change = mass[1] / mass[0] - 1 if mass[0] else float("nan")
    yield Check(
        name="lung mass, exhale and inhale",
        found=f"{mass[0]:.0f} and {mass[1]:.0f} g ({change:+.0%})",
        usual=f"within {MASS_CHANGE:.0%}",
        doubt=None
        if abs(change) <= MASS_CHANGE
        else "tissue comes or goes between the phases: a mask leaks, or lacks lung in one of them",
    )
    for phase, held in (("exhale", lungs.exhale), ("inhale", lungs.inhale)):
        share = held.excluded_ml / max(held.volume_ml + held.excluded_ml, 1e-9)
        yield Check(
            name=f"{phase}: mask above 100 HU",
            found=f"{share:.1%}",
            usual=f"below {MOST_EXCLUDED:.0%}",
            doubt="the mask holds bone, contrast or drains" if share > MOST_EXCLUDED else None,
        )
    yield Check(
        name="registration",
        found=f"lungs overlap {trust.overlap:.3f}, insides correlate {trust.similarity:.2f}",
        usual="0.97 and more; 0.5 to 0.8",
        doubt="; ".join(trust.doubts) or None,
    )


def cut_share(scan: PhaseScan) -> float:
    """Of the lung's surface voxels, those that touch what wasn't measured or the end of the scan."""
    lung, measured = scan.lung > 0, scan.valid > 0
    surface = edge = 0
    for axis in range(3):
        for turn in (1, -1):
            beside_lung, beside_measured = (_shifted(mask, axis, turn) for mask in (lung, measured))
            outer = lung & ~beside_lung
            surface += int(outer.sum())
            edge += int((outer & ~beside_measured).sum())
    return edge / max(surface, 1)


def _shifted(mask: np.ndarray, axis: int, turn: int) -> np.ndarray:
    """Each voxel's neighbour along an axis; False beyond the array."""
    moved = np.roll(mask, turn, axis)
    end = [slice(None)] * 3
    end[axis] = slice(0, 1) if turn == 1 else slice(-1, None)
    moved[tuple(end)] = False
    return moved


def tissue_peak_hu(scan: PhaseScan) -> float | None:
    """The commonest HU of soft tissue around the lungs, smoothed over 10 HU; None where there is none."""
    low, high = TISSUE_HU
    hu = scan.ct_hu[(scan.lung == 0) & (scan.ct_hu >= low) & (scan.ct_hu < high)]
    if not len(hu):
        return None
    counts = np.convolve(np.bincount(hu - low, minlength=high - low), np.ones(11), mode="same")
    return float(low + counts.argmax())
