"""The charts of `motion.py` over arrays of points."""

import zlib
from pathlib import Path
from types import ModuleType
from typing import no_type_check

import numpy as np
from jaxtyping import Float64, UInt8
from numba import njit
from numpy import ndarray

from lungssl_data.phantom import ffd, motion
from lungssl_data.phantom.motion import LEFT_LUNG, RIGHT_LUNG, Breath, Chest, locate, place


def callees(*modules: ModuleType) -> ndarray:
    """An empty array whose type holds a checksum of the modules' files.

    numba's cache on disk watches a kernel's own file only. Passed to a kernel, this array's type, and with it the key
    of the cache, stands for the functions that it calls: an edit there recompiles.
    """
    source = b"".join(Path(str(module.__file__)).read_bytes() for module in modules)
    return np.empty(0, [(f"crc_{zlib.crc32(source):08x}", np.uint8)])


_CALLEES = callees(motion, ffd)


@njit(nogil=True, cache=True)
@no_type_check
def _trace(
    chest: Chest, exhale: Breath, here: Breath, there: Breath, points_mm: ndarray, callees: ndarray
) -> tuple[ndarray, ndarray, ndarray]:
    n = points_mm.shape[0]
    region, material, moved = np.empty(n, np.uint8), np.empty((n, 3)), np.empty((n, 3))
    for i in range(n):
        kind, q, depth, v, _ = locate(chest, exhale, here, points_mm[i, 0], points_mm[i, 1], points_mm[i, 2])
        x, y, z, _ = place(chest, exhale, there, kind, q, depth, v)
        region[i] = kind
        material[i, 0], material[i, 1], material[i, 2] = q, depth, v
        moved[i, 0], moved[i, 1], moved[i, 2] = x, y, z
    return region, material, moved


@njit(nogil=True, cache=True)
@no_type_check
def _place_lung(
    chest: Chest, exhale: Breath, there: Breath, material: ndarray, callees: ndarray
) -> tuple[ndarray, ndarray]:
    n = material.shape[0]
    moved, det = np.empty((n, 3)), np.empty(n)
    for i in range(n):
        region = LEFT_LUNG if material[i, 0] > 0 else RIGHT_LUNG
        x, y, z, d = place(chest, exhale, there, region, material[i, 0], material[i, 1], material[i, 2])
        moved[i, 0], moved[i, 1], moved[i, 2] = x, y, z
        det[i] = d
    return moved, det


def trace(
    chest: Chest, exhale: Breath, here: Breath, there: Breath, points_mm: Float64[ndarray, "n 3"]
) -> tuple[UInt8[ndarray, " n"], Float64[ndarray, "n 3"], Float64[ndarray, "n 3"]]:
    """Points of phase `here` to region (an effusion's is its lung's), material (q, Y, v) and place in `there`."""
    return _trace(chest, exhale, here, there, np.ascontiguousarray(points_mm), _CALLEES)


def place_lung(
    chest: Chest, exhale: Breath, there: Breath, material: Float64[ndarray, "n 3"]
) -> tuple[Float64[ndarray, "n 3"], Float64[ndarray, " n"]]:
    """Lung material (q, Y, v) to points in phase `there`, and det in mm3 per material unit."""
    return _place_lung(chest, exhale, there, np.ascontiguousarray(material), _CALLEES)
