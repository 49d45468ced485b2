"""The demo's page: one HTML file that opens offline, with pictures and honest numbers."""

import json
import math
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from lungssl_backbones.weights import load_encoder
from lungssl_data.cache import PairCache
from lungssl_data.pair import PhasePair
from lungssl_tasks.inference import predict_labels
from lungssl_tasks.metrics import LOBE_TOLERANCE_MM
from lungssl_tasks.model_folder import load_model

from lungssl.cohort import CohortConfig, preset_of
from lungssl.config import Recipe
from lungssl.evaluation import ScanScore, per_patient
from lungssl.reports import figures
from lungssl.reports.feature_colours import feature_colours
from lungssl.training.logs import read_metrics
from lungssl.training.run_folder import environment

TITLES = {"scratch": "from scratch", "pretrained": "fine-tuned"}
ENTROPY_BAND = (0.2, 0.95)
"""ln K units between which a teacher has not collapsed (`ssl.md` F, T20)."""


@dataclass(frozen=True, kw_only=True)
class DemoResults:
    """What the demo's parts left behind."""

    folder: Path
    cache: PairCache
    cohort: CohortConfig
    pretraining: Recipe
    summary: Mapping[str, Any]
    """The pretraining run's summary.json."""
    runs: Mapping[str, Path]
    """`pretrain`, `pretrained`, `scratch`."""
    scores: Mapping[str, list[ScanScore]]
    timings: Sequence[tuple[str, float]]


def write_demo_report(results: DemoResults, path: Path) -> Path:
    """Write the page."""
    test = results.cache.split("test")
    pairs = {_title(patient): results.cache[patient] for patient in _examples(results.cache, test)}
    shown = next(iter(pairs.values()))
    encoder = load_encoder(results.runs["pretrain"] / "export" / "encoder.safetensors")
    colours = feature_colours(encoder, {phase: shown.scan(phase) for phase in shown.phases()})
    phases = {phase: (shown.scan(phase), colours.rgb[phase]) for phase in shown.phases()}
    labelled = json.loads((results.runs["scratch"] / "summary.json").read_text(encoding="utf-8"))["labelled_patients"]
    method = results.pretraining.method
    assert method is not None
    page = Environment(autoescape=True).from_string(
        (files("lungssl") / "reports" / "templates" / "demo.html").read_text(encoding="utf-8")
    )
    text = page.render(
        sentence=sentence(results.scores, len(labelled)),
        caveat=caveat(results.scores),
        cohort=results.cohort,
        labelled=labelled,
        figures={
            "pairs": figures.png(
                figures.pair_figure({n: {p: pair.scan(p) for p in pair.phases()} for n, pair in pairs.items()})
            ),
            "pretraining": figures.png(figures.curves_figure(_pretraining_panels(results.runs["pretrain"]))),
            "features": figures.png(figures.features_figure(phases)),
            "masks": figures.png(_masks(results, shown)),
            "finetuning": figures.png(figures.curves_figure(_finetuning_panels(results.runs))),
            "scores": figures.png(figures.scores_figure(_by_lobe(results.scores))),
        },
        pair_rows=[_pair_row(name, pair) for name, pair in pairs.items()],
        features=colours,
        masks_of=f"{next(iter(pairs))}, inhale",
        pretraining={
            "method": method.name,
            "steps": results.pretraining.train.steps,
            "batch": results.pretraining.train.batch,
            "patients": len(results.cache.split("train")),
            "held_out": len(results.cache.split("val")),
            "prototypes": getattr(method.config, "prototypes", None),
            "verdict": results.summary["verdict"],
        },
        scores={
            "patients": len(per_patient(results.scores["scratch"], "dice")),
            "tolerance_mm": LOBE_TOLERANCE_MM,
            "rows": [_score_row(name, results.scores[name]) for name in TITLES],
        },
        timings=[*results.timings, ("all", sum(seconds for _, seconds in results.timings))],
        machine=_machine(),
        recipes=[(name, (run / "config.yaml").read_text(encoding="utf-8")) for name, run in results.runs.items()],
        command=f"lungssl demo --out {shlex.quote(str(results.folder))}",
    )
    path.write_text(text, encoding="utf-8")
    return path


def sentence(scores: Mapping[str, list[ScanScore]], labelled: int) -> str:
    """What the numbers support, in plain words, whichever way they fall."""
    fine, scratch = (np.array(list(per_patient(scores[name], "dice").values())) for name in ("pretrained", "scratch"))
    difference = fine - scratch
    mean, better = float(difference.mean()), int((difference > 0).sum())
    lead = (
        f"With {labelled} labelled phantoms, lobe Dice on {len(fine)} unseen ones was {fine.mean():.3f} from the "
        f"pretrained encoder and {scratch.mean():.3f} from random weights: a difference of {mean:+.3f}, "
        f"better in {better} of {len(fine)}."
    )
    return (
        f"{lead} One seed, one draw of labels: an example of how the parts fit together, not evidence for the method."
    )


def caveat(scores: Mapping[str, list[ScanScore]]) -> str:
    """How far the difference can be trusted."""
    fine, scratch = (np.array(list(per_patient(scores[name], "dice").values())) for name in ("pretrained", "scratch"))
    difference = fine - scratch
    spread = float(difference.std(ddof=1)) if len(difference) > 1 else math.nan
    return (
        f"Paired difference in Dice: {difference.mean():+.3f}, standard deviation over {len(difference)} phantoms "
        f"{spread:.3f}. "
        f"This spread holds neither other seeds nor other draws of labelled patients, so it says nothing on whether "
        f"pretraining helps; that question needs all three varied, at equal compute."
    )


def _examples(cache: PairCache, patients: list[str]) -> list[str]:
    """The first patient of each kind of breathing in the split (kinds differ in how much air moves)."""
    moved = {p: _lung_ml(cache, p, "inhale") / _lung_ml(cache, p, "exhale") for p in patients}
    return sorted({max(moved, key=moved.__getitem__), min(moved, key=moved.__getitem__)}, key=lambda p: -moved[p])


def _lung_ml(cache: PairCache, patient: str, phase: Any) -> float:
    return cache.phase_record(patient, phase).lung_ml


def _title(patient: str) -> str:
    return f"{patient} ({preset_of(int(patient.removeprefix('phantom')))})"


def _pair_row(name: str, pair: PhasePair) -> dict[str, Any]:
    exhale, inhale = pair.scan("exhale"), pair.scan("inhale")
    assert pair.displacement is not None
    length = np.sqrt((pair.displacement.u_mm[:, exhale.lung > 0] ** 2).sum(0))
    litres = [np.count_nonzero(s.lung) * s.geometry().voxel_ml() / 1000 for s in (exhale, inhale)]
    return {
        "name": name,
        "exhale_l": litres[0],
        "inhale_l": litres[1],
        "exhale_hu": exhale.ct_hu[exhale.lung > 0].mean(),
        "inhale_hu": inhale.ct_hu[inhale.lung > 0].mean(),
        "motion_mm": float(np.nanmean(length)),
    }


def _masks(results: DemoResults, pair: PhasePair) -> Any:
    scan = pair.scan("inhale")
    assert scan.lobes is not None
    masks = {"truth": scan.lobes}
    for name, title in TITLES.items():
        model, card = load_model(results.runs[name] / "export" / "model")
        dice = np.mean(
            [s.score.dice for s in results.scores[name] if s.patient == pair.patient and s.phase == "inhale"]
        )
        masks[f"{title}, Dice {dice:.3f}"] = predict_labels(model, scan.ct_hu, roi_vox=card.roi_vox)
    return figures.masks_figure(scan, masks)


def _curve(run: Path, name: str) -> tuple[list[float], list[float]]:
    rows = [(row["step"], row[name]) for row in read_metrics(run / "metrics.jsonl") if name in row]
    return [step for step, _ in rows], [value for _, value in rows]


def _pretraining_panels(run: Path) -> list[Any]:
    def both(name: str) -> dict[str, Any]:
        return {"training": _curve(run, name), "held out": _curve(run, f"val/{name}")}

    return [
        ("loss", "loss / ln K", both("loss_lnk"), None),
        ("teacher entropy", "entropy / ln K", both("teacher_entropy_lnk"), ENTROPY_BAND),
        ("what is left to learn", "KL(teacher, student) / ln K", both("teacher_kl_lnk"), None),
    ]


def _finetuning_panels(runs: Mapping[str, Path]) -> list[Any]:
    return [
        ("training crops", "Dice", {title: _curve(runs[name], "dice") for name, title in TITLES.items()}, None),
        ("held-out crops", "Dice", {title: _curve(runs[name], "val/dice") for name, title in TITLES.items()}, None),
        ("held-out loss", "Dice + cross-entropy", {t: _curve(runs[n], "val/loss") for n, t in TITLES.items()}, None),
    ]


def _by_lobe(scores: Mapping[str, list[ScanScore]]) -> dict[str, dict[str, list[float]]]:
    return {
        lobe: {
            title: list(per_patient([s for s in scores[name] if s.score.name == lobe], "dice").values())
            for name, title in TITLES.items()
        }
        for lobe in figures.LOBE_NAMES.values()
    }


def _score_row(name: str, scores: list[ScanScore]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": TITLES[name]}
    for metric, short in (("dice", "dice"), ("nsd", "nsd"), ("hd95_mm", "hd95")):
        values = list(per_patient(scores, metric).values())
        row |= {short: np.mean(values), f"{short}_sd": np.std(values, ddof=1) if len(values) > 1 else math.nan}
    return row


def _machine() -> str:
    env = environment()
    commit = env["commit"] or "an installed package"
    versions = env["versions"]
    return (
        f"lungssl {versions.get('lungssl')} ({commit}), torch {versions.get('torch')}, Python {env['python']}, "
        f"{env['cores']} CPU cores, {platform.machine()}, {sys.platform}."
    )
