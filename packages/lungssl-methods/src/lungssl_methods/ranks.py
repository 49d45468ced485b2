"""How methods meet the other ranks of a distributed run, on torch's default process group."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor


class RanksGather:
    """`method.Gather` over torch.distributed. Raises ValueError, torch's, where no process group was started."""

    def __init__(self) -> None:
        self._alone = False

    @property
    def rank(self) -> int:
        """See `method.Gather`."""
        return 0 if self._alone else dist.get_rank()

    @property
    def ranks(self) -> int:
        """See `method.Gather`."""
        return 1 if self._alone else dist.get_world_size()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it a rank is by itself: for held-out batches, of which each rank looks at others."""
        before, self._alone = self._alone, True
        try:
            yield
        finally:
            self._alone = before

    @torch.no_grad()
    def sum(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """See `method.Gather`."""
        total = value.clone()
        if not self._alone:
            dist.all_reduce(total)
        return total

    def rows(self, value: Shaped[Tensor, "n *row"]) -> Shaped[Tensor, "m *row"]:
        """See `method.Gather`. Raises ValueError where ranks have different numbers of rows."""
        if self._alone:
            return value
        counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=value.device)
        counts[dist.get_rank()] = len(value)
        dist.all_reduce(counts)
        if len(set(counts.tolist())) > 1:
            raise ValueError(
                f"ranks have {counts.tolist()} rows of one batch; give each rank as many samples, and drop a last "
                f"batch that is smaller"
            )
        return _Rows.apply(value)  # pyright: ignore[reportReturnType]


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Every rank's loss depends on this rank's rows: the sum of their gradients."""
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]
