"""Slices grouped into the stacks of one phase each, and a stack's order and grid.

What a stack can't be, and other readers silently make of it anyway (gap, duplicate, gantry tilt: measured, `io.md`
section 5), is refused with the cause. Positions in messages are along the slice axis from the first slice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from lungssl_data.pair import Phase
from lungssl_data.readers.checks import VolumeError, check_size, geometry_of
from lungssl_data.readers.dicom_phase import RULES, splitting_rule
from lungssl_data.readers.dicom_pixels import read_hu
from lungssl_data.readers.dicom_slice import Slice
from lungssl_data.volume import Geometry

SPACING_VARIATION = 0.05
"""Steps between slices may differ by this share of the median step; one missing slice is a variation of 1."""
DRIFT = 0.25
"""No slice may lie farther than this share of a step from its place on the even grid that the volume has."""
TILT_DEGREES, TILT_MM = 0.1, 0.02
"""Slices shifted against each other by more (0.5 mm over a 300 mm scan) are a sheared stack; positions are rounded to
0.01 mm, so a shorter shift shows nothing."""
DUPLICATE_MM = 0.01
SAME_AXES = 1e-3


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Group:
    """Slices of one series, frame of reference, orientation and phase, in no order yet."""

    slices: tuple[Slice, ...]
    phase: Phase | None
    percent: float | None
    evidence: str
    """The rule that tells the phase, or tells it from the series' other phases; empty for neither."""


def group(slices: Sequence[Slice]) -> list[Group]:
    """One series' slices, phase by phase (in the order of the phases' keys) within frame and orientation."""
    stacks: list[list[Slice]] = []
    for one in slices:
        for stack in stacks:
            if stack[0].frame == one.frame and np.allclose(stack[0].axes, one.axes, atol=SAME_AXES):
                stack.append(one)
                break
        else:
            stacks.append([one])
    return [part for stack in stacks for part in _phases(stack)]


def _phases(stack: list[Slice]) -> list[Group]:
    rule = splitting_rule([one.mark for one in stack])
    parts: dict[float | str | None, list[Slice]] = {}
    for one in stack:
        parts.setdefault(None if rule is None else one.mark.keys[rule], []).append(one)
    groups = []
    for key in sorted(parts, key=lambda key: (isinstance(key, str), key)):
        mark = parts[key][0].mark
        same = all(one.mark.phase == mark.phase and one.mark.percent == mark.percent for one in parts[key])
        phase, percent, evidence = (mark.phase, mark.percent, mark.evidence) if same else (None, None, "")
        evidence = evidence or ("" if rule is None else RULES[rule])
        groups.append(Group(slices=tuple(parts[key]), phase=phase, percent=percent, evidence=evidence))
    return groups


def ordered(slices: Sequence[Slice]) -> tuple[list[Slice], Geometry]:
    """The slices ascending along their normal, equal duplicates dropped, and their grid; VolumeError without a name."""
    first = slices[0]
    for other in slices[1:]:
        if (other.rows, other.columns) != (first.rows, first.columns):
            raise VolumeError("its slices differ in size; keep the slices of one reconstruction")
        if not np.allclose(other.pixel_mm, first.pixel_mm, rtol=1e-4):
            raise VolumeError("its slices differ in pixel spacing; keep the slices of one reconstruction")
        if not np.allclose(other.axes, first.axes, atol=SAME_AXES):
            raise VolumeError("its slices differ in orientation; keep the slices of one reconstruction")
        if other.frame != first.frame:
            raise VolumeError("its slices differ in frame of reference; keep the slices of one acquisition")
    normal = np.cross(*first.axes)
    stack = _without_duplicates(sorted(slices, key=lambda one: float(one.position_mm @ normal)), normal)
    if len(stack) < 2:
        raise VolumeError("the CT series has 1 slice, a volume needs 2 or more; export all slices")
    step_mm = _step_mm(np.stack([one.position_mm for one in stack]), normal)
    spacing = np.array([first.pixel_mm[1], first.pixel_mm[0], step_mm])
    affine = np.column_stack([np.stack([*first.axes, normal], axis=1) * spacing, stack[0].position_mm])
    shape = (len(stack), first.rows, first.columns)
    check_size(int(np.prod(shape, dtype=object)) * 2, "")
    return stack, geometry_of(affine, shape, "")


def _without_duplicates(stack: list[Slice], normal: Float[ndarray, "3"]) -> list[Slice]:
    """VolumeError where two slices of one place show different things."""
    kept = [stack[0]]
    different: list[float] = []
    for one in stack[1:]:
        step_mm = one.position_mm - kept[-1].position_mm
        if float(step_mm @ normal) >= DUPLICATE_MM:
            kept.append(one)
        elif np.linalg.norm(step_mm) >= DUPLICATE_MM or not np.array_equal(*read_hu([kept[-1], one])):
            different.append(float((one.position_mm - stack[0].position_mm) @ normal))
    if different:
        several = len(different) > 1
        raise VolumeError(
            f"{len(different)} {'slices share their' if several else 'slice shares its'} position with another that "
            f"shows something else ({'the first ' if several else ''}at {different[0]:.2f} mm from the first slice); "
            "the series holds two phases or reconstructions that no element tells apart, separate them"
        )
    return kept


def _step_mm(positions_mm: Float[ndarray, "slices 3"], normal: Float[ndarray, "3"]) -> float:
    """The slice spacing; VolumeError for gaps, changing steps and tilt."""
    along_mm = (positions_mm - positions_mm[0]) @ normal
    steps_mm = np.diff(along_mm)
    median_mm = float(np.median(steps_mm))
    uneven = np.flatnonzero(np.abs(steps_mm - median_mm) > SPACING_VARIATION * median_mm)
    if len(uneven):
        places = ", ".join(f"{along_mm[i]:.2f} to {along_mm[i + 1]:.2f}" for i in uneven[:4])
        more = f" and {len(uneven) - 4} more" if len(uneven) > 4 else ""
        raise VolumeError(
            f"slices are {median_mm:.2f} mm apart, but not from {places} mm{more} from the first slice"
            f"{_missing(along_mm, steps_mm, median_mm)}; export the complete series"
        )
    step_mm = float(along_mm[-1] / (len(along_mm) - 1))
    drift_mm = float(np.abs(along_mm - step_mm * np.arange(len(along_mm))).max())
    if drift_mm > DRIFT * step_mm:
        raise VolumeError(
            f"its slice spacing changes from {steps_mm.min():.2f} to {steps_mm.max():.2f} mm, which puts slices "
            f"{drift_mm:.2f} mm off an even grid; resample it with a converter that knows uneven spacing first"
        )
    shift_mm = float(np.linalg.norm(positions_mm - positions_mm[0] - np.outer(along_mm, normal), axis=1).max())
    tilt = float(np.degrees(np.arctan(shift_mm / along_mm[-1])))
    if tilt > TILT_DEGREES and shift_mm > TILT_MM:
        raise VolumeError(
            f"the gantry was tilted by {tilt:.2f} degrees, so the slices form a sheared stack; "
            "correct the tilt with a resampling converter first"
        )
    return step_mm


def _missing(along_mm: Float[ndarray, " slices"], steps_mm: Float[ndarray, " steps"], median_mm: float) -> str:
    """The places of the slices that fill gaps of whole steps; empty where a gap is of another length."""
    places: list[float] = []
    for start, step in zip(along_mm, steps_mm, strict=False):
        count = round(step / median_mm)
        if abs(step - count * median_mm) > SPACING_VARIATION * median_mm or count < 1:
            return ": the spacing changes"
        places += [float(start) + median_mm * i for i in range(1, min(count, 1000))]
    named = ", ".join(f"{place:.2f}" for place in places[:8])
    more = f" and {len(places) - 8} more" if len(places) > 8 else ""
    return f": {len(places)} {'slice is' if len(places) == 1 else 'slices are'} missing at {named} mm{more}"
