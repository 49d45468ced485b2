"""How well a cohort's pairs are registered: per patient, by landmarks and by displacements that are known."""

import csv
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from lungssl_backbones.encoder import Encoder
from lungssl_backbones.weights import load_encoder
from lungssl_data.cache import PairCache
from lungssl_data.pair import PhasePair, PhaseScan, Split
from lungssl_tasks.model_folder import load_displacements
from lungssl_tasks.registration import PRESETS, Registration, register
from lungssl_tasks.registration.scores import FieldScores, LandmarkErrors, field_scores, landmark_errors
from numpy import ndarray

from lungssl.comparison.landmarks import points_of
from lungssl.errors import DataError
from lungssl.finetuning import encoder_file
from lungssl.pretraining import check_spacing
from lungssl.registering import ENCODER_SHARE, encoder_features, network_start, searched_by, window_mm_of
from lungssl.segmenting import model_folder


@dataclass(frozen=True, kw_only=True)
class PairScore:
    """One patient's registration by one kind of truth."""

    patient: str
    truth: str
    """`expert` or `automatic` landmarks, or the displacement's provenance (`phantom (exact)`)."""
    errors: LandmarkErrors
    affine_mm: float
    """Mean error of the affine alone."""
    field: FieldScores
    inverse_p95_mm: float
    """95th centile of how far fixed points miss their start, there by the field and back by its inverse."""
    doubts: tuple[str, ...]
    seconds: float

    def row(self) -> dict[str, object]:
        """One line of the CSV."""
        return {
            "patient": self.patient,
            "truth": self.truth,
            **asdict(self.errors),
            "affine_mm": self.affine_mm,
            **asdict(self.field),
            "inverse_p95_mm": self.inverse_p95_mm,
            "seconds": self.seconds,
            "doubts": "; ".join(self.doubts),
        }


def score_registrations(
    cache: PairCache,
    split: Split | str,
    *,
    preset: str = "default",
    encoder: Path | None = None,
    encoder_share: float = ENCODER_SHARE,
    model: Path | None = None,
    device: torch.device,
    say: Callable[[str], None],
) -> list[PairScore]:
    """Register the pairs of a split (or `all`) at the cache's voxels and compare with all that is known of them.

    `encoder`, `encoder_share` and `model` as in `registering.register_files`. Raises DataError where no pair has
    landmarks or a displacement, ConfigError where weights are for other voxels.
    """
    patients = [p for p in cache.patients if split in ("all", cache.record(p).split)]
    network = None if model is None else load_displacements(model_folder(model)).to(device)
    weights = None if encoder is None else load_encoder(encoder_file(encoder))
    used = weights if network is None else network.encoder
    if used is not None:
        assert isinstance(used, Encoder)
        check_spacing("the encoder", used.spacing_mm, cache)
    config = PRESETS[preset] if weights is None else searched_by(PRESETS[preset], encoder_share)
    window_mm = 0.0 if weights is None else window_mm_of(encoder, weights)
    scores = []
    for patient in patients:
        pair = cache[patient]
        known = truths(cache, pair)
        if not known:
            continue
        scans = {"fixed": pair.scan("exhale"), "moving": pair.scan("inhale")}
        started = time.perf_counter()
        found = register(
            scans["fixed"],
            scans["moving"],
            config,
            features=None if weights is None else encoder_features(weights, scans, window_mm=window_mm),
            start=None if network is None else network_start(network, scans),
            device=device,
        )
        seconds = time.perf_counter() - started
        for score in score_pair(patient, scans["fixed"], found, known, seconds):
            scores.append(score)
            say(f"{patient}, {score.truth}: {score.errors.mean_mm:.2f} mm (affine {score.affine_mm:.2f})")
    if not scores:
        raise DataError(f"{cache.folder}: no pair of split {split!r} has landmarks or a displacement to compare with")
    return scores


def score_pair(
    patient: str,
    fixed: PhaseScan,
    found: Registration,
    known: Mapping[str, tuple[Float[ndarray, "n 3"], Float[ndarray, "n 3"]]],
    seconds: float,
) -> list[PairScore]:
    """One registration by each kind of truth that `truths` gives; `seconds` are what it took."""
    field = field_scores(found.on_grid(fixed.geometry()), fixed.lung > 0, fixed.spacing_mm)
    scores = []
    for name, (here, there) in known.items():
        moved = here + found.at(here)
        affine = here @ found.affine[:, :3].T + found.affine[:, 3]
        miss = np.linalg.norm(moved + found.back(moved) - here, axis=1)
        scores.append(
            PairScore(
                patient=patient,
                truth=name,
                errors=landmark_errors(moved, there, here),
                affine_mm=float(np.linalg.norm(affine - there, axis=1).mean()),
                field=field,
                inverse_p95_mm=float(np.percentile(np.nan_to_num(miss, nan=np.inf), 95)),
                doubts=found.trust.doubts,
                seconds=seconds,
            )
        )
    return scores


def truths(cache: PairCache, pair: PhasePair) -> dict[str, tuple[Float[ndarray, "n 3"], Float[ndarray, "n 3"]]]:
    """Exhale points and where they are in inhale, by what tells it; nothing for a patient with one phase."""
    if len(pair.phases()) < 2:
        return {}
    found: dict[str, tuple[Float[ndarray, "n 3"], Float[ndarray, "n 3"]]] = {
        kind: (marks.exhale_mm, marks.inhale_mm) for kind, marks in pair.landmarks.items()
    }
    if pair.displacement is not None:
        points = points_of(cache, pair.patient)
        assert points.truth_mm is not None
        found[pair.displacement.provenance or "displacement"] = (
            points.query_mm.double().numpy(),
            points.truth_mm.double().numpy(),
        )
    return found


def summary(scores: list[PairScore]) -> dict[str, dict[str, float]]:
    """By kind of truth: means over patients."""
    figures: Mapping[str, Callable[[PairScore], float]] = {
        "identity_mm": lambda s: s.errors.identity_mm,
        "affine_mm": lambda s: s.affine_mm,
        "mean_mm": lambda s: s.errors.mean_mm,
        "median_mm": lambda s: s.errors.median_mm,
        "p95_mm": lambda s: s.errors.p95_mm,
        "tre30_mm": lambda s: s.errors.tre30_mm,
        "folded_share": lambda s: s.field.folded_share,
        "sdlogj": lambda s: s.field.sdlogj,
        "sdlogj_l2r": lambda s: s.field.sdlogj_l2r,
        "inverse_p95_mm": lambda s: s.inverse_p95_mm,
        "seconds": lambda s: s.seconds,
    }
    held: dict[str, dict[str, float]] = {}
    for truth in dict.fromkeys(score.truth for score in scores):
        rows = [score for score in scores if score.truth == truth]
        held[truth] = {name: float(np.mean([figure(row) for row in rows])) for name, figure in figures.items()}
        means = [row.errors.mean_mm for row in rows]
        held[truth] |= {
            "patients": len(rows),
            "not_trusted": sum(bool(row.doubts) for row in rows),
            "sd_mm": float(np.std(means, ddof=1)) if len(rows) > 1 else float("nan"),
        }
    return held


def finite_summary(scores: list[PairScore]) -> dict[str, dict[str, float | None]]:
    """The summary with None, which JSON has, for what isn't finite."""
    return {
        truth: {name: value if np.isfinite(value) else None for name, value in figures.items()}
        for truth, figures in summary(scores).items()
    }


def table(scores: list[PairScore]) -> str:
    """The summary as text."""
    lines = ["mean over patients, mm; TRE at places between voxels, not rounded"]
    lines.append(
        f"{'truth':>12} {'n':>4} {'before':>7} {'affine':>7} {'TRE (SD)':>13} {'p95':>6} {'folds %':>8} "
        f"{'SD ln J':>8} {'doubts':>7} {'s':>6}"
    )
    for truth, m in summary(scores).items():
        spread = "–" if np.isnan(m["sd_mm"]) else f"{m['sd_mm']:.2f}"
        lines.append(
            f"{truth:>12} {m['patients']:>4.0f} {m['identity_mm']:>7.1f} {m['affine_mm']:>7.2f} "
            f"{m['mean_mm']:>6.2f} ({spread:>4}) {m['p95_mm']:>6.2f} {m['folded_share'] * 100:>8.3f} "
            f"{m['sdlogj']:>8.3f} {m['not_trusted']:>7.0f} {m['seconds']:>6.1f}"
        )
    return "\n".join(lines)


def write_scores(folder: Path, scores: list[PairScore]) -> None:
    """`scores.csv` with a line per patient and kind of truth, `summary.json`, and `table.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [score.row() for score in scores]
    with open(folder / "scores.csv", "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "summary.json").write_text(json.dumps(finite_summary(scores), indent=2), encoding="utf-8")
    (folder / "table.txt").write_text(table(scores) + "\n", encoding="utf-8")
