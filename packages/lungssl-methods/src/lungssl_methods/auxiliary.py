"""Auxiliary losses of two phases: what a token of the exhale scan says of the air that its place takes in.

`ssl.md` C4 and C5: small heads on the student's tokens, to be weighted about 0.1 beside a method's own loss. Targets
are read from both scans at corresponding places; the head sees the exhale token alone ("ventilation from one phase").
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lungssl_backbones.encoder import Features
from lungssl_data.batch import PairBatch, View
from torch import Tensor, nn

from lungssl_methods.correspondence import token_matches, token_mean
from lungssl_methods.losses import ratio_to_still
from lungssl_methods.method import Gather, LocalGather, mean_over_ranks
from lungssl_methods.physics import (
    NON_AERATED_HU,
    log_jacobian_from_density,
    tissue_fraction,
    to_hu,
    undisturbed_hu,
)

LEAST_LUNG = 0.5
"""Share of lung in a token from which its mean says something of lung."""


@dataclass(frozen=True, kw_only=True)
class TokenAir:
    """Means over the lung voxels of each token of a view."""

    fraction: Float[Tensor, "b n"]
    """Tissue fraction."""
    non_aerated: Float[Tensor, "b n"]
    """Share of voxels above -100 HU."""
    lung: Float[Tensor, "b n"]
    """Share of the token that is measured lung."""


def token_air(view: View, stride_vox: int) -> TokenAir:
    """How much tissue each token's lung holds, by the view's HU before its own shift and gamma; of no meaning where
    `lung` is 0."""
    if view.shift_hu is None or view.gamma is None:
        hu = to_hu(view.image)
    else:
        hu = undisturbed_hu(view.image, shift_hu=view.shift_hu, gamma=view.gamma)
    inside = (view.lung & view.valid)[:, None].float()
    lung = token_mean(inside, stride_vox)[..., 0]
    per_lung = 1.0 / lung.clamp_min(1e-6)
    return TokenAir(
        fraction=token_mean(tissue_fraction(hu) * inside, stride_vox)[..., 0] * per_lung,
        non_aerated=token_mean((hu > NON_AERATED_HU) * inside, stride_vox)[..., 0] * per_lung,
        lung=lung,
    )


class _PhaseHead(nn.Module, ABC):
    """Norm, two layers, `outputs` numbers per token of slot 0, matched against targets from both slots.

    The last layer starts at 0, so that the first loss is that of predicting no change.
    """

    name: ClassVar[str]
    outputs: ClassVar[int]

    def __init__(self, dim: int, *, stride_vox: int, gather: Gather | None = None) -> None:
        super().__init__()
        self.stride_vox = stride_vox
        self.gather = gather or LocalGather()
        self.net = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, self.outputs))
        nn.init.zeros_(self.net[-1].weight)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(self.net[-1].bias)  # pyright: ignore[reportArgumentType]

    @abstractmethod
    def targets(self, exhale: TokenAir, inhale: TokenAir) -> Float[Tensor, "b n outputs"]:
        """What is predicted, of tokens at the same places."""

    def forward(self, batch: PairBatch, student: list[Features]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Smooth L1 over tokens with lung on both sides, and its ratio to predicting no change; 0 without any.

        `student` has the features of all the batch's views; samples of one phase count for nothing. On several
        ranks, in `train()`, the ranks' mean of it is the mean over all tokens.
        """
        total, zero, weights = [], [], []
        views = batch.global_views()
        paired = batch.paired()[:, None]
        for i, first in enumerate(views):
            for second in views:
                if first.slot != 0 or second.slot != 1:
                    continue
                target, weight = self._target(first, second, paired)
                predicted = self.net(student[i].tokens).float()
                total.append(F.smooth_l1_loss(predicted, target, reduction="none").mean(-1) * weight)
                zero.append(F.smooth_l1_loss(torch.zeros_like(target), target, reduction="none").mean(-1) * weight)
                weights.append(weight)
        number = torch.cat(weights).sum()
        if self.training:
            number = mean_over_ranks(number, self.gather)
        loss, still = (torch.cat(each).sum() / number.clamp_min(1e-6) for each in (total, zero))
        return loss, {f"{self.name}_vs_no_change": ratio_to_still(loss, still)}

    @torch.no_grad()
    def _target(
        self, first: View, second: View, paired: Tensor
    ) -> tuple[Float[Tensor, "b n outputs"], Float[Tensor, "b n"]]:
        step_mm = (first.coords_mm[..., 0, 0, 1] - first.coords_mm[..., 0, 0, 0]).norm(dim=1).mean()
        sigma_mm = 0.5 * self.stride_vox * float(step_mm)  # half a token: reads between the nearest ones
        match = token_matches(first, second, self.stride_vox, sigma_mm=sigma_mm)
        here, there = token_air(first, self.stride_vox), token_air(second, self.stride_vox)
        seen = match * there.lung[:, None]
        share = seen.sum(dim=2)
        seen = seen / share.clamp_min(1e-6)[..., None]

        def read(values: Tensor) -> Tensor:
            return (seen @ values[..., None])[..., 0]

        at_place = TokenAir(fraction=read(there.fraction), non_aerated=read(there.non_aerated), lung=share)
        weight = ((here.lung >= LEAST_LUNG) & (share >= LEAST_LUNG) & paired).float()
        target = self.targets(here, at_place)
        return torch.where(weight[..., None] > 0, target, 0.0), weight


class MassHead(_PhaseHead):
    """Predicts ln J, the local expansion, as conserved tissue implies it (`physics.log_jacobian_from_density`)."""

    name = "mass"
    outputs = 1

    def targets(self, exhale: TokenAir, inhale: TokenAir) -> Float[Tensor, "b n outputs"]:
        low = torch.finfo(torch.float32).tiny  # places without lung, which don't count
        return log_jacobian_from_density(exhale.fraction.clamp_min(low), inhale.fraction.clamp_min(low))[..., None]


class RecruitmentHead(_PhaseHead):
    """Predicts how much less of the place is non-aerated at inhale, and how its tissue fraction changes.

    Recruitment is the fall of the non-aerated share (Gattinoni et al. 2006, https://doi.org/10.1056/NEJMoa052052).
    """

    name = "recruitment"
    outputs = 2

    def targets(self, exhale: TokenAir, inhale: TokenAir) -> Float[Tensor, "b n outputs"]:
        return torch.stack([exhale.non_aerated - inhale.non_aerated, inhale.fraction - exhale.fraction], dim=-1)


AUXILIARY: dict[str, type[MassHead] | type[RecruitmentHead]] = {"mass": MassHead, "recruitment": RecruitmentHead}
"""Name -> class, built with (dim, stride_vox=...)."""
