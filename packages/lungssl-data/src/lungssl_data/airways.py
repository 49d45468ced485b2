"""Trachea and main bronchi, found slice by slice from the head down.

Source: the slice-wise tracking of Hu, Hoffman and Reinhardt 2001, doi:10.1109/42.929615.
Differs from it: the seed is the longest chain of tube-like sections (theirs is the one large round region of the
top slice, which a crop may lack), and a section that runs into the lung is retried at lower thresholds.
Axes: z from feet to head, y to the back, x to the left.
"""

from dataclasses import dataclass

import cc3d
import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy import ndimage

SECTION_MM2 = (60.0, 1000.0)
"""Area of a tracheal section in the seed. Adult tracheas are 13 to 25 mm wide and 13 to 27 mm deep, which is 130 to
530 mm2 (Breatnach et al. 1984, doi:10.2214/ajr.142.5.903); the margins are for children, partial volume and
tracheomegaly."""
CARINA_SHARE = 2.5
"""No section is larger than this many median seed sections: at the carina both main bronchi lie in one slice as a
bow tie, about twice the trachea's area; a section of lung soon exceeds it."""
BRONCHUS_MM2 = 40.0
"""Tracking ends below this: such a bronchus (7 mm wide, lobar or smaller) runs inside the lung."""
SEED_MM = 25.0
"""Shortest seed. The apex of a lung passes the tracheal areas within about 15 mm of height."""
GROWTH = 2.0
"""A section may be this many times larger than the one above it, or it has run into the lung."""
LUMEN_HU = -700.0
"""Seeds are looked for below this: the wall between trachea and lung, blurred over 2 mm voxels, is above it. On eight
CTs seeds are 68 to 130 mm long at -700, 40 to 120 mm at -400."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Section:
    """One connected region of air in one axial slice."""

    mask: Bool[ndarray, "y x"]
    area_mm2: float


def trachea_and_main_bronchi(
    air: Bool[ndarray, "z y x"],
    hu: Float[ndarray, "z y x"],
    *,
    spacing_mm: tuple[float, float, float],
    above_slice: int,
    threshold_hu: float,
) -> Bool[ndarray, "z y x"]:
    """The part of `air` that is trachea or main bronchus, empty where no trachea is to be seen.

    `spacing_mm` is (x, y, z). The seed is looked for with its centre above `above_slice`, so that a gas-filled colon
    is not taken for it. `threshold_hu` is the bound below which a voxel was called air.
    """
    airway = np.zeros_like(air)
    chain = _longest_chain(air & (hu < LUMEN_HU), spacing_mm, above_slice)
    if not chain:
        return airway
    for z, section in chain.items():
        airway[z] |= section.mask
    pixel_mm2 = spacing_mm[0] * spacing_mm[1]
    carina_mm2 = CARINA_SHARE * float(np.median([section.area_mm2 for section in chain.values()]))
    bottom = min(chain)
    front = [chain[bottom]]
    for z in range(bottom - 1, -1, -1):
        front = [
            below
            for above in front
            for below in _sections_below(above, air[z], hu[z], pixel_mm2, threshold_hu, carina_mm2)
        ]
        if not front:
            break
        for section in front:
            airway[z] |= section.mask
        front = _sections(np.logical_or.reduce([section.mask for section in front]), pixel_mm2)
    return airway


def _sections(air: Bool[ndarray, "y x"], pixel_mm2: float) -> list[_Section]:
    labels = cc3d.connected_components(air, connectivity=4)
    counts = np.bincount(labels.ravel())
    return [
        _Section(mask=labels == label, area_mm2=float(count * pixel_mm2))
        for label, count in enumerate(counts)
        if label and count * pixel_mm2 >= BRONCHUS_MM2
    ]


def _sections_below(
    above: _Section,
    air: Bool[ndarray, "y x"],
    hu: Float[ndarray, "y x"],
    pixel_mm2: float,
    threshold_hu: float,
    carina_mm2: float,
) -> list[_Section]:
    limit_mm2 = min(GROWTH * above.area_mm2, carina_mm2)
    for lumen_hu in np.linspace(threshold_hu, -950.0, 8):
        touching = [s for s in _sections(air & (hu < lumen_hu), pixel_mm2) if (s.mask & above.mask).any()]
        if touching and sum(s.area_mm2 for s in touching) <= limit_mm2:
            return touching
    return []


def _longest_chain(
    air: Bool[ndarray, "z y x"], spacing_mm: tuple[float, float, float], above_slice: int
) -> dict[int, _Section]:
    """The tube-like sections by slice that overlap from slice to slice over the greatest height."""
    tubes = np.zeros(air.shape, np.uint8)
    pixel_mm2 = spacing_mm[0] * spacing_mm[1]
    for z in range(len(air)):
        labels = cc3d.connected_components(air[z], connectivity=4)
        counts = np.bincount(labels.ravel())
        for label, box in enumerate(ndimage.find_objects(labels), start=1):
            if box is None or not SECTION_MM2[0] <= counts[label] * pixel_mm2 <= SECTION_MM2[1]:
                continue
            inside = labels[box] == label
            height, width = inside.shape[0] * spacing_mm[1], inside.shape[1] * spacing_mm[0]
            # A disc fills pi/4 of its box; the sickle of a costophrenic recess fills less than half.
            round_enough = inside.mean() >= 0.55 and max(height, width) <= 2.5 * min(height, width)
            if round_enough:
                tubes[z][box][inside] = 1
    labels = cc3d.connected_components(tubes, connectivity=6)
    best: dict[int, _Section] = {}
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        low, high = box[0].start, box[0].stop
        if (high - low) * spacing_mm[2] < SEED_MM or (low + high) / 2 < above_slice or high - low <= len(best):
            continue
        best = {
            z: _Section(mask=labels[z] == label, area_mm2=float((labels[z] == label).sum() * pixel_mm2))
            for z in range(low, high)
        }
    return best
