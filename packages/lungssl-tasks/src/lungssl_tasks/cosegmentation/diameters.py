"""Two diameters of a lesion on one axial slice, as RECIST has them measured, and the ellipsoid that they suggest.

RECIST 1.1: Eisenhauer et al. 2009, doi:10.1016/j.ejca.2008.10.026. Points are (x, y, z) in LPS mm, arrays (z, y, x).
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8
from lungssl_data.volume import Geometry
from numpy import ndarray
from scipy import ndimage
from scipy.spatial.distance import pdist, squareform


@dataclass(frozen=True, kw_only=True, eq=False)
class Diameters:
    """A lesion's longest diameter and the longest at right angles to it, on one slice."""

    long_mm: Float[ndarray, "2 3"]
    """Ends."""
    short_mm: Float[ndarray, "2 3"]
    source: str = ""
    """Where they are from, for messages: a file and its line."""

    def centre_mm(self) -> Float[ndarray, "3"]:
        """Mean of the four ends."""
        return np.concatenate([self.long_mm, self.short_mm]).mean(axis=0)

    def half_axes_mm(self) -> tuple[float, float, float]:
        """Of the ellipsoid: half of both diameters, and along z the shorter one again."""
        a, b = (float(np.linalg.norm(ends[1] - ends[0])) / 2 for ends in (self.long_mm, self.short_mm))
        return a, b, b

    def axes_at(self, grid: Geometry) -> Float[ndarray, "3 z y x"]:
        """Place of an axis-aligned grid's voxels along the three axes, in half axes: the ellipsoid is norm <= 1."""
        z, y, x = (
            np.arange(n) * mm + origin
            for n, mm, origin in zip(grid.shape, grid.spacing_mm[::-1], grid.origin_mm[::-1], strict=True)
        )
        z, y, x = np.meshgrid(z, y, x, indexing="ij")
        return np.moveaxis(self.axes_of(np.stack([x, y, z], axis=-1).reshape(-1, 3)), 1, 0).reshape(3, *grid.shape)

    def axes_of(self, points_mm: Float[ndarray, "n 3"]) -> Float[ndarray, "n 3"]:
        """Places of points along the three axes, in half axes."""
        along = (self.long_mm[1] - self.long_mm[0])[:2]
        along = along / np.linalg.norm(along)
        x, y, z = (points_mm - self.centre_mm()).T
        a, b, c = self.half_axes_mm()
        return np.stack([(x * along[0] + y * along[1]) / a, (y * along[0] - x * along[1]) / b, z / c], axis=1)

    def moved(self, by_mm: Float[ndarray, "3"]) -> "Diameters":
        """The same ones elsewhere."""
        return Diameters(long_mm=self.long_mm + by_mm, short_mm=self.short_mm + by_mm)

    def ellipsoid(self, grid: Geometry, scale: float = 1.0) -> Bool[ndarray, "z y x"]:
        """Voxels inside, its half axes scaled."""
        return np.linalg.norm(self.axes_at(grid), axis=0) <= scale

    def box(self, grid: Geometry, scale: float = 1.0) -> Bool[ndarray, "z y x"]:
        """Voxels inside the box around the ellipsoid, along its axes, scaled."""
        return np.asarray((np.abs(self.axes_at(grid)) <= scale).all(axis=0))


def told_of(diameters: Iterable[Diameters], grid: Geometry) -> Float[ndarray, "z y x"]:
    """What a network is told of where a lesion is: 1 in the middle of its ellipsoid, 1/2 on it, 0 at twice its half
    axes and beyond; of several parts the largest. Ours.
    """
    told = np.zeros(grid.shape)
    for one in diameters:
        told = np.maximum(told, 1 - np.linalg.norm(one.axes_at(grid), axis=0) / 2)
    return told


def measured(mask: Bool[ndarray, "z y x"], grid: Geometry) -> Diameters:
    """The diameters of a mask on its largest axial slice, from edge to edge of its pixels. ValueError for an empty one.

    The longest distance of two pixels, and the longest chord at right angles to it.
    """
    if not mask.any():
        raise ValueError("an empty mask has no diameters")
    k = int(mask.sum(axis=(1, 2)).argmax())
    rim = mask[k] & np.logical_not(ndimage.binary_erosion(mask[k]))
    sx, sy, _ = grid.spacing_mm
    inner = np.argwhere(mask[k])[:, ::-1] * (sx, sy)
    rim_mm = np.argwhere(rim)[:, ::-1] * (sx, sy)
    pixel = min(sx, sy)
    along = np.array([1.0, 0.0])
    first = second = rim_mm[0]
    if len(rim_mm) > 1:
        i, j = np.unravel_index(squareform(pdist(rim_mm)).argmax(), (len(rim_mm), len(rim_mm)))
        first, second = rim_mm[i], rim_mm[j]
        along = (second - first) / np.linalg.norm(second - first)
    across = np.array([-along[1], along[0]])
    place = np.rint((inner - first) @ along / pixel).astype(int)
    reach = (inner - first) @ across
    chords = {at: (reach[place == at].min(), reach[place == at].max()) for at in np.unique(place).tolist()}
    at = max(chords, key=lambda one: chords[one][1] - chords[one][0])
    low, high = chords[at]
    on = first + along * at * pixel
    ends = {
        "long_mm": (first - along * pixel / 2, second + along * pixel / 2),
        "short_mm": (on + across * (low - pixel / 2), on + across * (high + pixel / 2)),
    }
    z_mm = k * grid.spacing_mm[2]
    return Diameters(**{n: np.array([[*end, z_mm] for end in two]) + grid.origin_mm for n, two in ends.items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A connected lesion of one type, as a mask no larger than it needs to be."""

    mask: Bool[ndarray, "z y x"]
    corner: tuple[int, int, int]
    """Its first voxel in the scan."""
    kind: int

    @property
    def voxels(self) -> int:
        """How many."""
        return int(self.mask.sum())

    def diameters(self, scan: Geometry) -> Diameters:
        """Measured; `scan` is the grid that the mask was cut from."""
        x, y, z = (np.array(self.corner[::-1]) * scan.spacing_mm + scan.origin_mm).tolist()
        z_vox, y_vox, x_vox = self.mask.shape
        return measured(self.mask, dataclasses.replace(scan, shape=(z_vox, y_vox, x_vox), origin_mm=(x, y, z)))

    def points_mm(self, scan: Geometry) -> Float[ndarray, "n 3"]:
        """Middles of its voxels."""
        return (np.argwhere(self.mask) + self.corner)[:, ::-1] * np.array(scan.spacing_mm) + scan.origin_mm

    def holds(self, points_mm: Float[ndarray, "n 3"], scan: Geometry) -> Bool[ndarray, " n"]:
        """Which points lie in its voxels."""
        places = np.rint((points_mm - np.array(scan.origin_mm)) / scan.spacing_mm).astype(int)[:, ::-1] - self.corner
        inside = ((places >= 0) & (places < self.mask.shape)).all(axis=1)
        inside[inside] = self.mask[tuple(places[inside].T)]
        return inside


def lesions_of(types: UInt8[ndarray, "z y x"]) -> list[Part]:
    """Connected lesions (faces) of one type, the largest first; 0 is none."""
    found = []
    for kind in np.unique(types[types > 0]).tolist():
        labels = np.zeros(types.shape, np.int32)
        ndimage.label(types == kind, output=labels)
        for code, (z, y, x) in enumerate(ndimage.find_objects(labels), start=1):
            found.append(Part(mask=labels[z, y, x] == code, corner=(z.start, y.start, x.start), kind=kind))
    return sorted(found, key=lambda one: -one.voxels)
