"""Crops around a patient's lesions in both phases, with labels from diameters or from masks.

A lesion of exhale has its partner in inhale where the displacement, or the coarse affine, takes its centre into one;
where it takes it into none, inhale's label is empty: air is back in it, or nobody saw it. So it is the other way round
for lesions that only inhale has. A phase that nobody annotated (no mask, or no line in the file of diameters) is
unknown. Stateless: sample i is a function of the seed and i alone.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int16, UInt8
from lungssl_data.cache import PairCache
from lungssl_data.pair import AIR_HU, PhasePair, PhaseScan
from lungssl_data.volume import Geometry
from numpy import ndarray
from scipy import ndimage
from torch import Tensor

from lungssl_tasks.cosegmentation.diameters import Diameters, lesions_of, measured
from lungssl_tasks.cosegmentation.grabcut import GrabCutConfig, pseudo_mask
from lungssl_tasks.segmentation import IGNORE_LABEL

Supervision = Literal["diameters", "masks"]
OTHERS = 1.3
"""Within so much of another lesion's box a crop's label is unknown: it is a lesion, but not this one."""
PHASES = ("exhale", "inhale")
MOST_BYTES = 2**31
"""Of crops kept in memory: some 250 lesions in crops of 96 voxels, or 5,000 in crops of 32."""


class NoLesionsError(ValueError):
    """Nothing to learn from, or to be judged by."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesion:
    """One lesion of one scan."""

    diameters: Diameters
    mask: Bool[ndarray, "z y x"] | None
    """All of it, on the scan's grid, where somebody drew it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LesionPair:
    """Crops of both phases; one lesion is in their middle, in one of them perhaps none."""

    patient: str
    exhale_hu: Float[Tensor, "1 1 z y x"]
    inhale_hu: Float[Tensor, "1 1 z y x"]
    exhale_labels: UInt8[Tensor, "1 z y x"]
    """1 this lesion, 0 none, IGNORE_LABEL unknown; as are the next three."""
    inhale_labels: UInt8[Tensor, "1 z y x"]
    exhale_truth: UInt8[Tensor, "1 z y x"] | None
    """What somebody drew, if masks are there, whatever the labels are made of."""
    inhale_truth: UInt8[Tensor, "1 z y x"] | None

    def to(self, device: torch.device) -> "LesionPair":
        """On a device."""
        held = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{n: v.to(device) for n, v in held.items() if isinstance(v, Tensor)})


class LesionPairs:
    """Lesions of a cache's patients, one after another in a new order each round."""

    def __init__(
        self,
        cache: PairCache,
        patients: list[str],
        *,
        side_vox: int,
        supervision: Supervision,
        grabcut: GrabCutConfig,
        seed: int,
        shift_vox: int = 0,
        flips: bool = False,
        diameters: Mapping[tuple[str, str], list[Diameters]] | None = None,
    ) -> None:
        """`shift_vox`: the most that a crop's middle is off the lesion's along each axis, both scans alike; `flips`:
        both scans mirrored along axes, each with a chance of a half. `diameters` by patient and phase; without them
        they are measured on the cache's masks. Raises ValueError where no patient with both phases has a lesion.
        """
        self.cache, self.side_vox, self.supervision, self.grabcut = cache, side_vox, supervision, grabcut
        self.seed, self.shift_vox, self.flips, self.diameters = seed, shift_vox, flips, diameters
        self.labelled: frozenset[str] = frozenset()
        self.matches: list[tuple[str, int | None, int | None]] = []
        self._lesions: dict[str, dict[str, list[Lesion]]] = {}
        self._crops: dict[int, dict[str, Crop]] = {}
        self._crop_bytes = 0
        self._pseudo: dict[tuple[str, str, int], tuple[Bool[ndarray, "z y x"], tuple[int, int, int]]] = {}
        for patient in patients:
            pair = cache[patient]
            lesions = {phase: found_lesions(pair, phase, diameters) for phase in PHASES}
            self._lesions[patient] = lesions
            self.matches += [(patient, *match) for match in partners(pair, lesions["exhale"], lesions["inhale"])]
        if not self.matches:
            raise NoLesionsError(
                "no patient with both phases has a lesion; a cache has them as masks, or give a file of diameters"
            )
        if supervision == "masks" and any(
            one.mask is None for held in self._lesions.values() for some in held.values() for one in some
        ):
            raise ValueError("supervision by masks needs a mask of every lesion; take diameters")
        self.patients = list(dict.fromkeys(match[0] for match in self.matches))

    def __len__(self) -> int:
        return len(self.matches)

    def batch(self, index: int, size: int) -> list[LesionPair]:
        """Micro-batch `index` of `size` lesions."""
        return [self.pair(index * size + k) for k in range(size)]

    def pair(self, index: int) -> LesionPair:
        """Sample `index`."""
        turn, place = divmod(index, len(self.matches))
        order = np.random.default_rng([self.seed, turn]).permutation(len(self.matches))
        random = np.random.default_rng([self.seed, index, 1])
        shift = random.integers(-self.shift_vox, self.shift_vox + 1, 3)
        axes = tuple(axis for axis in range(3) if self.flips and random.random() < 0.5)
        patient = self.matches[order[place]][0]
        # z y x: where the sample begins in a crop that has room for every shift
        cut = tuple(slice(start, start + self.side_vox) for start in (self.shift_vox + shift).tolist())
        held: dict[str, Tensor | None] = {}
        for phase, crop in self.crops(int(order[place])).items():
            for name, values in (("hu", crop.hu), ("labels", crop.labels), ("truth", crop.truth)):
                value = None if values is None else torch.from_numpy(np.flip(values[cut], axes).copy())[None]
                held[f"{phase}_{name}"] = value[None].float() if value is not None and name == "hu" else value
        return LesionPair(patient=patient, **held)  # pyright: ignore[reportArgumentType]

    def crops(self, match: int) -> dict[str, "Crop"]:
        """Of both phases, `shift_vox` larger on every side than samples; kept, up to MOST_BYTES of all."""
        if match in self._crops:
            return self._crops[match]
        patient, *chosen = self.matches[match]
        pair = self.cache[patient]
        centres = centres_mm(pair, self._lesions[patient], (chosen[0], chosen[1]))
        made = {}
        for phase, which in zip(PHASES, chosen, strict=True):
            scan = pair.scan("exhale" if phase == "exhale" else "inhale")
            lesions = self._lesions[patient][phase]
            box = Box.around(scan, centres[phase], self.side_vox, self.shift_vox)
            truth = None
            if self.diameters is None and scan.lesion is not None:
                truth = np.where(box.cut(scan.valid, 0) > 0, np.uint8(0), np.uint8(IGNORE_LABEL))
                for k, lesion in enumerate(lesions):
                    assert lesion.mask is not None
                    truth[box.cut(lesion.mask, False)] = 1 if k == which else IGNORE_LABEL
            if annotated(pair, phase, self.diameters):
                labels = self._labels(patient, phase, scan, lesions, which, box)
            else:
                labels = np.full((box.side,) * 3, np.uint8(IGNORE_LABEL))
            made[phase] = Crop(hu=box.cut(scan.ct_hu, int(AIR_HU)), labels=labels, truth=truth)
        size = sum(one.nbytes() for one in made.values())
        if self._crop_bytes + size <= MOST_BYTES:
            self._crops[match] = made
            self._crop_bytes += size
        return made

    def _labels(
        self, patient: str, phase: str, scan: PhaseScan, lesions: list[Lesion], which: int | None, box: "Box"
    ) -> UInt8[ndarray, "z y x"]:
        labels = np.where(box.cut(scan.valid, 0) > 0, np.uint8(0), np.uint8(IGNORE_LABEL))
        grid = box.geometry(scan)
        for k, other in enumerate(lesions):
            if k != which:
                mask = other.mask if self.supervision == "masks" else None
                beside = other.diameters.box(grid, OTHERS) if mask is None else box.cut(mask, False)
                labels[beside] = IGNORE_LABEL
        if which is not None:
            lesion = lesions[which]
            if self.supervision == "masks":
                assert lesion.mask is not None
                labels[box.cut(lesion.mask, False)] = 1
            else:
                mask, corner = self.pseudo(patient, phase, which)
                labels[box.cut(mask, False, corner)] = 1
        return labels

    def pseudo(self, patient: str, phase: str, which: int) -> tuple[Bool[ndarray, "z y x"], tuple[int, int, int]]:
        """A lesion's pseudo-mask, and its first voxel (z, y, x) in the scan. Made once."""
        key = (patient, phase, which)
        if key not in self._pseudo:
            scan = self.cache[patient].scan("exhale" if phase == "exhale" else "inhale")
            lesion = self._lesions[patient][phase][which].diameters
            reach = max(lesion.half_axes_mm()) * self.grabcut.outside * 1.5
            middle, shape = index_of(scan, lesion.centre_mm()), np.array(scan.ct_hu.shape)
            vox = np.ceil(reach / np.array(scan.spacing_mm[::-1])).astype(int) + 2
            low, high = np.maximum(middle - vox, 0), np.minimum(middle + vox + 1, shape)
            cut = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            lung = ndimage.binary_dilation(scan.lung[cut] > 0) if scan.lung[cut].any() else None
            grid = dataclasses.replace(
                scan.geometry(),
                shape=tuple((high - low).tolist()),
                origin_mm=tuple((low[::-1] * np.array(scan.spacing_mm) + scan.origin_mm).tolist()),
            )
            if lung is not None:
                lung |= lesion.ellipsoid(grid, 1.0)  # lungs that are found by their air lack what is dense
            mask = pseudo_mask(scan.ct_hu[cut].astype(np.float64), grid, lesion, self.grabcut, within=lung)
            z, y, x = low.tolist()
            self._pseudo[key] = mask, (z, y, x)
        return self._pseudo[key]

    def lesion(self, patient: str, phase: str, which: int) -> Lesion:
        """One of a patient's, by its place in a match."""
        return self._lesions[patient][phase][which]


@dataclass(frozen=True, kw_only=True, eq=False)
class Crop:
    """What samples of one phase of a lesion are cut from."""

    hu: Int16[ndarray, "z y x"]
    labels: UInt8[ndarray, "z y x"]
    """As in `LesionPair`."""
    truth: UInt8[ndarray, "z y x"] | None

    def nbytes(self) -> int:
        """Of its arrays."""
        return self.hu.nbytes + self.labels.nbytes + (0 if self.truth is None else self.truth.nbytes)


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


def annotated(pair: PhasePair, phase: str, diameters: Mapping[tuple[str, str], list[Diameters]] | None) -> bool:
    """Whether anybody looked for lesions in this phase."""
    if diameters is not None:
        return (pair.patient, phase) in diameters
    return pair.scan("exhale" if phase == "exhale" else "inhale").lesion is not None


def found_lesions(
    pair: PhasePair, phase: str, diameters: Mapping[tuple[str, str], list[Diameters]] | None
) -> list[Lesion]:
    """A phase's lesions: with given diameters those, else of the mask's parts; none for a phase that isn't there."""
    if len(pair.phases()) < 2:
        return []
    if diameters is not None:
        return [Lesion(diameters=one, mask=None) for one in diameters.get((pair.patient, phase), [])]
    scan = pair.scan("exhale" if phase == "exhale" else "inhale")
    if scan.lesion is None:
        return []
    return [Lesion(diameters=measured(mask, scan.geometry()), mask=mask) for mask in lesions_of(scan.lesion)]


def partners(pair: PhasePair, exhale: list[Lesion], inhale: list[Lesion]) -> list[tuple[int | None, int | None]]:
    """Which lesions are one: each of exhale with the nearest of inhale whose ellipsoid its centre comes into, if there
    is one that no nearer lesion has; then those of inhale that are left.
    """
    near = []
    for i, one in enumerate(exhale):
        place = moved_mm(pair, one.diameters.centre_mm())
        for j, other in enumerate(inhale):
            distance = float(np.linalg.norm(other.diameters.axes_of(place[None])))
            if distance <= 1:
                near.append((distance, i, j))
    found: dict[int, int] = {}
    for _, i, j in sorted(near):
        if i not in found and j not in found.values():
            found[i] = j
    alone = [(None, j) for j in range(len(inhale)) if j not in found.values()]
    return [*((i, found.get(i)) for i in range(len(exhale))), *alone]


def centres_mm(
    pair: PhasePair, lesions: Mapping[str, list[Lesion]], match: tuple[int | None, int | None]
) -> dict[str, Float[ndarray, "3"]]:
    """Middles of both crops: the lesion's, or where the other's lies."""
    i, j = match
    if i is not None:
        exhale = lesions["exhale"][i].diameters.centre_mm()
        inhale = moved_mm(pair, exhale) if j is None else lesions["inhale"][j].diameters.centre_mm()
        return {"exhale": exhale, "inhale": inhale}
    assert j is not None
    inhale = lesions["inhale"][j].diameters.centre_mm()
    return {"exhale": moved_mm(pair, inhale, back=True), "inhale": inhale}


def moved_mm(pair: PhasePair, point_mm: Float[ndarray, "3"], *, back: bool = False) -> Float[ndarray, "3"]:
    """An exhale point in inhale by the displacement where it is known, else by the coarse affine.

    `back`, which needs no more than a crop's middle, by the affine's inverse, corrected once by the displacement.
    Raises ValueError for a pair without an affine.
    """
    affine = pair.exhale_to_inhale
    if affine is None:
        raise ValueError(f"patient {pair.patient} has no coarse affine; build the cache again")
    if back:
        start = np.linalg.solve(affine[:, :3], point_mm - affine[:, 3])
        return start + np.linalg.solve(affine[:, :3], point_mm - moved_mm(pair, start))
    field = pair.displacement
    if field is not None:
        z, y, x = np.rint((point_mm - field.origin_mm) / np.asarray(field.spacing_mm)).astype(int)[::-1]
        inside = all(0 <= k < n for k, n in zip((z, y, x), field.u_mm.shape[1:], strict=True))
        if inside and np.isfinite(u_mm := field.u_mm[:, z, y, x].astype(np.float64)).all():
            return point_mm + u_mm
    return affine[:, :3] @ point_mm + affine[:, 3]
