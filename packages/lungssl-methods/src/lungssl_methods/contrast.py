"""Contrastive losses: a row is to be told from strangers by its twin; what is neither counts for nothing.

In float32 at least, also under autocast: at temperature 0.1 logits reach 10, where one bf16 step is 0.06.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

_POSITIVE_SIGMAS = 3.0
"""Beyond it a soft positive weighs less than 1.1 % of a hard one, and is none."""


def nt_xent(
    first: Float[Tensor, "n d"],
    second: Float[Tensor, "n d"],
    groups: Int64[Tensor, " n"],
    temperature: float = 0.5,
    *,
    valid: Bool[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """NT-Xent of SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709): row i of both inputs is one sample.

    Negatives are the rows of other groups (patients), of both inputs; with as many groups as rows that is SimCLR's, and
    chance is ln(2 n - 1). In nats. Rows that are not `valid` are in no term. 0 where all rows are of one group.
    """
    return twin_contrast(first, second, groups[:, None] != groups[None], temperature=temperature, valid=valid)


def twin_contrast(
    first: Float[Tensor, "n d"],
    second: Float[Tensor, "n d"],
    stranger: Bool[Tensor, "n n"],
    *,
    temperature: float,
    valid: Bool[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """NT-Xent with the negatives given: `stranger[i, j]` says that row j, of either input, is one of row i.

    Mean over the valid rows of both inputs; 0 without one. Holds several (2 n)^2 matrices of floats.
    """
    n = len(first)
    keep = torch.ones(n, dtype=torch.bool, device=first.device) if valid is None else valid
    with torch.autocast(first.device.type, enabled=False):
        rows = _directions(torch.cat([first, second]))
        twin = torch.arange(2 * n, device=rows.device).roll(n)
        candidate = (stranger & keep).repeat(2, 2)
        candidate[torch.arange(2 * n, device=rows.device), twin] = True
        logits = (rows @ rows.mT / temperature).masked_fill(~candidate, -torch.inf)
        each = F.cross_entropy(logits, twin, reduction="none")
        weight = keep.repeat(2).to(each)
        return (each * weight).sum() / weight.sum().clamp_min(1.0)


def chance_nats(stranger: Bool[Tensor, "n n"], valid: Bool[Tensor, " n"]) -> Float[Tensor, ""]:
    """What `twin_contrast` gives where all rows are alike: mean over valid rows of ln(1 + twice their strangers)."""
    negatives = 2.0 * (stranger & valid).sum(dim=1)
    return (negatives.log1p() * valid).sum() / valid.sum().clamp_min(1)


def dense_infonce(
    first: Float[Tensor, "n d"],
    second: Float[Tensor, "n d"],
    positive: Float[Tensor, "n n"],
    negative: Bool[Tensor, "n n"],
    *,
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE (van den Oord et al. 2018, https://arxiv.org/abs/1807.03748) with soft positives, in nats.

    The candidates of row i of `first` are the rows j of `second` that are negative or whose `positive[i, j]` > 0. Their
    softmax is compared, by cross-entropy, with the positives' weights, scaled to sum to 1; so points near the true one
    may come next to it, but not before it. The other direction likewise, by columns. With an identity for positives and
    the rest negative it is plain InfoNCE, and chance is ln n. Rows without a positive are in no term; 0 without any.
    """
    with torch.autocast(first.device.type, enabled=False):
        logits = _directions(first) @ _directions(second).mT / temperature
        forth = _soft_cross_entropy(logits, positive, negative)
        back = _soft_cross_entropy(logits.mT, positive.mT, negative.mT)
    return (forth + back) / 2


def soft_positives(distance_mm: Float[Tensor, "n n"], sigma_mm: float) -> Float[Tensor, "n n"]:
    """exp(-d^2 / 2 sigma^2) up to 3 sigma; 0 beyond it and where the distance is NaN. A sigma of 0 leaves d = 0."""
    weight = torch.exp(-0.5 * (distance_mm / max(sigma_mm, 1e-6)).square())
    return torch.where(distance_mm <= _POSITIVE_SIGMAS * sigma_mm, weight, 0.0)


def far_or_strangers(
    distance_mm: Float[Tensor, "n n"], groups: Int64[Tensor, " n"], valid: Bool[Tensor, " n"], *, far_mm: float
) -> Bool[Tensor, "n n"]:
    """Pairs of valid points that are not one place: farther apart than `far_mm`, or of other patients (`groups`).

    Points of one patient whose distance is not known (NaN) are not negatives.
    """
    apart = (distance_mm > far_mm) | (groups[:, None] != groups[None])
    return apart & valid[:, None] & valid[None]


def _directions(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _soft_cross_entropy(
    logits: Float[Tensor, "n m"], positive: Float[Tensor, "n m"], negative: Bool[Tensor, "n m"]
) -> Float[Tensor, ""]:
    total = positive.sum(dim=1)
    known = total > 0
    left_out = ~(negative | (positive > 0))
    # Rows without a positive keep finite logits: a softmax over nothing is NaN, and so is its gradient times 0.
    log_share = logits.masked_fill(left_out & known[:, None], -torch.inf).log_softmax(dim=1)
    each = -(positive * log_share.masked_fill(left_out, 0.0)).sum(dim=1) / total.clamp_min(1e-12)
    return torch.where(known, each, 0.0).sum() / known.sum().clamp_min(1)
