"""The loop: steps, schedules, accumulation, clipping, logs, held-out evaluation, checkpoints, stopping.

The micro-step's index decides everything random in it: `read(index)` is a pure function, torch's generators are seeded
from (seed, index) before `prepare` and the forward pass. So a resumed run repeats an uninterrupted one bit for bit, on
the CPU with the same number of threads.

Several ranks share each micro-batch: each reads its samples and draws for all, gradients and figures are averaged
before anything is judged by them, so that every rank takes the same way. The first one writes, but for checkpoints of
sharded modules (`sharding.py`), of which each rank writes its part.
"""

import hashlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from lungssl_backbones.param_groups import param_groups
from lungssl_data.batch import StepOutput
from lungssl_methods.collapse import CollapseMonitor
from lungssl_methods.schedules import warmup_cosine
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lungssl.errors import TrainingError
from lungssl.training.allocator import keep_freed_memory
from lungssl.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    newest_valid,
    save_checkpoint,
    save_sharded,
    step_of,
    watch_state,
)
from lungssl.training.config import TrainConfig
from lungssl.training.logs import OpenLogs, Together, run_logs
from lungssl.training.precision import autocast
from lungssl.training.profiling import StepProfiler, part
from lungssl.training.progress import Progress, shown
from lungssl.training.ranks import ALONE, Ranks
from lungssl.training.read_ahead import read_ahead
from lungssl.training.run_folder import RunFolder
from lungssl.training.sharding import check_shardable, is_sharded, whole, whole_state
from lungssl.training.stop import StopRequest
from lungssl.training.watch import (
    MOST_ROLLBACKS,
    RATE_AFTER_ROLLBACK,
    NotFiniteError,
    RollbackError,
    Watch,
    buffers_of,
    keep_step,
)

Evaluate = Callable[[int], Mapping[str, float]]
"""Held-out figures after so many steps; it may put the module into eval mode."""

Probe = Callable[[], Mapping[str, float]]
"""Figures of a probe set, by the weights as they are."""


class Trainable(Protocol):
    """A method or a task. Also an `nn.Module`."""

    def __call__(self, batch: Any, step: int) -> StepOutput:
        """Loss and metrics of a micro-batch."""
        ...

    def after_optimizer_step(self, step: int) -> None:
        """Called after the optimizer's step `step`."""
        ...


@runtime_checkable
class Forgets(Protocol):
    """A part of a module that counts over the micro-steps of a step."""

    def forget(self) -> None:
        """Drop what was counted since the last step."""
        ...


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a run ended."""

    step: int
    """Optimizer steps done."""
    stopped_by: str | None
    """Signal or file that ended it early, None where all steps were made."""
    alarms: tuple[str, ...] = ()
    """What the collapse monitor said, once a kind, but for what was undone by a return."""
    returns: tuple[str, ...] = ()
    """Returns to a checkpoint with their reasons."""


def fit(
    module: nn.Module,
    *,
    read: Callable[[int], Any],
    prepare: Callable[[Any, int], Any],
    config: TrainConfig,
    run: RunFolder,
    seed: int,
    device: torch.device,
    evaluate: Evaluate | None = None,
    probe: Probe | None = None,
    bounds: CollapseMonitor.Config | None = None,
    ranks: Ranks = ALONE,
    logs: OpenLogs = run_logs,
    profile: int = 0,
) -> FitResult:
    """Train `module` (a `Trainable` on `device`) from the newest checkpoint of `run` to `config.steps`.

    `read(index)` gives micro-batch `index` on the CPU, in a background thread or process; `prepare(batch, index)` makes
    of it what the module is called with. `probe` is called with each held-out evaluation, `bounds` are those of its
    alarms. As one of several `ranks`, `read` gives this rank's samples; `evaluate` and `probe` are called on each and
    give each the same. `logs` opens what is told the figures, on the first rank, where `profile`
    steps are profiled into the run's folder.

    Raises NotFiniteError, a TrainingError, where loss or gradient is no number, TrainingError on an alarm as
    `config.on_collapse` has it, and KeyboardInterrupt after Ctrl-C; in all cases the last checkpoint stays.
    """
    if device.type == "cpu":
        keep_freed_memory()
    rollbacks: list[int] = []
    watch = Watch(config.on_collapse, say=run.say, bounds=bounds)
    if config.shard == "full" and not is_sharded(module):
        check_shardable(ranks)
        raise AssertionError("train.shard is full, but nobody called sharding.sharded")
    replica = module if is_sharded(module) else ranks.replica(module, device)
    parts = (module, replica, read, prepare, config, run, seed, device, evaluate, probe, watch, ranks, logs, profile)
    while True:
        try:
            return _fit(*parts, resumed=not rollbacks)
        except RollbackError as alarm:
            reason = str(alarm)
            start = ranks.from_first(lambda: _go_back(run, rollbacks))
            if start is None:
                raise TrainingError(f"{reason}; there is no checkpoint to go back to. Look at the data") from alarm
            rollbacks.append(start)
            if len(rollbacks) > MOST_ROLLBACKS:
                raise TrainingError(
                    f"{reason}; after {MOST_ROLLBACKS} returns to a checkpoint with half the rate each time it came "
                    f"again. Lower train.lr, or look at the data"
                ) from alarm
            watch.rate_scale *= RATE_AFTER_ROLLBACK
            watch.returns.append(f"{reason}; back to step {start} with learning rates times {watch.rate_scale:g}")
            run.say(f"WARNING: {watch.returns[-1]}")
            for one in module.modules():
                if isinstance(one, Forgets):  # counts of a step that was left in its middle
                    one.forget()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise TrainingError(  # torch raises it at any moment of a step
                f"a process that reads crops has died ({' '.join(str(error).split())[:200]}), perhaps for want of "
                f"memory; lower train.workers, and go on from the newest checkpoint with --resume"
            ) from error


def _fit(
    module: nn.Module,
    replica: nn.Module,
    read: Callable[[int], Any],
    prepare: Callable[[Any, int], Any],
    config: TrainConfig,
    run: RunFolder,
    seed: int,
    device: torch.device,
    evaluate: Evaluate | None,
    probe: Probe | None,
    watch: Watch,
    ranks: Ranks,
    logs: OpenLogs,
    profile: int,
    *,
    resumed: bool,
) -> FitResult:
    """From the newest checkpoint to the end, or to an alarm that RollbackError tells."""
    optimizer = make_optimizer(module, config)
    checkpoint = ranks.from_first(lambda: newest_valid(run.checkpoints, say=run.say))
    start = 0
    if checkpoint is not None:
        start = load_checkpoint(checkpoint, module, optimizer)
        watch.load(watch_state(checkpoint), returned=not resumed)
    if start and resumed:
        run.say(f"resuming after step {start}")
    stream = read_ahead(read, start * config.accumulate, config.steps * config.accumulate, workers=config.workers)
    log = Together(logs(run, start if checkpoint is not None else -1) if ranks.first else [])
    progress = Progress(config.steps, start, say=run.say, note=run.note, terminal=None if ranks.first else False)
    profiled = profile if ranks.first else 0
    profiler = StepProfiler(profiled, run.path / "profile", device, module=module, say=progress.interrupt)
    done, reason = start, None

    def held_out() -> None:
        if evaluate is None:
            return
        with part("held-out"), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            figures = evaluate(done)
            probed = probe() if probe is not None else {}
            module.train()
        log.write(
            done, {f"val/{name}": v for name, v in figures.items()} | {f"probe/{n}": v for n, v in probed.items()}
        )
        progress.interrupt(f"held-out after step {done}: {shown(figures)}")
        watch.probe(done, probed)

    def checkpoint_now() -> None:
        log.sync()
        arguments = (run.checkpoints, done, module, optimizer)
        keep, state = config.keep_checkpoints, watch.state()
        with part("checkpoint"):
            if is_sharded(module):
                save_sharded(*arguments, keep=keep, watch=state, ranks=ranks)
            else:
                ranks.from_first(lambda: save_checkpoint(*arguments, keep=keep, watch=state))

    try:
        with StopRequest(run.stop) as stop:
            module.train()
            if checkpoint is None:
                held_out()
                if config.on_collapse == "rollback":
                    checkpoint_now()
            while done < config.steps and reason is None:
                with profiler.step():
                    with part("copy buffers"):
                        before = buffers_of(module)
                    try:
                        values, timing = train_step(
                            module,
                            optimizer,
                            stream,
                            prepare,
                            step=done,
                            config=config,
                            seed=seed,
                            device=device,
                            rate_scale=watch.rate_scale,
                            replica=replica,
                            ranks=ranks,
                        )
                    except NotFiniteError as error:
                        failed = whole_state(module, ranks)
                        error.kept = ranks.from_first(partial(keep_step, run.nan, error, failed, before))
                        if config.on_collapse == "rollback":
                            raise RollbackError(f"{error.what} is {error.value} at step {error.step + 1}") from error
                        raise
                    done += 1
                    with part("watch and log"):
                        reason = ranks.agreed(stop.reason)
                        progress.update(done, values, timing["data_wait_s"])
                        if done % config.log_every == 0 or done == config.steps:
                            log.write(done, values, timing)
                        watch.step(done, values)
                    if done % config.eval_every == 0 or done == config.steps:
                        held_out()
                    if done % config.checkpoint_every == 0 or done == config.steps or reason is not None:
                        checkpoint_now()
    finally:
        profiler.finish()
        stream.close()
        log.close()
    if reason is not None:
        if ranks.first:
            run.stop.unlink(missing_ok=True)
        run.say(f"stopped by {reason} after step {done}, checkpoint written; continue with --resume")
    if reason == "SIGINT":
        raise KeyboardInterrupt
    alarms = tuple(alarm.sentence for alarm in watch.alarms)
    ended = reason if done < config.steps else None
    return FitResult(step=done, stopped_by=ended, alarms=alarms, returns=tuple(watch.returns))


def _go_back(run: RunFolder, rollbacks: list[int]) -> int | None:
    """The step of the checkpoint to return to, None without one; one that led to an alarm twice is dropped."""
    found = checkpoints(run.checkpoints)
    if len(found) > 1 and step_of(found[-1]) in rollbacks:
        shutil.rmtree(found.pop())
    return step_of(found[-1]) if found else None


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over `param_groups`; `train_step` writes each group's learning rate and weight decay."""
    groups = param_groups(module, lr=config.rate(), weight_decay=config.weight_decay, layer_decay=config.layer_decay)
    return torch.optim.AdamW(groups, lr=config.rate(), betas=config.betas, fused=True)


def train_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Iterator[Any],
    prepare: Callable[[Any, int], Any],
    *,
    step: int,
    config: TrainConfig,
    seed: int,
    device: torch.device,
    rate_scale: float = 1.0,
    replica: nn.Module | None = None,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, float], dict[str, float]]:
    """One optimizer step over `config.accumulate` micro-batches; returns mean figures and timing.

    `replica`: of `ranks`, by which `module` is called. Raises NotFiniteError before any weight has moved.
    """
    replica = module if replica is None else replica
    started = time.perf_counter()
    waited = 0.0
    lr, weight_decay = _scheduled(step, config)
    lr *= rate_scale
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr * group["lr_scale"], weight_decay if group["decays"] else 0.0
    optimizer.zero_grad(set_to_none=True)
    values: dict[str, float] = {}
    for index in range(step * config.accumulate, (step + 1) * config.accumulate):
        before = time.perf_counter()
        with part("wait for data"):
            batch = next(stream)
        waited += time.perf_counter() - before
        torch.manual_seed(micro_seed(seed, index))
        with part("prepare"):
            inputs = prepare(batch, index)
        # Gradients of accumulated micro-batches are averaged over ranks once, with the last; those of a sharded module
        # with each, because until then every rank would hold all of them.
        last = index == (step + 1) * config.accumulate - 1
        wait = isinstance(replica, DistributedDataParallel) and not last
        with replica.no_sync() if wait else nullcontext():  # pyright: ignore[reportCallIssue]
            with part("forward"), autocast(device, config.precision, module):
                output: StepOutput = replica(inputs, step)
            with part("figures"):
                figures = {name: float(v) for name, v in output.metrics.items()} | {"loss": float(output.loss.detach())}
                figures = ranks.mean(figures)
            bad = not math.isfinite(figures["loss"])
            if not bad or ranks.size > 1:  # a replica's forward pass must be followed by its backward pass
                with part("backward"):
                    (output.loss / config.accumulate).backward()
        if bad:
            raise NotFiniteError("loss", figures["loss"], step=step, index=index)
        for name, value in figures.items():
            values[name] = values.get(name, 0.0) + value / config.accumulate
    with part("gradient norm"):
        norm = clip_gradients([p for group in optimizer.param_groups for p in group["params"]], config.clip)
    if not math.isfinite(norm):
        raise NotFiniteError("gradient norm", norm, step=step, index=(step + 1) * config.accumulate - 1)
    with part("optimizer"):
        optimizer.step()
    with part("after the step"):
        module.after_optimizer_step(step)  # pyright: ignore[reportCallIssue] (Trainable, also an nn.Module)
    values |= {"lr": lr, "weight_decay": weight_decay, "grad_norm": norm}
    now = time.perf_counter()
    return values, {"step_s": now - started, "data_wait_s": waited, "time_s": time.time()}


def clip_gradients(parameters: list[nn.Parameter], most: float) -> float:
    """Their gradients' norm, to which they are cut where it is more than `most`; 0: never.

    As `nn.utils.clip_grad_norm_`, bit for bit, without its pass over all gradients to multiply them by 1.
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    value = float(whole(norm))
    if most and not value + 1e-6 <= most:  # torch's factor is most / (norm + 1e-6), and 1 at most
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return value


def micro_seed(seed: int, index: int) -> int:
    """Seed of micro-step `index`. Hashed, because torch's CPU generator uses only the low 32 bits of a seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=4).digest())


def _scheduled(step: int, config: TrainConfig) -> tuple[float, float]:
    """Learning rate and weight decay at a step."""
    lr = warmup_cosine(
        step,
        base=config.rate(),
        final=config.final_lr,
        warmup_steps=round(config.warmup * config.steps),
        total_steps=config.steps,
    )
    decay = warmup_cosine(
        step, base=config.weight_decay, final=config.final_weight_decay, warmup_steps=0, total_steps=config.steps
    )
    return lr, decay
