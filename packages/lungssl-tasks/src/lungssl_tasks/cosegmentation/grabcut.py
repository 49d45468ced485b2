"""A lesion's mask from two diameters: GrabCut in 3-D.

Source: Rother et al. 2004 (GrabCut), doi:10.1145/1015706.1015720: mixtures of Gaussians for inside and outside, a
minimum cut between them, again; diameters as seeds after Agarwal et al. 2020, https://arxiv.org/abs/2001.08590, and Cai
et al. 2018, https://arxiv.org/abs/1801.08614.
Differs from them: 3-D, six neighbours, HU for colours, which tell less than three do, so smoothness counts less and the
ellipsoid's shape counts, too; nobody measured its third axis; the cut is SciPy's `maximum_flow` on the voxels in doubt.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from lungssl_data.volume import Geometry
from numpy import ndarray
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from lungssl_tasks.cosegmentation.diameters import Diameters

OUTSIDE, INSIDE, DOUBT = 0, 1, 2
"""Codes of a trimap."""
LEAST_SD_HU = 15.0
"""Of a mixture's component: about a CT's noise; narrower ones would fit single voxels."""
EM_ROUNDS = 10
CAPACITY = 200.0
"""Integer units of one nat: SciPy's capacities are 32-bit integers. Sums of 100,000 voxels of MOST_NATS fit."""
MOST_NATS = 50.0
"""A voxel's likelihood counts no less than exp(-MOST_NATS)."""


@dataclass(frozen=True, kw_only=True)
class GrabCutConfig:
    """Seeds and weights."""

    inside: float = 0.5
    """Certain lesion: the ellipsoid, its axes scaled by this (`domain.md` E2)."""
    outside: float = 1.3
    """Certainly none: beyond its box, scaled by this (`domain.md` E2)."""
    least_hu: float | None = None
    """Below it is certainly no lesion: -700 for solid ones (`domain.md` E2); None for ground glass."""
    components: int = 5
    """Gaussians on each side (Rother et al. 2004)."""
    begin: float = 0.7
    """What the first mixtures are fitted to as lesion: the ellipsoid, scaled. Diameters of ragged lesions overstate
    them: phantoms' ellipsoids have a mean Dice of 0.69."""
    shape: float = 2.0
    """Nats by which a voxel speaks for the side of the ellipsoid it is on, one half axis from its surface."""
    smoothness: float = 1.0
    """Weight of a face between inside and outside where HU don't differ, nats. Rother et al. 2004 have 50 for colours
    of a photograph; on 18 lesions of phantoms of 4 mm (seeds 1, 2, 4) these defaults gave a mean Dice of 0.81, twice
    the smoothness 0.80, mixtures of 3 as much, 50 about 0.3 (docs/decisions/0011-joint.md)."""
    rounds: int = 5
    """Of fitting and cutting (`domain.md` E2)."""


def pseudo_mask(
    hu: Float[ndarray, "z y x"],
    grid: Geometry,
    lesion: Diameters,
    config: GrabCutConfig | None = None,
    *,
    within: Bool[ndarray, "z y x"] | None = None,
) -> Bool[ndarray, "z y x"]:
    """The lesion's voxels on an axis-aligned grid around it; `within`: what may be lesion at all, as the lung.

    The largest connected part. Raises ValueError where the diameters' middle lies beyond the grid.
    """
    config = config or GrabCutConfig()
    trimap = seeds(hu, grid, lesion, config, within=within)
    start = lesion.ellipsoid(grid, config.begin) & (trimap != OUTSIDE)
    radius = np.linalg.norm(lesion.axes_at(grid), axis=0)
    found = cut_out(hu, trimap, start, radius, grid.spacing_mm, config, within=within)
    labels = np.zeros(found.shape, np.int32)
    number = ndimage.label(found, output=labels)
    assert isinstance(number, int)
    if number <= 1:
        return found
    return np.asarray(labels == 1 + int(np.bincount(labels.ravel())[1:].argmax()))


def seeds(
    hu: Float[ndarray, "z y x"],
    grid: Geometry,
    lesion: Diameters,
    config: GrabCutConfig,
    *,
    within: Bool[ndarray, "z y x"] | None = None,
) -> UInt8[ndarray, "z y x"]:
    """OUTSIDE, INSIDE or DOUBT for each voxel; the one at the lesion's middle is INSIDE, however small the lesion.

    Raises ValueError where the middle lies beyond the grid.
    """
    trimap = np.full(hu.shape, DOUBT, np.uint8)
    trimap[~lesion.box(grid, config.outside)] = OUTSIDE
    if config.least_hu is not None:
        trimap[hu < config.least_hu] = OUTSIDE
    if within is not None:
        trimap[~within] = OUTSIDE
    middle = np.rint((lesion.centre_mm() - grid.origin_mm) / np.array(grid.spacing_mm)).astype(int)[::-1]
    if (middle < 0).any() or (middle >= grid.shape).any():
        raise ValueError(f"{lesion.source or 'the diameters'}: their middle lies beyond the crop; give LPS mm")
    trimap[lesion.ellipsoid(grid, config.inside)] = INSIDE
    trimap[tuple(middle)] = INSIDE
    return trimap


def cut_out(
    hu: Float[ndarray, "z y x"],
    trimap: UInt8[ndarray, "z y x"],
    start: Bool[ndarray, "z y x"],
    radius: Float[ndarray, "z y x"],
    spacing_mm: tuple[float, float, float],
    config: GrabCutConfig,
    *,
    within: Bool[ndarray, "z y x"] | None = None,
) -> Bool[ndarray, "z y x"]:
    """Inside after the last round; `start` is what is taken for it in the first, `radius` 1 on the expected surface."""
    inside = (start | (trimap == INSIDE)) & (trimap != OUTSIDE)
    doubt = trimap == DOUBT
    if not doubt.any():
        return trimap == INSIDE
    values = hu.astype(np.float64)
    for _ in range(config.rounds):
        # Of what may be lesion at all: chest wall looks like a dense lesion, and would be its background.
        outside = ~inside if within is None or not (within & ~inside).any() else within & ~inside
        sides = [mixture(values[side], config.components) for side in (outside, inside)]
        costs = [np.minimum(-log_density(values[doubt], *one), MOST_NATS) for one in sides]
        for cost, sign in zip(costs, (1, -1), strict=True):
            cost += config.shape * np.maximum(sign * (1 - radius[doubt]), 0)
        new = trimap == INSIDE
        new[doubt] = _cut(values, trimap, (costs[0], costs[1]), spacing_mm, config.smoothness)
        if (new == inside).all():
            break
        inside = new
    return inside


def mixture(
    values: Float[ndarray, " n"], components: int
) -> tuple[Float[ndarray, " k"], Float[ndarray, " k"], Float[ndarray, " k"]]:
    """Weights, means and standard deviations of Gaussians by EM from the values' quantiles; no more than values.

    HU are whole numbers, of which many are alike: each is looked at once, and counts as often as it is there.
    """
    distinct, number = np.unique(values, return_counts=True)
    k = min(components, len(distinct))
    means = np.quantile(values, (np.arange(k) + 0.5) / k)
    sds, weights = np.full(k, max(float(values.std()), LEAST_SD_HU)), np.full(k, 1 / k)
    for _ in range(EM_ROUNDS):
        each = _log_each(distinct, weights, means, sds)
        share = np.exp(each - np.logaddexp.reduce(each, axis=1, keepdims=True)) * number[:, None]
        total = share.sum(axis=0) + 1e-9
        weights = total / total.sum()
        means = (share * distinct[:, None]).sum(axis=0) / total
        spread = (share * (distinct[:, None] - means) ** 2).sum(axis=0) / total
        sds = np.sqrt(np.maximum(spread, LEAST_SD_HU**2))
    return weights, means, sds


def log_density(
    values: Float[ndarray, " n"], weights: Float[ndarray, " k"], means: Float[ndarray, " k"], sds: Float[ndarray, " k"]
) -> Float[ndarray, " n"]:
    """Logarithm of a mixture's density, per HU."""
    distinct, where = np.unique(values, return_inverse=True)
    return np.logaddexp.reduce(_log_each(distinct, weights, means, sds), axis=1)[where]


def _log_each(values: ndarray, weights: ndarray, means: ndarray, sds: ndarray) -> Float[ndarray, "n k"]:
    apart = (values[:, None] - means) / sds
    return np.log(weights) - np.log(sds) - 0.5 * np.log(2 * np.pi) - 0.5 * apart**2


def _cut(
    values: Float[ndarray, "z y x"],
    trimap: UInt8[ndarray, "z y x"],
    costs: tuple[Float[ndarray, " n"], Float[ndarray, " n"]],
    spacing_mm: tuple[float, float, float],
    smoothness: float,
) -> Bool[ndarray, " n"]:
    """For each voxel in doubt whether it is inside; `costs` of being outside, and inside."""
    nodes = np.full(trimap.shape, -1)
    doubt = trimap == DOUBT
    nodes[doubt] = np.arange(doubt.sum())
    pairs, squares, scales = [], [], []
    least = min(spacing_mm)
    for axis in range(3):
        here, there = (
            tuple(slice(*cut) if a == axis else slice(None) for a in range(3)) for cut in ((None, -1), (1, None))
        )
        some = doubt[here] | doubt[there]
        squares.append((values[here] - values[there])[some] ** 2)
        scales.append(np.full(int(some.sum()), least / spacing_mm[2 - axis]))
        ends = [np.where(doubt[side], nodes[side], -1 - trimap[side].astype(int))[some] for side in (here, there)]
        pairs.append(np.stack(ends, axis=1))
    ends, square = np.concatenate(pairs), np.concatenate(squares)
    beta = 1 / max(2 * float(square.mean()), 1e-9) if len(square) else 0.0
    weight = smoothness * np.exp(-beta * square) * np.concatenate(scales)
    cost_out, cost_in = (cost.copy() for cost in costs)
    for side, other in ((0, 1), (1, 0)):  # beside a certain voxel, being of the other kind costs the face
        for code, cost in ((INSIDE, cost_out), (OUTSIDE, cost_in)):
            beside = ends[:, other] == -1 - code
            np.add.at(cost, ends[beside, side], weight[beside])
    between = (ends >= 0).all(axis=1)
    return minimum_cut(cost_out, cost_in, ends[between], weight[between])


def minimum_cut(
    cost_out: Float[ndarray, " n"],
    cost_in: Float[ndarray, " n"],
    pairs: Int[ndarray, "m 2"],
    weights: Float[ndarray, " m"],
) -> Bool[ndarray, " n"]:
    """Labels of least cost: each node's of being out (False) or in (True), and a pair's weight where its ends differ.

    To within rounding to 1 / CAPACITY. Where several are least, the one with fewest nodes in. Costs may be negative.
    """
    n = len(cost_out)
    source, sink = n, n + 1
    least = np.minimum(cost_out, cost_in)  # only the difference matters
    to_source, to_sink = (np.rint((cost - least) * CAPACITY).astype(np.int32) for cost in (cost_out, cost_in))
    between = np.rint(weights * CAPACITY).astype(np.int32)
    every = np.arange(n)
    rows = np.concatenate([np.full(n, source), every, pairs[:, 0], pairs[:, 1]])
    columns = np.concatenate([every, np.full(n, sink), pairs[:, 1], pairs[:, 0]])
    data = np.concatenate([to_source, to_sink, between, between])
    graph = csr_array((data, (rows, columns)), shape=(n + 2, n + 2), dtype=np.int32)
    graph.eliminate_zeros()
    flow = maximum_flow(graph, source, sink).flow
    residual = csr_array(graph - flow)
    residual.eliminate_zeros()
    reached = breadth_first_order(residual, source, return_predecessors=False)
    inside = np.zeros(n + 2, bool)
    inside[reached] = True
    return inside[:n]
