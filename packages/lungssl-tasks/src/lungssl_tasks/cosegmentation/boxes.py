"""Cubes of voxels cut from a scan around a lesion, perhaps beyond the scan's border."""

import dataclasses
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int16, UInt8
from lungssl_data.pair import PhaseScan
from lungssl_data.volume import Geometry
from numpy import ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Crop:
    """What samples of one phase of a lesion are cut from."""

    low: tuple[int, int, int]
    """First voxel (z, y, x) in the scan."""
    hu: Int16[ndarray, "z y x"]
    labels: UInt8[ndarray, "z y x"]
    """As in `LesionPair`."""
    truth: UInt8[ndarray, "z y x"] | None
    told: UInt8[ndarray, "z y x"]
    """As in `LesionPair`, in steps of 1/255."""

    def nbytes(self) -> int:
        """Of its arrays."""
        return sum(one.nbytes for one in (self.hu, self.labels, self.told, self.truth) if one is not None)


@dataclass(frozen=True, kw_only=True)
class Box:
    """A cube of voxels in a scan, perhaps beyond its border."""

    low: tuple[int, int, int]
    """First voxel (z, y, x)."""
    side: int

    @staticmethod
    def around(scan: PhaseScan, centre_mm: Float[ndarray, "3"], side: int, margin: int) -> "Box":
        """With a point in the middle, `margin` voxels larger than `side` on every side."""
        z, y, x = (index_of(scan, centre_mm) - side // 2 - margin).tolist()
        return Box(low=(z, y, x), side=side + 2 * margin)

    def meets(self, scan: PhaseScan, centre_mm: Float[ndarray, "3"], radius_mm: float) -> bool:
        """Whether a cube of this radius around a point may reach into it."""
        reach = np.ceil(radius_mm / np.array(scan.spacing_mm[::-1]))
        place = index_of(scan, centre_mm) - self.low
        return bool((place + reach >= 0).all() and (place - reach < self.side).all())

    def geometry(self, scan: PhaseScan) -> Geometry:
        """Its grid in LPS mm."""
        x, y, z = (np.array(self.low[::-1]) * np.array(scan.spacing_mm) + scan.origin_mm).tolist()
        return dataclasses.replace(scan.geometry(), shape=(self.side,) * 3, origin_mm=(x, y, z))

    def cut(self, values: ndarray, beyond: float | int | bool, corner: tuple[int, int, int] = (0, 0, 0)) -> ndarray:
        """Values in it, of an array whose first voxel is `corner` of the scan; `beyond` outside the array."""
        out = np.full((self.side,) * 3, beyond, values.dtype)
        first = np.array(self.low) - corner
        low, high = np.maximum(first, 0), np.minimum(first + self.side, values.shape)
        if (high > low).all():
            there = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            here = tuple(slice(a, b) for a, b in zip(low - first, high - first, strict=True))
            out[here] = values[there]
        return out


def index_of(scan: PhaseScan, point_mm: Float[ndarray, "3"]) -> ndarray:
    """The voxel (z, y, x) nearest to a point."""
    return np.rint((point_mm - scan.origin_mm) / np.asarray(scan.spacing_mm)).astype(int)[::-1]
