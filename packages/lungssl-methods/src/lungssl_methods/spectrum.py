"""What a matrix of features says of collapse: how many directions it uses, and whether phases find each other in it.

Pure functions, in float64, of features [samples, channels]; all of them small: some hundred samples of a probe set.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lungssl_methods.variance import direction_spread

_RANKME_EPS = 1e-7
"""Added to each share, as RankMe has it."""


def effective_rank(features: Float[Tensor, "n d"]) -> float:
    """exp of the entropy of the normalised singular values of centred features; 1 to d, and 0 without any spread.

    Roy and Vetterli 2007, https://ieeexplore.ieee.org/document/7098875.
    """
    values = _singular_values(features - features.double().mean(dim=0))
    if values.sum() <= 1e-12 * max(1.0, features.abs().max().item()) * len(features):
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


def rankme(features: Float[Tensor, "n d"]) -> float:
    """The same without centring, each share raised by 1e-7: Garrido et al. 2023, https://arxiv.org/abs/2210.02885."""
    values = _singular_values(features.double())
    shares = values / values.sum().clamp_min(1e-300) + _RANKME_EPS
    return float((-(shares * shares.log()).sum()).exp())


def embedding_std(features: Float[Tensor, "n d"]) -> float:
    """Spread of L2-normalised rows times sqrt(d): 1 for directions all over the sphere, 0 where all are one."""
    return float(direction_spread(features.double()))


def off_diagonal_cosine(features: Float[Tensor, "n d"]) -> float:
    """Mean cosine of different rows: 1 where all crops look alike, about 0 for spread ones."""
    rows = torch.nn.functional.normalize(features.double(), dim=-1)
    n = len(rows)
    return float((rows.sum(0).square().sum() - rows.square().sum()) / (n * (n - 1)))


def paired_retrieval(exhale: Float[Tensor, "n d"], inhale: Float[Tensor, "n d"]) -> tuple[float, float]:
    """Top-1 and mean reciprocal rank of finding each patient's inhale among all by cosine. Ties count against.

    Chance is 1 / n. A shortcut (ribs, tubes, table) finds patients as well as their lungs do: `ssl.md` C1.
    """
    one, other = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (exhale, inhale))
    scores = one @ other.T
    own = scores.diagonal()[:, None]
    at_least = (scores >= own - 1e-12).sum(dim=1)  # the own one included
    return float((at_least == 1).double().mean()), float((1.0 / at_least.double()).mean())


def phase_auc(features: Float[Tensor, "n d"], inhale: Bool[Tensor, " n"], patient: Int64[Tensor, " n"]) -> float:
    """How well a linear probe tells phases of patients it wasn't fitted to: area under the ROC curve, 0.5 is chance.

    Ridge regression without intercept on standardised features, with the penalty n, each patient left out in turn; the
    scores of all folds are ranked together. 1 means that the phase is written into the embedding.
    """
    x = features.double()
    x = (x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-12)
    y = inhale.double() * 2 - 1
    scores = torch.empty(len(x), dtype=torch.float64)
    for one in patient.unique():
        out = patient == one
        kernel = x[~out] @ x[~out].T + (~out).sum() * torch.eye(int((~out).sum()), dtype=torch.float64)
        target = y[~out] - y[~out].mean()
        scores[out] = x[out] @ (x[~out].T @ torch.linalg.solve(kernel, target))
    first, second = scores[inhale], scores[~inhale]
    if not len(first) or not len(second):
        raise ValueError(f"phase_auc needs scans of both phases, got {len(first)} inhale and {len(second)} exhale")
    above = (first[:, None] > second).double() + 0.5 * (first[:, None] == second).double()
    return float(above.mean())


def _singular_values(features: Float[Tensor, "n d"]) -> Float[Tensor, " k"]:
    return torch.linalg.svdvals(features.double())
