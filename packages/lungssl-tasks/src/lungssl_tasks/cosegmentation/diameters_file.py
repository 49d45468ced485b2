"""A file of diameters: CSV, one lesion of one scan a line, points in LPS mm.

    patient,phase,long_a_x_mm,long_a_y_mm,long_a_z_mm,long_b_x_mm,...,short_a_x_mm,...,short_b_z_mm

Both diameters lie on one axial slice, cross at about a right angle, and the long one is the longer.
"""

import csv
import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from lungssl_data.pair import Phase, PhaseScan
from numpy import ndarray

from lungssl_tasks.cosegmentation.boxes import Box
from lungssl_tasks.cosegmentation.diameters import Diameters
from lungssl_tasks.cosegmentation.lesions import PHASES, Measured

COLUMNS = tuple(
    f"{axis}_{end}_{name}_mm" for axis, end, name in itertools.product(("long", "short"), ("a", "b"), ("x", "y", "z"))
)
MOST_TILT_DEG = 15.0
"""That two diameters may be off a right angle: people set the ends by hand. Ours."""
MOST_GAP = 0.5
"""Of the long diameter, that the short one may lie beside it: a crescent's lies beside the line between its tips.
Ours."""
AERATED_HU = -600.0
"""The inside of a lesion that is denser than this is not doubted."""
DENSER_HU = 200.0
"""By how much the place that RAS would name must be denser than a place full of air to be taken for what was meant: a
chest is nearly the same mirrored, so that wrong signs often lead into lung. Both ours."""
BESIDE = 1.3
"""Lung comes into the lesion's box, scaled by this, or it isn't one of the lung (as `GrabCutConfig.outside`)."""


def read_diameters(path: Path) -> dict[tuple[str, Phase], list[Diameters]]:
    """By patient and phase. Raises ValueError that names file and line for what isn't as above.

    Patients are not named: a file that somebody fills in by hand may hold more than an id.
    """
    found: dict[tuple[str, Phase], list[Diameters]] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle)
            if missing := [name for name in ("patient", "phase", *COLUMNS) if name not in (reader.fieldnames or ())]:
                raise ValueError(
                    f"{path}, line 1: column {missing[0]} is missing; name patient, phase, {', '.join(COLUMNS)}"
                )
            for row in reader:
                patient, phase, one = _lesion_of(row, f"{path}, line {reader.line_num}")
                for other in found.setdefault((patient, phase), []):
                    if np.array_equal(one.long_mm, other.long_mm) and np.array_equal(one.short_mm, other.short_mm):
                        raise ValueError(f"{one.source}: the same lesion as in {other.source}; leave one of them out")
                found[patient, phase].append(one)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}; save it as CSV in UTF-8, with commas") from error
    if not found:
        raise ValueError(f"{path}: no line after the names of the columns; give a line for each lesion of each scan")
    return found


def write_diameters(path: Path, lesions: Mapping[tuple[str, Phase], list[Diameters]]) -> None:
    """The file that `read_diameters` reads."""
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["patient", "phase", *COLUMNS])
        for (patient, phase), some in lesions.items():
            for one in some:
                numbers = np.concatenate([one.long_mm, one.short_mm]).ravel()
                writer.writerow([patient, phase, *(f"{value:.4f}" for value in numbers)])


def check_places(lesions: Measured, patient: str, phase: Phase, scan: PhaseScan) -> None:
    """ValueError for a scan's diameters that don't lie in it, or, where its lung is known, have no lung about them.

    Says where a file in RAS, or with other axes first, would have them inside.
    """
    lung_mm = np.argwhere(scan.lung > 0)[:, ::-1] * np.array(scan.spacing_mm) + scan.origin_mm
    for one in lesions.get((patient, phase), []):
        ends = np.concatenate([one.long_mm, one.short_mm])
        where = one.source
        if not _inside(ends, scan).all():
            outside = ends[~_inside(ends, scan)][0]
            low, high = _borders_mm(scan)
            raise ValueError(
                f"{where}: end {_text(outside)} lies outside of the {phase} scan, which goes from {_text(low)} to "
                f"{_text(high)}{_guess(ends, scan)}; give x, y, z in LPS mm of this patient's {phase}"
            )
        half_mm = np.maximum(np.array(one.half_axes_mm()) * BESIDE, max(scan.spacing_mm))
        if len(lung_mm) and not (np.abs(one.axes_of(lung_mm)) * one.half_axes_mm() <= half_mm).all(axis=1).any():
            raise ValueError(
                f"{where}: there is no lung about {_text(one.centre_mm())} of {phase}{_guess(ends, scan)}; "
                "look whether they are in LPS mm of this scan, or leave the line out"
            )
        here, mirrored = (_mean_hu(one, scan, turned) for turned in ((1, 1, 1), (-1, -1, 1)))
        if here is not None and mirrored is not None and here < AERATED_HU and mirrored > here + DENSER_HU:
            raise ValueError(
                f"{where}: what lies there in {phase} has {here:.0f} HU, as lung with air, and taken as RAS the ends "
                f"lie about {mirrored:.0f} HU; give LPS mm (x and y of RAS with the other sign)"
            )


def _lesion_of(row: dict[str, str | None], where: str) -> tuple[str, Phase, Diameters]:
    if not (patient := row["patient"]):
        raise ValueError(f"{where}: patient is empty; give the patient's id in the cache")
    phase = next((name for name in PHASES if name == row["phase"]), None)
    if phase is None:
        raise ValueError(f"{where}: phase {row['phase']!r}, expected exhale or inhale")
    if empty := [name for name in COLUMNS if not row[name]]:
        raise ValueError(f"{where}: {empty[0]} is empty; give numbers, LPS mm with a decimal point")
    try:
        ends = np.array([float(row[name] or "") for name in COLUMNS]).reshape(2, 2, 3)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; give numbers, LPS mm with a decimal point") from error
    lengths = np.linalg.norm(ends[:, 1] - ends[:, 0], axis=1)
    if not np.isfinite(ends).all() or (lengths <= 0).any():
        raise ValueError(f"{where}: a diameter is 0 or not finite; give both ends of both")
    if np.ptp(ends[..., 2]) > 1e-3:
        raise ValueError(
            f"{where}: both diameters lie on one axial slice, these from z {ends[..., 2].min():g} to "
            f"{ends[..., 2].max():g} mm; look whether x, y, z are in this order"
        )
    if lengths[1] > lengths[0] + 1e-3:
        raise ValueError(
            f"{where}: the short diameter has {lengths[1]:.1f} mm, the long one {lengths[0]:.1f}; swap them"
        )
    along, across = (end[1, :2] - end[0, :2] for end in ends)
    tilt = float(np.rad2deg(np.arcsin(min(abs(along @ across) / (lengths[0] * lengths[1]), 1.0))))
    if tilt > MOST_TILT_DEG:
        raise ValueError(
            f"{where}: the diameters are {tilt:.0f} degrees off a right angle, at most {MOST_TILT_DEG:g} are "
            f"expected; give the longest diameter and the longest across it"
        )
    gap = max(_gap_mm(ends[0], ends[1]), _gap_mm(ends[1], ends[0]))
    if gap > MOST_GAP * lengths[0]:
        raise ValueError(f"{where}: the diameters are {gap:.1f} mm apart; give two that cross, of one lesion")
    return patient, phase, Diameters(long_mm=ends[0], short_mm=ends[1], source=where)


def _gap_mm(line: Float[ndarray, "2 3"], other: Float[ndarray, "2 3"]) -> float:
    """How far the nearer end of `other` is from the line through `line`; 0 where its ends lie on both sides."""
    along = line[1, :2] - line[0, :2]
    normal = np.array([-along[1], along[0]]) / np.linalg.norm(along)
    a, b = (other[:, :2] - line[0, :2]) @ normal
    return 0.0 if a * b <= 0 else float(min(abs(a), abs(b)))


def _borders_mm(scan: PhaseScan) -> tuple[Float[ndarray, "3"], Float[ndarray, "3"]]:
    spacing = np.array(scan.spacing_mm)
    low = np.array(scan.origin_mm) - spacing / 2
    return low, low + spacing * scan.ct_hu.shape[::-1]


def _inside(points_mm: Float[ndarray, "n 3"], scan: PhaseScan) -> Bool[ndarray, " n"]:
    low, high = _borders_mm(scan)
    return ((points_mm >= low) & (points_mm <= high)).all(axis=1)


def _mean_hu(one: Diameters, scan: PhaseScan, turned: tuple[int, int, int]) -> float | None:
    """Within half of the ellipsoid's axes, its points' signs `turned`; None where that isn't all in the scan."""
    other = Diameters(long_mm=one.long_mm * turned, short_mm=one.short_mm * turned)
    if not _inside(np.concatenate([other.long_mm, other.short_mm]), scan).all():
        return None
    side = 2 * int(np.ceil(max(other.half_axes_mm()) / 2 / min(scan.spacing_mm))) + 1
    box = Box.around(scan, other.centre_mm(), side, margin=0)
    inside = other.ellipsoid(box.geometry(scan), 0.5) & (box.cut(scan.valid, 0) > 0)
    return float(box.cut(scan.ct_hu, 0)[inside].mean()) if inside.any() else None


def _guess(ends: Float[ndarray, "4 3"], scan: PhaseScan) -> str:
    """What the file may hold instead of LPS, where only that would be lung, or inside."""
    for name, other in (("RAS", ends * (-1, -1, 1)), ("z, y, x", ends[:, ::-1]), ("y, x, z", ends[:, [1, 0, 2]])):
        if _inside(other, scan).all():
            place = np.rint((other.mean(axis=0) - scan.origin_mm) / np.array(scan.spacing_mm)).astype(int)[::-1]
            place = np.clip(place, 0, np.array(scan.ct_hu.shape) - 1)
            if scan.lung[tuple(place)] or not scan.lung.any():
                return f" (as {name} it would lie inside)"
    return ""


def _text(point_mm: Float[ndarray, "3"]) -> str:
    return "(" + ", ".join(f"{value:.1f}" for value in point_mm) + ")"
