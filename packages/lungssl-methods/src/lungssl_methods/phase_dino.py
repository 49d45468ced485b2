"""DINO across breathing phases: what stays the same of a lung, for the crop as a whole and for each place in it.

`ssl.md` C1. The other phase is an augmentation that no transform can make. Beside DINO's pairs, of which those of two
slots are of two phases, tokens learn what the teacher says of the same place in the other phase, found in mm by the
cache's displacement. What changes between phases (air, blood, recruitment) would be provably discarded by that: so the
embedding is split. The first part is matched across views; the rest is free, and trained by iBOT's term within the
phase and by what the scans say of ventilation (`auxiliary`).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from lungssl_backbones.encoder import Features
from lungssl_data.batch import PairBatch, StepOutput, View
from torch import Tensor, nn

from lungssl_methods.auxiliary import AUXILIARY
from lungssl_methods.correspondence import check_correspondences, token_matches, token_mean
from lungssl_methods.dino import Dino, Distil, weighted_rows
from lungssl_methods.distillation import Distillation
from lungssl_methods.method import Gather, LocalGather, ViewCounts, checked_encoder


class PhaseDino(Dino):
    """DINO with a dense term across phases and a part of the embedding that stays out of it."""

    typical_views = ViewCounts(globals_per_slot=1, locals_per_slot=2)
    needs_correspondences = True
    may_collapse = True
    config: "PhaseDino.Config"

    @dataclass(frozen=True, kw_only=True)
    class Config(Dino.Config):
        """DINO's, and what two phases add."""

        dense_weight: float = 1.0
        """Weight of the tokens' cross-entropy with the other phase's teacher at the same place, as iBOT's has."""
        match_sigma_mm: float | None = None
        """Standard deviation of the Gaussian over the other view's tokens around that place. None: half the distance of
        neighbouring tokens, so that it reads between them."""
        invariant_share: float = 0.75
        """Share of the embedding's channels, the first ones, that is matched across views; 1 matches all of them."""
        mass_weight: float = 0.1
        """Weight of `auxiliary`'s mass conservation, learned from the other channels (`ssl.md` C5 for both)."""
        recruitment_weight: float = 0.1
        """Weight of `auxiliary`'s recruitment, likewise."""

        def build(
            self, encoder: nn.Module, *, total_steps: int, effective_batch: int = 32, gather: Gather | None = None
        ) -> "PhaseDino":
            """As `Dino.Config.build`; ValueError for a share that leaves the auxiliary losses no channel."""
            return PhaseDino(
                self, encoder, total_steps=total_steps, effective_batch=effective_batch, gather=gather or LocalGather()
            )

    def __init__(
        self, config: Config, encoder: nn.Module, *, total_steps: int, effective_batch: int, gather: Gather
    ) -> None:
        checked = checked_encoder(encoder)
        self.invariant_dim = round(config.invariant_share * checked.dim)
        weights = {"mass": config.mass_weight, "recruitment": config.recruitment_weight}
        self.auxiliary_weights = {name: weight for name, weight in weights.items() if weight > 0}
        free = checked.dim - self.invariant_dim
        if not 0 < self.invariant_dim <= checked.dim or (self.auxiliary_weights and not free):
            raise ValueError(
                f"invariant_share {config.invariant_share} leaves {self.invariant_dim} of {checked.dim} channels to be "
                f"matched and {free} for {' and '.join(self.auxiliary_weights) or 'nothing else'}; take a share "
                f"between 0 and 1, or 1 with mass_weight=0 and recruitment_weight=0"
            )
        super().__init__(config, encoder, total_steps=total_steps, effective_batch=effective_batch, gather=gather)
        spacing_mm = checked.token_stride_vox * checked.spacing_mm
        self.sigma_mm = 0.5 * spacing_mm if config.match_sigma_mm is None else config.match_sigma_mm
        self.dense = Distillation(self.invariant_dim, self.head_config, gather) if config.dense_weight > 0 else None
        self.auxiliary = nn.ModuleDict(
            {name: AUXILIARY[name](free, stride_vox=self.stride_vox, gather=gather) for name in self.auxiliary_weights}
        )

    def forward(self, batch: PairBatch, step: int) -> StepOutput:
        """As `Dino.forward`; `dense_loss_lnk` is the dense term, `matched_share` the share of lung that it sees.

        Raises ValueError where the crops were read without correspondences.
        """
        check_correspondences(batch, "phase_dino")
        return super().forward(batch, step)

    def summary_dim(self, dim: int) -> int:
        """The invariant channels."""
        return self.invariant_dim

    def summary_part(self, embedding: Float[Tensor, "v b d"]) -> Float[Tensor, "v b e"]:
        """The invariant channels."""
        return embedding[..., : self.invariant_dim]

    def heads(self) -> list[Distillation]:
        """With the dense term's."""
        return super().heads() if self.dense is None else [*super().heads(), self.dense]

    def wants_tokens(self) -> bool:
        """They are matched across phases, and the auxiliary losses read them."""
        return True

    def more_terms(
        self, batch: PairBatch, student: list[Features], teacher: list[Features], distil: Distil
    ) -> dict[str, tuple[float, Tensor]]:
        """The dense term across phases, and the auxiliary losses."""
        terms = {}
        if self.dense is not None:
            loss, share = self._dense_loss(batch.global_views(), student, teacher, distil)
            terms["dense_loss"] = (self.config.dense_weight, loss)
            terms["matched_share"] = (0.0, share)
        free = [
            Features(
                cls=None,
                tokens=one.tokens[..., self.invariant_dim :],
                pyramid=(),
                grid=one.grid,
                stride_mm=one.stride_mm,
            )
            for one in student
        ]
        for name, weight in self.auxiliary_weights.items():
            loss, metrics = self.auxiliary[name](batch, free)
            terms[f"{name}_loss"] = (weight, loss)
            terms |= {key: (0.0, value) for key, value in metrics.items()}
        return terms

    def _dense_loss(
        self, views: tuple[View, ...], student: list[Features], teacher: list[Features], distil: Distil
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Cross-entropy over tokens, weighted by their share of lung; and the share of lung that was matched."""
        assert self.dense is not None
        rows, targets, weights, lung = [], [], [], []
        for i, first in enumerate(views):
            for j, second in enumerate(views):
                if first.slot == second.slot:
                    continue
                with torch.no_grad():
                    match = token_matches(first, second, self.stride_vox, sigma_mm=self.sigma_mm)
                    share = token_mean(first.lung[:, None].float(), self.stride_vox)[..., 0]
                    targets.append((match @ teacher[j].tokens.float())[..., : self.invariant_dim])
                    weights.append(share * match.sum(dim=2))
                    lung.append(share)
                rows.append(student[i].tokens[..., : self.invariant_dim])
        weight, total = torch.cat(weights).flatten(), torch.cat(lung).sum()
        found = weighted_rows(weight)
        row, target = (torch.cat(parts).flatten(0, 1)[found][None] for parts in (rows, targets))
        loss, _ = self.dense(row, target, weight[found][None, None], **distil)
        return loss, torch.cat(weights).sum() / total.clamp_min(1e-6)
