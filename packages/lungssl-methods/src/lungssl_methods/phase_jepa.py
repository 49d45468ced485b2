"""JEPA across breathing phases. Experimental: no published result says that it helps (`ssl.md` C6).

From most of one phase, a few tokens of the other as a cue to the motion, and how much the volume changes, predict what
a slow average of the encoder says of the other phase's hidden places; without the cue the best guess is a blur over
all deformations. Half of the loss stays within the phase, and a floor on the spread of features is added, because
cross-modal JEPA's losses were seen to fall while those within each modality rose. Watch `within_loss_vs_zero`.
Sources: as of `jepa`; the floor, VICReg (Bardes et al. 2022, https://arxiv.org/abs/2105.04906).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int64
from lungssl_backbones.encoder import token_grid
from lungssl_data.batch import PairBatch, StepOutput, View
from torch import Tensor, nn

from lungssl_methods.auto import RunSize, auto_momentum
from lungssl_methods.choices import check_choices
from lungssl_methods.hidden_views import check_global_views_only
from lungssl_methods.jepa import Jepa, keeping_encoder, stacked_views
from lungssl_methods.latent import (
    LatentPredictor,
    latent_loss,
    latent_targets,
    take,
    target_std,
)
from lungssl_methods.losses import ratio_to_still
from lungssl_methods.mae import sincos_positions
from lungssl_methods.masking import random_block_masks, visible_indices
from lungssl_methods.method import Gather, LocalGather, ViewCounts, own_rows, rank_part
from lungssl_methods.schedules import cosine_momentum
from lungssl_methods.teacher import follow, slow_copy
from lungssl_methods.variance import spread_terms

_LEAST_ML = 1.0
"""Added to both lung volumes, so that a crop without lung has a ratio too."""


class PhaseJepa(nn.Module):
    """Predicts each phase's features from the other's, and from its own. In `eval()` the masks are always the same."""

    typical_views = ViewCounts(globals_per_slot=1, locals_per_slot=0)
    needs_correspondences = False
    may_collapse = True
    base_rate = Jepa.base_rate

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """What is seen, what counts, and how it is predicted."""

        context_share: float = 0.75
        """Share of tokens seen of the phase that is predicted from (`ssl.md` C6)."""
        cue_share: tuple[float, float] = (0.1, 0.25)
        """Share of tokens seen of the phase that is predicted, drawn per batch (`ssl.md` C6)."""
        within_weight: float = 0.5
        """Weight of prediction within the phase; across has the rest. `ssl.md` C6 asks for at least half."""
        floor_weights: tuple[float, float] = (1.0, 0.04)
        """Weights of the variance and the covariance of the student's features (`ssl.md` C6)."""
        norm: Literal["smooth_l1", "l1"] = "l1"
        """Of the error (V-JEPA 2's), or I-JEPA's "smooth_l1"."""
        predictor_width: int = 192
        """Width of the predictor, a multiple of its heads; as of `Jepa.Config`."""
        predictor_depth: int = 4
        """Predictor blocks."""
        predictor_heads: int = 6
        """Predictor attention heads."""
        momentum: float | None = None
        """The teacher's EMA momentum at step 0, rising to 1 over the run. None: `auto.auto_momentum`."""

        def settled(self, run: RunSize) -> tuple["PhaseJepa.Config", dict[str, str]]:
            """The same with the momentum that the run's size decides, and the reason by key."""
            if self.momentum is not None:
                return self, {}
            auto = auto_momentum(run)
            return replace(self, momentum=auto.value), {"momentum": auto.reason}

        def build(
            self, encoder: nn.Module, *, total_steps: int, effective_batch: int = 32, gather: Gather | None = None
        ) -> "PhaseJepa":
            """As `Jepa.Config.build`; ValueError for a weight within the phase outside of [0, 1]."""
            return PhaseJepa(
                self, encoder, total_steps=total_steps, effective_batch=effective_batch, gather=gather or LocalGather()
            )

    @property
    def batch_separable(self) -> bool:
        """Not with the floor, whose statistics are of all samples of a forward."""
        return self.config.floor_weights == (0.0, 0.0)

    def __init__(
        self, config: Config, encoder: nn.Module, *, total_steps: int, effective_batch: int, gather: Gather
    ) -> None:
        """Raises ValueError for a module that is no Encoder or cannot encode some of its tokens, or an unknown norm."""
        super().__init__()
        check_choices("phase_jepa", config)
        checked = keeping_encoder(encoder, "phase_jepa")
        if not 0 <= config.within_weight <= 1:
            raise ValueError(f"within_weight must be in [0, 1], got {config.within_weight}; across has the rest")
        config, _ = config.settled(RunSize(effective_batch=effective_batch, total_steps=total_steps, patients=0))
        assert config.momentum is not None
        self.config = config
        self.gather = gather
        self.total_steps = total_steps
        self.base_momentum = config.momentum
        self.stride_vox = checked.token_stride_vox
        self.encoder = encoder
        self.teacher_encoder = slow_copy(encoder)
        width = config.predictor_width
        self.predictor = LatentPredictor(
            checked.dim, width=width, depth=config.predictor_depth, heads=config.predictor_heads
        )
        self.slot_embedding = nn.Parameter(torch.randn(2, width) * 0.02)
        self.embed_ratio = nn.Linear(1, width)

    def train(self, mode: bool = True) -> "PhaseJepa":
        """The teacher always stays in evaluation mode: no dropped paths in its targets."""
        super().train(mode)
        self.teacher_encoder.eval()
        return self

    def check_views(self, *, globals_per_slot: int, locals_per_slot: int) -> None:
        """Raises ValueError without global views, and with local ones, which would be made for nothing."""
        check_global_views_only("phase_jepa", globals_per_slot, locals_per_slot)

    def forward(self, batch: PairBatch, step: int) -> StepOutput:
        """Both directions' losses, each with its ratio to predicting 0, and the floor.

        Of samples with one scan, "across" is between two crops of it. Masks are drawn from torch's global CPU
        generator. Raises ValueError where the views differ in size or have too few tokens.
        """
        config = self.config
        views = batch.global_views()
        # All of slot 0, then all of slot 1: row i of one half belongs to row i of the other.
        views = tuple(sorted(views, key=lambda view: view.slot))
        image, measured = stacked_views(views, self.stride_vox, "phase_jepa")
        z, y, x = image.shape[2:]
        grid = token_grid((z, y, x), self.stride_vox)
        place = sincos_positions(grid, self.predictor.width).to(image.device)
        slot = torch.tensor([view.slot for view in views for _ in range(len(view.image))], device=image.device)
        seen, unseen = self._split(len(image), len(views), grid, context=True)
        cue, hidden = self._split(len(image), len(views), grid, context=False)
        seen, unseen, cue, hidden = (index.to(image.device) for index in (seen, unseen, cue, hidden))
        context = self.encoder(image, keep=seen).tokens
        cues = self.encoder(image, keep=cue).tokens
        with torch.no_grad():
            target = latent_targets(self.teacher_encoder(image).tokens)
        terms = {}

        within = self.predictor(context, self._place(place, seen, slot), self._place(place, unseen, slot))
        terms["within"] = (within, take(target, unseen), measured.gather(1, unseen))
        half = len(image) // 2
        other = torch.arange(len(image), device=image.device).roll(half)
        volume_ml = torch.cat([lung_volume_ml(view) for view in views])
        ratio = ((volume_ml + _LEAST_ML) / (volume_ml[other] + _LEAST_ML)).log()
        across = self.predictor(
            torch.cat([context[other], cues], dim=1),
            torch.cat([self._place(place, seen, slot)[other], self._place(place, cue, slot)], dim=1),
            self._place(place, hidden, slot),
            self.embed_ratio(ratio[:, None])[:, None],
        )
        terms["across"] = (across, take(target, hidden), measured.gather(1, hidden))

        losses, metrics = {}, {}
        for name, (predicted, wanted, weight) in terms.items():
            losses[name] = latent_loss(predicted, wanted, weight, norm=config.norm)
            zero = latent_loss(torch.zeros_like(wanted), wanted, weight, norm=config.norm)
            metrics[f"{name}_loss_vs_zero"] = ratio_to_still(losses[name], zero)
            losses[name] = rank_part(losses[name], weight, self.gather)
        variance, covariance = config.floor_weights
        rows = self.gather.rows(context.flatten(0, 1))
        hinge, off_diagonal = spread_terms(rows)
        floor = variance * hinge + covariance * off_diagonal
        predicted_loss = config.within_weight * losses["within"] + (1 - config.within_weight) * losses["across"]
        loss = predicted_loss + floor
        return StepOutput(
            loss=loss,
            metrics={
                "loss": loss.detach(),
                **metrics,
                "floor": floor.detach(),
                "target_std": target_std(target),
                "ema_momentum": torch.tensor(self.momentum(step)),
            },
        )

    def momentum(self, step: int) -> float:
        """The teacher's EMA momentum at a step."""
        return cosine_momentum(step, base=self.base_momentum, total_steps=self.total_steps)

    def after_optimizer_step(self, step: int) -> None:
        """Move the teacher: parameters by EMA, buffers copied."""
        follow([(self.teacher_encoder, self.encoder)], self.momentum(step))

    def export_encoder(self) -> nn.Module:
        """The teacher's encoder."""
        return self.teacher_encoder

    def _split(
        self, count: int, views: int, grid: tuple[int, int, int], *, context: bool
    ) -> tuple[Int64[Tensor, "g k"], Int64[Tensor, "g m"]]:
        """Visible and hidden tokens, on the CPU; held out, always the same. Single tokens, so that a cue is spread."""
        generator = None if self.training else torch.Generator().manual_seed(int(context))
        share = self.config.context_share
        if not context:
            low, high = self.config.cue_share
            share = low + (high - low) * float(torch.rand((), generator=generator))
        drawn = random_block_masks(count * self.gather.ranks, grid, ratio=1.0 - share, generator=generator)
        mask = own_rows(drawn, self.gather, views=views)
        return visible_indices(mask), visible_indices(~mask)

    def _place(
        self, place: Float[Tensor, "n w"], index: Int64[Tensor, "g k"], slot: Int64[Tensor, " g"]
    ) -> Float[Tensor, "g k w"]:
        """Position within the crop, and which slot it is of."""
        return place[index] + self.slot_embedding[slot][:, None]


def lung_volume_ml(view: View) -> Float[Tensor, " b"]:
    """Volume of the measured lung in the view, by the mean volume of its voxels in its scan."""
    coords = view.coords_mm
    edges = [torch.diff(coords, dim=axis).flatten(2).mean(dim=2) for axis in (2, 3, 4)]
    voxel_mm3 = torch.linalg.det(torch.stack(edges, dim=1)).abs()
    return (view.lung & view.valid).flatten(1).sum(dim=1) * voxel_mm3 / 1000.0
