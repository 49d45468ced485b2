"""What a teacher adds to its logits per prototype before the softmax: the centre's share, or Sinkhorn's.

Both are vectors: softmax(logits / temperature + bias) is all that `prototype_cross_entropy` needs to know of either.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK_BYTES = 16 * 2**20
"""Of logits at a time."""


def centering_bias(centre: Float[Tensor, " k"], temperature: float) -> Float[Tensor, " k"]:
    """-centre / temperature, which makes softmax((logits - centre) / temperature) of the teacher's softmax.

    `centre` is an average of teacher logits (Caron et al. 2021, https://arxiv.org/abs/2104.14294, eq. 4), see
    `mean_logits`; `temperature` is the teacher's. Raises ValueError where that is not above 0.
    """
    _check_temperature(temperature, "centering_bias")
    return centre.to(torch.promote_types(centre.dtype, torch.float32)) / -temperature


@torch.no_grad()
def sinkhorn_bias(
    teacher: Float[Tensor, "*rows d"],
    prototypes: Float[Tensor, "k d"],
    *,
    temperature: float,
    iterations: int = 3,
    over_ranks: Callable[[Float[Tensor, " k"]], Float[Tensor, " k"]] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Float[Tensor, " k"]:
    """The bias with which the softmax of the teacher's logits is the Sinkhorn-Knopp assignment of all rows.

    As in SwAV, DINOv2 and DINOv3 (Caron et al. 2020, https://arxiv.org/abs/2006.09882, section 3.1): exp(logits /
    temperature) is scaled by prototype, then by row, `iterations` times, until all prototypes get the same share of the
    rows. The last scaling by row is the softmax itself. In the log domain with z = logits / temperature,

        f = 0;   g_k = -LSE_rows(z + f);   f_n = -LSE_prototypes(z + g);   g_k = ... ;   the bias is the last g

    so that nothing overflows: exp(logits / 0.04) is infinite in float32 from logits of 3.55 on. Logits are made again
    in each iteration, a block of rows at a time, and never held beyond `block_bytes` (one row at least).

    Pass only rows that count (iBOT: the masked tokens). Several GPUs: every rank passes its own rows, possibly none,
    and `over_ranks=all_reduce_logsumexp`, called once per iteration with k numbers. In float32, or float64 for float64
    rows; no gradient. Raises ValueError for a temperature not above 0, no iteration, or no rows on a single rank.
    """
    _check_temperature(temperature, "sinkhorn_bias")
    if iterations < 1:
        raise ValueError(f"sinkhorn_bias needs at least 1 iteration, got {iterations}; SwAV and DINOv2 take 3")
    if prototypes.ndim != 2 or teacher.shape[-1:] != prototypes.shape[1:]:
        raise ValueError(
            f"sinkhorn_bias got rows of shape {tuple(teacher.shape)} and prototypes of {tuple(prototypes.shape)}; "
            f"expected [..., d] and [k, d]"
        )
    if block_bytes < 1:
        raise ValueError(f"sinkhorn_bias: block_bytes {block_bytes} leaves no room for logits; leave it out")
    rows = teacher.reshape(-1, teacher.shape[-1])
    if not len(rows) and over_ranks is None:
        raise ValueError("sinkhorn_bias needs at least 1 row, got none; without rows use bias=None")
    dtype = torch.promote_types(torch.promote_types(rows.dtype, prototypes.dtype), torch.float32)
    rows, prototypes = rows.to(dtype) / temperature, prototypes.to(dtype)
    count = max(1, block_bytes // (len(prototypes) * dtype.itemsize))
    bias = None
    for _ in range(iterations):
        with torch.autocast(rows.device.type, enabled=False):
            column = _column_logsumexp(rows, prototypes, bias, count)
        bias = -(column if over_ranks is None else over_ranks(column))
    assert bias is not None
    return bias


def all_reduce_logsumexp(value: Float[Tensor, " k"], group: Any = None) -> Float[Tensor, " k"]:
    """log(sum over ranks of exp(value)), by two all-reduces of k numbers: the largest, then the sum of the rest.

    `group`: of torch.distributed; None is all ranks. -inf, what a rank without rows has, counts for nothing.
    """
    import torch.distributed as dist  # where it's needed: torch may be built without it

    largest = value.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    total = torch.where(largest.isfinite(), value - largest, value).exp()
    dist.all_reduce(total, dist.ReduceOp.SUM, group=group)
    return torch.where(largest.isfinite(), largest + total.log(), largest)


def _column_logsumexp(
    rows: Float[Tensor, "n d"], prototypes: Float[Tensor, "k d"], bias: Float[Tensor, " k"] | None, count: int
) -> Float[Tensor, " k"]:
    """LSE over rows of z + f, where f makes the rows of z + bias distributions (0 without a bias)."""
    largest = rows.new_full((len(prototypes),), -torch.inf)
    total = torch.zeros_like(largest)
    for block in rows.split(count) if len(rows) else ():
        z = torch.mm(block, prototypes.T)
        if bias is not None:
            z -= torch.logsumexp(z + bias, dim=1, keepdim=True)
        before, largest = largest, torch.maximum(largest, z.amax(dim=0))
        total = total * (before - largest).exp() + z.sub_(largest).exp_().sum(dim=0)
    return largest + total.log()


def _check_temperature(temperature: float, by: str) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{by} needs a finite temperature above 0, got {temperature}; DINO's are 0.04 to 0.07")
