"""Fine-tuning on whole pairs: for registration, which needs no labels, and what other tasks on pairs share with it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lungssl_data.cache import PairCache
from lungssl_data.draws import draw_patients
from lungssl_data.pair import Split
from lungssl_tasks.aeration.parts import LOBE_NAMES
from lungssl_tasks.cosegmentation.lesion_pairs import LesionPair, LesionPairs
from lungssl_tasks.cosegmentation.task import CosegmentationTask
from lungssl_tasks.joint.task import JointTask
from lungssl_tasks.model_folder import save_registration
from lungssl_tasks.registration.network import RegistrationTask
from lungssl_tasks.registration.training_pairs import AffineJitter, TrainingPair, TrainingPairs

from lungssl.config import Recipe
from lungssl.errors import ConfigError
from lungssl.finetuning import Labels, encoder_of, file_sha256
from lungssl.training.loop import fit
from lungssl.training.precision import autocast, pick_device
from lungssl.training.ranks import check_alone
from lungssl.training.run_folder import RunFolder
from lungssl.training.step_cost import measure_steps


@dataclass(frozen=True, kw_only=True)
class PairFinetuning:
    """Everything that `fit` needs. Made by `build`."""

    recipe: Recipe
    task: RegistrationTask | JointTask | CosegmentationTask
    cache: PairCache
    pairs: TrainingPairs | LesionPairs
    held_out: Sequence[TrainingPair | LesionPair]
    """Validation patients, the same at every evaluation, affines as they were found."""
    device: torch.device
    inputs: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of what was read beside cache and encoder, under its name in the summary."""

    def read(self, index: int) -> Sequence[TrainingPair | LesionPair]:
        """Pairs of micro-batch `index`."""
        return self.pairs.batch(index, self.recipe.train.patients())

    def prepare(self, batch: Sequence[TrainingPair | LesionPair], index: int) -> Sequence[TrainingPair | LesionPair]:
        """On the device."""
        return [pair.to(self.device) for pair in batch]

    def evaluate(self, step: int) -> dict[str, float]:
        """Mean figures over the held-out pairs, each over those that have it."""
        self.task.eval()
        with torch.no_grad(), autocast(self.device, self.recipe.train.precision, self.task):
            each = [self.task([pair.to(self.device)], step).metrics for pair in self.held_out]
        names = dict.fromkeys(name for metrics in each for name in metrics)
        return {name: float(np.mean([float(metrics[name]) for metrics in each if name in metrics])) for name in names}


def build(
    recipe: Recipe,
    data: Path,
    *,
    name: Literal["register", "joint"],
    encoder: Path | None,
    labels: Labels,
    device: str = "auto",
) -> PairFinetuning:
    """Open the cache, draw the patients, load or make the encoder.

    `labels` draws the pairs of task `register`; of task `joint`, which takes all pairs, those whose lobes are given.
    Raises ConfigError for parts that don't fit together, where no training patient has both phases, or, for `joint`,
    lobes.
    """
    if recipe.task is None or recipe.task.name != name:
        raise ConfigError(f"this recipe has no task `{name}`; take finetune/{name}")
    for section in ("data", "views"):
        if getattr(recipe, section) != type(getattr(recipe, section))():
            raise ConfigError(f"{section}: task {name} sees whole pairs; leave this section out")
    cache = PairCache(data)
    where = pick_device(device)
    config = recipe.task.config
    recipe, backbone = encoder_of(recipe, encoder, cache)
    try:
        task = (config.build(backbone, len(LOBE_NAMES)) if name == "joint" else config.build(backbone)).to(where)
    except ValueError as error:
        raise ConfigError(f"task: {error}") from error
    patients = paired(cache, "train")
    if not patients:
        raise ConfigError(f"{data}: no training patient has both phases; task {name} needs pairs")
    labelled: list[str] = []
    if name == "joint":
        labelled = [patient for patient in patients if lobed(cache, patient)]
        if not labelled:
            raise ConfigError(f"{data}: no training pair has lobes; label some, or take task register")
        if labels.patients is not None:
            labelled = draw_patients(labelled, labels.patients, draw=labels.draw)
    elif labels.patients is not None:
        patients = draw_patients(patients, labels.patients, draw=labels.draw)
    judged = paired(cache, "val")[: recipe.train.eval_batches * recipe.train.patients()]
    multiple = task.model.multiple
    held_out = []
    if judged:
        shown = judged if name == "joint" else ()
        held = TrainingPairs(cache, judged, multiple=multiple, seed=0, with_truth=True, labelled=shown)
        held_out = [held.pair(index) for index in range(len(held))]
    weights = config.field if name == "joint" else config
    return PairFinetuning(
        recipe=recipe,
        task=task,
        cache=cache,
        pairs=TrainingPairs(
            PairCache(data),
            patients,
            multiple=multiple,
            seed=recipe.seed,
            jitter=AffineJitter(),
            with_truth=weights.truth > 0,
            labelled=labelled,
            labelled_share=config.labelled_share if name == "joint" else 0.0,
        ),
        held_out=held_out,
        device=where,
    )


def finetune_register(
    recipe: Recipe,
    *,
    data: Path,
    out: Path,
    encoder: Path | None,
    labels: Labels,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train and export `export/model`; returns what summary.json holds.

    Raises ConfigError, the data package's errors, and what `fit` raises.
    """
    parts = build(recipe, data, name="register", encoder=encoder, labels=labels, device=device)

    def export(run: RunFolder, summary: dict[str, Any]) -> None:
        assert isinstance(parts.task, RegistrationTask)
        save_registration(run.export / "model", parts.task.model, extra=summary)
        run.say(f"model: {run.export / 'model'}; use it with `lungssl register --model {out}`")

    return train(parts, out, encoder=encoder, labels=labels, resume=resume, overwrite=overwrite, export=export)


def train(
    parts: PairFinetuning,
    out: Path,
    *,
    encoder: Path | None,
    labels: Labels,
    resume: bool,
    overwrite: bool,
    export: Callable[[RunFolder, dict[str, Any]], None],
) -> dict[str, Any]:
    """The run folder, `fit`, and at the end `export`, which may add to what summary.json will hold."""
    check_alone("fine-tuning")
    weights = None if encoder is None else file_sha256(encoder)
    labelled = f", labels of {' '.join(sorted(parts.pairs.labelled))}" if parts.pairs.labelled else ""
    also = "".join(f", {name} {sha256}" for name, sha256 in parts.inputs.items())
    seen = f"{parts.cache.fingerprint()}, pairs {' '.join(parts.pairs.patients)}{labelled}, encoder {weights}{also}"
    run = RunFolder.start(out, parts.recipe.as_dict(), data_fingerprint=seen, resume=resume, overwrite=overwrite)
    run.say(describe(parts, encoder))
    if not parts.held_out:
        run.say("WARNING: no val patient has what this needs; there are no held-out figures")
    result = fit(
        parts.task,
        read=parts.read,
        prepare=parts.prepare,
        config=parts.recipe.train,
        run=run,
        seed=parts.recipe.seed,
        device=parts.device,
        evaluate=parts.evaluate if parts.held_out else None,
    )
    summary: dict[str, Any] = {
        "step": result.step,
        "stopped_by": result.stopped_by,
        "patients": parts.pairs.patients,
        "draw": labels.draw,
        "encoder_sha256": weights,
        **parts.inputs,
    }
    if parts.pairs.labelled:
        summary["labelled_patients"] = sorted(parts.pairs.labelled)
    if result.stopped_by is None:
        if parts.held_out:
            summary["val"] = parts.evaluate(result.step)
        export(run, summary)
    run.write_summary(summary)
    return summary


def dry_run(recipe: Recipe, *, data: Path, encoder: Path | None, labels: Labels, device: str = "auto") -> str:
    """Build all, make two real steps, say what a run would cost; writes nothing."""
    joint = recipe.task is not None and recipe.task.name == "joint"
    parts = build(recipe, data, name="joint" if joint else "register", encoder=encoder, labels=labels, device=device)
    return cost_of(parts, encoder)


def cost_of(parts: PairFinetuning, encoder: Path | None) -> str:
    """What two real steps cost, and what a run would."""
    config = parts.recipe.train
    cost = measure_steps(
        parts.task, read=parts.read, prepare=parts.prepare, config=config, seed=parts.recipe.seed, device=parts.device
    )
    return "\n".join([describe(parts, encoder), *cost.lines(config, parts.device)])


def describe(parts: PairFinetuning, encoder: Path | None) -> str:
    """One line: pairs, encoder, parameters, device."""
    trained = sum(p.numel() for p in parts.task.parameters() if p.requires_grad)
    labelled = f", {len(parts.pairs.labelled)} of them labelled" if parts.pairs.labelled else ""
    return (
        f"{len(parts.pairs)} pairs{labelled}; {parts.recipe.backbone.name} from {encoder or 'random weights'}; "
        f"{trained / 1e6:.2f} M trained parameters; {parts.device.type}"
    )


def paired(cache: PairCache, split: Split) -> list[str]:
    """Patients of a split with both phases."""
    return [patient for patient in cache.split(split) if len(cache.record(patient).phases()) == 2]


def lobed(cache: PairCache, patient: str) -> bool:
    """Whether some phase of a patient has lobes."""
    return any("lobes" in cache.phase_record(patient, phase).datasets for phase in cache.record(patient).phases())
