"""How good a joint model is: lobes it predicts, lobes its field carries, and the field itself, per patient.

The fixed scan, exhale, is judged: its lobes as predicted, and inhale's drawn lobes as the field brings them over.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lungssl_data.cache import PairCache
from lungssl_tasks.joint.inference import predicted_labels, warped_labels
from lungssl_tasks.joint.model import JointModel
from lungssl_tasks.metrics import segmentation_scores
from lungssl_tasks.registration import PRESETS, register
from lungssl_tasks.tidying import tidy

from lungssl import evaluation, registration_scoring
from lungssl.errors import DataError
from lungssl.evaluation import ScanScore
from lungssl.registering import network_start
from lungssl.registration_scoring import PairScore


@dataclass(frozen=True, kw_only=True)
class JointScores:
    """Of some patients."""

    predicted: list[ScanScore]
    """Exhale's lobes, by the segmentation."""
    warped: list[ScanScore]
    """Inhale's drawn lobes on exhale, by the field."""
    pairs: list[PairScore]
    """The field by landmarks and known displacements."""


def score_joint(
    model: JointModel,
    cache: PairCache,
    patients: Iterable[str],
    *,
    names: Mapping[int, str],
    preset: str = "coarse",
    raw: bool = False,
    device: torch.device,
    say: Callable[[str], None],
) -> JointScores:
    """Scores of pairs, as far as the cache knows the truth: lobes of both phases, landmarks, displacements.

    The field is the network's answer (`coarse`), or what descent makes of it (other presets). Predicted lobes have no
    islands (`tidy`) unless they are asked for `raw`. Raises DataError where nothing is known of any patient.
    """
    model.to(device).eval()
    predicted, warped, pairs = [], [], []
    for patient in patients:
        pair = cache[patient]
        if len(pair.phases()) < 2:
            continue
        fixed, moving = pair.scan("exhale"), pair.scan("inhale")
        known = registration_scoring.truths(cache, pair)
        if fixed.lobes is None and not known:
            continue
        started = time.perf_counter()
        start = network_start(model, {"fixed": fixed, "moving": moving})
        found = register(fixed, moving, PRESETS[preset], start=start, device=device)
        seconds = time.perf_counter() - started
        pairs += registration_scoring.score_pair(patient, fixed, found, known, seconds)
        answers = {}
        if fixed.lobes is not None:
            labels = predicted_labels(model, fixed, moving, found.affine)
            answers["predicted"] = (predicted, labels if raw else tidy(labels))
            if moving.lobes is not None:
                answers["warped"] = (warped, warped_labels(found, fixed, moving))
        dice = {}
        for name, (rows, labels) in answers.items():
            assert fixed.lobes is not None
            scores = segmentation_scores(labels, fixed.lobes, spacing_mm=fixed.spacing_mm, labels=names)
            rows += [ScanScore(patient=patient, phase="exhale", score=score) for score in scores]
            dice[name] = f"{name} lobes {np.mean([score.dice for score in scores]):.3f}"
        errors = [f"{one.truth} {one.errors.mean_mm:.2f} mm" for one in pairs if one.patient == patient]
        say(f"{patient}: {', '.join([*dice.values(), *errors])}")
    if not predicted and not pairs:
        raise DataError(f"{cache.folder}: no pair of these has lobes of exhale, landmarks or a displacement")
    return JointScores(predicted=predicted, warped=warped, pairs=pairs)


def summary_of(scores: JointScores) -> dict[str, Any]:
    """Means over patients: of lobes, Dice and the rest for all and each; of the field by each kind of truth."""
    held: dict[str, Any] = {}
    for name in ("predicted", "warped"):
        if rows := getattr(scores, name):
            held[name] = evaluation.summary(rows)
    if scores.pairs:
        held["registration"] = registration_scoring.finite_summary(scores.pairs)
    return held


def stitches(model: JointModel) -> dict[str, Any]:
    """By level: mean and standard deviation over channels of the cross-stitch matrices.

    They are [[r from r, r from s], [s from r, s from s]], r the registration and s the segmentation.
    """
    return {
        level: {
            "channels": len(alpha),
            "mean": alpha.mean(dim=0).tolist(),
            "sd": alpha.std(dim=0, correction=0).tolist(),
        }
        for level, alpha in model.alphas().items()
    }


def table(scores: JointScores, matrices: Mapping[str, Any] | None = None) -> str:
    """The summary as text, with the cross-stitch matrices `stitches` gives."""
    parts = []
    for title, rows in (("predicted lobes of exhale", scores.predicted), ("warped lobes on exhale", scores.warped)):
        if rows:
            parts += [title, evaluation.table(rows), ""]
    if scores.pairs:
        parts += ["field", registration_scoring.table(scores.pairs), ""]
    if matrices:
        parts.append("cross-stitch matrices, mean over channels (SD): what registration (r) and segmentation (s) take")
        parts.append(f"{'level':>12} {'r from r':>13} {'r from s':>13} {'s from r':>13} {'s from s':>13}")
        for level, one in matrices.items():
            cells = [
                f"{mean:.3f} ({sd:.3f})"
                for means, sds in zip(one["mean"], one["sd"], strict=True)
                for mean, sd in zip(means, sds, strict=True)
            ]
            parts.append(f"{level:>12} " + " ".join(f"{cell:>13}" for cell in cells))
    return "\n".join(parts).rstrip()


def write_scores(folder: Path, scores: JointScores, matrices: Mapping[str, Any] | None = None) -> None:
    """Folders `predicted`, `warped` and `registration` as the two kinds of scores are written alone; `summary.json` and
    `table.txt` of all.
    """
    for name in ("predicted", "warped"):
        if rows := getattr(scores, name):
            evaluation.write_scores(folder / name, rows)
    if scores.pairs:
        registration_scoring.write_scores(folder / "registration", scores.pairs)
    folder.mkdir(parents=True, exist_ok=True)
    held = summary_of(scores) | ({"cross_stitch": matrices} if matrices else {})
    (folder / "summary.json").write_text(json.dumps(held, indent=2, allow_nan=False), encoding="utf-8")
    (folder / "table.txt").write_text(table(scores, matrices) + "\n", encoding="utf-8")
