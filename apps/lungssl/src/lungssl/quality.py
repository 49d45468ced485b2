"""Whether a pair's figures are to be believed: what was looked at, what was found, what is usual."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from lungssl_data.aeration_checks import scan_warnings
from lungssl_data.pair import PhaseScan
from lungssl_data.volume import Volume
from lungssl_tasks.aeration import Aeration, LungVoxels, Part
from lungssl_tasks.aeration.compartments import MOST_HU
from lungssl_tasks.aeration.parts import LOBE_NAMES
from lungssl_tasks.registration import Trust
from lungssl_tasks.registration.trust import CUT_SHARE, cut_share

from lungssl.registering import Registered

THICKEST_MM = 3.0
"""Thicker slices blur non-aerated into aerated lung. Ours: quantitative studies ask for slices of 1 to 2 mm."""
TISSUE_HU = (0, 120)
"""Where the peak of blood and muscle is looked for; unenhanced it lies at 30 to 60, after contrast above."""
USUAL_PEAK_HU = (20, 80)
MASS_CHANGE = 0.15
"""Lungs keep their tissue between the phases but for blood: 10 % is usual, ours with a margin."""
LEAST_DENSE = 0.01
"""Share of a mask's volume from -100 to 100 HU: normal lungs hold 7 (SD 4) % of their mass there (`domain.md` A2), some
2 % of their volume."""
MOST_EXCLUDED = 0.02
"""Share of the masks above 100 HU: bone, contrast and drains, or a mask that leaks."""


LANDMARKS_MM = 2.0
"""Mean error of landmarks: lung registrations in use reach 1 to 1.5 mm (DIR-Lab, `registration.md`); ours with a
margin."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    found: str
    usual: str
    doubt: str | None
    """What speaks against believing the figures; None where nothing does."""


def checks(
    volumes: Mapping[str, Volume],
    registered: Registered,
    voxels: Mapping[str, LungVoxels],
    parts: Mapping[str, Part],
    *,
    whole: bool,
) -> list[Check]:
    """All checks of a pair, by phase `exhale` and `inhale`. `whole`: the masks are said to hold non-aerated lung."""
    found: list[Check] = []
    for phase, role in (("exhale", "fixed"), ("inhale", "moving")):
        found += _of_scan(phase, volumes[phase], registered.scans[role])
        found += _of_mask(phase, registered.scans[role], getattr(parts["lungs"], phase), whole=whole)
    found += _of_lobes(voxels)
    found += _of_landmarks(registered)
    return [*found, *_of_pair(parts["lungs"], registered.registration.trust, whole=whole)]


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


def _of_mask(phase: str, scan: PhaseScan, held: Aeration, *, whole: bool) -> Iterator[Check]:
    volume_ml = held.volume_ml + held.excluded_ml
    above = held.excluded_ml / volume_ml
    yield Check(
        name=f"{phase}: mask above {MOST_HU:g} HU",
        found=f"{above:.1%}",
        usual=f"below {MOST_EXCLUDED:.0%}",
        doubt="the mask holds bone, contrast or drains" if above > MOST_EXCLUDED else None,
    )
    if whole:
        dense = held.compartment_ml["non"] / volume_ml
        yield Check(
            name=f"{phase}: mask without air",
            found=f"{dense:.2%} from -100 HU on",
            usual=f"{LEAST_DENSE:.0%} and more",
            doubt="hardly any of the mask is without air: if a threshold made it, recruitment can't be told from it"
            if dense < LEAST_DENSE
            else None,
        )
    x = np.nonzero(scan.lung)[2]
    sides = [x[scan.lung[scan.lung > 0] == side].mean() for side in (1, 2) if (scan.lung == side).any()]
    if len(sides) == 2 and sides[0] > sides[1]:
        yield Check(
            name=f"{phase}: sides",
            found="code 1 lies to the left of code 2",
            usual="1 right, 2 left",
            doubt="right and left are swapped, in the mask or in the scan's orientation",
        )


def _of_landmarks(registered: Registered) -> Iterator[Check]:
    if (errors := registered.landmarks) is None:
        return
    yield Check(
        name="landmarks",
        found=f"{errors.points} missed by {errors.mean_mm:.2f} mm (95th centile {errors.p95_mm:.1f})",
        usual=f"below {LANDMARKS_MM:g} mm",
        doubt="the registration compares tissue with other tissue: maps and figures by place are off"
        if errors.mean_mm > LANDMARKS_MM
        else None,
    )


def _of_lobes(voxels: Mapping[str, LungVoxels]) -> Iterator[Check]:
    held = {
        phase: set() if one.lobe is None else set(np.unique(one.lobe).tolist()) - {0} for phase, one in voxels.items()
    }
    for phase, other in (("exhale", "inhale"), ("inhale", "exhale")):
        if alone := [name for code, name in LOBE_NAMES.items() if code in held[phase] - held[other]]:
            yield Check(
                name="lobes",
                found=f"{', '.join(alone)} at {phase} only",
                usual="the same lobes",
                doubt=f"{', '.join(alone)} is in the {phase} lobes only: lungs and side compare different tissue",
            )


def _of_pair(lungs: Part, trust: Trust, *, whole: bool) -> Iterator[Check]:
    gas = lungs.exhale.gas_ml, lungs.inhale.gas_ml
    yield Check(
        name="gas, exhale and inhale",
        found=f"{gas[0]:.0f} and {gas[1]:.0f} ml",
        usual="more at inhale",
        doubt=None if gas[1] > gas[0] else "inhale holds no more gas than exhale: are the scans swapped?",
    )
    if whole:
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
    doubts = "; ".join(trust.doubts)
    for role, phase in (("fixed", "exhale"), ("moving", "inhale")):
        doubts = doubts.replace(f"the {role} ", f"the {phase} ")
    yield Check(
        name="registration",
        found=f"lungs overlap {trust.overlap:.3f}, insides correlate {trust.similarity:.2f}",
        usual="0.97 and more; 0.5 to 0.8",
        doubt=doubts or None,
    )


def tissue_peak_hu(scan: PhaseScan) -> float | None:
    """The commonest HU of soft tissue around the lungs, smoothed over 10 HU; None where there is none."""
    low, high = TISSUE_HU
    hu = scan.ct_hu[(scan.lung == 0) & (scan.ct_hu >= low) & (scan.ct_hu < high)]
    if not len(hu):
        return None
    counts = np.convolve(np.bincount(hu - low, minlength=high - low), np.ones(11), mode="same")
    return float(low + counts.argmax())
