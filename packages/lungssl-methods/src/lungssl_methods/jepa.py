"""I-JEPA in 3-D: from some tokens of a crop, predict what a slow average of the encoder says of others.

Source: Assran et al. 2023, https://arxiv.org/abs/2301.08243; the option of plain L1 is V-JEPA 2's (Assran et al. 2025,
https://arxiv.org/abs/2506.09985). Differs from it: boxes in 3-D (see `block_targets`), a smaller predictor for smaller
encoders and batches, the EMA's momentum by the batch and rising by a cosine as in DINO, and padding counts for nothing.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from lungssl_backbones.encoder import Encoder, token_grid
from lungssl_data.batch import PairBatch, StepOutput, View
from torch import Tensor, nn

from lungssl_methods.auto import BaseRate, RunSize, auto_momentum
from lungssl_methods.block_targets import sample_blocks
from lungssl_methods.choices import check_choices
from lungssl_methods.correspondence import token_mean
from lungssl_methods.hidden_views import check_global_views_only, stacked_images
from lungssl_methods.latent import LatentPredictor, latent_loss, latent_targets, take, target_std
from lungssl_methods.losses import ratio_to_still
from lungssl_methods.mae import sincos_positions
from lungssl_methods.method import Gather, LocalGather, ViewCounts, checked_encoder, own_rows, rank_part
from lungssl_methods.schedules import cosine_momentum
from lungssl_methods.teacher import follow, slow_copy


class Jepa(nn.Module):
    """Predicts features of hidden boxes of both slots' global views. In `eval()` the boxes are always the same."""

    typical_views = ViewCounts(globals_per_slot=1, locals_per_slot=0)
    needs_correspondences = False
    may_collapse = True
    batch_separable = True
    base_rate = BaseRate(lr=1e-3, batch=2048, source="ssl.md B.3, I-JEPA")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """What is hidden, and how it is predicted."""

        targets: int = 4
        """Boxes to predict in each view (I-JEPA)."""
        target_scale: tuple[float, float] = (0.15, 0.2)
        """Share of the tokens in each box (I-JEPA)."""
        target_aspect: tuple[float, float] = (0.75, 1.5)
        """Aspect ratios of boxes (I-JEPA)."""
        context_scale: tuple[float, float] = (0.85, 1.0)
        """Share of the tokens in the box that the context is left of (I-JEPA)."""
        min_keep: int = 10
        """Fewest context tokens (I-JEPA)."""
        norm: Literal["smooth_l1", "l1"] = "smooth_l1"
        """Of the error: I-JEPA's, or V-JEPA 2's "l1"."""
        predictor_width: int = 192
        """Width of the predictor, a multiple of its heads; 384 in the paper, beside encoders of 768 and more."""
        predictor_depth: int = 4
        """Predictor blocks; 6 to 12 in the paper."""
        predictor_heads: int = 6
        """Predictor attention heads."""
        momentum: float | None = None
        """The teacher's EMA momentum at step 0, rising to 1 over the run. None: `auto.auto_momentum`."""

        def settled(self, run: RunSize) -> tuple["Jepa.Config", dict[str, str]]:
            """The same with the momentum that the run's size decides, and the reason by key."""
            if self.momentum is not None:
                return self, {}
            auto = auto_momentum(run)
            return replace(self, momentum=auto.value), {"momentum": auto.reason}

        def build(
            self, encoder: nn.Module, *, total_steps: int, effective_batch: int = 32, gather: Gather | None = None
        ) -> "Jepa":
            """A JEPA around `encoder`, which becomes the student and is copied for the teacher.

            `effective_batch`: samples per optimizer step over all ranks and accumulated micro-batches.
            """
            return Jepa(
                self, encoder, total_steps=total_steps, effective_batch=effective_batch, gather=gather or LocalGather()
            )

    def __init__(
        self, config: Config, encoder: nn.Module, *, total_steps: int, effective_batch: int, gather: Gather
    ) -> None:
        """Raises ValueError for a module that is no Encoder or cannot encode some of its tokens, or an unknown norm."""
        super().__init__()
        check_choices("jepa", config)
        checked = keeping_encoder(encoder, "jepa")
        config, _ = config.settled(RunSize(effective_batch=effective_batch, total_steps=total_steps, patients=0))
        assert config.momentum is not None
        self.config = config
        self.gather = gather
        self.total_steps = total_steps
        self.base_momentum = config.momentum
        self.stride_vox = checked.token_stride_vox
        self.encoder = encoder
        self.teacher_encoder = slow_copy(encoder)
        self.predictor = LatentPredictor(
            checked.dim, width=config.predictor_width, depth=config.predictor_depth, heads=config.predictor_heads
        )

    def train(self, mode: bool = True) -> "Jepa":
        """The teacher always stays in evaluation mode: no dropped paths in its targets."""
        super().train(mode)
        self.teacher_encoder.eval()
        return self

    def check_views(self, *, globals_per_slot: int, locals_per_slot: int) -> None:
        """Raises ValueError without global views, and with local ones, which would be made for nothing."""
        check_global_views_only("jepa", globals_per_slot, locals_per_slot)

    def forward(self, batch: PairBatch, step: int) -> StepOutput:
        """Loss over target tokens; `loss_vs_zero` is its ratio to predicting 0, 1 where nothing is learned.

        `target_std` falls to 0 in a collapse, and the loss with it. Boxes are drawn from torch's global CPU generator,
        on any device. Raises ValueError where the views differ in size or have too few tokens.
        """
        config = self.config
        views = batch.global_views()
        image, measured = stacked_views(views, self.stride_vox, "jepa")
        z, y, x = image.shape[2:]
        grid = token_grid((z, y, x), self.stride_vox)
        # Held-out boxes are the same at every evaluation, so that losses of different steps compare.
        generator = None if self.training else torch.Generator().manual_seed(0)
        blocks = sample_blocks(
            len(image) * self.gather.ranks,
            grid,
            targets=config.targets,
            target_scale=config.target_scale,
            aspect=config.target_aspect,
            context_scale=config.context_scale,
            min_keep=config.min_keep,
            generator=generator,
        )
        own = (own_rows(index, self.gather, views=len(views)) for index in (blocks.context, blocks.targets))
        context, targets = (index.to(image.device) for index in own)
        targets = targets.flatten(0, 1)
        place = sincos_positions(grid, self.predictor.width).to(image.device)
        # Each box is predicted by itself: mask tokens of one don't see those of another.
        seen = self.encoder(image, keep=context).tokens.repeat_interleave(config.targets, dim=0)
        predicted = self.predictor(seen, place[context].repeat_interleave(config.targets, dim=0), place[targets])
        with torch.no_grad():
            everywhere = latent_targets(self.teacher_encoder(image).tokens)
            target = take(everywhere.repeat_interleave(config.targets, dim=0), targets)
            weight = measured.repeat_interleave(config.targets, dim=0).gather(1, targets)
        loss = latent_loss(predicted, target, weight, norm=config.norm)
        with torch.no_grad():
            zero_loss = latent_loss(torch.zeros_like(target), target, weight, norm=config.norm)
            still = ratio_to_still(loss, zero_loss)
        loss = rank_part(loss, weight, self.gather)
        with torch.no_grad():
            metrics = {
                "loss": loss.detach(),
                "loss_vs_zero": still,
                "target_std": target_std(everywhere),
                "context_share": torch.tensor(context.shape[1] / place.shape[0]),
                "ema_momentum": torch.tensor(self.momentum(step)),
            }
        return StepOutput(loss=loss, metrics=metrics)

    def momentum(self, step: int) -> float:
        """The teacher's EMA momentum at a step."""
        return cosine_momentum(step, base=self.base_momentum, total_steps=self.total_steps)

    def after_optimizer_step(self, step: int) -> None:
        """Move the teacher: parameters by EMA, buffers copied."""
        follow([(self.teacher_encoder, self.encoder)], self.momentum(step))

    def export_encoder(self) -> nn.Module:
        """The teacher's encoder, which I-JEPA evaluates."""
        return self.teacher_encoder


def keeping_encoder(encoder: nn.Module, method: str) -> Encoder:
    """The same object, known to be an Encoder that can encode some of a crop's tokens; else ValueError."""
    checked = checked_encoder(encoder)
    if not checked.supports_keep:
        raise ValueError(
            f"{method} encodes the visible tokens alone, which {checked.name} cannot (supports_keep is false); "
            f"take a transformer, e.g. vit3d_nano, or the methods mae or dino for a convolutional encoder"
        )
    return checked


def stacked_views(
    views: tuple[View, ...], stride_vox: int, method: str
) -> tuple[Float[Tensor, "g 1 z y x"], Float[Tensor, "g n"]]:
    """Images of all views after each other, and the measured share of their tokens; ValueError for different sizes."""
    image = stacked_images(views, method)
    valid = torch.cat([view.valid for view in views])
    return image, token_mean(valid[:, None].float(), stride_vox)[..., 0]
