"""The loop: steps, schedules, accumulation, clipping, logs, held-out evaluation, checkpoints, stopping.

The micro-step's index decides everything random in it: `read(index)` is a pure function, torch's generators are seeded
from (seed, index) before `prepare` and the forward pass. So a resumed run repeats an uninterrupted one bit for bit, on
the CPU with the same number of threads.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lungssl_backbones.param_groups import param_groups
from lungssl_data.batch import StepOutput
from lungssl_methods.schedules import warmup_cosine
from torch import nn

from lungssl.errors import TrainingError
from lungssl.training.checkpoint import load_checkpoint, newest_valid, save_checkpoint
from lungssl.training.config import TrainConfig
from lungssl.training.logs import MetricsLog
from lungssl.training.precision import autocast
from lungssl.training.progress import Progress, shown
from lungssl.training.read_ahead import read_ahead
from lungssl.training.run_folder import RunFolder
from lungssl.training.stop import StopRequest

Evaluate = Callable[[int], Mapping[str, float]]
"""Held-out figures after so many steps; it may put the module into eval mode."""


class Trainable(Protocol):
    """A method or a task. Also an `nn.Module`."""

    def __call__(self, batch: Any, step: int) -> StepOutput:
        """Loss and metrics of a micro-batch."""
        ...

    def after_optimizer_step(self, step: int) -> None:
        """Called after the optimizer's step `step`."""
        ...


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a run ended."""

    step: int
    """Optimizer steps done."""
    stopped_by: str | None
    """Signal or file that ended it early, None where all steps were made."""


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
) -> FitResult:
    """Train `module` (a `Trainable` on `device`) from the newest checkpoint of `run` to `config.steps`.

    `read(index)` gives micro-batch `index` on the CPU, in a background thread or process; `prepare(batch, index)` makes
    of it what the module is called with. Raises TrainingError where loss or gradient is not finite, KeyboardInterrupt
    after Ctrl-C; in both cases the last checkpoint stays.
    """
    optimizer = make_optimizer(module, config)
    checkpoint = newest_valid(run.checkpoints, say=run.say)
    start = 0 if checkpoint is None else load_checkpoint(checkpoint, module, optimizer)
    if start:
        run.say(f"resuming after step {start}")
    stream = read_ahead(read, start * config.accumulate, config.steps * config.accumulate, workers=config.workers)
    log = MetricsLog(run.metrics, run.tensorboard, after_step=start)
    progress = Progress(config.steps, start, say=run.say, note=run.note)
    done, reason = start, None

    def held_out() -> None:
        if evaluate is not None:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                figures = evaluate(done)
            module.train()
            log.write(done, {f"val/{name}": value for name, value in figures.items()})
            progress.interrupt(f"held-out after step {done}: {shown(figures)}")

    try:
        with StopRequest(run.stop) as stop:
            module.train()
            if start == 0:
                held_out()
            while done < config.steps and reason is None:
                values, timing = train_step(
                    module, optimizer, stream, prepare, step=done, config=config, seed=seed, device=device
                )
                done += 1
                reason = stop.reason
                progress.update(done, values, timing["data_wait_s"])
                if done % config.log_every == 0 or done == config.steps:
                    log.write(done, values, timing)
                if done % config.eval_every == 0 or done == config.steps:
                    held_out()
                if done % config.checkpoint_every == 0 or done == config.steps or reason is not None:
                    log.sync()
                    save_checkpoint(run.checkpoints, done, module, optimizer, keep=config.keep_checkpoints)
    finally:
        stream.close()
        log.close()
    if reason is not None:
        run.stop.unlink(missing_ok=True)
        run.say(f"stopped by {reason} after step {done}, checkpoint written; continue with --resume")
    if reason == "SIGINT":
        raise KeyboardInterrupt
    return FitResult(step=done, stopped_by=reason if done < config.steps else None)


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over `param_groups`; `train_step` writes each group's learning rate and weight decay."""
    groups = param_groups(module, lr=config.rate(), weight_decay=config.weight_decay, layer_decay=config.layer_decay)
    return torch.optim.AdamW(groups, lr=config.rate(), betas=config.betas)


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
) -> tuple[dict[str, float], dict[str, float]]:
    """One optimizer step over `config.accumulate` micro-batches; returns mean figures and timing."""
    started = time.perf_counter()
    waited = 0.0
    lr, weight_decay = _scheduled(step, config)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr * group["lr_scale"], weight_decay if group["decays"] else 0.0
    optimizer.zero_grad(set_to_none=True)
    values: dict[str, float] = {}
    for index in range(step * config.accumulate, (step + 1) * config.accumulate):
        before = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - before
        torch.manual_seed(micro_seed(seed, index))
        inputs = prepare(batch, index)
        with autocast(device, config.precision):
            output: StepOutput = module(inputs, step)
        figures = {name: float(v) for name, v in output.metrics.items()} | {"loss": float(output.loss.detach())}
        if not math.isfinite(figures["loss"]):
            raise TrainingError(_not_finite("loss", figures["loss"], step))
        (output.loss / config.accumulate).backward()
        for name, value in figures.items():
            values[name] = values.get(name, 0.0) + value / config.accumulate
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(parameters, config.clip or math.inf))
    if not math.isfinite(norm):
        raise TrainingError(_not_finite("gradient norm", norm, step))
    optimizer.step()
    module.after_optimizer_step(step)  # pyright: ignore[reportCallIssue] (Trainable, also an nn.Module)
    values |= {"lr": lr, "weight_decay": weight_decay, "grad_norm": norm}
    now = time.perf_counter()
    return values, {"step_s": now - started, "data_wait_s": waited, "time_s": time.time()}


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


def _not_finite(what: str, value: float, step: int) -> str:
    return (
        f"{what} is {value} at step {step + 1}; the weights of that step were discarded, earlier checkpoints stay. "
        f"Lower train.lr or raise train.warmup, or try train.precision=fp32"
    )
