"""Auxiliary losses: what one token of the exhale scan says of how its place ventilates, checked against inhale.

`ssl.md` C4 (mass: the density-implied log-Jacobian) and C5 (recruitment). A head predicts from the token alone, never
from the inhale scan, so that the features must carry it. Targets are read off the views' images: intensity
augmentation that differs between the slots is noise in them, and per-volume scaling would make them meaningless.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lungssl_backbones.encoder import Features
from lungssl_data.batch import PairBatch, View
from torch import Tensor, nn

from lungssl_methods.correspondence import check_correspondences, token_matches
from lungssl_methods.physics import TokenTarget, image_to_hu, mass_target, recruitment_target

ROBUST_FROM = 0.1
"""Errors above it count linearly (smooth-L1's beta): 10 % of volume, 10 % of non-aerated lung, 100 HU. Twice the
5 % by which blood volume and registration disturb a token's mass balance."""


class TokenHead(nn.Module):
    """A linear prediction from each layer-normed token of slot 0's global views; a subclass says of what."""

    name: str
    outputs: int

    def __init__(self, dim: int, *, stride_vox: int, sigma_mm: float | None = None) -> None:
        """`dim`: width of the tokens. `sigma_mm`: as of `token_matches`; None: half the distance of tokens."""
        super().__init__()
        self.stride_vox = stride_vox
        self.sigma_mm = sigma_mm
        self.predict = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, self.outputs))

    def target(self, exhale: View, inhale: View, match: Float[Tensor, "b n m"]) -> TokenTarget:
        """What the tokens of `exhale` are to predict."""
        raise NotImplementedError

    def forward(
        self, batch: PairBatch, student: list[Features]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Lung-weighted mean smooth-L1, and metrics; `student` has the features of `batch.views`, in their order.

        `*_vs_mean` is the ratio to predicting the batch's mean everywhere: 1 where nothing regional is learned.
        `*_known_share` is the weight of a mean token. Samples of one phase count for nothing; where no place is
        known the loss and its gradient are 0. Raises ValueError where the crops were read without correspondences.
        """
        check_correspondences(batch, self.name)
        pairs = [
            (i, view, other)
            for i, view in enumerate(batch.views)
            for other in batch.views
            if (view.slot, other.slot) == (0, 1) and view.kind == other.kind == "global"
        ]
        if not pairs:
            raise ValueError(f"{self.name} needs global views of both slots; set globals_per_slot to at least 1")
        predicted, targets, weights = [], [], []
        for index, view, other in pairs:
            features = student[index]
            with torch.no_grad():
                sigma_mm = features.stride_mm / 2 if self.sigma_mm is None else self.sigma_mm
                match = token_matches(view, other, self.stride_vox, sigma_mm=sigma_mm)
                target = self.target(view, other, match)
                targets.append(target.value.flatten(0, 1))
                weights.append((target.weight * batch.paired()[:, None]).flatten())
            predicted.append(self.predict(features.tokens).flatten(0, 1).float())
        prediction, value, weight = torch.cat(predicted), torch.cat(targets), torch.cat(weights)
        loss = _robust(prediction, value, weight)
        with torch.no_grad():
            mean = (value * weight[:, None]).sum(0) / weight.sum().clamp_min(_LEAST)
            constant = _robust(mean.expand_as(value), value, weight)
            metrics = {
                f"{self.name}_vs_mean": loss.detach() / constant.clamp_min(_LEAST),
                f"{self.name}_known_share": weight.mean(),
            }
        return loss, metrics


class MassHead(TokenHead):
    """Predicts ln of the volume that a token's tissue takes up at inhale over that at exhale, by its density."""

    name = "mass"
    outputs = 1

    def target(self, exhale: View, inhale: View, match: Float[Tensor, "b n m"]) -> TokenTarget:
        """See `physics.mass_target`."""
        return mass_target(*_densities(exhale), *_densities(inhale), match, self.stride_vox)


class RecruitmentHead(TokenHead):
    """Predicts how a token's non-aerated share and mean HU change from exhale to inhale."""

    name = "recruitment"
    outputs = 2

    def target(self, exhale: View, inhale: View, match: Float[Tensor, "b n m"]) -> TokenTarget:
        """See `physics.recruitment_target`."""
        return recruitment_target(*_densities(exhale), *_densities(inhale), match, self.stride_vox)


AUXILIARY: dict[str, type[TokenHead]] = {"mass": MassHead, "recruitment": RecruitmentHead}
"""By the name that a method's weights use. Built by `AUXILIARY[name](dim, stride_vox=...)`."""

_LEAST = 1e-6


def _densities(view: View) -> tuple[Tensor, Tensor]:
    """HU [b, z, y, x] and measured lung."""
    return image_to_hu(view.image[:, 0].float()), view.lung & view.valid


def _robust(
    prediction: Float[Tensor, "rows c"], value: Float[Tensor, "rows c"], weight: Float[Tensor, " rows"]
) -> Float[Tensor, ""]:
    error = F.smooth_l1_loss(prediction, value, beta=ROBUST_FROM, reduction="none").mean(dim=1)
    return (error * weight).sum() / weight.sum().clamp_min(_LEAST)
