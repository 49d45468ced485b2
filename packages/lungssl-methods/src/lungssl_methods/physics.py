"""What breathing does to CT density: tissue is kept, air comes and goes.

Mass conservation (`ssl.md` C4; Reinhardt et al. 2008, https://doi.org/10.1016/j.media.2008.03.007): with phi from
exhale to inhale points and J its Jacobian determinant, f_inhale(phi(x)) J(x) = f_exhale(x) for the tissue fraction f.
Blood that moves and airless lung that opens break it: losses on it should be robust.
Axes: z y x voxels, points and displacements (x, y, z) in mm; n exhale tokens, m inhale tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from lungssl_data.batch import HU_WINDOW
from lungssl_ops.warp import jacobian_determinant
from torch import Tensor

from lungssl_methods.correspondence import token_mean

FRACTION_RANGE = (0.02, 1.1)
"""Below is the noise of air (20 HU), above nothing but bone and contrast (`ssl.md` C4)."""
NON_AERATED_HU = -100.0
"""Lung above it has no air (`ssl.md` C5; Gattinoni et al. 2001, https://doi.org/10.1164/ajrccm.164.9.2103121)."""


@dataclass(frozen=True, kw_only=True)
class TokenTarget:
    """What a token is to predict, and how much it counts."""

    value: Float[Tensor, "b n c"]
    """Finite everywhere."""
    weight: Float[Tensor, "b n"]
    """Share of lung here times that there, in [0, 1]; 0 where the place is not known."""


def image_to_hu(image: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """HU of network input. What the window clipped stays clipped: -1000 and 400 HU are beyond all lung."""
    low, high = HU_WINDOW
    return image * (high - low) + low


def tissue_fraction(hu: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Share of a voxel that is no air: 0 at -1000 HU, 1 at 0 HU, clipped to FRACTION_RANGE."""
    return ((hu + 1000.0) / 1000.0).clamp(*FRACTION_RANGE)


def fraction_to_hu(fraction: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The inverse of `tissue_fraction` within its range."""
    return 1000.0 * fraction - 1000.0


def log_jacobian_from_density(
    exhale: Float[Tensor, "*shape"], inhale: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """ln J that two tissue fractions of the same tissue imply: positive where it expands from exhale to inhale.

    Needs the map but not its derivative. In nats; ln 1.5 = 0.405 is 50 % more volume.
    """
    return exhale.log() - inhale.log()


def jacobian(
    displacement_mm: Float[Tensor, "b 3 z y x"], spacing_mm: tuple[float, float, float]
) -> Float[Tensor, "b z y x"]:
    """Volume change of x -> x + u(x), of u on a lattice of `spacing_mm` (x, y, z); its error is O(spacing^2) inside.

    Raises ValueError for a spacing that is not positive.
    """
    if min(spacing_mm) <= 0:
        raise ValueError(f"spacing_mm must be positive along (x, y, z), got {spacing_mm}")
    return jacobian_determinant(displacement_mm / displacement_mm.new_tensor(spacing_mm).reshape(3, 1, 1, 1))


def mass_residual(
    exhale: Float[Tensor, "b z y x"],
    inhale_there: Float[Tensor, "b z y x"],
    jacobian: Float[Tensor, "b z y x"],
    mask: Bool[Tensor, "b z y x"],
    *,
    smooth_vox: int = 1,
) -> Float[Tensor, "b z y x"]:
    """f_inhale(phi) J - f_exhale, averaged over the masked voxels of cubes of `smooth_vox` a side; 0 outside the mask.

    Tissue fractions on the exhale grid. Negative where tissue went missing. 4 to 5 mm of smoothing take out noise and
    the registration's error (`ssl.md` C4). Unmasked voxels may be NaN. Raises ValueError for an even or negative side.
    """
    if smooth_vox < 1 or smooth_vox % 2 == 0:
        raise ValueError(f"smooth_vox must be odd and positive, got {smooth_vox}; take {abs(smooth_vox) + 1}")
    weight = mask.to(exhale.dtype)
    residual = torch.where(mask, inhale_there * jacobian - exhale, 0.0)
    if smooth_vox > 1:
        total, share = (
            F.avg_pool3d(part[:, None], smooth_vox, stride=1, padding=smooth_vox // 2)[:, 0]
            for part in (residual, weight)
        )
        residual = torch.where(mask, total / share.clamp_min(0.5 / smooth_vox**3), 0.0)
    return residual


def mass_target(
    exhale_hu: Float[Tensor, "b z y x"],
    exhale_lung: Bool[Tensor, "b z y x"],
    inhale_hu: Float[Tensor, "b iz iy ix"],
    inhale_lung: Bool[Tensor, "b iz iy ix"],
    match: Float[Tensor, "b n m"],
    stride_vox: int,
) -> TokenTarget:
    """Density-implied ln J of each exhale token, from mean tissue fractions of its lung and of the lung it matches.

    `match` as of `correspondence.token_matches`; one token averages over more than the 5 mm that `mass_residual` asks.
    """
    here, there, weight = _matched_means(
        tissue_fraction(exhale_hu)[:, None],
        exhale_lung,
        tissue_fraction(inhale_hu)[:, None],
        inhale_lung,
        match,
        stride_vox,
    )
    least = FRACTION_RANGE[0]
    return TokenTarget(
        value=log_jacobian_from_density(here.clamp_min(least), there.clamp_min(least)),
        weight=weight,
    )


def recruitment_target(
    exhale_hu: Float[Tensor, "b z y x"],
    exhale_lung: Bool[Tensor, "b z y x"],
    inhale_hu: Float[Tensor, "b iz iy ix"],
    inhale_lung: Bool[Tensor, "b iz iy ix"],
    match: Float[Tensor, "b n m"],
    stride_vox: int,
) -> TokenTarget:
    """Inhale minus exhale of (non-aerated share of the lung, mean HU / 1000), per exhale token.

    The first is negative where lung opens, the second where it takes up air. `match` as of
    `correspondence.token_matches`.
    """
    exhale, inhale = (
        torch.stack([(hu > NON_AERATED_HU).to(hu.dtype), hu / 1000.0], dim=1) for hu in (exhale_hu, inhale_hu)
    )
    here, there, weight = _matched_means(exhale, exhale_lung, inhale, inhale_lung, match, stride_vox)
    return TokenTarget(value=torch.where(weight[..., None] > 0, there - here, 0.0), weight=weight)


def _matched_means(
    exhale: Float[Tensor, "b c z y x"],
    exhale_lung: Bool[Tensor, "b z y x"],
    inhale: Float[Tensor, "b c iz iy ix"],
    inhale_lung: Bool[Tensor, "b iz iy ix"],
    match: Float[Tensor, "b n m"],
    stride_vox: int,
) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"], Float[Tensor, "b n"]]:
    """Means over each token's lung voxels here and there (0 without any), and the product of both lung shares."""
    total, share = _lung_sums(exhale, exhale_lung, stride_vox)
    total_there, share_there = (match @ part for part in _lung_sums(inhale, inhale_lung, stride_vox))
    # Less than one voxel of lung is rounding, in any crop.
    least = 0.5 / stride_vox**3
    here, there = total / share.clamp_min(least), total_there / share_there.clamp_min(least)
    return here, there, (share * share_there)[..., 0]


def _lung_sums(
    values: Float[Tensor, "b c z y x"], lung: Bool[Tensor, "b z y x"], stride_vox: int
) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n 1"]]:
    inside = lung[:, None]
    return token_mean(torch.where(inside, values, 0.0), stride_vox), token_mean(inside.float(), stride_vox)
