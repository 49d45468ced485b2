"""Values that a run's size decides, each with its reason: published defaults are for batches of hundreds.

A Config may have a field that is "auto" and a method `settled(run)` that replaces it; `lungssl pretrain` writes the
value and the reason into the run's config.yaml.
"""

from dataclasses import dataclass
from typing import Any

from lungssl_methods.schedules import auto_momentum as momentum_of

ROWS_PER_PROTOTYPE = 32
"""Teacher rows of a whole run for each prototype. Measured, not derived: 256 prototypes at 9,600 rows learned where
4096 gave targets near uniform (`dino_vit_nano`, docs/log.md of 2026-11-23)."""
PROTOTYPES = (64, 4096, 8192)
"""Least, and most below and from 5,000 patients on (`ssl.md` B.1)."""
MANY_PATIENTS = 5000


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """What the values depend on."""

    effective_batch: int
    """Samples per optimizer step, over all ranks and accumulated micro-batches."""
    total_steps: int
    patients: int
    """To train on."""
    accumulate: int = 1
    """Micro-batches that an optimizer step is made of."""


@dataclass(frozen=True, kw_only=True)
class Auto:
    """A value and why it is that."""

    value: Any
    reason: str


@dataclass(frozen=True, kw_only=True)
class BaseRate:
    """A method's published learning rate."""

    lr: float
    batch: int | None = None
    """Batch that it is for; the rate goes with the square root of the batch's share. None: it doesn't depend on it."""
    source: str = ""

    def at(self, run: RunSize) -> Auto:
        """The rate for a run's batch; square roots suit AdamW (Malladi et al. 2022, https://arxiv.org/abs/2205.10287)."""
        if self.batch is None:
            return Auto(value=self.lr, reason=f"{self.lr:g} at any batch ({self.source})")
        value = float(f"{self.lr * (run.effective_batch / self.batch) ** 0.5:.3g}")
        return Auto(
            value=value,
            reason=f"{self.lr:g} * sqrt({run.effective_batch} samples a step / {self.batch}) ({self.source})",
        )


def auto_prototypes(run: RunSize) -> Auto:
    """A power of two: as many prototypes as a run's teacher rows can tell apart."""
    least, few, many = PROTOTYPES
    most = many if run.patients >= MANY_PATIENTS else few
    rows = 2 * run.effective_batch * run.total_steps
    value = max(least, min(most, 2 ** ((rows // ROWS_PER_PROTOTYPE).bit_length() - 1 if rows else 0)))
    return Auto(
        value=value,
        reason=f"{rows:,} teacher rows in the run, {ROWS_PER_PROTOTYPE} to a prototype, from {least} to {most} for "
        f"{run.patients} patients",
    )


def auto_momentum(run: RunSize) -> Auto:
    """`schedules.auto_momentum`, in words."""
    value = momentum_of(effective_batch=run.effective_batch, total_steps=run.total_steps)
    return Auto(
        value=float(f"{value:.6g}"),
        reason=f"0.996^({run.effective_batch} samples a step / 256), its half-life at most 5 % of {run.total_steps} "
        f"steps, at least 0.95",
    )
