"""How good a fine-tuned model is on patients it has not seen: whole scans, per patient, per structure."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from lungssl_data.cache import PairCache
from lungssl_data.pair import Phase, PhaseScan, Split
from lungssl_tasks.inference import predict_labels
from lungssl_tasks.metrics import LabelScore, segmentation_scores
from lungssl_tasks.segmentation import SegmentationModel
from lungssl_tasks.tidying import tidy
from numpy import ndarray

from lungssl.errors import DataError
from lungssl.structures import in_one_piece, labels_named, structures

METRICS = ("dice", "nsd", "hd95_mm", "assd_mm", "volume_error_ml")


@dataclass(frozen=True, kw_only=True)
class ScanScore:
    """One structure in one scan."""

    patient: str
    phase: Phase
    score: LabelScore

    def row(self) -> dict[str, str | float]:
        """One line of the CSV."""
        return {"patient": self.patient, "phase": self.phase, **asdict(self.score)}


def evaluate_model(
    model: SegmentationModel,
    cache: PairCache,
    patients: Iterable[str],
    *,
    names: Mapping[int, str],
    roi_vox: tuple[int, int, int],
    overlap: float = 0.5,
    device: str = "cpu",
    raw: bool = False,
) -> list[ScanScore]:
    """Scores of every labelled scan of `patients`; DataError where none is labelled, ConfigError for other `names`.

    Lobes and lungs are freed of islands first, as `lungssl segment` does, unless `raw`.
    """
    labels = labels_named(names)
    predictions = predict_scans(model, cache, patients, labels=labels, roi_vox=roi_vox, overlap=overlap, device=device)
    tidied = in_one_piece(names) and not raw
    return [
        score
        for prediction in predictions
        for score in (replace(prediction, predicted=tidy(prediction.predicted)) if tidied else prediction).scores(names)
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """A model's labels of a scan that somebody labelled."""

    patient: str
    phase: Phase
    scan: PhaseScan
    truth: UInt8[ndarray, "z y x"]
    predicted: UInt8[ndarray, "z y x"]

    def scores(self, names: Mapping[int, str]) -> list[ScanScore]:
        """One per structure."""
        tolerance_mm = structures(labels_named(names)).tolerance_mm
        rows = segmentation_scores(
            self.predicted, self.truth, spacing_mm=self.scan.spacing_mm, labels=names, tolerance_mm=tolerance_mm
        )
        return [ScanScore(patient=self.patient, phase=self.phase, score=row) for row in rows]


def predict_scans(
    model: SegmentationModel,
    cache: PairCache,
    patients: Iterable[str],
    *,
    labels: str = "lobes",
    roi_vox: tuple[int, int, int],
    overlap: float = 0.5,
    device: str = "cpu",
) -> Iterator[Prediction]:
    """Labels of every scan of `patients` that has `labels` (`structures.py`); DataError where none has."""
    none = True
    for patient in patients:
        pair = cache[patient]
        for phase in pair.phases():
            scan = pair.scan(phase)
            truth = getattr(scan, labels)
            if truth is not None:
                none = False
                predicted = predict_labels(model, scan.ct_hu, roi_vox=roi_vox, overlap=overlap, device=device)
                yield Prediction(patient=patient, phase=phase, scan=scan, truth=truth, predicted=predicted)
    if none:
        raise DataError(f"none of the patients to evaluate has {labels}; take another --split or label some")


def evaluation_patients(cache: PairCache, split: Split | str, labels: str = "lobes") -> list[str]:
    """Patients of a split (or `all`) that have `labels` in some phase; DataError where there are none."""
    patients = cache.patients if split == "all" else [p for p, r in cache.records.items() if r.split == split]
    labelled = [
        p for p in patients if any(labels in cache.phase_record(p, ph).datasets for ph in cache.record(p).phases())
    ]
    if not labelled:
        raise DataError(f"{cache.folder}: no patient of split {split!r} has {labels}; see `lungssl cache info`")
    return labelled


def per_patient(scores: Iterable[ScanScore], metric: str) -> dict[str, float]:
    """Mean over a patient's scans and structures: the patient is the unit (`domain.md` F)."""
    values: dict[str, list[float]] = {}
    for item in scores:
        values.setdefault(item.patient, []).append(getattr(item.score, metric))
    return {patient: float(np.mean(v)) for patient, v in values.items()}


def summary(scores: list[ScanScore]) -> dict[str, object]:
    """Mean and standard deviation over patients, for all structures together and each alone."""
    structures = {item.score.name: [s for s in scores if s.score.name == item.score.name] for item in scores}
    return {
        "patients": len(per_patient(scores, "dice")),
        "scans": len({(item.patient, item.phase) for item in scores}),
        "nsd_tolerance_mm": scores[0].score.tolerance_mm,
        "definition": "surface figures by DeepMind's definition (area-weighted surface elements)",
        "all": _moments(scores),
        **{name: _moments(rows) for name, rows in structures.items()},
    }


def table(scores: list[ScanScore]) -> str:
    """The summary as text."""
    values = summary(scores)
    nsd = f"NSD {values['nsd_tolerance_mm']:g} mm"
    wide = max(len(name) for name, moments in values.items() if isinstance(moments, dict))
    head = f"{'':>{wide}} {'Dice':>15} {nsd:>15} {'HD95 mm':>15} {'volume error ml':>18}"
    lines = [f"{values['patients']} patients, {values['scans']} scans; mean ± standard deviation over patients", head]
    for name, moments in values.items():
        if isinstance(moments, dict):
            digits = {"dice": 3, "nsd": 3, "hd95_mm": 1, "volume_error_ml": 1}
            cells = [_cell(moments[metric], places) for metric, places in digits.items()]
            lines.append(f"{name:>{wide}} {cells[0]:>15} {cells[1]:>15} {cells[2]:>15} {cells[3]:>18}")
    return "\n".join(lines)


def write_scores(folder: Path, scores: list[ScanScore]) -> None:
    """`scores.csv` with a line per patient, phase and structure, `summary.json`, and `table.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [item.row() for item in scores]
    with open(folder / "scores.csv", "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "summary.json").write_text(json.dumps(summary(scores), indent=2, allow_nan=False), encoding="utf-8")
    (folder / "table.txt").write_text(table(scores) + "\n", encoding="utf-8")


def _cell(moments: dict[str, float | None], digits: int) -> str:
    sd = "–" if moments["sd"] is None else f"{moments['sd']:.{digits}f}"
    return f"{moments['mean']:.{digits}f} ± {sd}"


def _moments(scores: list[ScanScore]) -> dict[str, dict[str, float | None]]:
    result = {}
    for metric in METRICS:
        values = list(per_patient(scores, metric).values())
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        result[metric] = {"mean": float(np.mean(values)), "sd": sd}
    return result
