"""Figures of an encoder, or of a model learned from labels, for each patient that judges."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lungssl_backbones.representation import paired_retrieval, phase_auc, phase_scores, rankme, retrieval_ranks
from lungssl_data.cache import PairCache
from lungssl_tasks.aeration import non_aerated_mass_g
from lungssl_tasks.aeration.parts import LOBE_NAMES
from lungssl_tasks.model_folder import load_model
from torch import nn

from lungssl.comparison.landmarks import PairPoints, affine_error_mm, find, pair_features, points_of, position_only
from lungssl.comparison.probing import LobeProbe, lobes_at, probe_dice, probes_of
from lungssl.errors import DataError
from lungssl.evaluation import Prediction, evaluation_patients, per_patient, predict_scans

Values = dict[str, dict[str, float]]
"""Endpoint to patient to figure."""
OVERLAP = 0.25
"""Of the sliding windows: half of the usual one, as there are hundreds of models to judge."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a run gave."""

    values: Values
    scalars: dict[str, float]
    """Of all patients together."""


class Judge:
    """The patients that judge, and their points, kept between runs."""

    def __init__(self, cache: PairCache, shift: PairCache | None) -> None:
        """`shift`: all of whose patients judge, under names with `shift_` before them."""
        self.cache, self.shift = cache, shift
        self._points: dict[str, PairPoints] = {}

    def encoder(self, encoder: nn.Module, side_vox: int) -> Judged:
        """How well points and patients are found again, seen through windows of `side_vox`."""
        probes = probes_of(encoder, self.cache, side_vox)
        names = _with_both_phases(self.cache, self.cache.split("test"))
        if not names:
            raise DataError(f"{self.cache.folder}: no patient of split test has both phases; none can judge an encoder")
        values, embeddings = self._places(encoder, side_vox, probes, self.cache, names)
        exhale, inhale = embeddings[0::2], embeddings[1::2]
        is_inhale, patient = torch.arange(len(embeddings)) % 2 == 1, torch.arange(len(embeddings)) // 2
        scores = phase_scores(embeddings, is_inhale, patient)
        told = (torch.sign(scores[1::2] - scores[0::2]) + 1) / 2  # 1: this patient's phases are told apart, 0.5: a tie
        values["retrieval"] = dict(zip(names, (1.0 / retrieval_ranks(exhale, inhale)).tolist(), strict=True))
        values["phase_leak"] = dict(zip(names, told.tolist(), strict=True))
        scalars = {
            "phase_auc": phase_auc(embeddings, is_inhale, patient),
            "retrieval_top1": paired_retrieval(exhale, inhale).top1,
            "rankme": rankme(embeddings),
        }
        if self.shift is not None:
            there = _with_both_phases(self.shift, self.shift.patients)
            shifted, _ = self._places(encoder, side_vox, probes, self.shift, there)
            values |= {f"shift_{name}": of_patient for name, of_patient in shifted.items()}
        return Judged(values=values, scalars=scalars)

    def floors(self) -> Values:
        """What the endpoints of places are with the coarse affine alone, of the same patients."""
        values: Values = {}
        caches = {"": (self.cache, _with_both_phases(self.cache, self.cache.split("test")))}
        if self.shift is not None:
            caches["shift_"] = (self.shift, _with_both_phases(self.shift, self.shift.patients))
        for before, (cache, patients) in caches.items():
            for patient in patients:
                pair = self._pair(cache, patient)
                if pair.truth_mm is None:
                    continue
                nearest_mm = position_only(pair)[1]
                for name, value in (
                    ("landmark_mm", nearest_mm),
                    ("near_mm", nearest_mm),
                    ("registration_mm", affine_error_mm(pair)),
                ):
                    values.setdefault(before + name, {})[patient] = value
        return values

    def _pair(self, cache: PairCache, patient: str) -> PairPoints:
        key = f"{cache.folder}/{patient}"
        if key not in self._points:
            self._points[key] = points_of(cache, patient)
        return self._points[key]

    def _places(
        self, encoder: nn.Module, side_vox: int, probes: Sequence[LobeProbe], cache: PairCache, patients: Sequence[str]
    ) -> tuple[Values, torch.Tensor]:
        """Errors of looking up, lobes at inhale, and each scan's mean features, exhale and inhale in turn."""
        names = ("landmark_mm", "near_mm", "registration_mm")
        values: Values = {name: {} for name in (*names, "position_mm", "grid_mm", "probe_dice")}
        scans = []
        for patient in patients:
            pair = self._pair(cache, patient)
            query, candidates = pair_features(encoder, pair, side_vox)
            scans += [query.mean(dim=0), candidates.mean(dim=0)]
            if pair.truth_mm is not None:
                found = find(pair, query, candidates)
                for name, value in zip(names, (found.mean_mm, found.near_mm, found.registered_mm), strict=True):
                    values[name][patient] = value
                values["grid_mm"][patient], values["position_mm"][patient] = position_only(pair)
            dice = probe_dice(probes, candidates, lobes_at(pair.inhale, pair.candidates_mm))
            if dice is not None:
                values["probe_dice"][patient] = dice
        return {name: of_patient for name, of_patient in values.items() if of_patient}, torch.stack(scans)

    def model(self, folder: Path, device: str) -> Judged:
        """Lobes and non-aerated mass, by a model folder."""
        values = self._lobes(folder, self.cache, evaluation_patients(self.cache, "test"), device)
        if self.shift is not None:
            shifted = self._lobes(folder, self.shift, evaluation_patients(self.shift, "all"), device)
            values |= {f"shift_{name}": of_patient for name, of_patient in shifted.items()}
        return Judged(values=values, scalars={})

    def _lobes(self, folder: Path, cache: PairCache, patients: Sequence[str], device: str) -> Values:
        model, card = load_model(folder)
        assert dict(card.labels) == LOBE_NAMES
        found = list(predict_scans(model, cache, patients, roi_vox=card.roi_vox, overlap=OVERLAP, device=device))
        scores = [score for one in found for score in one.scores(LOBE_NAMES)]
        return {name: per_patient(scores, name) for name in ("dice", "nsd", "hd95_mm")} | airless_errors(found)


def _with_both_phases(cache: PairCache, patients: Sequence[str]) -> list[str]:
    return [patient for patient in patients if len(cache.record(patient).phases()) == 2]


def airless_errors(found: Iterable[Prediction]) -> Values:
    """Errors of the mass without air that predicted lungs hold, mean over a patient's scans, and of its loss from
    exhale to inhale (net recruitment, `domain.md` A3.1); absolute, in g, against the true lungs in the same scan.
    """
    masses: dict[str, dict[str, tuple[float, float]]] = {}
    for one in found:
        lobes = one.scan.lobes
        assert lobes is not None
        masses.setdefault(one.patient, {})[one.phase] = (
            non_aerated_mass_g(one.scan.ct_hu, one.predicted > 0, one.scan.spacing_mm),
            non_aerated_mass_g(one.scan.ct_hu, lobes > 0, one.scan.spacing_mm),
        )
    values: Values = {"airless_g": {}, "recruited_g": {}}
    for patient, phases in masses.items():
        values["airless_g"][patient] = float(np.mean([abs(got - true) for got, true in phases.values()]))
        if len(phases) == 2:
            got, true = (phases["exhale"][i] - phases["inhale"][i] for i in (0, 1))
            values["recruited_g"][patient] = abs(got - true)
    return values
