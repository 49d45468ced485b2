"""Which student view learns from which teacher view.

Students are all views of a batch in their order, teachers the global ones. One matrix makes single-phase, cross-phase
and mixed self-distillation the same method: a pair of views of different slots is a cross-phase pair where the sample
has both phases, and a pair of crops of one scan where it has one.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float32
from lungssl_data.batch import PairBatch, View
from torch import Tensor

PairPolicy = Literal["all", "cross", "within"] | tuple[float, float]
"""A name, or the weights of (cross-slot, same-slot) pairs: 1, 1 is "all"; 1, 0.5 is between "all" and "cross"."""

_NAMED = {"all": (1.0, 1.0), "cross": (1.0, 0.0), "within": (0.0, 1.0)}


def policy_weights(policy: PairPolicy) -> tuple[float, float]:
    """The weights of (cross-slot, same-slot) pairs.

    Raises ValueError for an unknown name, negative weights, or two zeros.
    """
    weights = _NAMED.get(policy) if isinstance(policy, str) else policy
    if weights is None or min(weights) < 0 or max(weights) <= 0:
        raise ValueError(
            f"pair policy {policy!r} must be one of {', '.join(_NAMED)}, or two weights of at least 0 for cross-slot "
            f"and same-slot pairs, of which one is positive"
        )
    return weights


def slot_pair_weight(student_slots: list[int], teacher_slots: list[int], policy: PairPolicy) -> Float32[Tensor, "s t"]:
    """Weight of each pair by slot; a teacher's own view is the student of the same index, and always weighs 0.

    Raises ValueError where no pair is left.
    """
    cross, within = policy_weights(policy)
    weight = [
        [0.0 if s == t else (within if slot == teacher_slot else cross) for t, teacher_slot in enumerate(teacher_slots)]
        for s, slot in enumerate(student_slots)
    ]
    if not any(map(any, weight)):
        raise ValueError(
            f"pair policy {policy!r} leaves no student-teacher pair among student views of slots {student_slots} and "
            f"teacher views of slots {teacher_slots}; add local views or global views per slot, or use policy 'all'"
        )
    return torch.tensor(weight, dtype=torch.float32)


def pair_weight(batch: PairBatch, policy: PairPolicy) -> Float32[Tensor, "s t b"]:
    """Weight of each student-teacher pair of each sample, on the batch's device.

    Depends on slots and not on phases, so that a patient with one scan counts as many pairs as one with two. Views
    without one measured voxel (crops that fell into padding) are in no pair; samples left without pairs weigh nothing.

    Raises ValueError where the views leave the policy no pair at all, and where the global views are not the first.
    """
    kinds = [view.kind for view in batch.views]
    teachers = kinds.count("global")
    if "global" in kinds[teachers:]:
        raise ValueError(f"global views must come before local ones, got {kinds}; make views with ViewConfig.build()")
    slots = [int(view.slot) for view in batch.views]
    measured = measured_views(batch.views).float()
    weight = slot_pair_weight(slots, slots[:teachers], policy).to(measured.device)
    return weight[:, :, None] * measured[:, None] * measured[None, :teachers]


def measured_views(views: Sequence[View]) -> Bool[Tensor, "v b"]:
    """Whether anything was measured in each view of each sample: a crop that fell into padding says nothing."""
    return torch.stack([view.valid.flatten(1).any(dim=1) for view in views])
