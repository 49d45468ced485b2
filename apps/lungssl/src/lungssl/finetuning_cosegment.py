"""Fine-tuning for co-segmentation: lesions of both phases from two diameters each, the same loop as pretraining."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lungssl_data.cache import PairCache
from lungssl_data.draws import draw_patients
from lungssl_tasks.cosegmentation.diameters import read_diameters
from lungssl_tasks.cosegmentation.grabcut import GrabCutConfig
from lungssl_tasks.cosegmentation.lesion_pairs import PHASES, LesionPair, LesionPairs, NoLesionsError
from lungssl_tasks.cosegmentation.task import CosegmentationTask
from lungssl_tasks.model_folder import save_cosegmentation

from lungssl import lesion_scoring
from lungssl.config import Recipe
from lungssl.errors import ConfigError, DataError
from lungssl.finetuning import Labels, encoder_of
from lungssl.finetuning_registration import PairFinetuning, cost_of, paired, train
from lungssl.training.precision import pick_device
from lungssl.training.run_folder import RunFolder


def build(
    recipe: Recipe,
    data: Path,
    *,
    encoder: Path | None,
    labels: Labels,
    diameters: Path | None = None,
    device: str = "auto",
) -> PairFinetuning:
    """Open the cache, find lesions, draw the patients, load or make the encoder.

    `diameters`: a file of them (`lungssl_tasks.cosegmentation.diameters`); without it they are measured on the cache's
    masks. Raises ConfigError for parts that don't fit together, DataError for a file that can't be read.
    """
    if recipe.task is None or recipe.task.name != "cosegment":
        raise ConfigError("this recipe has no task `cosegment`; take finetune/cosegment")
    for section in ("data", "views"):
        if getattr(recipe, section) != type(getattr(recipe, section))():
            raise ConfigError(f"{section}: task cosegment cuts its own crops; leave this section out")
    cache = PairCache(data)
    where = pick_device(device)
    config = recipe.task.config
    recipe, backbone = encoder_of(recipe, encoder, cache)
    try:
        task: CosegmentationTask = config.build(backbone).to(where)
    except ValueError as error:
        raise ConfigError(f"task: {error}") from error
    given = None
    if diameters is not None:
        try:
            given = read_diameters(diameters)
        except (OSError, ValueError) as error:
            raise DataError(f"--diameters: {error}") from error
    patients = paired(cache, "train")
    if labels.patients is not None:
        patients = draw_patients(patients, labels.patients, draw=labels.draw)
    common = {"side_vox": config.side_vox, "grabcut": config.grabcut, "diameters": given}
    try:
        pairs = LesionPairs(
            PairCache(data),
            patients,
            supervision=config.supervision,
            seed=recipe.seed,
            shift_vox=config.shift_vox,
            flips=config.flips,
            **common,
        )
    except ValueError as error:
        raise ConfigError(f"{data}: {error}") from error
    held_out = []
    try:
        held = LesionPairs(
            cache, with_lesions(cache, paired(cache, "val"), given), supervision="diameters", seed=0, **common
        )
        held_out = [held.pair(index) for index in range(len(held))]
    except NoLesionsError:  # `train` warns
        pass
    return PairFinetuning(recipe=recipe, task=task, cache=cache, pairs=pairs, held_out=held_out, device=where)


def finetune_cosegment(
    recipe: Recipe,
    *,
    data: Path,
    out: Path,
    encoder: Path | None,
    labels: Labels,
    diameters: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train, judge on the validation patients' lesions, export `export/model`; returns what summary.json holds.

    `summary["lesions"]`: Dice of predicted and of pseudo-masks with masks that somebody drew, per phase
    (`lesion_scoring.summary`). Raises ConfigError, the data package's errors, and what `fit` raises.
    """
    parts = build(recipe, data, encoder=encoder, labels=labels, diameters=diameters, device=device)

    def export(run: RunFolder, summary: dict[str, Any]) -> None:
        assert isinstance(parts.task, CosegmentationTask)
        judged = [pair for pair in parts.held_out if isinstance(pair, LesionPair)]
        if any(pair.exhale_truth is not None or pair.inhale_truth is not None for pair in judged):
            scores = lesion_scoring.score_lesions(parts.task.model, judged, device=parts.device)
            summary["lesions"] = lesion_scoring.summary(scores)
            run.say(f"lesions of val patients:\n{lesion_scoring.table(scores)}")
        side_vox = parts.task.config.side_vox
        save_cosegmentation(run.export / "model", parts.task.model, side_vox=side_vox, extra=summary)
        run.say(f"model: {run.export / 'model'}")

    return train(parts, out, encoder=encoder, labels=labels, resume=resume, overwrite=overwrite, export=export)


def dry_run(
    recipe: Recipe,
    *,
    data: Path,
    encoder: Path | None,
    labels: Labels,
    diameters: Path | None = None,
    device: str = "auto",
) -> str:
    """Build all, make two real steps, say what a run would cost; writes nothing."""
    parts = build(recipe, data, encoder=encoder, labels=labels, diameters=diameters, device=device)
    return cost_of(parts, encoder)


def judged_lesions(cache: PairCache, split: str, *, side_vox: int) -> list[LesionPair]:
    """Undisturbed crops of a split's (or of `all`) lesions, by the cache's masks; DataError where there are none."""
    pairs = [
        p for p in cache.patients if split in ("all", cache.record(p).split) and len(cache.record(p).phases()) == 2
    ]
    try:
        held = LesionPairs(
            cache,
            with_lesions(cache, pairs, None),
            supervision="diameters",
            seed=0,
            side_vox=side_vox,
            grabcut=GrabCutConfig(),
        )
    except ValueError as error:
        raise DataError(f"{cache.folder}, split {split!r}: {error}") from error
    return [held.pair(index) for index in range(len(held))]


def with_lesions(cache: PairCache, patients: list[str], given: Mapping[tuple[str, str], Any] | None) -> list[str]:
    """Those that have a lesion to be judged on: in the file, or a mask in either phase."""
    if given is not None:
        named = {patient for patient, _ in given}
        return [patient for patient in patients if patient in named]
    return [p for p in patients if any("lesion" in cache.phase_record(p, phase).datasets for phase in PHASES)]
