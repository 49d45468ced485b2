"""Terms beside a self-distillation loss, as pure functions: spread of embeddings, and patch similarities kept."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

_EPS = 1e-8
"""Least distance, as DINOv2 has it; two equal vectors of 256 features then give 15.587."""


def koleo(
    x: Float[Tensor, "b d"], groups: Int64[Tensor, " b"], *, valid: Bool[Tensor, " b"] | None = None
) -> Float[Tensor, ""]:
    """-mean log distance to the nearest neighbour of another group, of L2-normalised rows: pushes samples apart.

    Sablayrolles et al. 2019, https://arxiv.org/abs/1806.03198, as in DINOv2 (Oquab et al. 2023,
    https://arxiv.org/abs/2304.07193). Rows of one group (the phases and crops of a patient) are not pushed apart; rows
    without a stranger count for nothing, and rows that are not `valid` are nobody's neighbour, either. Antipodal rows
    give -ln 2, orthonormal ones -ln sqrt 2. 0 without strangers.

    In float32 at least: in half precision the distances of neighbours are rounded away.
    """
    with torch.autocast(x.device.type, enabled=False):
        rows = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=_EPS)
        twins = groups[:, None] == groups[None]
        if valid is not None:
            twins = twins | ~(valid[:, None] & valid[None])
        with torch.no_grad():
            nearest = (rows @ rows.mT).masked_fill(twins, -2.0).argmax(dim=1)
        distance = torch.linalg.vector_norm(rows - rows[nearest] + _EPS, dim=-1)
        lonely = twins.all(dim=1)
        loss = -(distance + _EPS).log().masked_fill(lonely, 0.0)
        return loss.sum() / (~lonely).sum().clamp_min(1)


def gram(
    student: Float[Tensor, "b n d"], anchor: Float[Tensor, "b n d"], *, valid: Bool[Tensor, " b"] | None = None
) -> Float[Tensor, ""]:
    """Mean squared difference of the tokens' cosine similarities within each crop to those of an earlier teacher.

    Gram anchoring of DINOv3 (Siméoni et al. 2025, https://arxiv.org/abs/2508.10104): dense features of long runs
    decay while the summary improves; similarities of patches don't fix the features themselves. No gradient to
    `anchor`. Of the crops that are `valid`, 0 without one.
    """
    similar = [F.normalize(x.float(), dim=-1) for x in (student, anchor.detach())]
    first, second = (x @ x.mT for x in similar)
    each = (first - second).square().mean(dim=(1, 2))
    if valid is None:
        return each.mean()
    return (each * valid).sum() / valid.sum().clamp_min(1)
