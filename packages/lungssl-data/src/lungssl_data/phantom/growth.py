"""Space-filling growth of one tree by halving the tissue that each branch supplies; `trees` says how it is used.

Coordinates are "flat": material (s, Y, v), each scaled to millimetres.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray
from numpy.random import Generator

STEP = (0.4, 0.5)
"""How far a child grows towards its tissue's centroid."""
SPLIT = (0.4, 0.6)
"""Share of a branch's tissue that the first child takes."""
FORWARD = np.array([1.0, 0.6, 0.4])
"""The first child takes the tissue that lies this way; any direction that few branches are square to would do."""
MAX_TURN = 0.5
"""Cosine of the sharpest turn from parent to child, 60 degrees: in physical space most lie in D3's 25-50."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Grown:
    """One lung's branches, in flat coordinates."""

    nodes: Float64[ndarray, "nodes 3"]
    ends: Int64[ndarray, "branches 2"]
    share: Float64[ndarray, " branches"]
    """Of the lung that it supplies."""
    generation: Int64[ndarray, " branches"]

    def only(self, chosen: ndarray) -> "Grown":
        return Grown(
            nodes=self.nodes, ends=self.ends[chosen], share=self.share[chosen], generation=self.generation[chosen]
        )


def grow(
    rng: Generator,
    points: Float64[ndarray, "n 3"],
    lobes: ndarray,
    root: Float64[ndarray, " 3"],
    forward: Float64[ndarray, " 3"],
    root_mm: float,
    splits: tuple[tuple[int, ...], ...],
    stop_share: float,
    across: bool,
) -> Grown:
    """Breadth first, all branches of a generation at once. `across` swaps the parting planes below the lobes."""
    total, high = len(points), points.max(0)
    low = np.minimum(points.min(0), root)
    at = np.clip(root + root_mm * forward, low, high)[None]
    nodes, ends, shares, sizes = [root[None], at], [np.array([[0, 1]])], [np.ones(1)], [1]
    label = np.zeros(total, np.int64)
    tip, heading = np.array([1]), forward[None] / np.linalg.norm(forward)
    depth = 0
    while len(tip):
        second = _parts(rng, points, label, at, across and depth == len(splits))
        if depth < len(splits):
            # What is left of the lung parts along a fissure, other branches as they like.
            rest = label == label[np.isin(lobes, splits[depth])].max() if depth else np.ones(total, bool)
            mixed = np.isin(lobes[rest], splits[depth])
            if mixed.any() and not mixed.all():
                second[rest] = ~mixed
        label = 2 * label + second
        count = np.bincount(label, minlength=2 * len(tip)).astype(float)
        centre = np.stack([np.bincount(label, c, 2 * len(tip)) for c in points.T], 1) / np.maximum(count, 1)[:, None]
        parent = np.repeat(np.arange(len(tip)), 2)
        way = centre - at[parent]
        distance = np.linalg.norm(way, axis=1)
        toward = way / np.maximum(distance, 1e-9)[:, None]
        cosine = (toward * heading[parent]).sum(1, keepdims=True)
        aside = toward - cosine * heading[parent]
        aside /= np.maximum(np.linalg.norm(aside, axis=1, keepdims=True), 1e-9)
        limited = MAX_TURN * heading[parent] + (1 - MAX_TURN**2) ** 0.5 * aside
        toward = np.where(cosine < MAX_TURN, limited, toward)
        end = at[parent] + toward * (rng.uniform(*STEP, len(parent)) * distance)[:, None]
        end = np.clip(end, low, high)
        keep = (count >= max(2.0, stop_share * total)) & (distance > 1.0)
        number = np.where(keep, np.cumsum(keep) - 1, -1)
        new = tip[-1] + 1 + np.arange(int(keep.sum()))
        ends.append(np.stack([tip[parent[keep]], new], 1))
        nodes.append(end[keep])
        shares.append(count[keep] / total)
        sizes.append(len(new))
        depth += 1
        alive = keep[label]
        points, lobes, label = points[alive], lobes[alive], number[label[alive]]
        tip, heading, at = new, toward[keep], end[keep]
    return Grown(
        nodes=np.concatenate(nodes),
        ends=np.concatenate(ends).astype(np.int64),
        share=np.concatenate(shares),
        generation=np.repeat(np.arange(len(sizes)), sizes),
    )


def _parts(rng: Generator, points: ndarray, label: ndarray, at: ndarray, across: bool) -> ndarray:
    """Which of two children each point goes to: parted along its group's long axis square to the branch's way."""
    n = len(at)
    count = np.maximum(np.bincount(label, minlength=n), 1).astype(float)
    centre = np.stack([np.bincount(label, c, n) for c in points.T], 1) / count[:, None]
    ahead = centre - at
    ahead /= np.maximum(np.linalg.norm(ahead, axis=1, keepdims=True), 1e-9)
    offset = points - centre[label]
    square = np.empty((n, 3, 3))
    for i in range(3):
        for j in range(i, 3):
            square[:, i, j] = square[:, j, i] = np.bincount(label, offset[:, i] * offset[:, j], n) / count
    flat = np.eye(3) - ahead[:, :, None] * ahead[:, None, :]
    _, axes = np.linalg.eigh(flat @ square @ flat)
    axis = axes[:, :, 1 if across else 2]
    # eigh leaves the sign open, and LAPACK gave other ones on another processor: another tree from the same seed.
    axis = np.where((axis @ FORWARD < 0)[:, None], -axis, axis)
    along = (offset * axis[label]).sum(1)
    order = np.lexsort((along, label))
    rank = np.empty(len(label))
    size = np.bincount(label, minlength=n)
    rank[order] = np.arange(len(label)) - np.repeat(np.cumsum(size) - size, size)
    return rank >= np.rint(rng.uniform(*SPLIT, n) * count)[label]
