"""Hounsfield units of everything but lung, as a function of region and *exhale* position.

Inhale voxels are carried to exhale by the charts of `motion.py` first, so organs keep their tissue. Ranges: `domain.md`
D3; shapes are schematic: ribs are parallel sloping slabs of the wall, organs are ellipsoids and tubes.
"""

import math
from typing import NamedTuple, no_type_check

from numba import njit

from lungssl_data.phantom.motion import (
    ABDOMEN,
    NECK,
    SPINE,
    WALL,
    Breath,
    Chest,
    axes,
    diaphragm,
    lung_top,
    superellipse,
)

AIR_HU, FAT_HU, MUSCLE_HU, BLOOD_HU, LIVER_HU = -1000.0, -100.0, 50.0, 42.0, 60.0
CORTEX_HU, MARROW_HU, CARTILAGE_HU, DISC_HU = 800.0, 220.0, 110.0, 85.0
CARINA_DEPTH = 0.2
"""Y of the trachea and its bifurcation."""
RIGHT_BRONCHUS_MM, LEFT_BRONCHUS_MM = (-50.0, 6.0, -38.0), (62.0, 8.0, -36.0)
"""From the carina to beyond the lungs' medial surfaces."""
RIGHT_BRONCHUS_RADIUS, LEFT_BRONCHUS_RADIUS = 0.78, 0.68
"""Against the trachea's."""
ARTERY_START_MM, RIGHT_ARTERY_MM, LEFT_ARTERY_MM = (4.0, 0.0, -16.0), (-40.0, 8.0, -24.0), (50.0, 14.0, -18.0)
"""Bifurcation of the pulmonary trunk and ends of its branches, from the cavity's axis at the carina's level."""


class Anatomy(NamedTuple):
    """What of one subject's tissues varies."""

    fat_mm: float
    muscle_mm: float
    rib_pitch_mm: float
    rib_slope: float
    """Fall of a rib per millimetre forward."""
    trachea_mm: float
    """Radius of the tracheal lumen."""
    carina: float
    """v of the tracheal bifurcation in the mediastinum."""
    stomach_gas: float
    """Share of the stomach's height filled with gas."""


@njit(nogil=True)
@no_type_check
def _segment_distance(
    x: float, y: float, z: float, x0: float, y0: float, z0: float, x1: float, y1: float, z1: float
) -> float:
    dx, dy, dz = x1 - x0, y1 - y0, z1 - z0
    t = ((x - x0) * dx + (y - y0) * dy + (z - z0) * dz) / (dx * dx + dy * dy + dz * dz)
    t = min(max(t, 0.0), 1.0)
    return math.sqrt((x - x0 - t * dx) ** 2 + (y - y0 - t * dy) ** 2 + (z - z0 - t * dz) ** 2)


@njit(nogil=True)
@no_type_check
def outside_body(chest: Chest, anatomy: Anatomy, exhale: Breath, across: float, depth: float, z: float) -> float:
    """Millimetres beyond the skin in the slice's plane; negative inside. `across` = x / a, `depth` = Y at exhale."""
    a, b, _, _ = axes(chest, exhale, z)
    gauge = max(superellipse(across, depth), 1e-6) ** 0.4
    radius = math.sqrt((across * a) ** 2 + (depth * b) ** 2)
    return radius * (1.0 - 1.0 / gauge) - _wall_mm(chest, anatomy, depth / gauge, z) - _fat_mm(anatomy, depth / gauge)


@njit(nogil=True)
@no_type_check
def _fat_mm(anatomy: Anatomy, behind: float) -> float:
    return anatomy.fat_mm * (1.0 - 0.35 * behind)


@njit(nogil=True)
@no_type_check
def _wall_mm(chest: Chest, anatomy: Anatomy, behind: float, z: float) -> float:
    """Ribs and muscle; `behind` runs from -1 in front to 1 at the back. Shoulders fill the tapering top."""
    t = min(max((z - chest.base_mm) / (chest.apex_mm - chest.base_mm), 0.0), 1.1)
    side = 1.0 - behind * behind
    back = max(behind, 0.0)
    return 9.0 + anatomy.muscle_mm * (0.6 + 0.5 * side + 1.4 * back * back) + (12.0 + 40.0 * side) * t**4


@njit(nogil=True)
@no_type_check
def _wall_hu(
    chest: Chest, anatomy: Anatomy, exhale: Breath, across: float, depth: float, x: float, y: float, z: float
) -> float:
    a, b, _, y_c = axes(chest, exhale, z)
    gauge = superellipse(across, depth) ** 0.4
    radius = math.sqrt((across * a) ** 2 + (depth * b) ** 2)
    out = radius * (1.0 - 1.0 / gauge)
    behind = depth / gauge
    wall = _wall_mm(chest, anatomy, behind, z)
    skin = wall + _fat_mm(anatomy, behind) - out
    if skin < 2.0:
        return 20.0
    front = y_c - b - y
    # Sternum: 35 x 12 mm, from below the thoracic inlet down to the level of the heart.
    if abs(x) < 18.0 and behind < 0.0 and chest.apex_mm - 175.0 < z < chest.apex_mm - 45.0:
        edge = max(abs(x) - 6.0, 0.0) ** 2 / 144.0 + ((front - 8.0) / 6.0) ** 2
        if edge < 1.0:
            return CORTEX_HU * 0.6 if edge > 0.6 else MARROW_HU * 0.7
    level = z + anatomy.rib_slope * (y_c + b - y)
    rib = math.floor((chest.apex_mm + 10.0 - level) / anatomy.rib_pitch_mm)
    offset = (chest.apex_mm + 10.0 - level) - (rib + 0.5) * anatomy.rib_pitch_mm
    # Twelve pairs; the lower five do not reach the sternum.
    reach = -1.0 if rib < 7 else -0.75 + 0.25 * (rib - 7)
    if 0 <= rib < 12 and behind > reach:
        edge = ((out - 5.0) / 3.6) ** 2 + (offset / 6.5) ** 2
        if edge < 1.0:
            if behind < -0.8:
                return CARTILAGE_HU
            return MARROW_HU if edge < 0.3 else CORTEX_HU
    if out < 1.5 or out > wall:
        return FAT_HU
    if out < 9.0:
        return MUSCLE_HU if abs(offset) < 0.4 * anatomy.rib_pitch_mm else 0.0
    # Scapulae: thin oblique plates behind the upper ribs.
    if chest.apex_mm - 110.0 < z < chest.apex_mm - 10.0 and 0.15 < behind < 0.8 and abs(out - 16.0) < 2.5:
        return CORTEX_HU * 0.7
    # One plane of fat between the muscles' layers.
    return FAT_HU if abs(out - 9.0 - 0.5 * (wall - 9.0)) < 1.2 else MUSCLE_HU


@njit(nogil=True)
@no_type_check
def _spine_hu(chest: Chest, anatomy: Anatomy, exhale: Breath, x: float, y: float, z: float) -> float:
    _, b, _, y_c = axes(chest, exhale, z)
    back = y - (y_c + b)
    step = z / anatomy.rib_pitch_mm
    offset = (step - math.floor(step)) * anatomy.rib_pitch_mm
    disc = offset < 5.0
    body = (x / 17.0) ** 2 + ((back + 14.0) / 14.0) ** 2
    if body < 1.0:
        if disc:
            return DISC_HU
        return CORTEX_HU * 0.7 if body > 0.8 or offset < 6.5 or offset > anatomy.rib_pitch_mm - 1.5 else MARROW_HU
    if x * x + (back - 8.0) ** 2 < 64.0:
        return 15.0
    if x * x + (back - 8.0) ** 2 < 150.0 and back > 0.0 and not disc:
        return CORTEX_HU * 0.7
    if abs(x) < 3.5 and 18.0 < back < 38.0 and offset > 8.0:
        return CORTEX_HU * 0.5
    return MUSCLE_HU if back > 2.0 else FAT_HU


@njit(nogil=True)
@no_type_check
def _airway(chest: Chest, anatomy: Anatomy, exhale: Breath, x: float, y: float, z: float) -> float:
    """Millimetres outside the lumen of the trachea and the main bronchi; negative inside."""
    low, top = diaphragm(chest, exhale, 0.0, CARINA_DEPTH), lung_top(chest, 0.0, CARINA_DEPTH)
    z_carina = low + anatomy.carina * (top - low)
    _, b, _, y_c = axes(chest, exhale, max(z, z_carina))
    y_trachea = y_c + CARINA_DEPTH * b
    r = anatomy.trachea_mm
    if z >= z_carina:
        tube = math.sqrt(x * x + (y - y_trachea) ** 2) - r
    else:
        tube = _segment_distance(x, y, z, 0.0, y_trachea, z_carina, 0.0, y_trachea, z_carina + 1.0) - r
    xe, ye, ze = RIGHT_BRONCHUS_MM
    right = _segment_distance(x, y, z, 0.0, y_trachea, z_carina, xe, y_trachea + ye, z_carina + ze)
    xe, ye, ze = LEFT_BRONCHUS_MM
    left = _segment_distance(x, y, z, 0.0, y_trachea, z_carina, xe, y_trachea + ye, z_carina + ze)
    right, left = right - RIGHT_BRONCHUS_RADIUS * r, left - LEFT_BRONCHUS_RADIUS * r
    return min(tube, right, left)


@njit(nogil=True)
@no_type_check
def _mediastinum_hu(chest: Chest, anatomy: Anatomy, exhale: Breath, x: float, y: float, z: float) -> float:
    _, b, _, y_c = axes(chest, exhale, z)
    airway = _airway(chest, anatomy, exhale, x, y, z)
    if airway < 0.0:
        return AIR_HU
    if airway < 1.8:
        return 35.0
    low, top = diaphragm(chest, exhale, 0.0, chest.heart_front), lung_top(chest, 0.0, chest.heart_front)
    z_heart = low + chest.heart_level * (top - low)
    centre = 0.42 * (chest.heart_left_mm - chest.heart_right_mm)
    half_width = 0.5 * (chest.heart_left_mm + chest.heart_right_mm) + 18.0
    heart = ((x - centre) / half_width) ** 2 + ((y - y_c - chest.heart_front * b) / 48.0) ** 2
    heart += ((z - z_heart) / 62.0) ** 2
    if heart < 1.0:
        return BLOOD_HU
    low, top = diaphragm(chest, exhale, 0.0, CARINA_DEPTH), lung_top(chest, 0.0, CARINA_DEPTH)
    z_carina = low + anatomy.carina * (top - low)
    z_arch = z_carina + 26.0
    front, back = y_c - 0.2 * b, y_c + 0.5 * b
    vessel = _segment_distance(x, y, z, -10.0, front, z_arch, 22.0, back, z_arch) - 13.0
    if z < z_arch:
        vessel = min(vessel, math.sqrt((x - 23.0) ** 2 + (y - back) ** 2) - 11.5)
        if z > z_heart:
            vessel = min(vessel, math.sqrt((x + 12.0) ** 2 + (y - front) ** 2) - 15.0)
    else:
        for x_branch in (-20.0, 2.0, 22.0):
            vessel = min(vessel, math.sqrt((x - x_branch) ** 2 + (y - y_c + 0.05 * b) ** 2) - 5.5)
    if z > z_heart:
        vessel = min(vessel, math.sqrt((x + 27.0) ** 2 + (y - y_c + 0.1 * b) ** 2) - 8.5)
    # Pulmonary trunk and its two branches.
    xs, ys, zs = ARTERY_START_MM
    trunk = _segment_distance(x, y, z, 24.0, front - 4.0, z_carina + zs + 2.0, xs, y_c + ys, z_carina + zs) - 12.0
    xe, ye, ze = RIGHT_ARTERY_MM
    right = _segment_distance(x, y, z, xs, y_c + ys, z_carina + zs, xe, y_c + ye, z_carina + ze) - 9.0
    xe, ye, ze = LEFT_ARTERY_MM
    left = _segment_distance(x, y, z, xs, y_c + ys, z_carina + zs, xe, y_c + ye, z_carina + ze) - 9.0
    vessel = min(vessel, trunk, right, left)
    oesophagus = math.sqrt((x - 4.0) ** 2 + (y - y_c - 0.46 * b) ** 2) - 7.0
    return BLOOD_HU if min(vessel, oesophagus) < 0.0 else FAT_HU


@njit(nogil=True)
@no_type_check
def _abdomen_hu(
    chest: Chest, anatomy: Anatomy, exhale: Breath, q: float, depth: float, x: float, y: float, z: float
) -> float:
    a, b, _, y_c = axes(chest, exhale, z)
    under = diaphragm(chest, exhale, q, depth) - z
    if under < 3.0:
        return MUSCLE_HU
    if math.sqrt((x - 14.0) ** 2 + (y - y_c - 0.45 * b) ** 2) < 11.0:
        return BLOOD_HU
    rim = superellipse(x / a, depth) ** 0.4
    if rim > 0.97:
        return FAT_HU
    dome = diaphragm(chest, exhale, 0.0, 0.0)
    # Liver: the whole right side under the dome, its left lobe thinning across the midline in front.
    if x < 15.0 - 0.2 * (dome - z) - 25.0 * depth and x < 40.0:
        return LIVER_HU
    spleen = ((x - 0.68 * a) / 30.0) ** 2 + ((y - y_c - 0.4 * b) / 38.0) ** 2 + ((z - dome + 35.0) / 48.0) ** 2
    if spleen < 1.0:
        return 50.0
    stomach = ((x - 0.42 * a) / 40.0) ** 2 + ((y - y_c + 0.15 * b) / 36.0) ** 2 + ((z - dome + 42.0) / 38.0) ** 2
    if stomach < 1.0:
        if stomach > 0.85:
            return 35.0
        # Supine: gas rises to the front.
        return -950.0 if y < y_c - 0.15 * b - 36.0 + 72.0 * anatomy.stomach_gas else 15.0
    return FAT_HU


@njit(nogil=True)
@no_type_check
def _neck_hu(chest: Chest, anatomy: Anatomy, exhale: Breath, x: float, y: float, z: float) -> float:
    _, b, _, y_c = axes(chest, exhale, z)
    airway = _airway(chest, anatomy, exhale, x, y, z)
    if airway < 0.0:
        return AIR_HU
    for x_vessel in (-27.0, -18.0, 18.0, 27.0):
        if (x - x_vessel) ** 2 + (y - y_c + 0.1 * b) ** 2 < 36.0:
            return BLOOD_HU
    return FAT_HU if abs(x) > 36.0 else MUSCLE_HU


@njit(nogil=True)
@no_type_check
def tissue_hu(
    chest: Chest,
    anatomy: Anatomy,
    exhale: Breath,
    region: int,
    q: float,
    depth: float,
    x: float,
    y: float,
    z: float,
) -> float:
    """HU at exhale position (x, y, z), material (q, Y), of a region that is not lung."""
    if region == WALL:
        return _wall_hu(chest, anatomy, exhale, q, depth, x, y, z)
    if region == SPINE:
        if outside_body(chest, anatomy, exhale, q, depth, z) > -2.0:
            return 20.0
        if outside_body(chest, anatomy, exhale, q, depth, z) > -_fat_mm(anatomy, 1.0):
            return FAT_HU
        return _spine_hu(chest, anatomy, exhale, x, y, z)
    if region == ABDOMEN:
        return _abdomen_hu(chest, anatomy, exhale, q, depth, x, y, z)
    if region == NECK:
        return _neck_hu(chest, anatomy, exhale, x, y, z)
    return _mediastinum_hu(chest, anatomy, exhale, x, y, z)
