"""A tiny method and a run of it; also a script, so that tests can kill it: fake_run.py OUT STEPS DIE_AT SIGNAL."""

import os
import signal
import sys
from pathlib import Path

import torch
from lungssl.training.config import TrainConfig
from lungssl.training.logs import OpenLogs, run_logs
from lungssl.training.loop import FitResult, Probe, fit
from lungssl.training.run_folder import RunFolder
from lungssl_data.batch import StepOutput
from torch import Tensor, nn


class FakeMethod(nn.Module):
    """Dropout (random numbers), an EMA teacher and a moving centre: everything that a resumed run could lose."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.3), nn.Linear(12, 3))
        self.teacher = nn.Linear(6, 3).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(3))

    def forward(self, batch: Tensor, step: int) -> StepOutput:
        target = self.teacher(batch) - self.centre
        loss = (self.student(batch + 0.1 * torch.randn_like(batch)) - target).square().mean() + 0.0 * step
        if self.training:
            self.last_mean = target.mean(0).detach()
        return StepOutput(loss=loss, metrics={"loss": loss.detach(), "target_std": target.std().detach()})

    @torch.no_grad()
    def after_optimizer_step(self, step: int) -> None:
        self.centre.mul_(0.9).add_(self.last_mean, alpha=0.1)
        self.teacher.weight.mul_(0.99).add_(self.student[2].weight[:, :6], alpha=0.01)


def read(index: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(index))


def train(
    out: Path,
    *,
    steps: int = 20,
    die_at: int = -1,
    send: int = signal.SIGKILL,
    resume: bool = False,
    probe: Probe | None = None,
    logs: OpenLogs = run_logs,
    profile: int = 0,
    **options: object,
) -> tuple[FitResult, FakeMethod]:
    """Make or continue a run; with `die_at` the process gets the signal `send` while it prepares that micro-batch."""
    config = TrainConfig(
        **{"steps": steps, "checkpoint_every": 5, "log_every": 1, "eval_every": 5, "lr": 1e-2} | options
    )
    run = RunFolder.start(out, {"seed": 0, "train": {"steps": steps, "lr": config.lr}}, resume=resume)
    method = FakeMethod()

    def prepare(batch: Tensor, index: int) -> Tensor:
        if index == die_at:
            os.kill(os.getpid(), send)
        return batch + 0.01 * torch.randn_like(batch)

    def evaluate(step: int) -> dict[str, float]:
        method.eval()
        with torch.no_grad():
            return {"loss": float(method(read(10_000), step).loss)}

    result = fit(
        method,
        read=read,
        prepare=prepare,
        config=config,
        run=run,
        seed=3,
        device=torch.device("cpu"),
        evaluate=evaluate,
        probe=probe,
        logs=logs,
        profile=profile,
    )
    return result, method


if __name__ == "__main__":
    torch.set_num_threads(1)
    result, _ = train(Path(sys.argv[1]), steps=int(sys.argv[2]), die_at=int(sys.argv[3]), send=int(sys.argv[4]))
    print(result.stopped_by)
