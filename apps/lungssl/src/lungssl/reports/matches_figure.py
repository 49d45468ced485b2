"""Landmarks of a pair, joined: where each point of exhale is at inhale, and by how much the registration misses it."""

import numpy as np
from lungssl_data.pair import PhaseScan
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy import ndarray

from lungssl.analyzing import Analysed
from lungssl.reports.figures import WINDOW_HU

MOST_LINES = 60
"""More can't be told apart; those shown are evenly spread over the landmarks' ranks in height."""
MOST_MM = 5.0
"""Colours end there."""
GAP_MM = 25.0
"""Between the scans."""


def matches_figure(found: Analysed) -> Figure:
    """Both scans from the front, averaged over the depth of the lungs, and lines from each landmark to its place.

    Lines end where the landmark is at inhale, crosses are where the registration takes it; colours are the distance
    between the two. Raises ValueError for a pair without landmarks.
    """
    points = found.registered.points_mm
    if points is None:
        raise ValueError("this pair has no landmarks to join")
    here, there = points
    taken = here + found.registered.registration.at(here)
    errors_mm = np.linalg.norm(taken - there, axis=1)
    ranks = np.linspace(0, len(here) - 1, min(len(here), MOST_LINES)).round().astype(int)
    chosen = np.argsort(here[:, 2], kind="stable")[ranks]
    exhale, inhale = (found.registered.scans[role] for role in ("fixed", "moving"))
    shift_mm = _left_mm(exhale) + GAP_MM - inhale.origin_mm[0]
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    axes = figure.subplots()
    low, high = WINDOW_HU
    extents = [_extent(exhale, 0.0), _extent(inhale, shift_mm)]
    for scan, extent in zip((exhale, inhale), extents, strict=True):
        axes.imshow(_from_the_front(scan), cmap="gray", vmin=low, vmax=high, extent=extent)
    first_x, last_x, bottom, top = zip(*extents, strict=True)
    axes.set_xlim(min(first_x), max(last_x))
    axes.set_ylim(min(bottom), max(top))
    places = [place[chosen][:, [0, 2]] + [offset_mm, 0] for place, offset_mm in ((here, 0.0), (there, shift_mm))]
    lines = LineCollection(list(np.stack(places, axis=1)), cmap="cool", linewidths=1.0, alpha=0.85)
    lines.set_array(errors_mm[chosen])
    lines.set_clim(0, MOST_MM)
    axes.add_collection(lines)
    crosses = taken[chosen][:, [0, 2]] + [shift_mm, 0]
    axes.scatter(*crosses.T, c=errors_mm[chosen], cmap="cool", vmin=0, vmax=MOST_MM, marker="x", s=22, linewidths=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor("black")
    axes.set_title("exhale (left), inhale (right)", fontsize=11)
    figure.colorbar(lines, ax=axes, shrink=0.8, label="missed by, mm")
    return figure


def _from_the_front(scan: PhaseScan) -> ndarray:
    """Mean HU from front to back of the lungs, head up."""
    depth = np.flatnonzero((scan.lung > 0).any(axis=(0, 2)))
    return scan.ct_hu[::-1, depth[0] : depth[-1] + 1].mean(axis=1)


def _left_mm(scan: PhaseScan) -> float:
    """LPS x of the last voxel."""
    return scan.origin_mm[0] + scan.spacing_mm[0] * (scan.ct_hu.shape[2] - 1)


def _extent(scan: PhaseScan, offset_mm: float) -> tuple[float, float, float, float]:
    """Edges along x and z, mm, for a picture whose rows begin at the head."""
    half_x, half_z = scan.spacing_mm[0] / 2, scan.spacing_mm[2] / 2
    bottom = scan.origin_mm[2]
    top = bottom + scan.spacing_mm[2] * (scan.ct_hu.shape[0] - 1)
    left, right = scan.origin_mm[0] + offset_mm, _left_mm(scan) + offset_mm
    return left - half_x, right + half_x, bottom - half_z, top + half_z
