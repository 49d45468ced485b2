"""Exponential moving average of parameters.

No kernel: `torch._foreach_lerp_` moves the floor of 12 bytes per float32 parameter (read both, write one) in one call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, in place.

    Momentum 1 leaves every bit as it is, and 0 copies the student, whatever the other holds.

    Raises ValueError where the lists differ in length or in the shape of a pair, momentum is outside [0, 1], or a
    teacher tensor is in half precision: at momentum 0.996 and above a bf16 average stalls, because the update is
    smaller than half of its 2^-8 rounding step. Of DTensors each rank moves its part: nothing is sent.
    """
    teacher, student = list(teacher), list(student)
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
    if [p.shape for p in teacher] != [p.shape for p in student]:
        raise ValueError(
            f"teacher and student must be lists of tensors of equal shapes, got {len(teacher)} and {len(student)} "
            f"tensors with different shapes; make the teacher with copy.deepcopy(student)"
        )
    half = {p.dtype for p in teacher} & {torch.bfloat16, torch.float16}
    if half:
        raise ValueError(f"the teacher must be kept in float32, got {half.pop()}; call .float() on it")
    if [_placed(p) for p in teacher] != [_placed(p) for p in student]:
        raise ValueError("teacher and student must be shared out over the ranks alike; shard both, or none of them")
    teacher, student = _own_parts(teacher), _own_parts(student)
    if teacher and momentum < 1.0:
        matched = [s.to(t.dtype) for s, t in zip(student, teacher, strict=True)]
        if momentum == 0.0:
            torch._foreach_copy_(teacher, matched)  # pyright: ignore[reportPrivateImportUsage]
            return
        torch._foreach_lerp_(teacher, matched, 1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]


# DTensors are known by their methods: torch.distributed may be missing, and importing them takes 0.8 s.


def _placed(tensor: Tensor) -> object:
    """Which part of it each rank holds; None for a plain tensor."""
    return getattr(tensor, "placements", None)


def _own_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this rank holds of each, in the same memory."""
    return [one.to_local() if _placed(one) is not None else one for one in tensors]  # pyright: ignore[reportAttributeAccessIssue]
