"""Crops around a patient's lesions in both phases, with labels from diameters or from masks.

Where a phase has no such lesion (`lesions`), its label is empty. A phase that nobody annotated (no mask, or no line in
the file of diameters) is unknown. Stateless: sample i is a function of the seed and i alone.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from lungssl_data.pair import AIR_HU, Phase, PhasePair
from numpy import ndarray
from scipy import ndimage
from torch import Tensor

from lungssl_tasks.cosegmentation.boxes import Box, Crop, index_of
from lungssl_tasks.cosegmentation.diameters import told_of
from lungssl_tasks.cosegmentation.grabcut import GrabCutConfig, pseudo_mask
from lungssl_tasks.cosegmentation.lesions import (
    PHASES,
    Lesion,
    Match,
    Measured,
    annotated,
    centres_mm,
    found_lesions,
    partners,
    told_diameters,
)
from lungssl_tasks.segmentation import IGNORE_LABEL

Supervision = Literal["diameters", "masks"]
OTHERS = 1.3
"""Within so much of another lesion's box a crop's label is unknown: it is a lesion, but not this one."""
MOST_BYTES = 2**31
"""Of crops kept in memory: some 250 lesions in crops of 96 voxels, or 5,000 in crops of 32."""


class NoLesionsError(ValueError):
    """Nothing to learn from, or to be judged by."""


@runtime_checkable
class Patients(Protocol):
    """Pairs by patient, as `PairCache` has them."""

    def __getitem__(self, patient: str, /) -> PhasePair: ...


def judged_shift(side_vox: int) -> int:
    """How many voxels the lesion is off the middle of crops that a network is judged on, at most along each axis.

    A quarter of the side: in phantoms' crops with lesions in their middles a ball there, which reads no HU, has a Dice
    of 0.54 (docs/guide/cosegment.md).
    """
    return side_vox // 4


@dataclass(frozen=True, kw_only=True, eq=False)
class LesionPair:
    """Crops of both phases; one lesion is about their middle, in one of them perhaps none."""

    patient: str
    exhale_hu: Float[Tensor, "1 1 z y x"]
    inhale_hu: Float[Tensor, "1 1 z y x"]
    exhale_labels: UInt8[Tensor, "1 z y x"]
    """1 this lesion, 0 none, IGNORE_LABEL unknown; as are the next three."""
    inhale_labels: UInt8[Tensor, "1 z y x"]
    exhale_truth: UInt8[Tensor, "1 z y x"] | None
    """What somebody drew, if masks are there, whatever the labels are made of; None, too, for a lesion of fewer than
    LEAST_VOXELS voxels here, and for one that is in the file of diameters, but not in this phase's masks or lines."""
    inhale_truth: UInt8[Tensor, "1 z y x"] | None
    exhale_told: Float[Tensor, "1 1 z y x"]
    """Where the lesion is said to be (`told_of`), by its own diameters, or where the other phase's lead."""
    inhale_told: Float[Tensor, "1 1 z y x"]

    def to(self, device: torch.device) -> "LesionPair":
        """On a device."""
        held = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{n: v.to(device) for n, v in held.items() if isinstance(v, Tensor)})


class LesionPairs:
    """Lesions of a cache's patients, one after another in a new order each round."""

    def __init__(
        self,
        cache: Patients,
        patients: Iterable[str],
        *,
        side_vox: int,
        supervision: Supervision,
        grabcut: GrabCutConfig,
        seed: int,
        shift_vox: int = 0,
        flips: bool = False,
        diameters: Measured | None = None,
    ) -> None:
        """`shift_vox`: the most that a crop's middle is off the lesion's along each axis, both scans alike; `flips`:
        both scans mirrored along axes, each with a chance of a half. `diameters` by patient and phase; without them
        they are measured on the cache's masks. Raises ValueError where no patient with both phases has a lesion.
        """
        self.cache, self.side_vox, self.supervision, self.grabcut = cache, side_vox, supervision, grabcut
        self.seed, self.shift_vox, self.flips, self.diameters = seed, shift_vox, flips, diameters
        self.labelled: frozenset[str] = frozenset()
        self.matches: list[Match] = []
        self._lesions: dict[str, dict[Phase, list[Lesion]]] = {}
        self._crops: dict[Match, dict[Phase, Crop]] = {}
        self._crop_bytes = 0
        self._pseudo: dict[tuple[str, Phase, int], tuple[Bool[ndarray, "z y x"], tuple[int, int, int]]] = {}
        self._last: PhasePair | None = None
        for patient in patients:
            pair = self._pair(patient)
            lesions = {phase: found_lesions(pair, phase, diameters) for phase in PHASES}
            self._lesions[patient] = lesions
            self.matches += partners(pair, lesions["exhale"], lesions["inhale"])
        if not self.matches:
            raise NoLesionsError(
                "no patient with both phases has a lesion; a cache has them as masks, or give a file of diameters"
            )
        if supervision == "masks" and any(
            one.part is None for held in self._lesions.values() for some in held.values() for one in some
        ):
            raise ValueError("supervision by masks needs a mask of every lesion; take diameters")

    @property
    def patients(self) -> list[str]:
        """Those with lesions."""
        return list(dict.fromkeys(match.patient for match in self.matches))

    def keep(self, patients: Iterable[str]) -> None:
        """Forget the other patients' lesions."""
        chosen = set(patients)
        self.matches = [match for match in self.matches if match.patient in chosen]

    def prepare(self, say: Callable[[str], None]) -> None:
        """Cut all crops, and with them make all pseudo-masks, before they are needed; a line of progress in ten."""
        for number, match in enumerate(self.matches, start=1):
            self.crops(match)
            if number % 10 == 0 or number == len(self.matches):
                say(f"labels of lesions: {number}/{len(self.matches)}")

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
        match = self.matches[order[place]]
        # z y x: where the sample begins in a crop that has room for every shift
        cut = tuple(slice(start, start + self.side_vox) for start in (self.shift_vox + shift).tolist())
        held: dict[str, Tensor | None] = {}
        for phase, crop in self.crops(match).items():
            for name, values in (("hu", crop.hu), ("labels", crop.labels), ("truth", crop.truth)):
                value = None if values is None else torch.from_numpy(np.flip(values[cut], axes).copy())[None]
                held[f"{phase}_{name}"] = value[None].float() if value is not None and name == "hu" else value
            told = torch.from_numpy(np.flip(crop.told[cut], axes).copy())
            held[f"{phase}_told"] = told[None, None].float() / 255
        return LesionPair(patient=match.patient, **held)  # pyright: ignore[reportArgumentType]

    def crops(self, match: Match) -> dict[Phase, "Crop"]:
        """Of both phases, `shift_vox` larger on every side than samples; kept, up to MOST_BYTES of all."""
        if match in self._crops:
            return self._crops[match]
        pair = self._pair(match.patient)
        lesions = self._lesions[match.patient]
        centres = centres_mm(pair, lesions, match)
        told = told_diameters(lesions, match, centres)
        made: dict[Phase, Crop] = {}
        for phase, which in zip(PHASES, (match.exhale, match.inhale), strict=True):
            scan = pair.scan(phase)
            box = Box.around(scan, centres[phase], self.side_vox, self.shift_vox)
            hu = box.cut(scan.ct_hu, int(AIR_HU))
            made[phase] = Crop(
                low=box.low,
                hu=hu,
                labels=self._labels(pair, phase, which, box),
                truth=self._truth(pair, phase, which, box),
                told=(255 * told_of(told[phase], box.geometry(scan))).astype(np.uint8),
            )
        size = sum(one.nbytes() for one in made.values())
        if self._crop_bytes + size <= MOST_BYTES:
            self._crops[match] = made
            self._crop_bytes += size
        return made

    def _labels(self, pair: PhasePair, phase: Phase, which: tuple[int, ...], box: "Box") -> UInt8[ndarray, "z y x"]:
        scan, lesions = pair.scan(phase), self._lesions[pair.patient][phase]
        if not annotated(pair, phase, self.diameters):
            return np.full((box.side,) * 3, np.uint8(IGNORE_LABEL))
        labels = np.where(box.cut(scan.valid, 0) > 0, np.uint8(0), np.uint8(IGNORE_LABEL))
        grid, learnt = box.geometry(scan), () if self._too_small(pair.patient, phase, which) else which
        for k, other in enumerate(lesions):
            if k in learnt:
                continue
            if self.supervision == "masks" or other.small:
                assert other.part is not None
                labels[box.cut(other.part.mask, False, other.part.corner)] = IGNORE_LABEL
            elif box.meets(scan, other.diameters.centre_mm(), OTHERS * 2 * max(other.diameters.half_axes_mm())):
                labels[other.diameters.box(grid, OTHERS)] = IGNORE_LABEL
        for k in learnt:
            part = lesions[k].part
            if self.supervision == "masks":
                assert part is not None
                labels[box.cut(part.mask, False, part.corner)] = 1
            else:
                mask, corner = self.pseudo(pair.patient, phase, k)
                labels[box.cut(mask, False, corner)] = 1
        return labels

    def _truth(
        self, pair: PhasePair, phase: Phase, which: tuple[int, ...], box: "Box"
    ) -> UInt8[ndarray, "z y x"] | None:
        scan = pair.scan(phase)
        parts = [self._lesions[pair.patient][phase][k].part for k in which]
        if scan.lesion is None or None in parts or self._too_small(pair.patient, phase, which):
            return None
        if self.diameters is not None and not which:  # not measured here; whether it is here only its mask says
            return None
        truth = np.where(box.cut(scan.valid, 0) > 0, np.uint8(0), np.uint8(IGNORE_LABEL))
        truth[box.cut(scan.lesion, 0) > 0] = IGNORE_LABEL
        for part in parts:
            assert part is not None
            truth[box.cut(part.mask, False, part.corner)] = 1
        return truth

    def _too_small(self, patient: str, phase: Phase, which: tuple[int, ...]) -> bool:
        """Whether a lesion has no more than small parts in this phase."""
        return any(self._lesions[patient][phase][k].small for k in which)

    def _pair(self, patient: str) -> PhasePair:
        """A patient, read once while one asks for its lesions in turn."""
        if self._last is None or self._last.patient != patient:
            self._last = self.cache[patient]
        return self._last

    def pseudo(self, patient: str, phase: Phase, which: int) -> tuple[Bool[ndarray, "z y x"], tuple[int, int, int]]:
        """A lesion's pseudo-mask, and its first voxel (z, y, x) in the scan. Made once."""
        key = (patient, phase, which)
        if key not in self._pseudo:
            scan = self._pair(patient).scan(phase)
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

    def lesion(self, patient: str, phase: Phase, which: int) -> Lesion:
        """One of a patient's, by its number in a match."""
        return self._lesions[patient][phase][which]
