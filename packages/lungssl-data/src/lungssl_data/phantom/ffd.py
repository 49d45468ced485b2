"""Cubic B-spline warp of a lung's material space: the second family of motion (`domain.md` D1, D7).

m' = m + F(m) on (s, Y, v). Coefficients below 0.4 of the controls' spacing keep it invertible (Choi and Lee 2000,
doi:10.1016/S0167-8655(00)00042-1); three layers of zeros on every side let F and its first two derivatives vanish on
the lung's surface. Inverse by fixed point.
"""

from typing import no_type_check

import numpy as np
from jaxtyping import Float64
from numba import njit
from numpy import ndarray
from numpy.random import Generator

CONTROLS = (5, 6, 6)
"""Cells of the control grid along (s, Y, v)."""
MOST = 0.3
"""Largest coefficient in control spacings; the bound is 0.4."""
NO_WARP = np.zeros((0, 0, 0, 0, 0))
ITERATIONS = 200


def draw_warp(rng: Generator) -> Float64[ndarray, "2 s y v 3"]:
    """Coefficients for the right and the left lung, in material units."""
    warp = np.zeros((2, *(n + 3 for n in CONTROLS), 3))
    inner = warp[:, 3:-3, 3:-3, 3:-3]
    inner[:] = rng.uniform(-MOST, MOST, inner.shape) * [1.0 / CONTROLS[0], 2.0 / CONTROLS[1], 1.0 / CONTROLS[2]]
    return warp


@njit(nogil=True)
@no_type_check
def _weights(t: float, slope: bool) -> tuple[float, float, float, float]:
    if slope:
        return -0.5 * (1.0 - t) ** 2, 1.5 * t * t - 2.0 * t, -1.5 * t * t + t + 0.5, 0.5 * t * t
    return (1.0 - t) ** 3 / 6.0, 0.5 * t**3 - t * t + 2.0 / 3.0, 0.5 * (t + t * t - t**3) + 1.0 / 6.0, t**3 / 6.0


@njit(nogil=True)
@no_type_check
def _spline(warp: ndarray, side: int, s: float, depth: float, v: float, along: int) -> tuple[float, float, float]:
    """F (along -1), or its derivative along one material axis."""
    cells = (warp.shape[1] - 3, warp.shape[2] - 3, warp.shape[3] - 3)
    ts, ty, tv = s * cells[0], 0.5 * (depth + 1.0) * cells[1], v * cells[2]
    i = min(max(int(ts), 0), cells[0] - 1)
    j = min(max(int(ty), 0), cells[1] - 1)
    k = min(max(int(tv), 0), cells[2] - 1)
    ws, wy, wv = _weights(ts - i, along == 0), _weights(ty - j, along == 1), _weights(tv - k, along == 2)
    a, b, c = 0.0, 0.0, 0.0
    for p in range(4):
        for q in range(4):
            for r in range(4):
                weight = ws[p] * wy[q] * wv[r]
                a += weight * warp[side, i + p, j + q, k + r, 0]
                b += weight * warp[side, i + p, j + q, k + r, 1]
                c += weight * warp[side, i + p, j + q, k + r, 2]
    scale = 1.0
    if along == 0:
        scale = float(cells[0])
    elif along == 1:
        scale = 0.5 * cells[1]
    elif along == 2:
        scale = float(cells[2])
    return a * scale, b * scale, c * scale


@njit(nogil=True)
@no_type_check
def warped(warp: ndarray, side: int, s: float, depth: float, v: float) -> tuple[float, float, float, float]:
    """m + F(m), and det(I + dF/dm)."""
    a, b, c = _spline(warp, side, s, depth, v, -1)
    ss, ys, vs = _spline(warp, side, s, depth, v, 0)
    sy, yy, vy = _spline(warp, side, s, depth, v, 1)
    sv, yv, vv = _spline(warp, side, s, depth, v, 2)
    det = (1.0 + ss) * ((1.0 + yy) * (1.0 + vv) - yv * vy)
    det += -sy * (ys * (1.0 + vv) - yv * vs) + sv * (ys * vy - (1.0 + yy) * vs)
    return s + a, depth + b, v + c, det


@njit(nogil=True)
@no_type_check
def unwarped(warp: ndarray, side: int, s: float, depth: float, v: float) -> tuple[float, float, float]:
    """m with m + F(m) = (s, depth, v)."""
    x, y, z = s, depth, v
    for _ in range(ITERATIONS):
        a, b, c = _spline(warp, side, x, y, z, -1)
        # The surface is fixed: what a step carries beyond it comes back.
        a, b, c = min(max(s - a, 0.0), 1.0), min(max(depth - b, -1.0), 1.0), min(max(v - c, 0.0), 1.0)
        change = abs(a - x) + abs(b - y) + abs(c - z)
        x, y, z = a, b, c
        if change < 1e-13:
            break
    return x, y, z
