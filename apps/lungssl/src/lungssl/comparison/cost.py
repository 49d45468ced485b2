"""What each arm of a comparison costs, and whether they may be compared."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

from lungssl_methods.budget import step_budget

from lungssl.comparison.estimates import registration_seconds
from lungssl.comparison.plan import Equalised, Pretrain
from lungssl.errors import ConfigError
from lungssl.pretraining import build_pretraining
from lungssl.training.precision import autocast

TOLERANCE = 0.02
"""`ssl.md` C.7: what a plan equalises may differ by 2 %."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of the pretraining of one arm, with one seed; all 0 for an arm that isn't pretrained."""

    steps: int
    samples: int
    """Patients' crops, over all steps, each through both slots."""
    patients: int
    """Different ones that crops come from."""
    scans: int
    """Different ones."""
    voxels: int
    """Through encoders, student and teacher, over all steps."""
    tokens: int
    """Likewise."""
    flops: int
    """By the formulas of `lungssl_methods.budget`."""
    displacement: str
    """Where the correspondences are from; empty for arms that use none."""
    registration_s: float = 0.0
    """Seconds on this machine that estimating those of `patients` took, beside the FLOPs."""

    def as_dict(self) -> dict[str, int | float | str]:
        """Field by field."""
        return asdict(self)


def measure(run: Pretrain, data: Path, *, test: Sequence[str], device: str = "auto") -> Cost:
    """From one forward on the run's first batch.

    Raises ConfigError where the run would see a test patient, and for `train.batch: auto`.
    """
    if not run.pretrained:
        return Cost(steps=0, samples=0, patients=0, scans=0, voxels=0, tokens=0, flops=0, displacement="")
    if run.recipe.train.batch == "auto":
        raise ConfigError(
            f"arm {run.arm}: train.batch: auto takes what the machine's memory holds, and arms are compared at equal "
            f"numbers; give one, e.g. what `lungssl pretrain --dry-run train.batch=auto` finds"
        )
    parts = build_pretraining(run.recipe, data, device=device)
    stride = parts.method.export_encoder().token_stride_vox
    if run.window_vox % stride:
        raise ConfigError(
            f"arm {run.arm} would be judged through windows of {run.window_vox} voxels, and its tokens are {stride} "
            f"wide; set window_vox to a multiple of {stride}"
        )
    seen = set(parts.crops.patients) & set(test)
    if seen:
        raise ConfigError(f"arm {run.arm} would be pretrained on {len(seen)} test patients, e.g. {min(seen)}")
    train = parts.recipe.train
    with autocast(parts.device, train.precision, parts.method):
        one = step_budget(parts.method, parts.prepare(parts.read(0), 0), step=train.steps - 1)
    micro_steps = train.steps * train.accumulate
    where, registration_s = "", 0.0
    one_scan = all(len(set(phases)) == 1 for phases in parts.crops.slots.values())
    if parts.recipe.data.correspondences and (one_scan or run.recipe.data.partner == "itself"):
        where = "identity, of one scan"
    elif parts.recipe.data.correspondences and run.recipe.data.matched_by == "affine":
        where = "coarse affine"
    elif parts.recipe.data.correspondences:
        fields = (parts.crops.cache.displacement(patient) for patient in parts.crops.patients)
        where = ", ".join(sorted({"none" if field is None else field.provenance for field in fields}))
        registration_s = registration_seconds(data, parts.crops.patients)
    return Cost(
        steps=train.steps,
        samples=train.patients() * micro_steps,
        patients=len(parts.crops.patients),
        scans=sum(len(set(phases)) for phases in parts.crops.slots.values()),
        voxels=micro_steps * (one.voxels_student + one.voxels_teacher),
        tokens=micro_steps * (one.tokens_student + one.tokens_teacher),
        flops=micro_steps * one.flops,
        displacement=where,
        registration_s=registration_s,
    )


def check_fair(costs: Mapping[str, Cost], equalise: Equalised) -> None:
    """Raises ConfigError for two arms that differ by more than TOLERANCE in what the plan equalises.

    Arms that aren't pretrained cost nothing, and are compared with as what they are: the floor.
    """
    names = ("steps", "samples") if equalise == "steps" else ("flops",)
    for second, first in combinations((arm for arm, cost in costs.items() if cost.steps), 2):
        for name in names:
            a, b = getattr(costs[first], name), getattr(costs[second], name)
            if max(a, b) <= (1 + TOLERANCE) * min(a, b):
                continue
            steps = round(costs[first].steps * b / a) if name != "samples" else None
            way = f"arms.{first}.overrides train.steps={steps}" if steps else "the same train.batch in both"
            raise ConfigError(
                f"unfair: {first} has {_said(a, name)} and {second} {_said(b, name)} ({a / b - 1:+.1%}), and the plan "
                f"equalises {equalise} to within {TOLERANCE:.0%}; set {way}, or let the plan equalise something else"
            )


def _said(value: int, name: str) -> str:
    return f"{value / 1e12:.4g} TFLOP" if name == "flops" else f"{value:,} {name}"
