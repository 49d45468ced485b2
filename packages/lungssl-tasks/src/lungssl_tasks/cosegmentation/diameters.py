"""Two diameters of a lesion on one axial slice, as RECIST has them measured, and the ellipsoid that they suggest.

A file of them is CSV, one lesion of one scan a line, points in LPS mm:

    patient,phase,long_a_x_mm,long_a_y_mm,long_a_z_mm,long_b_x_mm,...,short_a_x_mm,...,short_b_z_mm

RECIST 1.1: Eisenhauer et al. 2009, doi:10.1016/j.ejca.2008.10.026. Points are (x, y, z), arrays (z, y, x).
"""

import csv
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from lungssl_data.pair import Phase
from lungssl_data.volume import Geometry
from numpy import ndarray
from scipy import ndimage
from scipy.spatial.distance import pdist, squareform

LEAST_VOXELS = 20
"""Of a lesion, or it is left out: with fewer its Dice says little of a network. Ours."""
COLUMNS = tuple(
    f"{axis}_{end}_{name}_mm" for axis, end, name in itertools.product(("long", "short"), ("a", "b"), ("x", "y", "z"))
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Diameters:
    """A lesion's longest diameter and the longest at right angles to it, on one slice."""

    long_mm: Float[ndarray, "2 3"]
    """Ends."""
    short_mm: Float[ndarray, "2 3"]

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

    def ellipsoid(self, grid: Geometry, scale: float = 1.0) -> Bool[ndarray, "z y x"]:
        """Voxels inside, its half axes scaled."""
        return np.linalg.norm(self.axes_at(grid), axis=0) <= scale

    def box(self, grid: Geometry, scale: float = 1.0) -> Bool[ndarray, "z y x"]:
        """Voxels inside the box around the ellipsoid, along its axes, scaled."""
        return np.asarray((np.abs(self.axes_at(grid)) <= scale).all(axis=0))


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


def lesions_of(types: UInt8[ndarray, "z y x"]) -> list[Bool[ndarray, "z y x"]]:
    """Connected lesions (faces) of one type and of LEAST_VOXELS and more, the largest first; 0 is none."""
    found = []
    for kind in np.unique(types[types > 0]).tolist():
        labels = np.zeros(types.shape, np.int32)
        number = ndimage.label(types == kind, output=labels)
        assert isinstance(number, int)
        found += [labels == code for code in range(1, number + 1)]
    return sorted((one for one in found if one.sum() >= LEAST_VOXELS), key=lambda one: -int(one.sum()))


def read_diameters(path: Path) -> dict[tuple[str, Phase], list[Diameters]]:
    """By patient and phase. Raises ValueError that names the line for what isn't as above."""
    found: dict[tuple[str, Phase], list[Diameters]] = {}
    with open(path, encoding="utf-8", newline="") as handle:
        for number, row in enumerate(csv.DictReader(handle), start=2):
            if missing := [name for name in ("patient", "phase", *COLUMNS) if not row.get(name)]:
                raise ValueError(
                    f"{path}, line {number}: {missing[0]} is missing; columns are patient, phase, {COLUMNS}"
                )
            try:
                ends = np.array([float(row[name]) for name in COLUMNS]).reshape(2, 2, 3)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}; give LPS mm") from error
            if not np.isfinite(ends).all() or (np.linalg.norm(ends[:, 1] - ends[:, 0], axis=1) <= 0).any():
                raise ValueError(f"{path}, line {number}: a diameter is 0 or not finite")
            if np.ptp(ends[..., 2]) > 1e-3 or not (ends[0, 1] - ends[0, 0])[:2].any():
                raise ValueError(f"{path}, line {number}: both diameters lie on one axial slice, these don't")
            phase = row["phase"]
            if phase not in ("exhale", "inhale"):
                raise ValueError(f"{path}, line {number}: phase {phase!r}, expected exhale or inhale")
            found.setdefault((row["patient"], phase), []).append(Diameters(long_mm=ends[0], short_mm=ends[1]))
    return found


def write_diameters(path: Path, lesions: Mapping[tuple[str, Phase], list[Diameters]]) -> None:
    """The file that `read_diameters` reads."""
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["patient", "phase", *COLUMNS])
        for (patient, phase), some in lesions.items():
            for one in some:
                numbers = np.concatenate([one.long_mm, one.short_mm]).ravel()
                writer.writerow([patient, phase, *(f"{value:.4f}" for value in numbers)])
