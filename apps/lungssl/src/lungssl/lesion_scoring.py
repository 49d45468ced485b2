"""How good a co-segmentation network is: Dice of its masks of each phase with what somebody drew, per lesion."""

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from lungssl_data.pair import Phase
from lungssl_tasks.cosegmentation.lesion_pairs import LesionPair
from lungssl_tasks.cosegmentation.lesions import PHASES
from lungssl_tasks.cosegmentation.model import CosegmentationModel
from lungssl_tasks.metrics import dice
from lungssl_tasks.segmentation import IGNORE_LABEL
from numpy import ndarray
from torch import Tensor

from lungssl.errors import DataError

Draw = Callable[[LesionPair], tuple[Bool[ndarray, "z y x"], Bool[ndarray, "z y x"]]]
"""Makes a mask of a lesion's exhale crop, and one of its inhale crop."""


@dataclass(frozen=True, kw_only=True)
class LesionScore:
    """One phase of one lesion; the fields are the columns of the CSV."""

    patient: str
    lesion: int
    """Of those judged, from 1."""
    phase: Phase
    dice: float
    """Of the network's mask, within the crop and what is known of it; 1 where both are empty."""
    pseudo_dice: float
    """Of the mask that the labels say: from the diameters, or the drawn one."""
    truth_vox: int
    """0 where this phase has no such lesion: air is back in it."""
    predicted_vox: int


def score_lesions(
    model: CosegmentationModel, pairs: Iterable[LesionPair], *, device: torch.device
) -> list[LesionScore]:
    """Scores of all lesions that somebody drew in; DataError where nobody drew in any."""
    model.to(device).eval()

    def draw(pair: LesionPair) -> tuple[Bool[ndarray, "z y x"], Bool[ndarray, "z y x"]]:
        with torch.inference_mode():
            there = pair.to(device)
            exhale, inhale = model(there.exhale_hu, there.inhale_hu, there.exhale_told, there.inhale_told)
        return likelier(exhale), likelier(inhale)

    return score_masks(draw, pairs)


def score_masks(draw: Draw, pairs: Iterable[LesionPair]) -> list[LesionScore]:
    """As `score_lesions`, of masks that anything draws."""
    scores = []
    for number, pair in enumerate(pairs, start=1):
        for phase, mask in zip(PHASES, draw(pair), strict=True):
            truth, labels = getattr(pair, f"{phase}_truth"), getattr(pair, f"{phase}_labels")
            if truth is None:
                continue
            known = (truth != IGNORE_LABEL).numpy()[0]
            there = (truth == 1).numpy()[0]
            found = mask & known
            scores.append(
                LesionScore(
                    patient=pair.patient,
                    lesion=number,
                    phase=phase,
                    dice=dice(found, there),
                    pseudo_dice=dice((labels == 1).numpy()[0] & known, there),
                    truth_vox=int(there.sum()),
                    predicted_vox=int(found.sum()),
                )
            )
    if not scores:
        raise DataError("nobody drew a lesion's mask in the patients to judge; see `lungssl cache info`")
    return scores


def summary(scores: list[LesionScore]) -> dict[str, dict[str, float]]:
    """By phase, means over patients of means over their lesions.

    `dice`, `pseudo_dice` of lesions that the phase has, `lesions` of them; `vanished`: pairs of which it has none, and
    `vanished_vox` what the network yet draws there, mean.
    """
    held = {}
    for phase in PHASES:
        here = [score for score in scores if score.phase == phase]
        there, gone = [one for one in here if one.truth_vox], [one for one in here if not one.truth_vox]
        held[phase] = {
            **{name: _mean(there, name) for name in ("dice", "pseudo_dice") if there},
            "patients": len({one.patient for one in there}),
            "lesions": len(there),
            "vanished": len(gone),
            **({"vanished_vox": _mean(gone, "predicted_vox")} if gone else {}),
        }
    return held


def table(scores: list[LesionScore]) -> str:
    """The summary as text."""
    lines = [
        f"{'':>6} {'patients':>8} {'lesions':>8} {'Dice':>6} {'of the labels':>13} {'vanished':>8} {'drawn there':>11}"
    ]
    for phase, held in summary(scores).items():
        cells = [f"{held[name]:.3f}" if name in held else "–" for name in ("dice", "pseudo_dice")]
        drawn = f"{held['vanished_vox']:.0f} vox" if "vanished_vox" in held else "–"
        lines.append(
            f"{phase:>6} {held['patients']:>8} {held['lesions']:>8} {cells[0]:>6} {cells[1]:>13} "
            f"{held['vanished']:>8} {drawn:>11}"
        )
    return "\n".join(lines)


def write_scores(folder: Path, scores: list[LesionScore]) -> None:
    """`scores.csv` with a line per lesion and phase, `summary.json`, and `table.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(score) for score in scores]
    with open(folder / "scores.csv", "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "summary.json").write_text(json.dumps(summary(scores), indent=2, allow_nan=False), encoding="utf-8")
    (folder / "table.txt").write_text(table(scores) + "\n", encoding="utf-8")


def likelier(logits: Float[Tensor, "1 2 z y x"]) -> Bool[ndarray, "z y x"]:
    """Where a lesion is likelier than none."""
    return (logits[0, 1] > logits[0, 0]).cpu().numpy()


def _mean(scores: list[LesionScore], name: str) -> float:
    patients: dict[str, list[float]] = {}
    for score in scores:
        patients.setdefault(score.patient, []).append(getattr(score, name))
    return float(np.mean([np.mean(values) for values in patients.values()]))
