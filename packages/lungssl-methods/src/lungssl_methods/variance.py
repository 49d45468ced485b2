"""Losses that keep embeddings from collapsing by their statistics over the batch, without negatives.

In float32 at least, also under autocast: variances are differences of near numbers.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def vicreg_terms(
    first: Float[Tensor, "n d"], second: Float[Tensor, "n d"], *, eps: float = 1e-4
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Invariance, variance and covariance of VICReg; row i of both inputs is one sample. All are 0 at best.

    Bardes et al. 2022, https://arxiv.org/abs/2105.04906, with the normalisation of the authors' code: the variance
    hinge is the mean of both views, the covariance their sum, and variances divide by n - 1. Their loss weighs them
    25, 25, 1; collapsed, it is 25 (1 - sqrt eps).

    Raises ValueError for fewer than 2 rows, which have no variance.
    """
    (hinge, covariance), (other_hinge, other_covariance) = (spread_terms(z, eps=eps) for z in (first, second))
    with torch.autocast(first.device.type, enabled=False):
        invariance = F.mse_loss(_full(first), _full(second))
    return invariance, (hinge + other_hinge) / 2, covariance + other_covariance


def spread_terms(x: Float[Tensor, "n d"], *, eps: float = 1e-4) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """What keeps VICReg's rows apart: hinge of each channel's standard deviation at 1, and squared covariances.

    Eq. 1 to 4 of the paper; `eps` is added to variances below the root. Constant rows give 1 - sqrt eps and 0, rows of
    unit variance without covariance 0 and 0. Raises ValueError for fewer than 2 rows.
    """
    _check_rows(x, "VICReg")
    with torch.autocast(x.device.type, enabled=False):
        full = _full(x)
        hinge = F.relu(1.0 - (full.var(dim=0) + eps).sqrt()).mean()
        return hinge, _covariance(full)


def barlow_twins(
    first: Float[Tensor, "n d"], second: Float[Tensor, "n d"], *, redundancy_weight: float = 5e-3, eps: float = 1e-5
) -> Float[Tensor, ""]:
    """Squared distance of the views' cross-correlation from the identity, its off-diagonal weighed less.

    Zbontar et al. 2021, https://arxiv.org/abs/2103.03230, eq. 1; a sum over d^2 entries. Channels are standardised as
    by batch norm: with the variance that divides by n, and `eps` added to it. Collapsed, it is d.

    Raises ValueError for fewer than 2 rows.
    """
    _check_rows(first, "barlow_twins")
    with torch.autocast(first.device.type, enabled=False):
        x, y = (_standardised(_full(z), eps) for z in (first, second))
        correlation = x.mT @ y / len(x)
        diagonal = correlation.diagonal()
        off_diagonal = correlation.square().sum() - diagonal.square().sum()
        return (diagonal - 1).square().sum() + redundancy_weight * off_diagonal


def direction_spread(x: Float[Tensor, "*rows d"], *, valid: Bool[Tensor, "*rows"] | None = None) -> Float[Tensor, ""]:
    """Spread of L2-normalised rows times sqrt(d), without gradient: 1 for directions all over the sphere, 0 for one.

    Of the rows that are `valid`, 0 without one.
    """
    rows = F.normalize(_full(x.detach()).flatten(0, -2), dim=-1)
    if valid is None:
        return rows.std(dim=0, correction=0).mean() * math.sqrt(rows.shape[1])
    share = valid.flatten()[:, None] / valid.sum().clamp_min(1).to(rows)  # no index: the host would wait for the device
    variance = (share * (rows - (share * rows).sum(dim=0)).square()).sum(dim=0)
    return variance.sqrt().mean() * math.sqrt(rows.shape[1])


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _standardised(x: Float[Tensor, "n d"], eps: float) -> Float[Tensor, "n d"]:
    return (x - x.mean(dim=0)) * (x.var(dim=0, correction=0) + eps).rsqrt()


def _covariance(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Sum of squares off the diagonal, over d."""
    centred = x - x.mean(dim=0)
    covariance = centred.mT @ centred / (len(x) - 1)
    return (covariance - covariance.diagonal().diag()).square().sum() / x.shape[1]


def _check_rows(x: Float[Tensor, "n d"], name: str) -> None:
    if len(x) < 2:
        raise ValueError(f"{name} needs at least 2 rows for its statistics, got {len(x)}; take larger batches")
