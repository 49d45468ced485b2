"""A patient's lesions, and which of both phases are one.

A lesion of exhale has its partner in inhale where the displacement, or the coarse affine, takes it. Two that touch in
one phase are one part of its mask and two of the other's, so several of either may be one lesion. Where there is no
partner, air is back in it, or nobody saw it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from lungssl_data.pair import Phase, PhasePair
from numpy import ndarray

from lungssl_tasks.cosegmentation.diameters import Diameters, Part, lesions_of

PHASES: tuple[Phase, Phase] = ("exhale", "inhale")
LEAST_VOXELS = 20
"""Of a lesion, or it is unknown: with fewer its Dice says little of a network. Ours."""
OVERLAP = 0.1
"""Two parts are of one lesion where so much of the smaller one is in both. Ours: beside other lesions it is 0."""
Measured = Mapping[tuple[str, Phase], list[Diameters]]
"""Diameters by patient and phase."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesion:
    """One lesion of one scan."""

    diameters: Diameters
    part: Part | None
    """All of it, where somebody drew it."""
    small: bool = False
    """A part of fewer than LEAST_VOXELS voxels."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """One lesion: which of exhale's, and which of inhale's; none where it isn't. Small ones only where all are."""

    patient: str
    exhale: tuple[int, ...]
    inhale: tuple[int, ...]


def annotated(pair: PhasePair, phase: Phase, diameters: Measured | None) -> bool:
    """Whether anybody looked for lesions in this phase."""
    if diameters is not None:
        return (pair.patient, phase) in diameters
    return pair.scan(phase).lesion is not None


def found_lesions(pair: PhasePair, phase: Phase, diameters: Measured | None) -> list[Lesion]:
    """A phase's lesions: with given diameters those, each with the part of the mask that most of its ellipsoid is in,
    else the mask's parts; none for a pair that lacks a phase.
    """
    if len(pair.phases()) < 2:
        return []
    scan = pair.scan(phase)
    grid = scan.geometry()
    if diameters is not None:
        given = diameters.get((pair.patient, phase), [])
        parts = [] if scan.lesion is None or not given else lesions_of(scan.lesion)
        return [Lesion(diameters=one, part=_drawn(one, [(p, p.points_mm(grid)) for p in parts])) for one in given]
    if scan.lesion is None:
        return []
    return [
        Lesion(diameters=part.diameters(grid), part=part, small=part.voxels < LEAST_VOXELS)
        for part in lesions_of(scan.lesion)
    ]


def partners(pair: PhasePair, exhale: list[Lesion], inhale: list[Lesion]) -> list[Match]:
    """Which lesions are one: the nearest of both phases, one to one; then each that is left joins the nearest pair that
    it lies in; then those that are alone. Left out are small parts, but where a phase has no more of a lesion.
    """
    near = sorted(_near(pair, exhale, inhale))
    group: dict[tuple[str, int], int] = {}
    for _, i, j in near:
        if ("exhale", i) not in group and ("inhale", j) not in group:
            group["exhale", i] = group["inhale", j] = len(group) // 2
    pairs = len(group) // 2
    paired = set(group)
    for _, i, j in near:
        for one, other in ((("exhale", i), ("inhale", j)), (("inhale", j), ("exhale", i))):
            if one not in group and other in paired:
                group[one] = group[other]
    every = [*(("exhale", i) for i in range(len(exhale))), *(("inhale", j) for j in range(len(inhale)))]
    for one in every:
        if one not in group:
            group[one] = pairs
            pairs += 1
    matches = []
    for number in dict.fromkeys(group[one] for one in every):
        held = {}
        for phase, lesions in (("exhale", exhale), ("inhale", inhale)):
            mine = [k for k in range(len(lesions)) if group[phase, k] == number]
            held[phase] = tuple(k for k in mine if not lesions[k].small), tuple(mine)
        if held["exhale"][0] or held["inhale"][0]:
            chosen = {phase: large or some for phase, (large, some) in held.items()}
            matches.append(Match(patient=pair.patient, exhale=chosen["exhale"], inhale=chosen["inhale"]))
    return matches


def centres_mm(pair: PhasePair, lesions: Mapping[Phase, list[Lesion]], match: Match) -> dict[Phase, ndarray]:
    """Middles of a lesion in both phases, (3,): its own, or where the other's lies."""
    held = {
        phase: _middle_mm([lesions[phase][k].diameters for k in chosen])
        for phase, chosen in (("exhale", match.exhale), ("inhale", match.inhale))
        if chosen
    }
    if "inhale" not in held:
        held["inhale"] = moved_mm(pair, held["exhale"][None])[0]
    elif "exhale" not in held:
        held["exhale"] = moved_mm(pair, held["inhale"][None], back=True)[0]
    return held


def told_diameters(
    lesions: Mapping[Phase, list[Lesion]], match: Match, centres_mm: Mapping[Phase, Float[ndarray, "3"]]
) -> dict[Phase, list[Diameters]]:
    """What is known of a lesion in both phases: its own diameters, or the other's about its middle here."""
    own = {
        phase: [lesions[phase][k].diameters for k in chosen]
        for phase, chosen in (("exhale", match.exhale), ("inhale", match.inhale))
    }
    for phase, other in (PHASES, PHASES[::-1]):
        if not own[phase]:
            own[phase] = [one.moved(centres_mm[phase] - centres_mm[other]) for one in own[other]]
    return own


def moved_mm(pair: PhasePair, points_mm: Float[ndarray, "n 3"], *, back: bool = False) -> Float[ndarray, "n 3"]:
    """Exhale points in inhale by the displacement where it is known, else by the coarse affine.

    `back`, which needs no more than a lesion's middle, by the affine's inverse, corrected once by the displacement.
    Raises ValueError for a pair without an affine.
    """
    affine = pair.exhale_to_inhale
    if affine is None:
        raise ValueError(f"patient {pair.patient} has no coarse affine; build the cache again")
    if back:
        start = np.linalg.solve(affine[:, :3], (points_mm - affine[:, 3]).T).T
        return start + np.linalg.solve(affine[:, :3], (points_mm - moved_mm(pair, start)).T).T
    found = points_mm @ affine[:, :3].T + affine[:, 3]
    field = pair.displacement
    if field is not None:
        places = np.rint((points_mm - np.array(field.origin_mm)) / field.spacing_mm).astype(int)[:, ::-1]
        inside = ((places >= 0) & (places < field.u_mm.shape[1:])).all(axis=1)
        u_mm = np.full(points_mm.shape, np.nan)
        u_mm[inside] = field.u_mm[(slice(None), *places[inside].T)].T
        found = np.where(np.isfinite(u_mm).all(axis=1, keepdims=True), points_mm + u_mm, found)
    return found


def _middle_mm(lesions: list[Diameters]) -> Float[ndarray, "3"]:
    """Of ellipsoids, by their volumes."""
    volumes = [float(np.prod(one.half_axes_mm())) for one in lesions]
    return np.average([one.centre_mm() for one in lesions], axis=0, weights=volumes)


def _drawn(lesion: Diameters, parts: list[tuple[Part, ndarray]]) -> Part | None:
    inside = [int((np.linalg.norm(lesion.axes_of(points), axis=1) <= 1).sum()) for _, points in parts]
    return parts[int(np.argmax(inside))][0] if any(inside) else None


def _near(pair: PhasePair, exhale: list[Lesion], inhale: list[Lesion]) -> list[tuple[float, int, int]]:
    """Those that may be one, and how far they are from it, for the order alone. Not two types.

    Below 0 by how many voxels of exhale lie in inhale's part; else by how far the centre of either is from the other's,
    in half axes.
    """
    near = []
    theirs = [one.diameters.centre_mm()[None] for one in inhale]
    returned = [moved_mm(pair, centre, back=True) for centre in theirs]
    grid = pair.scan("inhale").geometry()
    for i, one in enumerate(exhale):
        carried = moved_mm(pair, one.diameters.centre_mm()[None])
        points = None if one.part is None else moved_mm(pair, one.part.points_mm(pair.scan("exhale").geometry()))
        for j, other in enumerate(inhale):
            if one.part is not None and other.part is not None and one.part.kind != other.part.kind:
                continue
            if points is not None and other.part is not None:
                both = int(other.part.holds(points, grid).sum())
                if both >= OVERLAP * min(len(points), other.part.voxels):
                    near.append((-float(both), i, j))
                    continue
            apart = min(
                float(np.linalg.norm(other.diameters.axes_of(carried))),
                float(np.linalg.norm(one.diameters.axes_of(returned[j]))),
            )
            if apart <= 1:
                near.append((apart, i, j))
    return near
