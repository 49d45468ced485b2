"""Training-free mask of the air-filled lungs in a chest CT: 1 right, 2 left.

Steps, on voxels averaged to about 2 mm (then the edge is redrawn on the scan's own voxels): air below `AIR_BELOW_HU`;
of it, what the body encloses; without the trachea and main bronchi; the component of each side; vessels and holes
filled. After Hu, Hoffman and Reinhardt 2001, doi:10.1109/42.929615. Differs from it: room air is told from lung by
what surrounds it, not by contact with the image border, so that a crop whose borders cut the lung works like a whole
chest; touching lungs are parted by erosion, not by a dynamic-programming path.

Consolidated, collapsed or flooded lung is as dense as muscle and is not found: the mask is the aerated lung.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import no_type_check

import cc3d
import edt
import fill_voids
import numpy as np
from jaxtyping import Bool, Float, Int, Integer, UInt8
from numba import njit
from numpy import ndarray
from scipy import ndimage

from lungssl_data.airways import trachea_and_main_bronchi
from lungssl_data.volume import PADDING_BELOW_HU, Geometry, Volume

LUNG_MASK_VERSION = 2
"""Raised whenever the same volume would give another mask."""
RIGHT, LEFT = 1, 2
AIR_BELOW_HU = -400.0
"""Midway between aerated lung (-850) and muscle (+50): a blurred step has its edge at half its height, which is also
what the iterated threshold of Hu et al. 2001 converges to."""
ENCLOSED_SHARE = 0.55
"""Of the four directions left, right, front and back, the share that meets the body, as the mean of a component. Room
air beside the body has 0.50 to 0.52, whole lungs 1.0, a lung cut by one border 0.89 to 0.98, by two 0.62 (six CTs)."""
BODY_MM = 3.0
"""Tissue thinner than twice this (table shells, tubes, clothes) is not body; chest walls are thicker."""
BODY_SHARE = 0.05
"""Body parts that a crop cuts apart have at least this share of the largest; less is a thick part of the table."""
GAS_BELOW_HU = -970.0
"""A smaller component whose median is below is gas in bowel or pleura (-1000), not a second lung."""
SMALLER_LUNG_SHARE = 0.04
"""The smaller lung has at least this share of the larger one's volume; less is bowel gas or a bleb."""
BONE_HU = 150.0
"""Cortical and spongy bone of the spine, averaged over 2 mm, lies above; muscle and liver below."""
CLOSE_MM = 6.0
"""Radius of the closing that takes in vessels at the surface and fissures: hilar vessels are about 10 mm wide."""
WORKING_MM = 2.0
"""Voxel size that the steps run at; a 0.7 mm scan is averaged over blocks of three."""
SPLIT_MM = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 15.0, 18.0, 21.0, 25.0)
"""Erosions tried to part touching lungs; half the front-to-back depth of an anterior junction is 5 to 20 mm."""
SPINE_SIGMA_MM = 8.0
"""Blur of the map of bone over the slices: a quarter of a vertebral body's width, so that the spine is one peak."""
SPINE_SHARE = 0.2
"""Blurred share of a lung's slices with bone at the spine, at least; on eight CTs it is 0.45 to 0.79."""
SPINE_NEAR_MM = 40.0
"""The spine lies closer to a lung than this in the axial plane; the humerus of a hanging arm lies farther."""
VOLUME_ML = (300.0, 12000.0)
"""Believable gas-filled lung: from one lung at full exhale or in severe ARDS to beyond the largest TLC."""


class LungMaskError(ValueError):
    """No believable lung mask can be made of this volume."""


def lung_mask(volume: Volume) -> UInt8[ndarray, "z y x"]:
    """Label the aerated lungs on the volume's own grid: 0 outside, 1 right lung, 2 left lung.

    Right is the patient's right, -x of LPS. Two lungs are told apart by their order along x. A single lung (the other
    cropped away, absent or airless) gets its side from the spine: it is the right lung if it lies to the right of the
    column of bone that runs through its slices. Trachea and main bronchi are left out, also the wide part of a
    bronchus that could be followed into the hilum; the vessels and the smaller airways inside a lung belong to it.

    Raises LungMaskError where nothing looks like a lung, or where a single lung shows no spine to tell its side by.
    """
    hu, scan, factors, to_own_axes = _lps_scan(volume)
    lungs = _fill(_pick_sides(*_enclosed_air(scan), scan), scan)
    labels = lungs if max(factors) == 1 else _redraw(lungs, scan, hu, factors)
    return to_own_axes(labels)


def lung_sides(mask: Bool[ndarray, "z y x"], volume: Volume) -> UInt8[ndarray, "z y x"]:
    """Right (1) and left (2) of a mask of both lungs on the volume's grid, told apart as in `lung_mask`.

    Unlike there, the mask may hold airless lung: its parts come from the mask, only the spine from the scan. Small
    parts get the side of the nearest large one. Raises LungMaskError for an empty mask and as `lung_mask` does.
    """
    if not mask.any():
        raise LungMaskError("the lung mask is empty; give a mask of the lungs or leave it out to have one made")
    _, scan, factors, to_own_axes = _lps_scan(volume)
    axes, flips = _lps_axes(volume.geometry.direction)
    turned = np.flip(mask.transpose(axes), flips).astype(np.uint8)
    share = np.empty(scan.air.shape, np.float32)
    _block_means(turned, *factors, PADDING_BELOW_HU, share, np.empty(share.shape, bool))
    coarse = share >= 0.5
    sides = _pick_sides(coarse if coarse.any() else share > 0, np.zeros(share.shape, bool), scan)
    right_nearer = scan.distance_mm(sides == RIGHT) <= scan.distance_mm(sides == LEFT)
    side = np.where(right_nearer, RIGHT, LEFT).astype(np.uint8)
    labels = np.empty(turned.shape, np.uint8)
    columns = np.ix_(*(np.arange(n) // f for n, f in zip(turned.shape[1:], factors[1:], strict=True)))
    for z, voxels in enumerate(turned):
        labels[z] = side[z // factors[0]][columns] * voxels
    return to_own_axes(labels)


def plausibility(
    mask: UInt8[ndarray, "z y x"], geometry: Geometry, *, volume_ml: tuple[float, float] = VOLUME_ML
) -> str | None:
    """What is wrong with a lung mask, in one sentence, or None.

    Judges the volume of both lungs together. A crop or a severely flooded lung needs its own `volume_ml`.
    """
    total_ml = np.count_nonzero(mask) * geometry.voxel_ml()
    low, high = volume_ml
    if total_ml == 0:
        return "the lung mask is empty; check that the scan is a chest CT in Hounsfield units"
    if not low <= total_ml <= high:
        return (
            f"the lung mask holds {total_ml:.0f} ml, believable are {low:.0f} to {high:.0f} ml; "
            "look at the mask, check the voxel spacing and that the values are Hounsfield units"
        )
    return None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scan:
    """The scan in LPS order, averaged over blocks of voxels."""

    hu: Float[ndarray, "z y x"]
    air: Bool[ndarray, "z y x"]
    tissue: Bool[ndarray, "z y x"]
    """Neither air nor padding."""
    spacing_mm: tuple[float, float, float]

    def near(self, mask: Bool[ndarray, "z y x"], radius_mm: float) -> Bool[ndarray, "z y x"]:
        """The mask dilated by a ball."""
        return self.distance_mm(mask) <= radius_mm

    def distance_mm(self, mask: Bool[ndarray, "z y x"]) -> Float[ndarray, "z y x"]:
        """Distance of each voxel to the mask; 0 in it, infinite if it is empty."""
        return edt.edt(~mask, anisotropy=self.spacing_mm[::-1])


def _lps_axes(direction: Float[ndarray, "3 3"]) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """The array axes that lie closest to the patient's z, y, x, and which of those then run backwards."""
    index_axes = max(itertools.permutations(range(3)), key=lambda p: sum(abs(direction[w, j]) for w, j in enumerate(p)))
    x, y, z = (2 - j for j in index_axes)
    return (z, y, x), tuple(2 - w for w, j in enumerate(index_axes) if direction[w, j] < 0)


def _lps_scan(
    volume: Volume,
) -> tuple[Int[ndarray, "z y x"], "_Scan", tuple[int, int, int], Callable[[ndarray], ndarray]]:
    """HU in the patient's order, the scan at working size, voxels per block, and the way back to the stored order."""
    axes, flips = _lps_axes(volume.geometry.direction)
    hu = np.flip(volume.hu.transpose(axes), flips)
    z, y, x = (volume.geometry.spacing_mm[2 - axis] for axis in axes)
    fz, fy, fx = (max(1, round(WORKING_MM / mm)) for mm in (z, y, x))

    def to_own_axes(labels: ndarray) -> ndarray:
        return np.ascontiguousarray(np.flip(labels, flips).transpose(np.argsort(axes)))

    return hu, _average(hu, (fz, fy, fx), (x, y, z)), (fz, fy, fx), to_own_axes


def _average(hu: Int[ndarray, "z y x"], factors: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> _Scan:
    mean = np.empty([-(-n // f) for n, f in zip(hu.shape, factors, strict=True)], np.float32)
    measured = np.empty(mean.shape, bool)
    _block_means(hu, *factors, PADDING_BELOW_HU, mean, measured)
    air = measured & (mean < AIR_BELOW_HU)
    x, y, z = (mm * f for mm, f in zip(spacing_mm, reversed(factors), strict=True))
    return _Scan(hu=mean, air=air, tissue=measured & ~air, spacing_mm=(x, y, z))


def _enclosed_air(scan: _Scan) -> tuple[Bool[ndarray, "z y x"], Bool[ndarray, "z y x"]]:
    """Air that the body encloses without the airway, and the airway."""
    # A layer of one voxel has its centre one voxel from the air.
    half_mm = max(BODY_MM, *scan.spacing_mm[:2])
    core, counts, _ = _components(edt.edt(scan.tissue, anisotropy=scan.spacing_mm[::-1]) > half_mm, scan.hu)
    body = scan.tissue & scan.near((counts >= BODY_SHARE * counts.max())[core] & (core > 0), half_mm)
    sides = np.zeros(body.shape, np.uint8)
    for axis in (1, 2):
        sides += np.logical_or.accumulate(body, axis=axis)
        sides += np.flip(np.logical_or.accumulate(np.flip(body, axis), axis=axis), axis)
    # Room air beside the body meets it in two directions at most, and may reach the lungs through an open mouth.
    beside, _, gas = _components(scan.air & (sides == 2), scan.hu)
    labels, counts, gas = _components(scan.air & ((sides > 2) | (beside > 0) & ~gas[beside]), scan.hu)
    counts[np.bincount(labels.ravel(), sides.ravel()) < 4 * ENCLOSED_SHARE * counts] = 0
    if not counts.any():
        raise LungMaskError("no air is enclosed by a body; check that the scan is a chest CT in Hounsfield units")
    parenchyma = np.where(gas, 0, counts)
    if parenchyma.max() >= SMALLER_LUNG_SHARE * counts.max():
        counts = parenchyma
    air = (counts >= SMALLER_LUNG_SHARE * counts.max())[labels]
    largest = labels == np.argmax(counts)
    middle = round(float(np.average(np.arange(len(air)), weights=np.count_nonzero(largest, axis=(1, 2)))))
    airway = trachea_and_main_bronchi(
        air, scan.hu, spacing_mm=scan.spacing_mm, above_slice=middle, threshold_hu=AIR_BELOW_HU
    )
    return air & ~airway, airway


def _components(
    mask: Bool[ndarray, "z y x"], hu: Float[ndarray, "z y x"]
) -> tuple[Integer[ndarray, "z y x"], Int[ndarray, " label"], Bool[ndarray, " label"]]:
    """Labels, the voxels of each (0 for the background), and whether its median HU is that of gas."""
    labels = cc3d.connected_components(mask, connectivity=6)
    counts = np.bincount(labels.ravel())
    gas = 2 * np.bincount(labels.ravel(), (hu < GAS_BELOW_HU).ravel()) > counts
    counts[0] = 0
    return labels, counts, gas


def _pick_sides(air: Bool[ndarray, "z y x"], airway: Bool[ndarray, "z y x"], scan: _Scan) -> UInt8[ndarray, "z y x"]:
    """The right and the left lung among the components of air; touching lungs are parted."""
    # Without the airway's rim: where a bronchus runs along both lungs, its wall of partial volume bridges them.
    labels, parts = _parts(air & ~scan.near(airway, max(scan.spacing_mm[:2])), scan)
    if not parts:
        raise LungMaskError("no lung was found: all enclosed air belongs to the airway")
    largest = labels == parts[0].label
    spine_x = _spine_x(largest, scan)
    lungs = np.zeros(air.shape, np.uint8)
    if halves := _part_touching_lungs(largest, spine_x, scan):
        for side, seed in halves.items():
            lungs[seed] = side
        right_nearer = scan.distance_mm(lungs == RIGHT) <= scan.distance_mm(lungs == LEFT)
        return np.where(largest, np.where(right_nearer, RIGHT, LEFT), 0).astype(np.uint8)
    other = next((p for p in parts[1:] if _opposite(parts[0], p, spine_x)), None)
    if other is not None:
        middle_x = (parts[0].centre_mm[2] + other.centre_mm[2]) / 2
    elif spine_x is not None:
        middle_x = spine_x
    else:
        raise LungMaskError(
            "one lung and no spine to tell its side by; use a scan or a crop that shows the spine beside the lung"
        )
    for part in (parts[0], other):
        if part is not None:
            lungs[labels == part.label] = RIGHT if part.centre_mm[2] < middle_x else LEFT
    return lungs


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """A connected part of the air."""

    label: int
    centre_mm: tuple[float, float, float]
    """From the first voxel, (z, y, x)."""


def _parts(air: Bool[ndarray, "z y x"], scan: _Scan) -> tuple[Integer[ndarray, "z y x"], list[_Part]]:
    """Labels and the parts that may be a lung by size, the largest first."""
    labels = cc3d.connected_components(air, connectivity=6)
    statistics = cc3d.statistics(labels)
    counts = statistics["voxel_counts"].astype(np.int64)
    counts[0] = 0
    parts = []
    for label in np.argsort(-counts):
        if counts[label] == 0 or counts[label] < SMALLER_LUNG_SHARE * counts.max():
            break
        z, y, x = (float(c * mm) for c, mm in zip(statistics["centroids"][label], scan.spacing_mm[::-1], strict=True))
        parts.append(_Part(label=int(label), centre_mm=(z, y, x)))
    return labels, parts


def _opposite(first: _Part, second: _Part, spine_x: float | None) -> bool:
    """Whether two parts lie beside each other, on both sides of the spine if there is one to be seen."""
    dz, _, dx = (abs(a - b) for a, b in zip(first.centre_mm, second.centre_mm, strict=True))
    straddle = spine_x is None or (first.centre_mm[2] - spine_x) * (second.centre_mm[2] - spine_x) < 0
    return straddle and dx > dz


def _part_touching_lungs(
    air: Bool[ndarray, "z y x"], spine_x: float | None, scan: _Scan
) -> dict[int, Bool[ndarray, "z y x"]] | None:
    """The cores of two lungs that touch, found by eroding until they part; None if this is one lung."""
    if spine_x is not None:
        right_share = np.count_nonzero(air[:, :, : round(spine_x / scan.spacing_mm[0])]) / np.count_nonzero(air)
        if not SMALLER_LUNG_SHARE <= right_share <= 1 - SMALLER_LUNG_SHARE:
            return None
    depth_mm = edt.edt(air, anisotropy=scan.spacing_mm[::-1])
    for erosion_mm in SPLIT_MM:
        labels, parts = _parts(depth_mm > erosion_mm, scan)
        other = next((p for p in parts[1:] if _opposite(parts[0], p, spine_x)), None)
        if other is not None:
            right, left = sorted((parts[0], other), key=lambda p: p.centre_mm[2])
            return {RIGHT: labels == right.label, LEFT: labels == left.label}
    return None


def _spine_x(lung: Bool[ndarray, "z y x"], scan: _Scan) -> float | None:
    """Where along x (mm from the first voxel) bone runs through the slices of a lung; None if nowhere.

    Ribs cross a column of voxels in a few slices only; a hanging arm's humerus is farther away than `SPINE_NEAR_MM`.
    """
    slices = np.any(lung, axis=(1, 2))
    pixel_mm = scan.spacing_mm[1], scan.spacing_mm[0]
    share = (scan.hu[slices] > BONE_HU).mean(0)
    share = ndimage.gaussian_filter(share, [SPINE_SIGMA_MM / mm for mm in pixel_mm], mode="nearest")
    near = edt.edt(~np.any(lung, axis=0), anisotropy=pixel_mm) <= SPINE_NEAR_MM
    share = np.where(near, share, 0.0)
    if share.max() < SPINE_SHARE:
        return None
    return float(np.unravel_index(np.argmax(share), share.shape)[1]) * pixel_mm[1]


def _fill(lungs: UInt8[ndarray, "z y x"], scan: _Scan) -> UInt8[ndarray, "z y x"]:
    """Vessels, fissures and holes filled, each lung for itself and never into the other."""
    filled = lungs.copy()
    margin = [int(np.ceil(CLOSE_MM / mm)) + 1 for mm in reversed(scan.spacing_mm)]
    for side in (RIGHT, LEFT):
        lung = lungs == side
        if not lung.any():
            continue
        box = _box(lung)
        # Padded, so that the closing sees beyond the border nothing, neither lung nor body.
        lung = np.pad(lung[box], [(m, m) for m in margin])
        closed = edt.edt(scan.near(lung, CLOSE_MM), anisotropy=scan.spacing_mm[::-1]) > CLOSE_MM
        closed = fill_voids.fill(closed | lung)[tuple(slice(m, -m) for m in margin)]
        filled[box][closed & (lungs[box] == 0)] = side
    return filled


def _redraw(
    lungs: UInt8[ndarray, "z y x"], scan: _Scan, hu: Int[ndarray, "Z Y X"], factors: tuple[int, int, int]
) -> UInt8[ndarray, "Z Y X"]:
    """The mask on the scan's own voxels: within a coarse voxel of the edge, the scan's own HU decide."""
    near_right, near_left = (_dilated(lungs == side) for side in (RIGHT, LEFT))
    other_air = scan.air & (lungs == 0)
    inner = ~_dilated(lungs == 0)
    surely = np.where(inner | ~scan.air, lungs, 0).astype(np.uint8)  # what was filled in is not air and stays
    maybe = np.where(lungs > 0, lungs, np.where(near_right, RIGHT, np.where(near_left, LEFT, 0))).astype(np.uint8)
    maybe[other_air] = 0
    labels = np.empty(hu.shape, np.uint8)
    _by_own_air(hu, *factors, surely, maybe, labels)
    return labels


def _box(mask: Bool[ndarray, "z y x"]) -> tuple[slice, slice, slice]:
    """The smallest box around a mask that is not empty."""
    sides = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    z, y, x = (slice(int(at[0]), int(at[-1]) + 1) for at in sides)
    return z, y, x


def _dilated(mask: Bool[ndarray, "z y x"]) -> Bool[ndarray, "z y x"]:
    """With all 26 neighbours; a cube is the sum of three lines."""
    for axis in range(3):
        line = np.moveaxis(mask, axis, 0)
        wider = line.copy()
        wider[1:] |= line[:-1]
        wider[:-1] |= line[1:]
        mask = np.moveaxis(wider, 0, axis)
    return mask


@njit(nogil=True, cache=True)
@no_type_check
def _block_means(
    hu: ndarray, fz: int, fy: int, fx: int, padding_below_hu: int, mean: ndarray, measured: ndarray
) -> None:
    """Mean of the voxels that are not padding in blocks of fz * fy * fx (fewer at the far borders)."""
    for z in range(mean.shape[0]):
        for y in range(mean.shape[1]):
            for x in range(mean.shape[2]):
                total, count = 0, 0
                for k in range(z * fz, min((z + 1) * fz, hu.shape[0])):
                    for j in range(y * fy, min((y + 1) * fy, hu.shape[1])):
                        for i in range(x * fx, min((x + 1) * fx, hu.shape[2])):
                            value = hu[k, j, i]
                            if value >= padding_below_hu:
                                total += value
                                count += 1
                mean[z, y, x] = np.float32(total / max(count, 1))
                measured[z, y, x] = count > 0


@njit(nogil=True, cache=True)
@no_type_check
def _by_own_air(hu: ndarray, fz: int, fy: int, fx: int, surely: ndarray, maybe: ndarray, labels: ndarray) -> None:
    """Labels of the block a voxel lies in: `maybe` where the voxel is air, else `surely`."""
    for z in range(hu.shape[0]):
        for y in range(hu.shape[1]):
            inside, edge = surely[z // fz, y // fy], maybe[z // fz, y // fy]
            for block in range(edge.shape[0]):
                if inside[block] == edge[block]:
                    for x in range(block * fx, min((block + 1) * fx, hu.shape[2])):
                        labels[z, y, x] = inside[block]
                else:
                    for x in range(block * fx, min((block + 1) * fx, hu.shape[2])):
                        labels[z, y, x] = edge[block] if hu[z, y, x] < AIR_BELOW_HU else inside[block]
