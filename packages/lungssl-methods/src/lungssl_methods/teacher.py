"""The slow average of the student that self-distilling methods take their targets from."""

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from lungssl_ops.ema import ema_update_
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


def slow_copy(student: Net) -> Net:
    """A teacher that starts as its student: without gradients, and in evaluation mode: no target drops paths."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def follow(pairs: Iterable[tuple[nn.Module, nn.Module]], momentum: float) -> None:
    """Move each (teacher, student) once, after the optimizer's step: parameters by EMA, buffers copied.

    teacher <- momentum * teacher + (1 - momentum) * student (Caron et al. 2021, https://arxiv.org/abs/2104.14294).
    """
    pairs = list(pairs)
    ema_update_(
        [p for teacher, _ in pairs for p in teacher.parameters()],
        [p for _, student in pairs for p in student.parameters()],
        momentum,
    )
    for teacher, student in pairs:
        for kept, moved in zip(teacher.buffers(), student.buffers(), strict=True):
            kept.copy_(moved)
