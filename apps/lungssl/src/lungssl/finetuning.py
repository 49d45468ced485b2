"""Fine-tuning for segmentation: few labelled patients, any encoder, the same loop as pretraining."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lungssl_backbones import create_backbone
from lungssl_backbones.encoder import Encoder
from lungssl_backbones.weights import load_encoder
from lungssl_data.batch import CropBatch, PairBatch
from lungssl_data.cache import PairCache
from lungssl_data.crops import PairCrops, usable_patients
from lungssl_data.draws import draw_patients
from lungssl_data.pair import Split
from lungssl_data.views import ViewSampler
from lungssl_tasks.model_folder import save_model
from lungssl_tasks.segmentation import SegmentationTask

from lungssl.config import Part, Recipe
from lungssl.errors import ConfigError
from lungssl.evaluation import evaluate_model, per_patient
from lungssl.pretraining import at_spacing, cache_spacing_mm, check_sizes, check_spacing
from lungssl.structures import structures
from lungssl.training.loop import fit, micro_seed
from lungssl.training.precision import autocast, pick_device
from lungssl.training.ranks import check_alone
from lungssl.training.recompute import recompute_blocks
from lungssl.training.run_folder import RunFolder
from lungssl.training.step_cost import measure_steps

WHOLE_LUNGS_MM = 250
"""Height and width of most adult lungs (LIDC case here: 300 x 270 mm with margins of 20 mm)."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Which labels a run may see."""

    patients: int | None = None
    """Labelled training patients; None takes all."""
    draw: int = 0
    """Which draw of that many patients; draws are nested in the number of patients."""


def encoder_file(source: Path) -> Path:
    """The encoder of a pretraining run's folder, or the file itself; ConfigError where there is none."""
    path = source / "export" / "encoder.safetensors" if source.is_dir() else source
    if not path.is_file():
        raise ConfigError(
            f"--encoder {source}: no weights at {path}; give a finished pretraining run, a .safetensors file or 'none'"
        )
    return path


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """Everything that `fit` needs. Made by `build_finetuning`."""

    recipe: Recipe
    task: SegmentationTask
    cache: PairCache
    crops: PairCrops
    held_out: list[CropBatch]
    """Crops of validation patients, the same at every evaluation; none without such patients."""
    sampler: ViewSampler
    spacing_mm: float
    device: torch.device

    def read(self, index: int) -> CropBatch:
        """Crops of micro-batch `index`."""
        return self.crops.batch(index, self.recipe.train.patients())

    def prepare(self, crops: CropBatch, index: int) -> PairBatch:
        """Its views on the device; the seed and `index` alone decide them."""
        generator = torch.Generator().manual_seed(micro_seed(self.recipe.seed, index))
        return self.sampler(crops.to(self.device), generator)

    def evaluate(self, step: int) -> dict[str, float]:
        """Mean figures over the central, undisturbed views of the held-out crops."""
        self.task.eval()
        with torch.no_grad(), autocast(self.device, self.recipe.train.precision, self.task):
            outputs = [self.task(self.sampler.plain(crops.to(self.device)), step).metrics for crops in self.held_out]
        return {name: float(np.mean([float(output[name]) for output in outputs])) for name in outputs[0]}

    def whole_scan_dice(self, split: Split) -> dict[str, float]:
        """Dice of each labelled patient of a split (of `train`: those the run may see), all structures, both phases."""
        patients = self.crops.patients if split == "train" else usable_patients(self.cache, self.recipe.data, split)
        if not patients:
            return {}
        scores = evaluate_model(
            self.task.model, self.cache, patients, names=self.names(), roi_vox=self.roi_vox(), device=str(self.device)
        )
        return per_patient(scores, "dice")

    def names(self) -> Mapping[int, str]:
        """What is learned, by code."""
        assert self.recipe.data.labels is not None
        return structures(self.recipe.data.labels).names

    def roi_vox(self) -> tuple[int, int, int]:
        """Sliding window: the size that the model was trained on."""
        side = self.recipe.views.global_vox
        return side, side, side


def build_finetuning(
    recipe: Recipe, data: Path, *, encoder: Path | None, labels: Labels, device: str = "auto"
) -> Finetuning:
    """Open the cache, draw the labelled patients, load or make the encoder.

    Raises ConfigError for parts that don't fit together, CacheError where no patient has labels.
    """
    if recipe.task is None or recipe.data.labels is None:
        raise ConfigError(
            "this recipe has no `task` or no `data.labels`: it is for `lungssl pretrain`; take finetune/segment"
        )
    classes = len(structures(recipe.data.labels).names)
    cache = PairCache(data)
    spacing_mm = cache_spacing_mm(cache)
    where = pick_device(device)
    task = recipe.task.config
    if recipe.task.name != "segment":
        raise ConfigError(f"task.name {recipe.task.name!r}: this command is for segment; give its name as TASK")
    recipe, backbone = encoder_of(recipe, encoder, cache)
    check_sizes(recipe, backbone)
    patients = usable_patients(cache, recipe.data, "train")
    if labels.patients is not None:
        patients = draw_patients(patients, labels.patients, draw=labels.draw)
    held_out = []
    if usable_patients(cache, recipe.data, "val"):
        judged = PairCrops(cache, recipe.data, split="val", seed=0)  # seed 0: all runs are judged on the same crops
        held_out = [judged.batch(index, recipe.train.patients()) for index in range(recipe.train.eval_batches)]
    return Finetuning(
        recipe=recipe,
        task=task.build(backbone, classes).to(where),
        cache=cache,
        crops=PairCrops(PairCache(data), recipe.data, split="train", patients=patients, seed=recipe.seed),
        held_out=held_out,
        sampler=recipe.views.build(),
        spacing_mm=spacing_mm,
        device=where,
    )


def encoder_of(recipe: Recipe, weights: Path | None, cache: PairCache) -> tuple[Recipe, Encoder]:
    """The encoder of a file, or the recipe's backbone with random weights for the cache's voxels; and the new recipe.

    Seeds torch's generator with the recipe's seed. Raises ConfigError where the file's is for other voxels, for
    `train.batch: auto`, and for `train.recompute` of an encoder without transformer blocks.
    """
    recipe.train.patients()
    torch.manual_seed(recipe.seed)
    if weights is None:
        recipe = at_spacing(recipe, cache_spacing_mm(cache))
        backbone = create_backbone(recipe.backbone.name, **dataclasses.asdict(recipe.backbone.config))
    else:
        backbone = load_encoder(weights)
        assert isinstance(backbone, Encoder)
        check_spacing(f"--encoder {weights}", backbone.spacing_mm, cache)
        recipe = dataclasses.replace(recipe, backbone=Part(name=backbone.name, config=backbone.config))
    assert isinstance(backbone, Encoder)
    if recipe.train.recompute:
        recompute_blocks(backbone)
    return recipe, backbone


def finetune_segment(
    recipe: Recipe,
    *,
    data: Path,
    out: Path,
    encoder: Path | None,
    labels: Labels,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    judged: Sequence[Split] = ("train", "val"),
) -> dict[str, Any]:
    """Train, judge on whole scans, export `export/model`; returns what summary.json holds.

    `encoder` None starts from random weights of `recipe.backbone`, otherwise from the file's. Whole-scan Dice is given
    for the labelled training patients (does it fit?) and for the validation patients (does it carry over?), or for the
    `judged` of these.
    Raises ConfigError, the data package's errors, and what `fit` raises.
    """
    check_alone("fine-tuning")
    parts = build_finetuning(recipe, data, encoder=encoder, labels=labels, device=device)
    weights = None if encoder is None else file_sha256(encoder)
    seen = f"{parts.cache.fingerprint()}, labels of {' '.join(parts.crops.patients)}, encoder {weights}"
    run = RunFolder.start(out, parts.recipe.as_dict(), data_fingerprint=seen, resume=resume, overwrite=overwrite)
    run.say(describe(parts, encoder))
    for warning in warnings(parts):
        run.say(f"WARNING: {warning}")
    if not parts.held_out and recipe.train.eval_batches:
        run.say("WARNING: no val patient has labels; there are no held-out figures")
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
        "labelled_patients": parts.crops.patients,
        "draw": labels.draw,
        "encoder_sha256": weights,
    }
    if result.stopped_by is None:
        for split in judged:
            dice = parts.whole_scan_dice(split)
            summary[f"{split}_dice"] = float(np.mean(list(dice.values()))) if dice else None
            if dice:
                run.say(f"whole-scan Dice, {len(dice)} {split} patients: {summary[f'{split}_dice']:.3f}")
        spacing_mm = (parts.spacing_mm, parts.spacing_mm, parts.spacing_mm)
        save_model(
            run.export / "model",
            parts.task.model,
            labels=parts.names(),
            spacing_mm=spacing_mm,
            roi_vox=parts.roi_vox(),
            extra=summary,
        )
        run.say(f"model: {run.export / 'model'}")
    run.write_summary(summary)
    return summary


def dry_run(recipe: Recipe, *, data: Path, encoder: Path | None, labels: Labels, device: str = "auto") -> str:
    """Build all, make two real steps, say what a run would cost; writes nothing."""
    parts = build_finetuning(recipe, data, encoder=encoder, labels=labels, device=device)
    train = parts.recipe.train
    cost = measure_steps(
        parts.task,
        read=parts.read,
        prepare=parts.prepare,
        config=train,
        seed=parts.recipe.seed,
        device=parts.device,
    )
    return "\n".join([describe(parts, encoder), *warnings(parts), *cost.lines(train, parts.device)])


def warnings(parts: Finetuning) -> list[str]:
    """What will probably spoil the result."""
    side_mm = parts.recipe.views.global_vox * parts.spacing_mm
    assert parts.recipe.data.labels is not None
    if side_mm < WHOLE_LUNGS_MM and structures(parts.recipe.data.labels).by_place:
        return [
            f"views.global_vox={parts.recipe.views.global_vox} at {parts.spacing_mm:g} mm sees {side_mm:.0f} mm; place "
            f"tells lobes and sides apart, so let views span the lungs (about {WHOLE_LUNGS_MM} mm): larger views or "
            f"a cache at a larger --spacing-mm"
        ]
    return []


def describe(parts: Finetuning, encoder: Path | None) -> str:
    """One line: labelled patients, encoder, parameters, device."""
    trained = sum(p.numel() for p in parts.task.parameters() if p.requires_grad)
    return (
        f"{len(parts.crops)} labelled patients ({', '.join(parts.crops.patients)}); {parts.recipe.backbone.name} from "
        f"{encoder or 'random weights'}; {trained / 1e6:.2f} M trained parameters; {parts.device.type}"
    )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
