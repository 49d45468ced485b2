"""Whether what came with a scan is of that scan: lobes, lesions, landmarks and a field against lungs and coarse map.

What can't be right is refused, what is odd is a warning. A shifted or mirrored label map, another patient's landmarks
or a field of the other direction would else train and judge without a word.
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from lungssl_data.coarse_field import CoarseField
from lungssl_data.pair import CacheError, PhasePair, PhaseScan

RIGHT_LOBES, LEFT_LOBES = (1, 2, 3), (4, 5)
LEAST_INSIDE = 0.5
"""Share of lobes, and of lesions, that must lie in the lungs. Lobes of people lie there to 0.95 and more; half leaves
room for a training-free lung mask that leaves consolidated lung out."""
ODD_INSIDE = 0.8
MOST_ON_OTHER_SIDE = 0.75
"""Share of right lobes in the left lung, and the reverse, above which sides are exchanged or the scan is mirrored."""
ODD_ON_OTHER_SIDE = 0.1
MOST_RESIDUAL_MM, ODD_RESIDUAL_MM = 60.0, 30.0
"""Median distance of corresponding points after the coarse affine map. The ten DIR-Lab COPD pairs have 12 to 31 mm
before any registration (`domain.md` C2); points of unlike places in the lungs are some 100 mm apart."""
CLEARLY_LESS = 0.7
"""A reversed reading that leaves less than this share of the residual is likely the right one."""
LEAST_KNOWN = 0.5
"""Share of lung points that a field should know."""
CLEARLY_BETTER = 1.25
"""How many times better the lungs' profile along an axis must fit when turned over. Among the masks of the ten DIR-Lab
COPD pairs the right way round is at worst 1.01 times, and the wrong way round 1.34 to 6 times in nine along z."""
_PROFILE_BINS = 32


def check_fit(pair: PhasePair) -> list[str]:
    """Sentences on what is odd; CacheError for what can't belong to its scan. Names no file."""
    found = []
    for phase in pair.phases():
        scan = pair.scan(phase)
        found += [f"{phase}: {text}" for text in [*_sides(scan), *_lobes(phase, scan), *_lesion(phase, scan)]]
    if pair.exhale is None or pair.inhale is None or pair.exhale_to_inhale is None:
        return found
    found += _turned(pair.exhale, pair.inhale)
    for kind, points in pair.landmarks.items():
        found += _points(f"{kind} landmarks", points.exhale_mm, points.inhale_mm, pair.exhale_to_inhale)
    if pair.displacement is not None:
        exhale_mm = _lung_points_mm(pair.exhale)
        inhale_mm = CoarseField.of(pair.displacement).inhale_mm(exhale_mm)
        known = np.isfinite(inhale_mm).all(axis=1)
        if not known.any():
            raise CacheError("displacement: it knows no point of the exhale lungs; it must lie on exhale's place in mm")
        if known.mean() < LEAST_KNOWN:
            found.append(f"the displacement knows only {known.mean():.0%} of the exhale lungs")
        found += _points("the displacement's points", exhale_mm[known], inhale_mm[known], pair.exhale_to_inhale)
    return found


def _sides(scan: PhaseScan) -> list[str]:
    x = {side: np.nonzero((scan.lung == side).any(axis=(0, 1)))[0] for side in (1, 2)}
    if min(map(len, x.values())) and x[1].mean() > x[2].mean():
        return ["the right lung lies to the patient's left; its mask's sides are exchanged, or the scan is mirrored"]
    return []


def _turned(exhale: PhaseScan, inhale: PhaseScan) -> list[str]:
    """Axes along which one phase's lungs look like the other's turned over."""
    found = []
    for axis, name in enumerate(("head and feet", "front and back", "right and left")):
        one, other = _profile(exhale, axis), _profile(inhale, axis)
        straight, turned = np.abs(one - other).sum(), np.abs(one - other[::-1]).sum()
        if straight > CLEARLY_BETTER * turned:
            found.append(
                f"the lungs of exhale and inhale fit better with {name} of one exchanged; look at both scans, one's "
                f"header may have a wrong direction"
            )
    return found


def _profile(scan: PhaseScan, axis: int) -> Float[ndarray, "bins"]:
    """Share of the lungs' voxels along an axis, from their first to their last slice."""
    counts = np.count_nonzero(scan.lung, axis=tuple({0, 1, 2} - {axis}))
    there = np.flatnonzero(counts)
    counts = counts[there[0] : there[-1] + 1]
    place = (np.arange(_PROFILE_BINS) + 0.5) / _PROFILE_BINS * len(counts) - 0.5
    profile = np.interp(place, np.arange(len(counts)), counts)
    return profile / profile.sum()


def _lobes(phase: str, scan: PhaseScan) -> list[str]:
    if scan.lobes is None:
        return []
    count = np.count_nonzero(scan.lobes)
    if not count:
        return ["the lobes lie wholly outside of what is kept around the lungs"] if scan.lung.any() else []
    inside = np.count_nonzero((scan.lobes > 0) & (scan.lung > 0)) / count
    if inside < LEAST_INSIDE:
        raise CacheError(
            f"{phase} lobes: {inside:.0%} of them lie in the lungs, at least {LEAST_INSIDE:.0%} should; check that "
            f"they are of this scan, and their origin and axes"
        )
    found = [f"only {inside:.0%} of the lobes lie in the lungs"] if inside < ODD_INSIDE else []
    right, left = np.isin(scan.lobes, RIGHT_LOBES), np.isin(scan.lobes, LEFT_LOBES)
    wrong = np.count_nonzero(right & (scan.lung == 2)) + np.count_nonzero(left & (scan.lung == 1))
    share = wrong / max(np.count_nonzero((scan.lobes > 0) & (scan.lung > 0)), 1)
    if share > MOST_ON_OTHER_SIDE:
        raise CacheError(
            f"{phase} lobes: {share:.0%} of them lie in the lung of the other side; check lobe_codes, and whether the "
            f"lobes or the scan are mirrored"
        )
    if share > ODD_ON_OTHER_SIDE:
        found.append(f"{share:.0%} of the lobes lie in the lung of the other side")
    there = set(np.unique(scan.lobes).tolist()) - {0}
    if len(there) < len(RIGHT_LOBES + LEFT_LOBES):
        found.append(f"{len(there)} of 5 lobes are labelled")
    return found


def _lesion(phase: str, scan: PhaseScan) -> list[str]:
    if scan.lesion is None or not scan.lesion.any():
        return []
    inside = np.count_nonzero((scan.lesion > 0) & (scan.lung > 0)) / np.count_nonzero(scan.lesion)
    if scan.lesion.all():
        raise CacheError(f"{phase} lesion: every voxel is labelled; check that it is a label map of lesions")
    return [f"only {inside:.0%} of the lesions lie in the lungs"] if inside < LEAST_INSIDE else []


def _points(
    what: str, exhale_mm: Float[ndarray, "n 3"], inhale_mm: Float[ndarray, "n 3"], affine: Float[ndarray, "3 4"]
) -> list[str]:
    """Median distance after the coarse map, and whether it were clearly less the other way round."""

    def residual(start: ndarray, end: ndarray) -> float:
        return float(np.median(np.linalg.norm(start @ affine[:, :3].T + affine[:, 3] - end, axis=1)))

    straight = residual(exhale_mm, inhale_mm)
    if straight > MOST_RESIDUAL_MM:
        raise CacheError(
            f"{what}: they lie {straight:.0f} mm (median) from where the lungs' coarse map takes them, at most "
            f"{MOST_RESIDUAL_MM:.0f} is possible; check that they are of this patient, their order, axes (LPS) and unit"
        )
    if residual(inhale_mm, exhale_mm) < CLEARLY_LESS * straight:
        return [f"{what} fit better with exhale and inhale exchanged; check their columns, or the field's direction"]
    if straight > ODD_RESIDUAL_MM:
        return [f"{what} lie {straight:.0f} mm (median) from where the lungs' coarse map takes them"]
    return []


def _lung_points_mm(scan: PhaseScan, count: int = 2000) -> Float[ndarray, "n 3"]:
    """Evenly taken lung voxels, at most `count`: a median over so many is within 1 mm of that of all."""
    inside = np.flatnonzero(scan.lung)
    index = np.stack(np.unravel_index(inside[:: max(1, len(inside) // count)], scan.lung.shape), axis=1)
    return index[:, ::-1] * scan.spacing_mm + scan.origin_mm
