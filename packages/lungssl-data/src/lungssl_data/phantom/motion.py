"""Closed-form breathing motion: one chart per tissue region and phase, from material to physical coordinates.

Cavity (both lungs and the mediastinum between them): material (q, Y, v) with transverse q in [-1, 1] across the
mediastinum and 1 + s with s in [0, 1] from the medial to the costal surface of a lung (q < 0: right), Y from anterior
-1 to posterior +1, v from diaphragm 0 to apex 1. At phase p

    Y_p = Y + tau(s) (g_p(Y) - Y)                    gravity: 1-D transport table, identity at the hilum
    z   = D_p + (v + kappa v (1 - v)) (A - D_p)      dome D_p(s, Y_p), lung top A(s, Y_p)
    y   = y_c(z) + b(z) Y_p - d_p(z) (1 - Y_p)^2 / 2 AP expansion; the back wall Y = 1 stays
    x   = +-(M_p + s (L_p - M_p)),  L_p = a_p(z) (1 - |Y_p|^n)^(1/n),  mediastinal half width M_p(Y_p, z)
    det = (L_p - M_p) (b + d_p (1 - Y_p)) (A - D_p) (1 + kappa (1 - 2 v)) Y_p'

with kappa = s (1 - Y^2) (k0 + k1 Y). The matrix row-reduces to triangular, so the determinant is exact, and each line
inverts in closed form (the table by bisection). In the second family of motion, g is the identity, kappa is 0, and a
B-spline of material space (`ffd.py`) takes their place. M_I = M_E (b h)_E / (b h)_I at one material point keeps the
mediastinum's volume; behind, beside the spine, M_I = M_E. At exhale g is the identity, kappa 0, d 0.

Around it: the wall keeps (x / a_p, Y) and slides over the lung with its own z (rib lift); abdomen and neck keep (q, Y)
and move with the diaphragm (down to a floor) and the lung top.

World: LPS mm, x to the left, y to the back, z to the head; z = 0 near the exhale costophrenic angle.
"""

import math
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float64
from numba import njit
from numpy import ndarray

from lungssl_data.phantom.ffd import NO_WARP, unwarped, warped

OUTSIDE, RIGHT_LUNG, LEFT_LUNG, MEDIASTINUM, ABDOMEN, NECK, WALL, SPINE, EFFUSION = range(9)

FLOOR_MM = -500.0
"""Where abdominal tissue stops moving: far enough that a 50 mm descent squeezes it by no more than 10 %."""
MAX_MEDIAL = 0.9
"""Largest share of the half chord that the mediastinum takes, so that lungs never lose their width."""
SPINE_FRONT = 0.62
"""Y of the front of the vertebral bodies; the mediastinum keeps its width behind it."""
SPINE_HALF_WIDTH_MM = 20.0


class Chest(NamedTuple):
    """What of one subject's shape is the same in both phases."""

    half_width_mm: float
    half_depth_mm: float
    apex_mm: float
    base_mm: float
    """Level (z) at which the rib cage expands most; below, it does not widen further."""
    apex_drop_mm: float
    """How far the lung top falls from its summit to the costal surface."""
    right_dome_mm: float
    """How much higher the right dome stands."""
    mediastinum_mm: float
    """Half width at the great vessels, at exhale."""
    heart_left_mm: float
    heart_right_mm: float
    heart_front: float
    """Y of the heart's centre."""
    heart_level: float
    """v of the heart's centre."""


class Breath(NamedTuple):
    """One phase's state of the chest."""

    recess_mm: float
    """Level of the costophrenic angle."""
    dome_mm: float
    """Height of the dome above it."""
    lateral_mm: float
    """Widening of the half width against exhale."""
    anterior_mm: float
    """Half of the sternum's excursion against exhale."""
    lift: float
    """Rib lift in front as a share of the height below the apex."""
    kappa: float
    kappa_posterior: float
    transport: ndarray
    """Y of this phase at equally spaced exhale Y from -1 to 1."""
    transport_slope: ndarray
    warp: ndarray = NO_WARP
    """Coefficients of `ffd.draw_warp`; of size 0 for none."""


@njit(nogil=True)
@no_type_check
def axes(chest: Chest, breath: Breath, z: float) -> tuple[float, float, float, float]:
    """Cavity at level z: half width a, half depth b, half AP expansion d and centre y_c, in mm."""
    t = min(max((z - chest.base_mm) / (chest.apex_mm - chest.base_mm), 0.0), 1.0)
    a = (chest.half_width_mm + breath.lateral_mm * (1.0 - 0.7 * t)) * (1.0 - 0.42 * t**4)
    b = chest.half_depth_mm * (1.0 - 0.4 * t**3)
    return a, b, breath.anterior_mm * (1.0 - 0.7 * t), 0.5 * (chest.half_depth_mm - b)


@njit(nogil=True)
@no_type_check
def superellipse(x: float, y: float) -> float:
    """|x|^n + |y|^n with n = 2.5: one on the cavity's surface."""
    return x * x * math.sqrt(abs(x)) + y * y * math.sqrt(abs(y))


@njit(nogil=True)
@no_type_check
def _depth_to_y(b: float, d: float, y_c: float, depth: float) -> float:
    return y_c + b * depth - 0.5 * d * (1.0 - depth) ** 2


@njit(nogil=True)
@no_type_check
def _y_to_depth(b: float, d: float, y_c: float, y: float) -> float:
    ahead = y_c + b - y
    return 1.0 - 2.0 * ahead / (b + math.sqrt(max(b * b + 2.0 * d * ahead, 0.0)))


@njit(nogil=True)
@no_type_check
def _lateral(s: float) -> float:
    """0 at the hilum, 1 in the lung's bulk: keeps what differs left from right, or by gravity, off the mediastinum."""
    return 1.0 - math.exp(-((s / 0.35) ** 2))


@njit(nogil=True)
@no_type_check
def _across(s: float, depth: float) -> float:
    """s in proportion to millimetres: towards the lungs' front and back edges, where they thin to nothing, s runs from
    0 to 1 within less and less tissue, and shapes that followed it would crease there."""
    return s * (1.0 - depth * depth)


@njit(nogil=True)
@no_type_check
def diaphragm(chest: Chest, breath: Breath, q: float, depth: float) -> float:
    """Level of the diaphragm in mm."""
    s = max(abs(q) - 1.0, 0.0)
    inside = 1.0 - (_across(s - 0.3, depth) / 0.75) ** 2 - ((depth + 0.05) / 1.1) ** 2
    bulge = 0.5 * (inside + math.sqrt(inside * inside + 0.06))
    height = breath.dome_mm + (chest.right_dome_mm * _lateral(s) if q < 0 else 0.0)
    return breath.recess_mm + height * bulge - 6.0 * (1.0 + depth) ** 2


@njit(nogil=True)
@no_type_check
def lung_top(chest: Chest, q: float, depth: float) -> float:
    """Level of the upper lung surface in mm."""
    s = max(abs(q) - 1.0, 0.0)
    return chest.apex_mm - chest.apex_drop_mm * ((_across(s - 0.35, depth) / 0.65) ** 2 + depth * depth)


@njit(nogil=True)
@no_type_check
def _exhale_half_width(chest: Chest, left: bool, depth: float, v: float) -> float:
    """Half of the mediastinum in mm: front and back junction, great vessels, heart, spine and aorta, thoracic inlet."""
    vessels = chest.mediastinum_mm * math.exp(-(((depth - 0.05) / 0.45) ** 2))
    spine = 15.0 / (1.0 + math.exp(-(depth - 0.45) / 0.08))
    aorta = 13.0 * math.exp(-(((depth - 0.45) / 0.2) ** 2)) if left else 0.0
    heart = math.exp(-(((depth - chest.heart_front) / 0.42) ** 2) - ((v - chest.heart_level) / 0.27) ** 2)
    return 8.0 + vessels + spine + aorta + 9.0 * v**4 + heart * (chest.heart_left_mm if left else chest.heart_right_mm)


@njit(nogil=True)
@no_type_check
def _half_width(
    chest: Chest, exhale: Breath, breath: Breath, left: bool, depth: float, z: float, half_chord: float
) -> float:
    """M_p in mm at this phase's (Y, z)."""
    low, top = diaphragm(chest, breath, 0.0, depth), lung_top(chest, 0.0, depth)
    v = min(max((z - low) / (top - low), -1.0), 1.5)
    width = _exhale_half_width(chest, left, depth, v)
    t = min(max((SPINE_FRONT - depth) / 0.6, 0.0), 1.0)
    if t > 0.0:
        low_e = diaphragm(chest, exhale, 0.0, depth)
        _, b_e, _, _ = axes(chest, exhale, low_e + v * (top - low_e))
        _, b, d, _ = axes(chest, breath, z)
        keep = b_e * (top - low_e) / ((b + d * (1.0 - depth)) * (top - low))
        width *= keep ** (t * t * t * (10.0 - 15.0 * t + 6.0 * t * t))
    full = (width / (MAX_MEDIAL * max(half_chord, 1e-9))) ** 4
    return width / math.sqrt(math.sqrt(1.0 + full))


@njit(nogil=True)
@no_type_check
def _half_chord(a: float, depth: float) -> float:
    return a * max(1.0 - superellipse(0.0, depth), 0.0) ** 0.4


@njit(nogil=True)
@no_type_check
def _blended(breath: Breath, i: int, share: float) -> float:
    even = -1.0 + 2.0 * i / (breath.transport.shape[0] - 1)
    return even + share * (breath.transport[i] - even)


@njit(nogil=True)
@no_type_check
def _transport(breath: Breath, s: float, material: float) -> float:
    n = breath.transport.shape[0] - 1
    i = min(max(int((material + 1.0) * 0.5 * n), 0), n - 1)
    rest = (material + 1.0) * 0.5 * n - i
    share = _lateral(s)
    low = _blended(breath, i, share)
    return low + rest * (_blended(breath, i + 1, share) - low)


@njit(nogil=True)
@no_type_check
def _transport_inverse(breath: Breath, s: float, depth: float) -> float:
    share = _lateral(s)
    low, high = 0, breath.transport.shape[0] - 1
    n = high
    while high - low > 1:
        middle = (low + high) // 2
        if _blended(breath, middle, share) <= depth:
            low = middle
        else:
            high = middle
    below = _blended(breath, low, share)
    return -1.0 + 2.0 * (low + (depth - below) / (_blended(breath, low + 1, share) - below)) / n


@njit(nogil=True)
@no_type_check
def _transport_slope(breath: Breath, s: float, material: float) -> float:
    n = breath.transport_slope.shape[0] - 1
    i = min(max(int((material + 1.0) * 0.5 * n), 0), n - 1)
    rest = (material + 1.0) * 0.5 * n - i
    slope = breath.transport_slope[i] + rest * (breath.transport_slope[i + 1] - breath.transport_slope[i])
    return 1.0 + _lateral(s) * (slope - 1.0)


@njit(nogil=True)
@no_type_check
def _lift(breath: Breath, depth: float) -> float:
    """Share of the height below the apex by which ribs rise at depth Y; none at the spine."""
    return breath.lift * min(max((SPINE_FRONT - depth) / 1.6, 0.0), 1.0)


@njit(nogil=True)
@no_type_check
def locate(
    chest: Chest, exhale: Breath, breath: Breath, x: float, y: float, z: float
) -> tuple[int, float, float, float, float]:
    """Physical point in phase `breath` to (region, q, Y, v, det); det in mm3 per material unit, 0 outside the lungs."""
    a, b, d, y_c = axes(chest, breath, z)
    depth = _y_to_depth(b, d, y_c, y)
    half_chord = _half_chord(a, depth)
    inside = abs(x) < half_chord
    q, low, top = 0.0, 0.0, 0.0
    if inside:
        medial = _half_width(chest, exhale, breath, x > 0, depth, z, half_chord)
        s = (abs(x) - medial) / (half_chord - medial)
        q = math.copysign(1.0 + s, x) if s > 0.0 else x / medial
        low, top = diaphragm(chest, breath, q, depth), lung_top(chest, q, depth)
        if s > 0.0 and low <= z <= top:
            material = _transport_inverse(breath, s, depth)
            kappa = _across(s, material) * (breath.kappa + breath.kappa_posterior * material)
            zeta = (z - low) / (top - low)
            v = 2.0 * zeta / (1.0 + kappa + math.sqrt((1.0 + kappa) ** 2 - 4.0 * kappa * zeta))
            det = (half_chord - medial) * (b + d * (1.0 - depth)) * (top - low)
            det *= (1.0 + kappa * (1.0 - 2.0 * v)) * _transport_slope(breath, s, material)
            if breath.warp.shape[0] > 0:
                side = 1 if x > 0 else 0
                s, material, v = unwarped(breath.warp, side, s, material, v)
                q = math.copysign(1.0 + s, x)
                det *= warped(breath.warp, side, s, material, v)[3]
            return (LEFT_LUNG if x > 0 else RIGHT_LUNG), q, material, v, det
    spine = depth > SPINE_FRONT and abs(x) < SPINE_HALF_WIDTH_MM * a / axes(chest, exhale, z)[0]
    if inside and not spine:
        if z < low:
            return ABDOMEN, q, depth, (low - z) / (low - FLOOR_MM), 0.0
        if z > top:
            return NECK, q, depth, z - top, 0.0
        return MEDIASTINUM, q, depth, (z - low) / (top - low), 0.0
    below = chest.apex_mm - z
    if below > 0.0:
        below /= 1.0 - _lift(breath, depth)
    return (SPINE if spine else WALL), x / a, depth, chest.apex_mm - below, 0.0


@njit(nogil=True)
@no_type_check
def place(
    chest: Chest, exhale: Breath, breath: Breath, region: int, q: float, material: float, v: float
) -> tuple[float, float, float, float]:
    """Material point to (x, y, z) in mm in phase `breath`, and det as in `locate`."""
    if region >= WALL:
        below = chest.apex_mm - v
        if below > 0.0:
            below *= 1.0 - _lift(breath, material)
        z = chest.apex_mm - below
        a, b, d, y_c = axes(chest, breath, z)
        return q * a, _depth_to_y(b, d, y_c, material), z, 0.0
    lung = region <= LEFT_LUNG
    s = max(abs(q) - 1.0, 0.0)
    spread = 1.0
    if lung and s > 0.0 and breath.warp.shape[0] > 0:
        s, material, v, spread = warped(breath.warp, 1 if q > 0 else 0, s, material, v)
        q = math.copysign(1.0 + s, q)
    depth = _transport(breath, s, material) if lung else material
    low, top = diaphragm(chest, breath, q, depth), lung_top(chest, q, depth)
    kappa = _across(s, material) * (breath.kappa + breath.kappa_posterior * material) if lung else 0.0
    if region == ABDOMEN:
        z = low - v * (low - FLOOR_MM)
    elif region == NECK:
        z = top + v
    else:
        z = low + (v + kappa * v * (1.0 - v)) * (top - low)
    a, b, d, y_c = axes(chest, breath, z)
    half_chord = _half_chord(a, depth)
    medial = _half_width(chest, exhale, breath, q > 0, depth, z, half_chord)
    x = math.copysign(medial + s * (half_chord - medial), q) if s > 0.0 else q * medial
    det = 0.0
    if lung:
        det = (half_chord - medial) * (b + d * (1.0 - depth)) * (top - low)
        det *= (1.0 + kappa * (1.0 - 2.0 * v)) * _transport_slope(breath, s, material) * spread
    return x, _depth_to_y(b, d, y_c, depth), z, det


def transport_table(
    exhale_density: Float64[ndarray, " n"], inhale_density: Float64[ndarray, " n"]
) -> tuple[Float64[ndarray, " n"], Float64[ndarray, " n"]]:
    """g and g' such that tissue spread as `exhale_density` over Y in [-1, 1] spreads as `inhale_density` (any scale).

    One-dimensional optimal transport: g = F_I^-1 o F_E with F the normalised cumulative tissue (`domain.md` D1).
    """
    even = np.linspace(-1.0, 1.0, len(exhale_density))

    def cumulative(density: Float64[ndarray, " n"]) -> Float64[ndarray, " n"]:
        total = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
        return total / total[-1]

    table = np.interp(cumulative(exhale_density), cumulative(inhale_density), even)
    table[0], table[-1] = -1.0, 1.0
    scale = np.trapezoid(inhale_density, even) / np.trapezoid(exhale_density, even)
    slope = scale * exhale_density / np.interp(table, even, inhale_density)
    return table, slope
