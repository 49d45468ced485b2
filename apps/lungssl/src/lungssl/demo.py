"""The main job on the built-in phantoms, in minutes: pairs, pretraining, lobes from few labels, a report."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lungssl_data.cache import PairCache
from lungssl_tasks.aeration.parts import LOBE_NAMES
from lungssl_tasks.model_folder import load_model

from lungssl.cohort import CohortConfig, make_cohort
from lungssl.config import load_recipe
from lungssl.errors import TrainingError
from lungssl.evaluation import ScanScore, evaluate_model, evaluation_patients, write_scores
from lungssl.finetuning import Labels, encoder_file, finetune_segment
from lungssl.pretraining import pretrain
from lungssl.reports.demo_report import DemoResults, write_demo_report

COHORT = CohortConfig(spacing_mm=6.0)
"""At 6 mm both lungs fit into a crop of 48 voxels, which two CPU cores train on in minutes."""
LABELS = Labels(patients=2)
"""Few enough that starting weights could matter; nested draws and seeds are for `compare`, not for a demo."""
MODELS = {"pretrained": "fine-tuned from the pretrained encoder", "scratch": "from scratch"}


@dataclass
class Stopwatch:
    """Seconds of each part, in order."""

    parts: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def part(self, name: str, say: Callable[[str], None]) -> Iterator[None]:
        """Time a block under a heading."""
        say(f"\n== {name}")
        started = time.perf_counter()
        yield
        self.parts.append((name, time.perf_counter() - started))
        say(f"   {self.parts[-1][1]:.0f} s")


def run_demo(out: Path, *, say: Callable[[str], None], seed: int = 0) -> Path:
    """Everything, from an empty folder to `<out>/report.html`; returns the report's path.

    `out` receives the cohort (`cohort/`), the three runs and the scores. An interrupted demo starts over.
    """
    watch = Stopwatch()
    with watch.part(f"phantoms: {COHORT.patients} exhale/inhale pairs", say):
        for line in make_cohort(COHORT, out / "cohort"):
            say(f"   {line}")
    cache = PairCache(out / "cohort")
    recipe = load_recipe("demo/pretrain", [f"seed={seed}"])
    with watch.part("pretraining on both phases, without labels", say):
        summary = _whole(pretrain(recipe, data=cache.folder, out=out / "pretrain"))
    runs: dict[str, Path] = {}
    for name, title in MODELS.items():
        with watch.part(f"lobes, {title}", say):
            runs[name] = _finetune(name, out, seed)
    with watch.part("evaluation on the test phantoms", say):
        scores = {name: _evaluate(run, cache, out / f"scores-{name}") for name, run in runs.items()}
    say("\n== report")
    results = DemoResults(
        folder=out,
        cache=cache,
        cohort=COHORT,
        pretraining=recipe,
        summary=summary,
        runs={"pretrain": out / "pretrain", **runs},
        scores=scores,
        timings=watch.parts,
    )
    return write_demo_report(results, out / "report.html")


def _whole(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run that made all its steps; a stopped one ends the demo."""
    if summary["stopped_by"] is not None:
        raise TrainingError(f"the demo was stopped ({summary['stopped_by']}); run it again with --overwrite")
    return summary


def _finetune(name: str, out: Path, seed: int) -> Path:
    run = out / f"segment-{name}"
    encoder = encoder_file(out / "pretrain") if name == "pretrained" else None
    recipe = load_recipe("demo/segment", [f"seed={seed}"])
    _whole(finetune_segment(recipe, data=out / "cohort", out=run, encoder=encoder, labels=LABELS))
    return run


def _evaluate(run: Path, cache: PairCache, folder: Path) -> list[ScanScore]:
    model, card = load_model(run / "export" / "model")
    scores = evaluate_model(
        model, cache, evaluation_patients(cache, "test"), names=LOBE_NAMES, roi_vox=card.roi_vox, overlap=0.25
    )
    write_scores(folder, scores)
    return scores
