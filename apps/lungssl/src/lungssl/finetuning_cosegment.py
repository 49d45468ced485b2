"""Fine-tuning for co-segmentation: lesions of both phases from two diameters each, the same loop as pretraining."""

import sys
from pathlib import Path
from typing import Any

from lungssl_data.cache import PairCache
from lungssl_data.draws import draw_patients
from lungssl_data.pair import Split
from lungssl_tasks.cosegmentation.diameters_file import check_places, read_diameters
from lungssl_tasks.cosegmentation.grabcut import GrabCutConfig
from lungssl_tasks.cosegmentation.lesion_pairs import LesionPair, LesionPairs, NoLesionsError, judged_shift
from lungssl_tasks.cosegmentation.lesions import PHASES, Measured
from lungssl_tasks.cosegmentation.task import CosegmentationTask
from lungssl_tasks.model_folder import save_cosegmentation

from lungssl import lesion_scoring
from lungssl.config import Recipe
from lungssl.errors import ConfigError, DataError
from lungssl.finetuning import Labels, encoder_of, file_sha256
from lungssl.finetuning_registration import PairFinetuning, cost_of, paired, train
from lungssl.training.precision import pick_device
from lungssl.training.run_folder import RunFolder

SPLITS: tuple[Split, ...] = ("train", "val", "test")


def build(
    recipe: Recipe,
    data: Path,
    *,
    encoder: Path | None,
    labels: Labels,
    diameters: Path | None = None,
    device: str = "auto",
) -> PairFinetuning:
    """Open the cache, find lesions, draw the patients, make their labels, load or make the encoder.

    `diameters`: a file of them (`lungssl_tasks.cosegmentation.diameters_file`); without it they are measured on the
    cache's masks. `labels` draws among the training patients with lesions. Raises ConfigError for parts that don't fit
    together, DataError for a file that can't be read, or isn't of these scans.
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
    given = None if diameters is None else checked_diameters(diameters, cache)
    common = {"side_vox": config.side_vox, "grabcut": config.grabcut}
    shift_vox = judged_shift(config.side_vox)
    try:
        pairs = LesionPairs(
            PairCache(data),
            paired(cache, "train"),
            supervision=config.supervision,
            seed=recipe.seed,
            shift_vox=shift_vox if config.shift_vox is None else config.shift_vox,
            flips=config.flips,
            diameters=given,
            **common,
        )
        if labels.patients is not None:
            pairs.keep(draw_patients(pairs.patients, labels.patients, draw=labels.draw))
        pairs.prepare(_say)
    except ValueError as error:
        raise ConfigError(f"{data}: {error}") from error
    held_out = []
    for patients, some in judged_by(cache, "val", given):
        try:
            held = LesionPairs(
                cache, patients, supervision="diameters", seed=0, shift_vox=shift_vox, diameters=some, **common
            )
        except NoLesionsError:  # `train` warns where there is none in the end
            continue
        held.prepare(_say)
        held_out += [held.pair(index) for index in range(len(held))]
    inputs = {} if diameters is None else {"diameters_sha256": file_sha256(diameters)}
    return PairFinetuning(
        recipe=recipe, task=task, cache=cache, pairs=pairs, held_out=held_out, device=where, inputs=inputs
    )


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


def checked_diameters(path: Path, cache: PairCache) -> Measured:
    """What a file holds, after every line was looked at beside its scan; DataError, which names file and line."""
    try:
        given = read_diameters(path)
        known = set(cache.patients)
        for (patient, phase), lesions in given.items():
            source = lesions[0].source
            if patient not in known:  # not quoted: who isn't in the cache may be named by more than an id
                raise ValueError(
                    f"{source}: its patient isn't among the {len(known)} in {cache.folder}; give the ids of its files"
                )
            if phase not in cache.record(patient).phases():
                raise ValueError(f"{source}, patient {patient}: the cache has no {phase} scan; leave the line out")
        for patient in dict.fromkeys(patient for patient, _ in given):
            pair = cache[patient]
            for phase in pair.phases():
                check_places(given, patient, phase, pair.scan(phase))
    except (OSError, ValueError) as error:
        raise DataError(f"--diameters: {error}") from error
    return given


def judged_lesions(cache: PairCache, split: str, *, side_vox: int, shift_vox: int | None = None) -> list[LesionPair]:
    """Crops of a split's (or of `all`) lesions, by the cache's masks; DataError where there are none.

    Always the same ones, lesions off their middles as in training (`shift_vox` at most; None: `judged_shift`).
    """
    try:
        held = LesionPairs(
            cache,
            [patient for one in SPLITS if split in ("all", one) for patient in masked(cache, one)],
            supervision="diameters",
            seed=0,
            side_vox=side_vox,
            shift_vox=judged_shift(side_vox) if shift_vox is None else shift_vox,
            grabcut=GrabCutConfig(),
        )
    except ValueError as error:
        raise DataError(f"{cache.folder}, split {split!r}: {error}") from error
    return [held.pair(index) for index in range(len(held))]


def judged_by(cache: PairCache, split: Split, given: Measured | None) -> list[tuple[list[str], Measured | None]]:
    """Patients of a split with lesions: those in the file with its diameters, others with masks as these have them."""
    named = {patient for patient, _ in given or {}}
    return [
        ([patient for patient in paired(cache, split) if patient in named], given),
        ([patient for patient in masked(cache, split) if patient not in named], None),
    ]


def masked(cache: PairCache, split: Split) -> list[str]:
    """Pairs of a split where somebody drew lesions in either phase."""
    return [p for p in paired(cache, split) if any("lesion" in cache.phase_record(p, f).datasets for f in PHASES)]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
