"""Matched crops of a patient's two phases: the same place in the lung, each from its own scan.

Stateless: sample i is a function of the seed and i alone, so a run that continues at step n reads what it would have
read, and any worker can make any sample.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from numpy import ndarray

from lungssl_data.batch import PHASES, CropBatch
from lungssl_data.cache import PairCache
from lungssl_data.coarse_field import LATTICE_MM, CoarseField
from lungssl_data.draws import draw_patients
from lungssl_data.hot import HotScans
from lungssl_data.pair import CacheError, Phase, Split

_JITTER_SHARES = (1.0, 0.5, 0.25, 0.0)


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Which scans crops come from and how they are matched."""

    phases: Literal["exhale", "inhale", "both"] = "both"
    """`both`: slot 0 exhale, slot 1 inhale (a patient with one phase fills both slots from it); otherwise that phase
    in both slots."""
    crop_vox: tuple[int, int, int] = (64, 64, 64)
    """Block size along (z, y, x); views are cut from it."""
    jitter_mm: float = 12.0
    """Largest distance per axis between the places the two slots look at."""
    min_overlap: float = 0.3
    """Least common share of the two blocks, measured in the first one's scan (`ssl.md` C0)."""
    labels: str | None = None
    """Data set to load as task labels, e.g. `lobes`; scans without it are left out."""
    crops_per_patient: int = 1
    """Consecutive samples from one patient: fewer files to open, less variety within a batch."""
    hot_mib: int = 0
    """Memory of one process for whole decoded scans, read once and then cut from; see `hot.py`."""
    patients: int | None = None
    """Only so many patients of the split, by `draws.draw_patients`, for comparisons at equal scans. None: all."""
    partner: Literal["own", "stranger", "itself"] = "own"
    """What fills slot 1 of a patient with both phases: the own inhale; `stranger`: always the same other patient's, at
    the corresponding place of the lungs, the negative control for pairing (`domain.md` F, A6), where no displacement is
    known; `itself`: the scan of slot 0, exhale or inhale drawn for each sample, so that both are seen and never
    compared (A3)."""
    matched_by: Literal["displacement", "affine"] = "displacement"
    """How places of two phases are matched: by the cache's displacement where one is known, or by the coarse affine
    alone, as of pairs that nobody registered. It maps lungs to lungs, a stranger's too."""
    correspondences: bool = False
    """Whether batches say where slot 0's points are in slot 1's scan: as `matched_by` says; a displacement may be
    exact (phantom), given or estimated. By the identity for two crops of one scan. Methods that need it say so."""


class PairCrops:
    """Crops from the patients of one split.

    Raises CacheError where no patient has what the configuration asks for, or a pair's scans can't be matched.
    """

    def __init__(
        self,
        cache: PairCache,
        config: CropConfig,
        *,
        split: Split | None = None,
        patients: list[str] | None = None,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        """`weights`: how often each patient is drawn, relative to the others; without them all equally often."""
        if config.crops_per_patient < 1 or config.hot_mib < 0:
            raise ValueError(
                f"crops_per_patient {config.crops_per_patient} must be 1 or more, hot_mib {config.hot_mib} 0 or more"
            )
        self.cache, self.config, self.seed = cache, config, seed
        self._source = HotScans(cache, config.hot_mib << 20) if config.hot_mib else cache
        wanted = _of_split(cache, split)
        if patients is not None:
            wanted = [patient for patient in wanted if patient in set(patients)]
        self.slots = {patient: slots for patient in wanted if (slots := _slots(cache, config, patient))}
        if config.patients is not None and self.slots:
            chosen = draw_patients(list(self.slots), config.patients)
            self.slots = {patient: slots for patient, slots in self.slots.items() if patient in set(chosen)}
        self.patients = list(self.slots)
        self._partners = _partners(self.slots, config, seed)
        if not self.patients:
            labels = f" with {config.labels}" if config.labels else ""
            raise CacheError(
                f"{cache.folder}: none of {len(wanted)} patients{f' in split {split}' if split else ''} has "
                f"{config.phases} scans{labels}; see `lungssl cache info`"
            )
        self._shares = None if weights is None else _shares(self.patients, weights)
        self._places = {patient: place for place, patient in enumerate(cache.patients)}
        self._fields: dict[str, CoarseField | None] = {}
        self._affines: dict[str, Float[ndarray, "3 4"]] = {}
        self._usable: dict[tuple[str, tuple[Phase, Phase]], Float[ndarray, "n 3"]] = {}
        for patient, phases in self.slots.items():
            if phases[0] != phases[1] and config.partner != "itself":
                self._centres(patient, phases)  # a pair that can't be matched must stop a run before its first step

    def __len__(self) -> int:
        """Samples of one pass: `crops_per_patient` of each patient (on average, with weights)."""
        return len(self.patients) * self.config.crops_per_patient

    def batch(self, index: int, batch_size: int) -> CropBatch:
        """Batch number `index`: samples index * batch_size and following, patients shuffled in each pass."""
        return self._read([self._place(index * batch_size + k) for k in range(batch_size)])

    def __getitem__(self, sample: int) -> CropBatch:
        """Sample number `sample` (any non-negative integer) as a batch of one."""
        return self._read([self._place(sample)])

    def _place(self, sample: int) -> "_Place":
        epoch, place = divmod(sample // self.config.crops_per_patient, len(self.patients))
        order_rng, count = np.random.default_rng([self.seed, 0, epoch]), len(self.patients)
        order = order_rng.permutation(count) if self._shares is None else order_rng.choice(count, count, p=self._shares)
        patient = self.patients[order[place]]
        phases = self.slots[patient]
        if self.config.partner == "itself":
            phases = (phases[np.random.default_rng([self.seed, 3, sample]).integers(2)],) * 2
        rng = np.random.default_rng([self.seed, 1, sample])
        centres = self._centres(patient, phases)
        centre = centres[rng.integers(len(centres))][None]
        direction = rng.uniform(-1, 1, (1, 3))
        # Less jitter where the volume's border spoils the overlap; without any, every one of `_centres` has enough.
        for share in _JITTER_SHARES:
            first, second, overlap = self._pair_of_starts(
                patient, phases, centre, share * self.config.jitter_mm * direction
            )
            if overlap[0] >= self.config.min_overlap:
                break
        return _Place(patient, phases, (_triple(first[0]), _triple(second[0])))

    def _centres(self, patient: str, phases: tuple[Phase, Phase]) -> Float[ndarray, "n 3"]:
        """Lung voxels (z, y, x) of the first slot around which both slots' blocks share enough.

        Raises CacheError where there is none: the scans' fields of view, or the map between them, don't match.
        """
        if (patient, phases) not in self._usable:
            points = self.cache.lung_points_vox(patient, phases[0]).astype(float)
            _, _, overlap = self._pair_of_starts(patient, phases, points, np.zeros((1, 3)))
            if not (overlap >= self.config.min_overlap).any():
                best = overlap.max() if len(overlap) else 0.0
                raise CacheError(
                    f"patient {patient}: blocks of {self.config.crop_vox} voxels in the two phases share at most "
                    f"{best:.0%}, data.min_overlap is {self.config.min_overlap:.0%}; take the patient out of the "
                    f"cache, lower data.min_overlap or take larger crops"
                )
            self._usable[patient, phases] = points[overlap >= self.config.min_overlap]
        return self._usable[patient, phases]

    def _pair_of_starts(
        self,
        patient: str,
        phases: tuple[Phase, Phase],
        centres_vox: Float[ndarray, "n 3"],
        jitter_mm: Float[ndarray, "1 3"],
    ) -> tuple[Int[ndarray, "n 3"], Int[ndarray, "n 3"], Float[ndarray, " n"]]:
        """First (z, y, x) index of both slots' blocks around voxels of the first slot's scan, and their overlap.

        The second block is at the first one's place, mapped between the phases and moved by the jitter (x, y, z). The
        overlap is the common share of the block and the one that the map points at, along axes where the volume is
        larger than the block (elsewhere the block holds all there is).
        """
        size = np.asarray(self.config.crop_vox, float)
        partner = self._partners.get(patient, patient)
        here, there = self.cache.phase_record(patient, phases[0]), self.cache.phase_record(partner, phases[1])
        first = self._starts(here.shape, centres_vox)
        place_mm = (first + size / 2)[:, ::-1] * here.spacing_mm + here.origin_mm
        if phases[0] != phases[1]:
            place_mm = self._to_inhale(patient, place_mm)
        ideal = ((place_mm - there.origin_mm) / there.spacing_mm)[:, ::-1]
        second = self._starts(there.shape, ideal + (jitter_mm / there.spacing_mm)[:, ::-1])
        shift = np.where(np.asarray(there.shape) <= size, 0.0, second - (ideal - size / 2))
        return first, second, np.prod(np.clip(1 - np.abs(shift) / size, 0, 1), axis=1)

    def _starts(self, shape: tuple[int, int, int], centres_vox: Float[ndarray, "n 3"]) -> Int[ndarray, "n 3"]:
        """First (z, y, x) index of blocks around voxels, moved inside the volume where they fit."""
        size, sides = np.asarray(self.config.crop_vox), np.asarray(shape)
        inside = np.clip(np.rint(centres_vox - size / 2), 0, np.maximum(sides - size, 0))
        return np.where(sides >= size, inside, (sides - size) // 2).astype(int)

    def _to_inhale(self, patient: str, exhale_mm: Float[ndarray, "n 3"]) -> Float[ndarray, "n 3"]:
        """Exhale points in slot 1's scan: by the cache's field where it is defined, else by the coarse affine."""
        mapped = self._by_affine(patient, exhale_mm)
        field = self._field(patient)
        if field is not None:
            by_field = field.inhale_mm(exhale_mm)
            mapped = np.where(np.isfinite(by_field).all(axis=1, keepdims=True), by_field, mapped)
        return mapped

    def _by_affine(self, patient: str, exhale_mm: Float[ndarray, "n 3"]) -> Float[ndarray, "n 3"]:
        affine = self._affine(patient)
        return exhale_mm @ affine[:, :3].T + affine[:, 3]

    def _affine(self, patient: str) -> Float[ndarray, "3 4"]:
        """Exhale mm to mm of slot 1's scan: the cache's, or by centre and spread of the lungs to a stranger's."""
        if patient not in self._partners:
            return np.asarray(self.cache.record(patient).exhale_to_inhale)
        if patient not in self._affines:
            moments = []
            for one, phase in ((patient, "exhale"), (self._partners[patient], "inhale")):
                grid = self.cache.phase_record(one, phase)
                lung_mm = self.cache.lung_points_vox(one, phase)[:, ::-1] * np.asarray(grid.spacing_mm) + grid.origin_mm
                moments.append((lung_mm.mean(axis=0), lung_mm.std(axis=0)))
            (centre, spread), (other_centre, other_spread) = moments
            scale = other_spread / spread
            shift = other_centre - scale * centre
            self._affines[patient] = np.concatenate([np.diag(scale), shift[:, None]], axis=1)
        return self._affines[patient]

    def _field(self, patient: str) -> CoarseField | None:
        if patient in self._partners or self.config.matched_by == "affine":
            return None
        if patient not in self._fields:
            field = self.cache.displacement(patient)
            self._fields[patient] = None if field is None else CoarseField.of(field)
        return self._fields[patient]

    def _partner_mm(self, places: "list[_Place]") -> Float32[ndarray, "b 3 z y x"]:
        """Slot 0's points in slot 1's scan on nodes at most LATTICE_MM apart; NaN where no place is known."""
        finest = min(min(self.cache.phase_record(place.patient, place.phases[0]).spacing_mm) for place in places)
        nodes = [1 + math.ceil((side - 1) * finest / LATTICE_MM) for side in self.config.crop_vox]
        z, y, x = (np.linspace(0, side - 1, count) for side, count in zip(self.config.crop_vox, nodes, strict=True))
        lattice_zyx = np.stack(np.meshgrid(z, y, x, indexing="ij"), -1).reshape(-1, 3)
        partner = np.full((len(places), len(lattice_zyx), 3), np.nan, np.float32)
        for row, (patient, phases, starts) in enumerate(places):
            grid = self.cache.phase_record(patient, phases[0])
            points_mm = (lattice_zyx + starts[0])[:, ::-1] * grid.spacing_mm + grid.origin_mm
            if phases[0] == phases[1]:
                partner[row] = points_mm
            elif self.config.matched_by == "affine":
                partner[row] = self._by_affine(patient, points_mm)
            elif (field := self._field(patient)) is not None:
                partner[row] = field.inhale_mm(points_mm)
        return np.ascontiguousarray(np.moveaxis(partner, -1, 1)).reshape(len(places), 3, *nodes)

    def _read(self, places: "list[_Place]") -> CropBatch:
        names = ("ct", "valid", "lung", *([self.config.labels] if self.config.labels else []))
        shape = (len(places), 2, *self.config.crop_vox)
        blocks = {name: np.empty(shape, np.int16 if name == "ct" else np.uint8) for name in names}
        affines = np.zeros((len(places), 2, 3, 4), np.float32)
        links = np.zeros((len(places), 3, 4), np.float32)
        for row, (patient, phases, starts) in enumerate(places):
            people = patient, self._partners.get(patient, patient)
            for slot, (one, phase, start) in enumerate(zip(people, phases, starts, strict=True)):
                for name, block in blocks.items():
                    self._source.read_into(one, phase, name, start, block[row, slot])
                grid = self.cache.phase_record(one, phase)
                affines[row, slot, :, :3] = np.diag(grid.spacing_mm)
                affines[row, slot, :, 3] = np.asarray(start)[::-1] * grid.spacing_mm + grid.origin_mm
            paired = phases[0] != phases[1]
            links[row] = self._affine(patient) if paired else np.eye(3, 4)
        tensors = {name: torch.from_numpy(block) for name, block in blocks.items()}
        return CropBatch(
            ct_hu=tensors["ct"],
            valid=tensors["valid"].bool(),
            lung=tensors["lung"],
            labels=tensors[self.config.labels] if self.config.labels else None,
            voxel_to_mm=torch.from_numpy(affines),
            slot_phase=torch.tensor([[PHASES.index(phase) for phase in place.phases] for place in places]),
            patient=torch.tensor([self._places[place.patient] for place in places]),
            exhale_to_inhale=torch.from_numpy(links),
            partner_mm=torch.from_numpy(self._partner_mm(places)) if self.config.correspondences else None,
        )


class _Place(NamedTuple):
    """Where one sample is read: both slots' phases and the first (z, y, x) index of their blocks."""

    patient: str
    phases: tuple[Phase, Phase]
    starts: tuple[tuple[int, int, int], tuple[int, int, int]]


def _partners(slots: Mapping[str, tuple[Phase, Phase]], config: CropConfig, seed: int) -> dict[str, str]:
    """Whose inhale each paired patient sees instead of the own one: the next of a random order. Empty for own ones.

    Raises CacheError for a single pair, which has no stranger.
    """
    paired = [patient for patient, phases in slots.items() if phases[0] != phases[1]]
    if config.partner != "stranger" or not paired:
        return {}
    if len(paired) == 1:
        raise CacheError(f"data.partner=stranger needs two patients with both phases, only {paired[0]} has them")
    order = [paired[i] for i in np.random.default_rng([seed, 2]).permutation(len(paired))]
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def usable_patients(cache: PairCache, config: CropConfig, split: Split | None = None) -> list[str]:
    """Patients of a split (None: all) with a scan of the phases and with the labels that `config` asks for.

    All of them, whatever `config.patients` is.
    """
    return [patient for patient in _of_split(cache, split) if _slots(cache, config, patient)]


def _shares(patients: list[str], weights: Mapping[str, float]) -> Float[ndarray, " n"]:
    missing = [patient for patient in patients if patient not in weights]
    values = np.array([weights.get(patient, 0.0) for patient in patients], float)
    if missing or not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise ValueError(
            f"weights: {len(missing)} of {len(patients)} patients have none, values run from {values.min():g} to "
            f"{values.max():g}; give every patient a finite weight of 0 or more, and one of them more than 0"
        )
    return values / values.sum()


def _triple(index: Int[ndarray, "3"]) -> tuple[int, int, int]:
    z, y, x = (int(i) for i in index)
    return z, y, x


def _of_split(cache: PairCache, split: Split | None) -> list[str]:
    return cache.patients if split is None else cache.split(split)


def _slots(cache: PairCache, config: CropConfig, patient: str) -> tuple[Phase, Phase] | None:
    """The phase of each slot; None where the patient has nothing of what is asked for."""
    usable: list[Phase] = []
    for phase in cache.record(patient).phases():
        labelled = config.labels is None or config.labels in cache.phase_record(patient, phase).datasets
        if labelled and config.phases in ("both", phase):
            usable.append(phase)
    return (usable[0], usable[-1]) if usable else None
