"""Pretraining: a cache, a recipe and a run folder, put together for the training loop."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from lungssl_backbones import create_backbone
from lungssl_backbones.encoder import Encoder
from lungssl_backbones.weights import save_encoder
from lungssl_data.batch import CropBatch, PairBatch
from lungssl_data.cache import PairCache
from lungssl_data.crops import CropConfig, PairCrops, usable_patients
from lungssl_data.views import ViewSampler
from lungssl_methods.collapse import CollapseMonitor
from lungssl_methods.method import Gather, LocalGather
from lungssl_methods.monitor import Evaluation, LearningCheck
from lungssl_methods.probe_set import ProbeSet
from lungssl_methods.ranks import RanksGather
from torch import nn

from lungssl.auto_batch import settle_batch
from lungssl.auto_values import settle
from lungssl.config import Recipe
from lungssl.errors import ConfigError, DataError
from lungssl.training.logs import OpenLogs, read_metrics, run_logs
from lungssl.training.loop import FitResult, fit, micro_seed
from lungssl.training.precision import autocast
from lungssl.training.ranks import ALONE, Ranks, check_alone, joined
from lungssl.training.recompute import recompute_blocks
from lungssl.training.run_folder import RunFolder
from lungssl.training.sharding import blocks_of, check_shardable, is_sharded, let_go, sharded, whole_encoder
from lungssl.training.step_cost import measure_steps
from lungssl.training.watch import NotFiniteError

_BUILD, _HELD_OUT = -1, -2  # places in the sequence of random draws that no micro-step has


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Everything that `fit` needs. Made by `build_pretraining`."""

    recipe: Recipe
    method: nn.Module
    crops: PairCrops
    sampler: ViewSampler
    held_out: list[CropBatch]
    """The same crops at every evaluation."""
    probed: list[CropBatch]
    """Crops of the same patients for the probe set, which say what corresponds where the cache knows it."""
    held_out_split: str
    """`val`, or `train` where the cache has no val patients."""
    fingerprint: str
    """Of the cache."""
    device: torch.device
    ranks: Ranks = ALONE
    gather: LocalGather | RanksGather = field(default_factory=LocalGather)
    """The method's."""
    reasons: tuple[str, ...] = ()
    """What was found for values that the recipe left to the run's size, and why."""

    def read(self, index: int) -> CropBatch:
        """This rank's crops of micro-batch `index`."""
        size = self.ranks.size
        return self.crops.batch(index * size + self.ranks.rank, self.recipe.train.patients() // size)

    def prepare(self, crops: CropBatch, index: int) -> PairBatch:
        """Its views on the device; the seed and `index` alone decide them."""
        generator = torch.Generator().manual_seed(micro_seed(self.recipe.seed, index))
        return self.sampler(crops.to(self.device), generator)

    def evaluate(self, step: int) -> dict[str, float]:
        """Mean figures over the held-out crops, seen through the same views every time; each rank looks at some."""
        self.method.eval()
        alone = self.gather.alone() if isinstance(self.gather, RanksGather) else nullcontext()
        sampler = self.recipe.views.build()
        found: dict[int, dict[str, float]] = {}
        indices = range(self.ranks.rank, len(self.held_out), self.ranks.size)
        if is_sharded(self.method):  # passes need all ranks: who has no batch left repeats the last one
            rounds = range(self.ranks.rank, len(self.held_out) + self.ranks.rank, self.ranks.size)
            indices = [min(index, len(self.held_out) - 1) for index in rounds]
        with torch.no_grad(), autocast(self.device, self.recipe.train.precision, self.method), alone:
            for index in indices:
                seed = micro_seed(_HELD_OUT, index)
                torch.manual_seed(seed)
                views = sampler(self.held_out[index].to(self.device), torch.Generator().manual_seed(seed))
                found[index] = {name: float(value) for name, value in self.method(views, step).metrics.items()}
        let_go(self.method)
        for others in self.ranks.all(found):
            found |= others
        totals: dict[str, float] = {}
        for index in range(len(self.held_out)):
            for name, value in found[index].items():
                totals[name] = totals.get(name, 0.0) + value / len(self.held_out)
        return totals

    def probe_set(self) -> Callable[[], dict[str, float]] | None:
        """Figures of plain held-out views by the exported encoder, against the encoder as it is now.

        By the first rank, for all.
        """
        if not self.probed:
            return None
        precision, begun = self.recipe.train.precision, self.exported()

        def started() -> ProbeSet:
            assert begun is not None
            with autocast(self.device, precision, begun):
                return ProbeSet([self.sampler.plain(crops.to(self.device)) for crops in self.probed], begun)

        probe = started() if self.ranks.first else None

        def figures() -> dict[str, float]:
            encoder = self.exported()

            def judged() -> dict[str, float]:
                assert probe is not None and encoder is not None  # on the first rank
                with autocast(self.device, precision, encoder):
                    return probe.figures(encoder)

            return self.ranks.from_first(judged)

        return figures

    def exported(self) -> nn.Module | None:
        """The encoder to use downstream; of a sharded method a copy, on the first rank. For all ranks."""
        encoder: nn.Module = self.method.export_encoder()  # pyright: ignore[reportCallIssue, reportAssignmentType]
        return whole_encoder(encoder, self.ranks, self.device)

    def describe(self) -> str:
        """One line: patients, batch, parameters, device."""
        train = self.recipe.train
        trained = sum(p.numel() for p in self.method.parameters() if p.requires_grad)
        together = (
            f"{train.patients()} x {train.accumulate} accumulated" if train.accumulate > 1 else f"{train.patients()}"
        )
        held_out = len({int(p) for crops in self.held_out for p in crops.patient})
        return (
            f"{len(self.crops)} training patients, {held_out} held out ({self.held_out_split}); {together} a step; "
            f"{trained / 1e6:.2f} M trained parameters; {self.device.type}"
            + (f"; {self.ranks.size} ranks" if self.ranks.size > 1 else "")
            + (", sharded" if is_sharded(self.method) else "")
        )


def build_pretraining(
    recipe: Recipe,
    data: Path,
    *,
    device: str = "auto",
    recorded: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
) -> Pretraining:
    """Open the cache, make crops, encoder and method. Raises ConfigError for parts that don't fit together.

    `recorded` is the config.yaml of the run to be resumed, which keeps what was found for its "auto" values.
    `ranks`: among which the batch is shared out.
    """
    where = ranks.device(device)
    cache = PairCache(data)
    patients = len(usable_patients(cache, recipe.data, "train"))
    patients = min(patients, recipe.data.patients or patients)
    found = []
    if recipe.train.batch == "auto":

        def build(tried: Recipe) -> Pretraining:
            return build_pretraining(tried, data, device=str(where))

        recipe, line = settle_batch(
            recipe, data=data, build=build, patients=patients, device=where, ranks=ranks, recorded=recorded
        )
        found.append(line)
    if recipe.train.patients() % ranks.size:
        near = max(1, round(recipe.train.patients() / ranks.size)) * ranks.size
        raise ConfigError(
            f"train.batch: {recipe.train.patients()} patients don't share out among {ranks.size} ranks; take {near}, "
            f"or another number of processes"
        )
    recipe = at_spacing(recipe, cache_spacing_mm(cache))
    recipe, reasons = settle(recipe, patients=patients, recorded=recorded)
    reasons = [*found, *reasons]
    train = recipe.train
    torch.manual_seed(micro_seed(recipe.seed, _BUILD))
    gather = ranks.gather()
    encoder, method = build_method(recipe, gather=gather, prepare=lambda encoder: ranks.synchronised(encoder, where))
    if getattr(method, "needs_correspondences", False):  # the method decides it, as the data decides the spacing
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, correspondences=True))
        reasons = [*reasons, *said_of_correspondences(recipe, cache)]
    if train.recompute:
        recompute_blocks(encoder)
    if train.compile:
        for module in method.modules():  # a teacher's encoder, too
            if type(module) is type(encoder):
                for part in blocks_of(module) if train.shard == "full" else [module]:  # what is gathered as one
                    part.compile()
    split = "val" if usable_patients(cache, recipe.data, "val") else "train"
    # A cache of their own: open files are not to be shared with the thread that reads ahead. Seed 0 for every run, so
    # that runs with different seeds are judged on the same crops.

    def held_out(data_config: CropConfig) -> list[CropBatch]:
        judged = PairCrops(PairCache(data), dataclasses.replace(data_config, patients=None), split=split, seed=0)
        return [judged.batch(index, train.patients()) for index in range(train.eval_batches)]

    return Pretraining(
        recipe=recipe,
        method=method.to(where),
        crops=PairCrops(cache, recipe.data, split="train", seed=recipe.seed),
        sampler=recipe.views.build(rank=ranks.rank, ranks=ranks.size),
        held_out=held_out(recipe.data),
        probed=held_out(dataclasses.replace(recipe.data, correspondences=True, partner="own")),
        held_out_split=split,
        fingerprint=cache.fingerprint(),
        device=where,
        ranks=ranks,
        gather=gather,
        reasons=tuple(reasons),
    )


def build_method(
    recipe: Recipe, *, gather: Gather | None = None, prepare: Callable[[nn.Module], nn.Module] = lambda encoder: encoder
) -> tuple[nn.Module, nn.Module]:
    """Encoder, changed by `prepare`, and method with random weights.

    Raises ConfigError or ValueError for parts that don't fit together.
    """
    if recipe.method is None:
        raise ConfigError("this recipe has no `method`: it is for `lungssl finetune`; see `lungssl list recipes`")
    encoder = create_backbone(recipe.backbone.name, **dataclasses.asdict(recipe.backbone.config))
    check_sizes(recipe, encoder)
    encoder = prepare(encoder)
    batch = recipe.train.patients() * recipe.train.accumulate
    method = recipe.method.config.build(encoder, total_steps=recipe.train.steps, effective_batch=batch, gather=gather)
    views = recipe.views
    method.check_views(globals_per_slot=views.globals_per_slot, locals_per_slot=views.locals_per_slot)
    if recipe.train.accumulate > 1 and not method.batch_separable:
        raise ConfigError(
            f"train.accumulate: {recipe.train.accumulate}, but {recipe.method.name} with these settings compares the "
            f"samples of one forward, and would compare micro-batches of {recipe.train.patients()}; set "
            f"train.accumulate to 1 and train.batch to what memory holds (dino: or method.centering to ema and "
            f"koleo_weight to 0)"
        )
    return encoder, method


def said_of_correspondences(recipe: Recipe, cache: PairCache) -> list[str]:
    """What is to be said of training patients without a displacement; DataError where none with both phases has one."""
    if recipe.data.phases != "both" or recipe.data.matched_by == "affine" or recipe.data.partner != "own":
        return []  # points correspond by the scan itself, or by the affine
    records = [cache.record(patient) for patient in usable_patients(cache, recipe.data, "train")]
    pairs = [record for record in records if len(record.phases()) == 2]
    known = sum(record.has_displacement for record in pairs)
    if pairs and not known:
        raise DataError(
            f"--data {cache.folder}: none of the {len(pairs)} training patients with both phases has a displacement, "
            f"from which this method knows what corresponds; set data.matched_by=affine to take the coarse affine, or "
            f"method.matched_by=teacher with paired_dense, or take another method, such as croco"
        )
    if not pairs:
        return ["WARNING: no training patient has both phases, so nothing is learned across phases"]
    if known < len(pairs):
        without = len(pairs) - known
        return [f"WARNING: {without} of {len(pairs)} pairs have no displacement; their points count for nothing"]
    return []


def cache_spacing_mm(cache: PairCache) -> float:
    """The voxel size of a cache; DataError where its scans are not all of one isotropic size."""
    scans = [
        cache.phase_record(patient, phase) for patient in cache.patients for phase in cache.record(patient).phases()
    ]
    sizes = {round(mm, 3) for scan in scans for mm in scan.spacing_mm}
    if len(sizes) != 1:
        raise DataError(
            f"--data {cache.folder}: scans with voxels of {', '.join(f'{mm:g}' for mm in sorted(sizes))} mm; "
            f"an encoder needs one isotropic size, build the cache with one --spacing-mm"
        )
    return sizes.pop()


def check_spacing(what: str, spacing_mm: float, cache: PairCache) -> None:
    """Raises ConfigError where weights meant for one voxel size meet a cache of another: nothing else would notice."""
    found = cache_spacing_mm(cache)
    if abs(found - spacing_mm) > 0.01 * spacing_mm:
        raise ConfigError(
            f"{what} is for voxels of {spacing_mm:g} mm, {cache.folder} has {found:g} mm; build a cache with "
            f"`lungssl cache build ... --spacing-mm {spacing_mm:g}`"
        )


def at_spacing(recipe: Recipe, spacing_mm: float) -> Recipe:
    """The recipe with a backbone meant for this voxel size: the data decides it."""
    config = dataclasses.replace(recipe.backbone.config, spacing_mm=spacing_mm)
    return dataclasses.replace(recipe, backbone=dataclasses.replace(recipe.backbone, config=config))


def check_sizes(recipe: Recipe, encoder: nn.Module) -> None:
    """Raises ConfigError where views are no whole number of tokens or don't fit into the crops."""
    assert isinstance(encoder, Encoder)
    stride, views = encoder.token_stride_vox, recipe.views
    sides = {"global_vox": views.global_vox} | ({"local_vox": views.local_vox} if views.locals_per_slot else {})
    for name, side in sides.items():
        if side % stride:
            near = max(stride, round(side / stride) * stride)
            raise ConfigError(
                f"views.{name}: {side} is not a multiple of the {stride} voxels per token of {recipe.backbone.name}; "
                f"try {near}"
            )
        if side > min(recipe.data.crop_vox):
            raise ConfigError(f"views.{name}: {side} is larger than data.crop_vox {list(recipe.data.crop_vox)}")


def pretrain(
    recipe: Recipe,
    *,
    data: Path,
    out: Path,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    logs: OpenLogs = run_logs,
    profile: int = 0,
) -> dict[str, Any]:
    """Train, judge and export; returns what summary.json holds.

    In processes that `torchrun` started it is one of a run's ranks. `logs` and `profile` as in `fit`. Raises
    ConfigError, the data package's errors, and what `fit` raises.
    """
    with joined() as ranks:
        return _pretrain(recipe, data, out, device, ranks, logs, profile, resume=resume, overwrite=overwrite)


def _pretrain(
    recipe: Recipe,
    data: Path,
    out: Path,
    device: str,
    ranks: Ranks,
    logs: OpenLogs,
    profile: int,
    *,
    resume: bool,
    overwrite: bool,
) -> dict[str, Any]:
    recorded = (
        yaml.safe_load((out / "config.yaml").read_text("utf-8")) if resume and (out / "config.yaml").is_file() else None
    )
    if recipe.train.shard == "full":
        check_shardable(ranks)
    parts = build_pretraining(recipe, data, device=device, recorded=recorded, ranks=ranks)
    if recipe.train.shard == "full":
        parts = dataclasses.replace(parts, method=sharded(parts.method, ranks, parts.device))
    run = ranks.from_first(
        lambda: RunFolder.start(
            out,
            parts.recipe.as_dict(),
            data_fingerprint=parts.fingerprint,
            comments=parts.reasons,
            ranks=ranks.size,
            resume=resume,
            overwrite=overwrite,
        )
    )
    run.quiet = not ranks.first
    run.say(parts.describe())
    for reason in parts.reasons:
        run.say(reason)
    if parts.held_out_split == "train" and parts.held_out:
        run.say("WARNING: the cache has no val patients of these phases; held-out figures are of training patients")
    started = time.perf_counter()
    try:
        result = fit(
            parts.method,
            read=parts.read,
            prepare=parts.prepare,
            config=parts.recipe.train,
            run=run,
            seed=recipe.seed,
            device=parts.device,
            evaluate=parts.evaluate if parts.held_out else None,
            probe=parts.probe_set(),
            bounds=alarm_bounds(parts.method),
            ranks=ranks,
            logs=logs,
            profile=profile,
        )
    except NotFiniteError as error:
        run.say(f"to see where: lungssl pretrain {out / 'config.yaml'} --data {data} --replay {error.kept}")
        raise
    encoder = parts.exported()
    return ranks.from_first(lambda: _finish(parts, encoder, run, result, started))


def _finish(
    parts: Pretraining, encoder: nn.Module | None, run: RunFolder, result: FitResult, started: float
) -> dict[str, Any]:
    """Export the encoder, judge the run, write summary.json and return what it holds."""
    recipe = parts.recipe
    summary: dict[str, Any] = {"step": result.step, "stopped_by": result.stopped_by, "data": parts.fingerprint}
    summary |= {"alarms": list(result.alarms), "returns": list(result.returns)}
    if result.stopped_by is None and encoder is not None:
        export = run.export / "encoder.safetensors"
        extra = {"method": recipe.method.name if recipe.method else "", "steps": str(result.step)}
        save_encoder(encoder, export, extra=extra)
        summary |= {"held_out_split": parts.held_out_split, **judge(read_metrics(run.metrics), result.alarms)}
        run.say(f"encoder: {export}")
        run.say(summary["verdict"])
    summary["seconds"] = round(time.perf_counter() - started, 1)
    run.write_summary(summary)
    return summary


def alarm_bounds(method: nn.Module) -> CollapseMonitor.Config:
    """The collapse monitor's, without spread and rank of the mean features for methods that can't collapse."""
    bounds = CollapseMonitor.Config()
    if getattr(method, "may_collapse", True):
        return bounds
    return dataclasses.replace(bounds, spread_share=0.0, rank_share=0.0)


def judge(history: Sequence[Mapping[str, Any]], alarms: Sequence[str] = ()) -> dict[str, Any]:
    """Whether the held-out lines of a metrics.jsonl show learning: `learned` (None: too few to tell) and `verdict`."""
    evaluations = [
        Evaluation(
            step=line["step"],
            loss=line["val/loss"],
            teacher_entropy_lnk=line.get("val/teacher_entropy_lnk"),
            teacher_kl_lnk=line.get("val/teacher_kl_lnk"),
            landmark_mm=line.get("probe/landmark_mm"),
            landmark_floor_mm=line.get("probe/landmark_floor_mm"),
        )
        for line in history
        if "val/loss" in line
    ]
    check = LearningCheck()
    if len(evaluations) <= check.window:
        return {
            "learned": None,
            "verdict": f"Not judged: {len(evaluations)} held-out evaluations; lower train.eval_every",
        }
    if not any(evaluation.loss for evaluation in evaluations):
        return {
            "learned": None,
            "verdict": "Not judged: the held-out loss was always 0, as of a contrast without a second held-out patient"
            "; split more patients into val, or raise train.batch",
        }
    verdict = check.judge(evaluations, alarms=alarms)
    return {"learned": verdict.learned, "verdict": verdict.sentence}


def dry_run(recipe: Recipe, *, data: Path, device: str = "auto") -> str:
    """Build everything, make two steps, write nothing; returns what a run would be and cost."""
    check_alone("--dry-run")
    parts = build_pretraining(recipe, data, device=device)
    train, where = parts.recipe.train, parts.device
    cost = measure_steps(
        parts.method, read=parts.read, prepare=parts.prepare, config=train, seed=recipe.seed, device=where
    )
    stored = sum(value.numel() * value.element_size() for value in parts.method.state_dict().values())
    moments = 2 * sum(p.numel() * p.element_size() for p in parts.method.parameters() if p.requires_grad)
    disk = f"checkpoints    {train.keep_checkpoints} of {(stored + moments) / 2**20:.0f} MiB"
    return "\n".join([parts.describe(), *parts.reasons, disk, *_budget_lines(parts), *cost.lines(train, where)])


def _budget_lines(parts: Pretraining) -> list[str]:
    """What a step and the run cost, whatever machine they run on."""
    from lungssl_methods.budget import step_budget

    train = parts.recipe.train
    with autocast(parts.device, train.precision, parts.method):
        one = step_budget(parts.method, parts.prepare(parts.read(0), 0), step=train.steps - 1)
    teacher = f" and {one.images_teacher} of its teacher" if one.images_teacher else ""
    through = f"{one.images_student} crops of the encoder{teacher}, {one.tokens_student + one.tokens_teacher:,} tokens"
    total = one.flops * train.accumulate
    return [
        f"a micro-batch  {one.patients} patients, {through}",
        f"compute        {total / 1e9:,.1f} GFLOP a step, {total * train.steps / 1e15:,.3g} PFLOP the run",
    ]
