"""Airways, arteries and veins, grown once in material space and carried to each phase by the charts (`domain.md` D3).

Growth halves volumes (after Tawhai et al. 2004, doi:10.1152/japplphysiol.00520.2004): the lung tissue that a branch
supplies is parted by a plane through the branch's axis, and a child grows some of the way towards either part's
centroid. Tissue is a cloud of points, uniform in exhale volume, so a count of points is a volume. Material space is
scaled to millimetres for this; in it lungs and lobes are convex, so that no branch leaves its lung.

Arteries follow the bronchi and go on where these end; veins are grown apart, and part each lobe across the plane that
arteries part it along, which leaves them between segments. Radii follow Murray's rule, r ~ (volume supplied)^(1/g).
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray
from numpy.random import Generator

from lungssl_data.phantom.anatomy import (
    ARTERY_START_MM,
    CARINA_DEPTH,
    LEFT_ARTERY_MM,
    LEFT_BRONCHUS_MM,
    LEFT_BRONCHUS_RADIUS,
    RIGHT_ARTERY_MM,
    RIGHT_BRONCHUS_MM,
    RIGHT_BRONCHUS_RADIUS,
    Anatomy,
)
from lungssl_data.phantom.growth import Grown, grow
from lungssl_data.phantom.motion import LEFT_LUNG, RIGHT_LUNG, Breath, Chest
from lungssl_data.phantom.parenchyma import Parenchyma, lobes_at
from lungssl_data.phantom.points import place_lung, trace

AIRWAY, ARTERY, VEIN = 1, 2, 3
"""Codes of a tree, and of its voxels in the label map."""
POINTS = 24_000
"""Points of tissue in both lungs: five and more for each of the smallest arteries."""
WALL_SHARE, WALL_MM = 0.1, 0.5
"""Thickness of an airway's wall: a share of the lumen's diameter, and as much again (D3)."""
AIRWAY_STOP_MM = 0.75
"""Least lumen radius (D3: D 1.5 mm)."""
VESSEL_STOP_MM = 0.4
VESSELS_ML = (120.0, 250.0)
"""Arteries and veins of both lungs (D3); all their radii are scaled to it."""
AIRWAY_EXPONENT = 2.5
"""From a main bronchus of 12 mm through Weibel's diameters (D3) to within 30 %."""
VESSEL_EXPONENT = (2.5, 3.0)
ARTERY_RATIO = (0.9, 1.1)
"""Artery against the bronchus with its wall, at the hilum (D3)."""
VEIN_RATIO = (0.9, 1.1)
"""Vein against artery at the hilum."""
PIECE_MM = 3.0
"""Longest straight piece of a branch (D3)."""
LOBE_SPLITS = {RIGHT_LUNG: ((1,), (2,)), LEFT_LUNG: ((4,),)}
"""Lobes that leave the bronchus first, in turn: RUL, then RML from RLL; LUL from LLL."""
VEIN_SPLITS = {RIGHT_LUNG: ((1, 2), (1,)), LEFT_LUNG: ((4,),)}
"""Superior vein, with the middle lobe's, from the inferior one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tree:
    """Branches of one kind in both lungs; each runs straight in material space from one node to another."""

    kind: int
    nodes: Float64[ndarray, "nodes 3"]
    """Material (q, Y, v)."""
    ends: Int64[ndarray, "branches 2"]
    """First and last node of each branch."""
    radius_mm: Float64[ndarray, " branches"]
    """At exhale; of the lumen where it is an airway."""
    generation: Int64[ndarray, " branches"]
    """0 is the branch at the hilum."""

    def forks(self) -> tuple[Float64[ndarray, "forks 3"], Float64[ndarray, " forks"]]:
        """Material place of every bifurcation, and the radius of the branch that ends there."""
        starts = np.bincount(self.ends[:, 0], minlength=len(self.nodes))
        branch = np.flatnonzero(starts[self.ends[:, 1]] >= 2)
        return self.nodes[self.ends[branch, 1]], self.radius_mm[branch]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """Straight pieces of all trees in one phase."""

    kind: Int64[ndarray, " n"]
    start_mm: Float64[ndarray, "n 3"]
    end_mm: Float64[ndarray, "n 3"]
    radius_mm: Float64[ndarray, " n"]

    def volume_ml(self, kind: int) -> float:
        """Volume of one kind's cylinders."""
        chosen = self.kind == kind
        length = np.linalg.norm(self.end_mm - self.start_mm, axis=1)[chosen]
        return float((np.pi * self.radius_mm[chosen] ** 2 * length).sum() / 1000)


def grow_trees(
    rng: Generator, chest: Chest, exhale: Breath, anatomy: Anatomy, lung: Parenchyma
) -> tuple[tuple[Tree, ...], dict[str, float]]:
    """One subject's trees, and the numbers drawn for them."""
    exponent, artery_ratio, vein_ratio = (float(rng.uniform(*b)) for b in (VESSEL_EXPONENT, ARTERY_RATIO, VEIN_RATIO))
    region, material = _tissue(rng, chest, exhale)
    lobe = lobes_at(lung, region, material)
    bundles, veins = [], []
    for side in (RIGHT_LUNG, LEFT_LUNG):
        inside = region == side
        points, lobes = material[inside], lobe[inside]
        sign = -1.0 if side == RIGHT_LUNG else 1.0
        scale_mm = _scale(chest, exhale, points)
        bronchus, artery, forward = _hilum(chest, exhale, anatomy, side)
        relative = RIGHT_BRONCHUS_RADIUS if side == RIGHT_LUNG else LEFT_BRONCHUS_RADIUS
        radius = relative * anatomy.trachea_mm
        widest = artery_ratio * ((1.0 + 2.0 * WALL_SHARE) * radius + WALL_MM)
        stop = (VESSEL_STOP_MM / widest) ** exponent
        grown = grow(
            rng, _flat(points, scale_mm), lobes, _flat(bronchus[None], scale_mm)[0], forward,
            8.0, LOBE_SPLITS[side], stop, False,
        )  # fmt: skip
        bundles.append((sign, scale_mm, grown, radius, widest, artery))
        atrium = np.array([sign * 0.3, 0.3, bronchus[2] - 0.1])
        grown = grow(
            rng, _flat(points, scale_mm), lobes, _flat(atrium[None], scale_mm)[0], np.array([1.0, 0.0, 0.0]),
            0.3 * scale_mm[0], VEIN_SPLITS[side], stop, True,
        )  # fmt: skip
        veins.append((sign, scale_mm, grown, vein_ratio * widest))

    def joined(kind: int, parts: list[tuple[ndarray, Grown, ndarray]]) -> Tree:
        offsets = np.cumsum([0] + [len(nodes) for nodes, _, _ in parts])
        return Tree(
            kind=kind,
            nodes=np.concatenate([nodes for nodes, _, _ in parts]),
            ends=np.concatenate([g.ends + offset for (_, g, _), offset in zip(parts, offsets[:-1], strict=True)]),
            radius_mm=np.concatenate([radius for _, _, radius in parts]),
            generation=np.concatenate([g.generation for _, g, _ in parts]),
        )

    airway_parts, artery_parts, vein_parts = [], [], []
    for sign, scale_mm, grown, radius, widest, artery in bundles:
        nodes = _curved(grown.nodes, scale_mm, sign)
        lumen = radius * grown.share ** (1.0 / AIRWAY_EXPONENT)
        vessel = widest * grown.share ** (1.0 / exponent)
        # Shares fall from parent to child, so that what is wide enough is connected.
        airway_parts.append((nodes, grown.only(lumen >= AIRWAY_STOP_MM), lumen[lumen >= AIRWAY_STOP_MM]))
        beside = _beside(chest, exhale, nodes, grown, lumen, vessel)
        beside[0] = artery
        artery_parts.append((beside, grown, vessel))
    for sign, scale_mm, grown, widest in veins:
        vessel = widest * grown.share ** (1.0 / exponent)
        vein_parts.append((_curved(grown.nodes, scale_mm, sign), grown, vessel))
    vessels = (joined(VEIN, vein_parts), joined(ARTERY, artery_parts))
    wanted_ml = float(rng.uniform(*VESSELS_ML))
    drawn = carry_trees(vessels, chest, exhale, exhale)
    scale = (wanted_ml / (drawn.volume_ml(ARTERY) + drawn.volume_ml(VEIN))) ** 0.5
    vessels = tuple(_scaled(vessel, scale) for vessel in vessels)
    return (*vessels, joined(AIRWAY, airway_parts)), {
        "vessels_ml": wanted_ml,
        "vessel_exponent": exponent,
        "artery_ratio": scale * artery_ratio,
        "vein_ratio": vein_ratio,
    }


def carry_trees(
    trees: tuple[Tree, ...], chest: Chest, exhale: Breath, here: Breath, *, least_radius_mm: float = 0.0
) -> Pieces:
    """Trees in phase `here`, cut into pieces of 3 mm and less; branches below `least_radius_mm` are left out.

    A vessel keeps its blood: where it is stretched it thins, r ~ (length)^(-1/2). An airway widens with the tissue
    around it, D ~ J^(1/3).
    """
    kinds, starts, ends, radii = [], [], [], []
    for tree in trees:
        wide = tree.radius_mm >= least_radius_mm
        first, last = tree.nodes[tree.ends[wide, 0]], tree.nodes[tree.ends[wide, 1]]
        if not len(first):
            continue
        length = np.linalg.norm(
            place_lung(chest, exhale, exhale, last)[0] - place_lung(chest, exhale, exhale, first)[0], axis=1
        )
        count = np.maximum(np.ceil(1.05 * length / PIECE_MM), 1).astype(int)
        branch = np.repeat(np.arange(len(first)), count)
        place = np.arange(len(branch)) - np.repeat(np.cumsum(count) - count, count)
        step = (last - first)[branch] / count[branch, None]
        low = first[branch] + step * place[:, None]
        low_e, det_low_e = place_lung(chest, exhale, exhale, low)
        high_e, det_high_e = place_lung(chest, exhale, exhale, low + step)
        radius = tree.radius_mm[wide][branch]
        if here is exhale:
            low_mm, high_mm = low_e, high_e
        else:
            low_mm, det_low = place_lung(chest, exhale, here, low)
            high_mm, det_high = place_lung(chest, exhale, here, low + step)
            if tree.kind == AIRWAY:
                radius = radius * np.cbrt((det_low + det_high) / np.maximum(det_low_e + det_high_e, 1e-9))
            else:
                stretch = np.linalg.norm(high_mm - low_mm, axis=1) / np.linalg.norm(high_e - low_e, axis=1)
                radius = radius / np.sqrt(np.clip(stretch, 0.25, 4.0))
        kinds.append(np.full(len(branch), tree.kind))
        starts.append(low_mm)
        ends.append(high_mm)
        radii.append(radius)
    return Pieces(
        kind=np.concatenate(kinds),
        start_mm=np.concatenate(starts),
        end_mm=np.concatenate(ends),
        radius_mm=np.concatenate(radii),
    )


def _scaled(tree: Tree, scale: float) -> Tree:
    """Radii times `scale`, without what is then too thin."""
    wide = scale * tree.radius_mm >= VESSEL_STOP_MM
    return replace(tree, ends=tree.ends[wide], radius_mm=scale * tree.radius_mm[wide], generation=tree.generation[wide])


def _tissue(rng: Generator, chest: Chest, exhale: Breath) -> tuple[ndarray, Float64[ndarray, "n 3"]]:
    """Random points of both lungs, uniform in exhale volume: their region and material place."""
    # The recess lies 24 mm below z = 0 at the back.
    corner = np.array([chest.half_width_mm, chest.half_depth_mm, chest.apex_mm])
    points = rng.uniform((-1.0, -1.0, -24.0 / chest.apex_mm), 1.0, (4 * POINTS, 3)) * corner
    region, material, _ = trace(chest, exhale, exhale, exhale, points)
    lung = np.flatnonzero((region == RIGHT_LUNG) | (region == LEFT_LUNG))[:POINTS]
    return region[lung], material[lung]


def _scale(chest: Chest, exhale: Breath, material: Float64[ndarray, "n 3"]) -> Float64[ndarray, " 3"]:
    """Millimetres of one unit of (s, Y, v) in this lung's middle."""
    sign = np.sign(material[0, 0])
    middle = np.array([sign * 1.5, 0.0, 0.5])
    step = np.array([[sign * 0.3, 0.0, 0.0], [0.0, 0.3, 0.0], [0.0, 0.0, 0.3]])
    high, low = (place_lung(chest, exhale, exhale, middle + way * step)[0] for way in (1.0, -1.0))
    return np.linalg.norm(high - low, axis=1) / 0.6


def _flat(material: Float64[ndarray, "n 3"], scale_mm: Float64[ndarray, " 3"]) -> Float64[ndarray, "n 3"]:
    return np.stack([np.abs(material[:, 0]) - 1.0, material[:, 1], material[:, 2]], 1) * scale_mm


def _curved(flat: Float64[ndarray, "n 3"], scale_mm: Float64[ndarray, " 3"], sign: float) -> Float64[ndarray, "n 3"]:
    s, y, v = (flat / scale_mm).T
    return np.stack([sign * (1.0 + s), y, v], 1)


def _hilum(
    chest: Chest, exhale: Breath, anatomy: Anatomy, side: int
) -> tuple[Float64[ndarray, " 3"], Float64[ndarray, " 3"], Float64[ndarray, " 3"]]:
    """Material places where the main bronchus and its artery, as `anatomy` draws them, meet the lung; its direction."""
    right = side == RIGHT_LUNG
    sign = -1.0 if right else 1.0
    midline = np.array([[sign * 1e-6, depth, anatomy.carina] for depth in (CARINA_DEPTH, 0.0)])
    carina, centre = place_lung(chest, exhale, exhale, midline)[0]
    bronchus = np.asarray(RIGHT_BRONCHUS_MM if right else LEFT_BRONCHUS_MM)
    trunk = np.array([0.0, centre[1], carina[2]])
    artery = np.asarray(RIGHT_ARTERY_MM if right else LEFT_ARTERY_MM)
    places = []
    for start, end in (
        (carina * [0, 1, 1], carina * [0, 1, 1] + bronchus),
        (trunk + ARTERY_START_MM, trunk + artery),
    ):
        line = start + np.linspace(0.2, 1.0, 161)[:, None] * (end - start)
        region, material, _ = trace(chest, exhale, exhale, exhale, line)
        reached = np.flatnonzero(region == side)
        places.append(material[reached[0] if len(reached) else -1])
    forward = bronchus * [sign, 1.0, 1.0]
    return places[0], places[1], forward / np.linalg.norm(forward)


def _beside(
    chest: Chest, exhale: Breath, nodes: ndarray, grown: Grown, lumen: ndarray, vessel: ndarray
) -> Float64[ndarray, "nodes 3"]:
    """Nodes moved aside by as much as bronchus and artery need to lie side by side; where that leaves the lung, not."""
    at, _ = place_lung(chest, exhale, exhale, nodes)
    way = at[grown.ends[:, 1]] - at[grown.ends[:, 0]]
    # Square to the branch, towards the head and the lung's outside: where arteries lie at the upper lobes' bronchi.
    outward = np.stack([0.5 * np.sign(nodes[grown.ends[:, 1], 0]), np.zeros(len(way)), np.ones(len(way))], 1)
    side = outward - (outward * way).sum(1, keepdims=True) / np.maximum((way**2).sum(1, keepdims=True), 1e-9) * way
    side /= np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-9)
    gap = np.where(lumen >= AIRWAY_STOP_MM, 1.2 * lumen + 0.5 + vessel, 0.0)
    moved = at.copy()
    moved[grown.ends[:, 1]] += gap[:, None] * side
    region, material, _ = trace(chest, exhale, exhale, exhale, moved)
    ok = (region == RIGHT_LUNG) | (region == LEFT_LUNG)
    return np.where(ok[:, None], material, nodes)
