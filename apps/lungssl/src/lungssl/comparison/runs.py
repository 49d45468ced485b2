"""Makes the runs of a plan, one after the other, and keeps what each gave in a small file.

<out>/plan.yaml            the plan
<out>/costs.json           what each arm costs
<out>/runs/<id>/           run folders; checkpoints of finished ones are deleted; .<id>.lock is held by who makes one
<out>/results/<id>.json    figures per patient, written when a run is finished or broke down; while it is there, the run
                           isn't repeated
"""

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lungssl_backbones.encoder import Encoder
from lungssl_backbones.weights import load_encoder, save_encoder
from lungssl_data.cache import PairCache
from lungssl_tasks.registration import EstimateConfig

from lungssl.comparison import cost
from lungssl.comparison.estimates import estimated_cache
from lungssl.comparison.judging import Judge
from lungssl.comparison.plan import (
    AFFINE,
    Finetune,
    Plan,
    Pretrain,
    Regime,
    as_text,
    finetune_runs,
    pretrain_runs,
    shard_of,
)
from lungssl.errors import ConfigError, DataError, TrainingError
from lungssl.finetuning import Labels, finetune_segment
from lungssl.pretraining import build_pretraining, cache_spacing_mm, check_spacing, pretrain
from lungssl.training.allocator import keep_freed_memory
from lungssl.training.progress import duration
from lungssl.training.ranks import check_alone
from lungssl.training.run_folder import environment, write_atomic


class StoppedError(TrainingError):
    """A signal or STOP file ended a run before its time."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the runs of a plan gave so far."""

    folder: Path
    plan: Plan
    costs: dict[str, cost.Cost]
    results: dict[str, dict[str, Any]]
    """By run id; only finished ones, failed ones too."""
    missing: list[str]
    """Ids of the plan's runs without a result."""
    floors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Endpoint to patient to the figure of the coarse affine alone."""


def carry_out(
    plan: Plan,
    *,
    data: Path,
    out: Path,
    shift: Path | None = None,
    shard: str | None = None,
    device: str = "auto",
    say: Callable[[str], None],
) -> Outcome:
    """Make what is missing of a plan, or of one shard of it; the rest is reused from `<out>/results`.

    `shift`: the cache of the shift test, which the plan asks for.
    Raises ConfigError for an unfair plan, for a folder that holds something else, for a shift test that holds
    patients of `data` or has voxels of another size, and where torchrun started several processes.
    """
    check_alone("lungssl compare")
    check_folder(out)
    keep_freed_memory()
    cache, shifted = PairCache(data), _shift_cache(plan, data, shift)
    check_labels(plan, cache)
    about = {"data": cache.fingerprint(), "shift": None if shifted is None else shifted.fingerprint()}
    runs = pretrain_runs(plan, **about)
    caches = {"cache": data}
    if any(run.displacement == "estimated" for run in runs):
        fair_costs(plan, runs, caches | {"estimated": data}, device=device)  # before minutes of estimating
        caches["estimated"] = estimated_cache(cache, out / "estimated", EstimateConfig(), say=say)
    costs = fair_costs(plan, runs, caches, device=device)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "plan.yaml", as_text(plan.as_dict()))
    for folder in (out / "runs", out / "results"):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "costs.json", json.dumps({arm: one.as_dict() for arm, one in costs.items()}, indent=1))
    write_atomic(out / "env.json", json.dumps(environment() | about | {"cohort": data.name}, indent=1))
    judge = Judge(cache, shifted)
    worker = _Worker(caches=caches, judge=judge, out=out, device=device)
    mine = [step for run in shard_of(runs, shard) for step in (run, *finetune_runs(plan, run))]
    todo = [step for step in mine if not worker.result(step.id).is_file()]
    say(f"{len(mine)} runs{f' in shard {shard}' if shard else ''}, {len(mine) - len(todo)} of them finished before")
    started = time.perf_counter()
    for done, step in enumerate(todo):
        passed = time.perf_counter() - started
        left = f", {duration(passed / done * (len(todo) - done))} left" if done else ""
        say(f"\n== {len(mine) - len(todo) + done + 1}/{len(mine)}{left}: {step.id}")
        if not worker.make(step):
            say("another process makes it; left out")
    wanted = wanted_ids(plan, **about)
    results = {name: read_result(worker.result(name)) for name in wanted if worker.result(name).is_file()}
    floors = judge.floors()
    write_atomic(out / "floors.json", json.dumps(floors, indent=1))
    return Outcome(
        folder=out,
        plan=plan,
        costs=costs,
        results=results,
        missing=[name for name in wanted if name not in results],
        floors=floors,
    )


def read_result(path: Path) -> dict[str, Any]:
    """Of a run. Raises DataError that names the file where it is damaged, or another run's."""
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        whole = row["id"] == path.stem and path.stem.startswith(row["arm"])
        whole = whole and {"seed", "failed", "values", "scalars", "seconds", "commit"} <= set(row)
        figures = [*row["scalars"].values(), *(value for of in row["values"].values() for value in of.values())]
        whole = whole and all(isinstance(value, int | float) for value in figures)
        whole = whole and (row["failed"] is None or (isinstance(row["failed"], str) and not figures))
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise DataError(f"{path}: damaged, or not the result of this run; delete it, and the run is made again")
    return row


def check_labels(plan: Plan, cache: PairCache) -> None:
    """Raises ConfigError for more labelled patients than a cache has to learn from."""
    if plan.labels is None:
        return
    known = sum(
        any("lobes" in cache.phase_record(patient, phase).datasets for phase in cache.record(patient).phases())
        for patient in cache.split("train")
    )
    if known < max(plan.labels.patients):
        raise ConfigError(
            f"labels.patients asks for {max(plan.labels.patients)} labelled patients, and {known} of split train have "
            f"lobes; set labels.patients to fewer"
        )


def check_folder(out: Path) -> None:
    """Raises ConfigError for a folder that holds something else than a comparison, or than one that still estimates."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")
    held = {one.name for one in out.iterdir()} if out.is_dir() else set()
    if held - {"estimated"} and "plan.yaml" not in held:
        raise ConfigError(f"--out {out} is not empty and holds no comparison (no plan.yaml); name another folder")


def wanted_ids(plan: Plan, data: str, shift: str | None) -> list[str]:
    """Of all runs of a plan on caches with these fingerprints."""
    return [step.id for run in pretrain_runs(plan, data, shift) for step in (run, *finetune_runs(plan, run))]


def describe(plan: Plan, data: Path, *, device: str = "auto") -> str:
    """What a plan would make and what its arms cost, for a person. Raises as `carry_out`."""
    check_labels(plan, PairCache(data))
    runs = pretrain_runs(plan, PairCache(data).fingerprint())
    # An estimate changes no cost but its own, and a dry run makes none.
    costs = fair_costs(plan, runs, {"cache": data, "estimated": data}, device=device)
    learned = [one for run in runs for one in finetune_runs(plan, run)]
    lines = [plan.title, f"{len(runs)} encoders, {len(learned)} models learned from labels on them"]
    width = max(8, *(len(arm) for arm in costs))
    for arm, one in costs.items():
        lines.append(
            f"{arm:<{width}} {plan.arms[arm].isolates}: {one.patients} patients, {one.scans} scans, "
            f"{one.steps:,} steps, {one.samples:,} samples, {one.flops / 1e12:.2f} TFLOP"
        )
    by = "steps or samples a run" if plan.equalise == "steps" else plan.equalise
    lines.append(f"fair: no two pretrained arms differ in {by} by more than {cost.TOLERANCE:.0%}")
    scans = {arm: one.scans for arm, one in costs.items() if one.steps}
    if len(set(scans.values())) > 1:
        lines.append(f"scans aren't equal: {', '.join(f'{arm} {number}' for arm, number in scans.items())}")
    return "\n".join(lines)


def fair_costs(
    plan: Plan, runs: Sequence[Pretrain], caches: Mapping[str, Path], *, device: str = "auto"
) -> dict[str, cost.Cost]:
    """Of each arm, measured with the first seed on its own of the `caches`. Raises ConfigError for an unfair plan."""
    test = PairCache(caches["cache"]).split("test")
    costs = {
        run.arm: cost.measure(run, caches[run.displacement], test=test, device=device)
        for run in runs
        if run.seed == plan.seeds[0]
    }
    cost.check_fair(costs, plan.equalise)
    return costs


def _shift_cache(plan: Plan, data: Path, shift: Path | None) -> PairCache | None:
    if (shift is None) != (plan.shift is None):
        raise ConfigError("the plan's `shift` and --shift-data belong together: set plan key shift={} for such data")
    if shift is None:
        return None
    found = PairCache(shift)
    check_spacing(f"the plan's data {data}", cache_spacing_mm(PairCache(data)), found)
    if common := set(found.patients) & set(PairCache(data).patients):
        raise ConfigError(f"--shift-data {shift} has {len(common)} patients of --data, e.g. {min(common)}; take others")
    return found


class _Worker:
    """Makes single runs."""

    def __init__(self, *, caches: Mapping[str, Path], judge: Judge, out: Path, device: str) -> None:
        self.caches, self.judge, self.out, self.device = caches, judge, out, device
        self.data = caches["cache"]
        self._commit = environment()["commit"]

    def result(self, run_id: str) -> Path:
        return self.out / "results" / f"{run_id}.json"

    def folder(self, run_id: str) -> Path:
        return self.out / "runs" / run_id

    def make(self, step: Pretrain | Finetune) -> bool:
        """Make a run and write its result; one that breaks down is a result, too.

        False: another process is at it, or at the encoder that it starts from.
        """
        if isinstance(step, Finetune) and not self.result(step.parent.id).is_file():
            return False
        with open(self.out / "runs" / f".{step.id}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of by a process that is killed
            except BlockingIOError:
                return False
            if not self.result(step.id).is_file():
                self._make(step)
            return True

    def _make(self, step: Pretrain | Finetune) -> None:
        started = time.perf_counter()
        parent = step if isinstance(step, Pretrain) else step.parent
        about: dict[str, Any] = {"id": step.id, "arm": parent.arm, "seed": parent.seed, "commit": self._commit}
        if isinstance(step, Finetune):
            about |= {"labels": step.regime.patients, "mode": step.regime.mode, "draw": step.draw}
        try:
            found = self._pretrain(step) if isinstance(step, Pretrain) else self._finetune(step)
            result = about | {"failed": None} | found
        except StoppedError:
            raise
        except TrainingError as error:
            result = about | {"failed": str(error), "values": {}, "scalars": {}}
        result["seconds"] = round(time.perf_counter() - started, 1)
        write_atomic(self.result(step.id), json.dumps(result, indent=1))
        shutil.rmtree(self.folder(step.id) / "checkpoints", ignore_errors=True)

    def _pretrain(self, run: Pretrain) -> dict[str, Any]:
        folder = self.folder(run.id)
        weights = folder / "export" / "encoder.safetensors"
        summary: dict[str, Any] = {"alarms": [], "verdict": "not pretrained"}
        if run.pretrained:
            resume = self._can_go_on(folder)
            summary = _whole(
                pretrain(run.recipe, data=self.caches[run.displacement], out=folder, device=self.device, resume=resume),
                folder,
            )
        elif run.weights is not None:
            weights.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run.weights, weights)
        else:
            weights.parent.mkdir(parents=True, exist_ok=True)
            method = build_pretraining(run.recipe, self.data, device="cpu").method
            save_encoder(method.export_encoder(), weights, extra={"steps": "0"})  # pyright: ignore[reportCallIssue, reportArgumentType]
        encoder = load_encoder(weights)
        assert isinstance(encoder, Encoder)
        check_spacing(f"arm {run.arm}", encoder.spacing_mm, self.judge.cache)
        judged = self.judge.encoder(encoder, run.window_vox)
        return {
            "alarms": summary["alarms"],
            "verdict": summary["verdict"],
            "values": judged.values,
            "scalars": judged.scalars,
        }

    def _finetune(self, run: Finetune) -> dict[str, Any]:
        folder = self.folder(run.id)
        weights = self.folder(run.parent.id) / "export" / "encoder.safetensors"
        if not weights.is_file() and not read_result(self.result(run.parent.id))["failed"]:
            raise ConfigError(
                f"{self.folder(run.parent.id)} isn't here, and models are to be learned on its encoder; copy runs/ of "
                f"all shards into {self.out}, or delete {self.result(run.parent.id)}, and the encoder is made again"
            )
        if not weights.is_file():
            raise TrainingError(f"its encoder {run.parent.id} has no weights: that run failed")
        summary = _whole(
            finetune_segment(
                run.recipe,
                data=self.data,
                out=folder,
                encoder=weights,
                labels=Labels(patients=run.regime.patients, draw=run.draw),
                device=self.device,
                resume=self._can_go_on(folder),
                judged=(),
            ),
            folder,
        )
        judged = self.judge.model(folder / "export" / "model", self.device if self.device != "auto" else "cpu")
        return {"values": judged.values, "scalars": {}, "labelled": summary["labelled_patients"]}

    @staticmethod
    def _can_go_on(folder: Path) -> bool:
        """Whether the folder holds a run to resume; what a kill left before that is cleared away."""
        if (folder / "config.yaml").is_file():
            return True
        shutil.rmtree(folder, ignore_errors=True)
        return False


def _whole(summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    if summary["stopped_by"] is not None:
        raise StoppedError(f"stopped by {summary['stopped_by']} in {folder}; the same command goes on from there")
    return summary


def array_of(
    outcome: Outcome, arm: str, endpoint: str, regime: Regime | None = None
) -> tuple[list[str], np.ndarray] | None:
    """Patients, and figures [patients, seeds, draws] of an arm; None where a run of them failed or is missing.

    The arm AFFINE has the floors, the same for every seed.
    """
    if arm == AFFINE:
        floor = outcome.floors.get(endpoint)
        if not floor:
            return None
        one = np.array([floor[patient] for patient in sorted(floor)])
        return sorted(floor), np.repeat(one[:, None, None], len(outcome.plan.seeds), axis=1)
    rows = [
        row
        for row in outcome.results.values()
        if row["arm"] == arm and _regime_of(row) == regime and endpoint in row["values"]
    ]
    draws = 1 if regime is None or outcome.plan.labels is None else outcome.plan.labels.draws
    by_place = {(row["seed"], row.get("draw", 0)): row["values"][endpoint] for row in rows}
    places = [(seed, draw) for seed in outcome.plan.seeds for draw in range(draws)]
    if any(place not in by_place for place in places):
        return None
    patients = sorted(by_place[places[0]])
    if any(sorted(by_place[place]) != patients for place in places):
        return None
    values = [
        [[by_place[seed, draw][patient] for draw in range(draws)] for seed in outcome.plan.seeds]
        for patient in patients
    ]
    return patients, np.array(values)


def _regime_of(row: Mapping[str, Any]) -> Regime | None:
    return Regime(patients=row["labels"], mode=row["mode"]) if "labels" in row else None
