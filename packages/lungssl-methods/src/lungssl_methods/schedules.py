"""Schedules as pure functions of the step, so that a resumed run continues where it was.

Steps count from 0; the last step of a run is total_steps - 1, and values stay there beyond it.
"""

import math


def warmup_cosine(step: int, *, base: float, final: float, warmup_steps: int, total_steps: int) -> float:
    """Linear from base / warmup_steps at step 0 to base, then half a cosine to `final` at the last step.

    The first step is not 0, so that no step is lost. SGDR's cosine: Loshchilov & Hutter 2017,
    https://arxiv.org/abs/1608.03983.

    Raises ValueError where the warm-up does not end before the run.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps {warmup_steps} must be at least 0 and less than total_steps {total_steps}")
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    return final + (base - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def linear_warmup_then_constant(step: int, *, start: float, end: float, warmup_steps: int) -> float:
    """`start` at step 0, linear to `end` at step `warmup_steps`, then `end`."""
    if step >= warmup_steps:
        return end
    return start + (end - start) * step / warmup_steps


def cosine_momentum(step: int, *, base: float, total_steps: int) -> float:
    """Half a cosine from `base` at step 0 to 1 at the last step (BYOL, Grill et al. 2020, https://arxiv.org/abs/2006.07733)."""
    return warmup_cosine(step, base=base, final=1.0, warmup_steps=0, total_steps=total_steps)


def auto_momentum(*, effective_batch: int, total_steps: int) -> float:
    """A teacher's first momentum: 0.996^(batch / 256), capped at a half-life of 5 % of the run, but never below 0.95.

    0.996 is DINO's at batch 256 and up; the exponent is the scaling rule of Busbridge et al. 2023,
    https://arxiv.org/abs/2307.13813. At batch 16 it gives 0.99975, a half-life of 2770 steps: a short run's teacher
    would hardly leave its start, hence the cap. 0.95 is a half-life of 13.5 steps, twice that of the centre (momentum
    0.9): a teacher that moves as fast as its centre follows swings between collapses (decision 0004).
    """
    scaled = 0.996 ** (effective_batch / 256)
    return min(scaled, max(0.5 ** (1.0 / max(1.0, 0.05 * total_steps)), 0.95))
