"""The definition of `ema_update_`: a loop over the tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_reference_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, in place."""
    for average, value in zip(teacher, student, strict=True):
        average.mul_(momentum).add_(value, alpha=1.0 - momentum)
