"""A linear probe: how well lobes are told by frozen features alone, learned from a few labelled patients.

Ridge regression on indicators of the lobes, the closed form of a least-squares classifier (Hastie, Tibshirani and
Friedman, The Elements of Statistical Learning, 2009, sections 3.4.1 and 4.2): it has nothing to train, so that hundreds
of encoders can be judged by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from lungssl_data.cache import PairCache
from lungssl_data.draws import draw_patients
from lungssl_data.pair import PhaseScan
from lungssl_tasks.aeration.parts import LOBE_NAMES
from torch import Tensor, nn

from lungssl.comparison.landmarks import lung_grid_mm, point_features

LABELLED = 5
"""Patients, the regime that `domain.md` F's primary endpoint has."""
DRAWS = 2
"""Of such patients, nested as those of fine-tuning; a figure is the mean over them."""
TRAIN_GRID_MM = 8.0
"""Pitch of the points that are learned from: some 8,000 in a lung at inhale, for a hundred features. Not tuned."""
RIDGE = 1e-2
"""Added to the correlation matrix of standardised features. Not tuned."""


@dataclass(frozen=True, kw_only=True)
class LobeProbe:
    """Scores of lobes, linear in standardised features."""

    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    weight: Float[Tensor, "d k"]
    bias: Float[Tensor, " k"]

    def lobes(self, features: Float[Tensor, "n d"]) -> Int64[Tensor, " n"]:
        """The lobe with the highest score, from 1 on."""
        return 1 + ((features - self.mean) / self.scale @ self.weight + self.bias).argmax(dim=1)


def fit_probe(features: Float[Tensor, "n d"], lobes: Int64[Tensor, " n"]) -> LobeProbe:
    """Least squares of the lobes' indicators, with RIDGE; points of lobe 0, outside of all, are left out."""
    rows, named = features[lobes > 0].double(), lobes[lobes > 0]
    mean, scale = rows.mean(dim=0), rows.std(dim=0).clamp_min(1e-12)
    standard = (rows - mean) / scale
    wanted = torch.nn.functional.one_hot(named - 1, len(LOBE_NAMES)).double()
    bias = wanted.mean(dim=0)
    moments = standard.T @ standard / len(rows) + RIDGE * torch.eye(rows.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(moments, standard.T @ (wanted - bias) / len(rows))
    return LobeProbe(mean=mean.float(), scale=scale.float(), weight=weight.float(), bias=bias.float())


def probes_of(encoder: nn.Module, cache: PairCache, side_vox: int) -> list[LobeProbe]:
    """One for each draw of LABELLED training patients (or all there are), from their inhale scans; none without lobes.

    `side_vox`: of the windows that features are seen through.
    """
    named = [patient for patient in cache.split("train") if _has_lobes(cache, patient)]
    found: dict[str, tuple[Tensor, Tensor]] = {}
    probes = []
    for draw in range(DRAWS if named else 0):
        chosen = draw_patients(named, min(LABELLED, len(named)), draw=draw)
        for patient in chosen:
            if patient not in found:
                scan = cache[patient].scan("inhale")
                points = lung_grid_mm(scan, TRAIN_GRID_MM)
                found[patient] = point_features(encoder, scan, points, side_vox), lobes_at(scan, points)
        features, lobes = (torch.cat(parts) for parts in zip(*(found[patient] for patient in chosen), strict=True))
        probes.append(fit_probe(features, lobes))
    return probes


def probe_dice(probes: Sequence[LobeProbe], features: Float[Tensor, "n d"], lobes: Int64[Tensor, " n"]) -> float | None:
    """Mean over probes and lobes of the Dice of points; None without a probe or a lobe. Lobe 0 is left out."""
    if not probes or not bool((lobes > 0).any()):
        return None
    found = [dice_of_points(probe.lobes(features[lobes > 0]), lobes[lobes > 0]) for probe in probes]
    return float(np.mean(found))


def dice_of_points(predicted: Int64[Tensor, " n"], true: Int64[Tensor, " n"]) -> float:
    """Mean over the lobes that `true` has of twice the common points over the points of both."""
    each = []
    for lobe in true.unique().tolist():
        here, there = predicted == lobe, true == lobe
        each.append(2 * (here & there).sum().item() / (here.sum() + there.sum()).item())
    return float(np.mean(each))


def lobes_at(scan: PhaseScan, points_mm: Float[Tensor, "n 3"]) -> Int64[Tensor, " n"]:
    """Lobe of the voxel nearest to each point, (x, y, z) in mm; 0 for all where the scan has no lobes."""
    if scan.lobes is None:
        return torch.zeros(len(points_mm), dtype=torch.long)
    index = np.rint((points_mm.numpy() - scan.origin_mm) / np.asarray(scan.spacing_mm)).astype(int)
    x, y, z = index.T
    return torch.from_numpy(scan.lobes[z, y, x].astype(np.int64))


def _has_lobes(cache: PairCache, patient: str) -> bool:
    return "inhale" in cache.record(patient).phases() and "lobes" in cache.phase_record(patient, "inhale").datasets
