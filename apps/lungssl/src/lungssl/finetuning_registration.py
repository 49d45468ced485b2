"""Fine-tuning for registration: pairs without labels, any encoder, the same loop as pretraining."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lungssl_data.cache import PairCache
from lungssl_data.draws import draw_patients
from lungssl_data.pair import Split
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
class RegistrationFinetuning:
    """Everything that `fit` needs. Made by `build`."""

    recipe: Recipe
    task: RegistrationTask
    pairs: TrainingPairs
    held_out: list[TrainingPair]
    """Validation patients, the same at every evaluation, affines as they were found."""
    fingerprint: str
    device: torch.device

    def read(self, index: int) -> list[TrainingPair]:
        """Pairs of micro-batch `index`."""
        return self.pairs.batch(index, self.recipe.train.batch)

    def prepare(self, batch: list[TrainingPair], index: int) -> list[TrainingPair]:
        """On the device."""
        return [pair.to(self.device) for pair in batch]

    def evaluate(self, step: int) -> dict[str, float]:
        """Mean figures over the held-out pairs; `error_mm` over those whose displacement is known."""
        self.task.eval()
        with torch.no_grad(), autocast(self.device, self.recipe.train.precision):
            each = [self.task([pair.to(self.device)], step).metrics for pair in self.held_out]
        names = dict.fromkeys(name for metrics in each for name in metrics)
        return {name: float(np.mean([float(metrics[name]) for metrics in each if name in metrics])) for name in names}


def build(
    recipe: Recipe, data: Path, *, encoder: Path | None, labels: Labels, device: str = "auto"
) -> RegistrationFinetuning:
    """Open the cache, draw the patients, load or make the encoder.

    Raises ConfigError for parts that don't fit together or where no training patient has both phases.
    """
    if recipe.task is None or recipe.task.name != "register":
        raise ConfigError("this recipe has no task `register`; take finetune/register")
    for name in ("data", "views"):
        if getattr(recipe, name) != type(getattr(recipe, name))():
            raise ConfigError(f"{name}: a registration network sees whole pairs; leave this section out")
    cache = PairCache(data)
    where = pick_device(device)
    recipe, backbone = encoder_of(recipe, encoder, cache)
    task: RegistrationTask = recipe.task.config.build(backbone).to(where)
    patients = paired(cache, "train")
    if not patients:
        raise ConfigError(f"{data}: no training patient has both phases; a registration network needs pairs")
    if labels.patients is not None:
        patients = draw_patients(patients, labels.patients, draw=labels.draw)
    judged = paired(cache, "val")[: recipe.train.eval_batches * recipe.train.batch]
    held_out = []
    if judged:
        held = TrainingPairs(cache, judged, multiple=task.model.multiple, seed=0, with_truth=True)
        held_out = [held.pair(index) for index in range(len(held))]
    return RegistrationFinetuning(
        recipe=recipe,
        task=task,
        pairs=TrainingPairs(
            PairCache(data),
            patients,
            multiple=task.model.multiple,
            seed=recipe.seed,
            jitter=AffineJitter(),
            with_truth=recipe.task.config.truth > 0,
        ),
        held_out=held_out,
        fingerprint=cache.fingerprint(),
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
    check_alone("fine-tuning")
    parts = build(recipe, data, encoder=encoder, labels=labels, device=device)
    weights = None if encoder is None else file_sha256(encoder)
    seen = f"{parts.fingerprint}, pairs {' '.join(parts.pairs.patients)}, encoder {weights}"
    run = RunFolder.start(out, parts.recipe.as_dict(), data_fingerprint=seen, resume=resume, overwrite=overwrite)
    run.say(describe(parts, encoder))
    if not parts.held_out:
        run.say("WARNING: no val patient has both phases; there are no held-out figures")
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
    }
    if result.stopped_by is None:
        if parts.held_out:
            summary["val"] = parts.evaluate(result.step)
        save_registration(run.export / "model", parts.task.model, extra=summary)
        run.say(f"model: {run.export / 'model'}; use it with `lungssl register --model {out}`")
    run.write_summary(summary)
    return summary


def dry_run(recipe: Recipe, *, data: Path, encoder: Path | None, labels: Labels, device: str = "auto") -> str:
    """Build all, make two real steps, say what a run would cost; writes nothing."""
    parts = build(recipe, data, encoder=encoder, labels=labels, device=device)
    train = parts.recipe.train
    cost = measure_steps(
        parts.task, read=parts.read, prepare=parts.prepare, config=train, seed=parts.recipe.seed, device=parts.device
    )
    return "\n".join([describe(parts, encoder), *cost.lines(train, parts.device)])


def describe(parts: RegistrationFinetuning, encoder: Path | None) -> str:
    """One line: pairs, encoder, parameters, device."""
    trained = sum(p.numel() for p in parts.task.parameters() if p.requires_grad)
    return (
        f"{len(parts.pairs)} pairs; {parts.recipe.backbone.name} from {encoder or 'random weights'}; "
        f"{trained / 1e6:.2f} M trained parameters; {parts.device.type}"
    )


def paired(cache: PairCache, split: Split) -> list[str]:
    """Patients of a split with both phases."""
    return [patient for patient in cache.split(split) if len(cache.record(patient).phases()) == 2]
