"""Landmark pairs: bifurcations of the trees, and random lung points where these are too few (`domain.md` D6)."""

import numpy as np
from jaxtyping import Float64, UInt8
from numpy import ndarray
from numpy.random import Generator

from lungssl_data.phantom.parenchyma import to_phase
from lungssl_data.phantom.points import place_lung
from lungssl_data.phantom.subject import Subject
from lungssl_data.phantom.trees import Tree

LANDMARKS = 300
DEPTH_MM = 5.0
"""Least distance of a landmark to its lung's surface, in both phases (D6)."""
GAP_MM = 8.0
LEAST_RADIUS_MM = 0.7
"""Of a branch whose fork can be seen."""
CHUNK = 800
"""Candidates tried at a time: most subjects need no second helping."""
FORK, POINT = 1, 0
"""Kinds of a landmark."""


def draw_landmarks(
    subject: Subject, trees: tuple[Tree, ...], rng: Generator
) -> tuple[Float64[ndarray, "n 3"], Float64[ndarray, "n 3"], UInt8[ndarray, " n"]]:
    """Exhale and inhale places and kind; each is kept where no kept one is near (Poisson thinning).

    Of the subject alone, not of its grids: one seed has the same landmarks at every spacing.
    """
    chest, exhale, inhale, lung = subject.chest, subject.exhale, subject.inhale, subject.lung
    wide = [nodes[radius >= LEAST_RADIUS_MM] for nodes, radius in (tree.forks() for tree in trees)]
    forks = np.concatenate((np.zeros((0, 3)), *wide))
    forks, _ = place_lung(chest, exhale, exhale, rng.permutation(forks))
    corner = np.array([chest.half_width_mm, chest.half_depth_mm, chest.apex_mm])
    chunks = [(FORK, forks[i : i + CHUNK]) for i in range(0, len(forks), CHUNK)]
    chunks += [(POINT, rng.uniform(-1.0, 1.0, (5 * CHUNK, 3)) * corner) for _ in range(5)]
    kept, there, kinds = np.zeros((0, 3)), np.zeros((0, 3)), []
    for kind, points in chunks:
        moved = to_phase(chest, lung, exhale, exhale, inhale, points)
        inside = np.isfinite(moved).all(1)
        points, moved = points[inside], moved[inside]
        for i in np.flatnonzero(_deep(subject, points, moved)):
            if len(kept) < LANDMARKS and (((kept - points[i]) ** 2).sum(1) >= GAP_MM**2).all():
                kept, there = np.vstack((kept, points[i])), np.vstack((there, moved[i]))
                kinds.append(kind)
        if len(kept) == LANDMARKS:
            break
    return kept, there, np.asarray(kinds, np.uint8)


def _deep(subject: Subject, points: Float64[ndarray, "n 3"], moved: Float64[ndarray, "n 3"]) -> ndarray:
    """Whether probes in 26 directions, a tenth longer than the depth to allow for what lies between them, all end in
    a lung."""
    chest, exhale, inhale, lung = subject.chest, subject.exhale, subject.inhale, subject.lung
    deep = np.ones(len(points), bool)
    probes = np.stack(np.meshgrid(*[(-1.0, 0.0, 1.0)] * 3), -1).reshape(-1, 3)
    for probe in np.delete(probes, 13, axis=0):
        step = probe * (1.1 * DEPTH_MM / np.linalg.norm(probe))
        at = np.flatnonzero(deep)
        there = to_phase(chest, lung, exhale, exhale, inhale, points[at] + step)
        back = to_phase(chest, lung, exhale, inhale, exhale, moved[at] + step)
        deep[at] = np.isfinite(there).all(1) & np.isfinite(back).all(1)
    return deep
