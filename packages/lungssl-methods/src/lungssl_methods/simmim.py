"""SimMIM in 3-D: the encoder sees the whole crop with tokens hidden, and one linear layer predicts their voxels.

Source: Xie et al. 2022, https://arxiv.org/abs/2111.09886 (0.6 masked, L1 of hidden pixels, a linear head). Differs from
it for CT: targets are the fixed HU window, not normalised per image; padding counts for nothing, voxels outside the
lung for little.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from lungssl_data.batch import PairBatch, StepOutput
from lungssl_ops.patches import patchify
from torch import Tensor, nn

from lungssl_methods.auto import BaseRate
from lungssl_methods.hidden_views import check_global_views_only, drawn_masks, lung_weight, stacked_images
from lungssl_methods.losses import ratio_to_still
from lungssl_methods.masking import MASK_WIDTH_VOX
from lungssl_methods.method import Gather, LocalGather, ViewCounts, checked_encoder, rank_part


class SimMim(nn.Module):
    """Predicts hidden blocks of the global views of both slots. In `eval()` the masks are always the same."""

    typical_views = ViewCounts(globals_per_slot=1, locals_per_slot=0)
    needs_correspondences = False
    may_collapse = False
    batch_separable = True
    base_rate = BaseRate(lr=3e-4, source="as mae, ssl.md B.2")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """What is hidden and what counts."""

        mask_ratio: float = 0.6
        """Share of blocks that is hidden (SimMIM's default)."""
        mask_unit_tokens: int | None = None
        """Side of a hidden block in tokens. None: as many as make 16 voxels, at least 1 (SimMIM: 32 pixels of 224)."""
        outside_lung_weight: float = 0.1
        """Weight of measured voxels outside the lung, where inside is 1 (`ssl.md` C2)."""

        def build(
            self, encoder: nn.Module, *, total_steps: int, effective_batch: int = 32, gather: Gather | None = None
        ) -> "SimMim":
            """A masked predictor around `encoder`. It has no schedule."""
            return SimMim(self, encoder, gather or LocalGather())

    def __init__(self, config: Config, encoder: nn.Module, gather: Gather) -> None:
        """Raises ValueError for a module that is no Encoder."""
        super().__init__()
        checked = checked_encoder(encoder)
        self.config = config
        self.gather = gather
        self.encoder = encoder
        self.patch_vox = checked.token_stride_vox
        unit = config.mask_unit_tokens
        self.unit_tokens = max(1, MASK_WIDTH_VOX // self.patch_vox) if unit is None else unit
        self.predict = nn.Linear(checked.dim, self.patch_vox**3)

    def check_views(self, *, globals_per_slot: int, locals_per_slot: int) -> None:
        """Raises ValueError without global views, and with local ones, which would be made for nothing."""
        check_global_views_only("simmim", globals_per_slot, locals_per_slot)

    def forward(self, batch: PairBatch, step: int) -> StepOutput:
        """L1 over hidden voxels, in network input; `loss_vs_mean` is its ratio to predicting each crop's visible mean.

        Masks are drawn from torch's global CPU generator, on any device. `step` changes nothing.

        Raises ValueError where the views differ in size, or their tokens don't split into blocks to hide.
        """
        views = batch.global_views()
        image = stacked_images(views, "simmim")
        weight = lung_weight(views, self.config.outside_lung_weight)
        mask = drawn_masks(
            image,
            self.patch_vox,
            views=len(views),
            ratio=self.config.mask_ratio,
            unit=self.unit_tokens,
            training=self.training,
            gather=self.gather,
        ).to(image.device)
        patch = (self.patch_vox, self.patch_vox, self.patch_vox)
        target, weights = patchify(image, patch), patchify(weight[:, None], patch)
        loss = masked_l1(self.predict(self.encoder(image, mask=mask).tokens), target, mask, weights)
        with torch.no_grad():
            seen = weights * ~mask[..., None]
            mean = (target * seen).sum(dim=(1, 2)) / seen.sum(dim=(1, 2)).clamp_min(1e-6)
            still = masked_l1(mean[:, None, None].expand_as(target), target, mask, weights)
        against_mean = ratio_to_still(loss, still)
        loss = rank_part(loss, weights.sum(dim=2) * mask, self.gather)
        metrics = {
            "loss": loss.detach(),
            "loss_vs_mean": against_mean,
            "masked_share": mask.float().mean(),
        }
        return StepOutput(loss=loss, metrics=metrics)

    def after_optimizer_step(self, step: int) -> None:
        """Nothing moves between steps."""

    def export_encoder(self) -> nn.Module:
        """The trained encoder."""
        return self.encoder


def masked_l1(
    predicted: Float[Tensor, "b n p"],
    target: Float[Tensor, "b n p"],
    mask: Bool[Tensor, "b n"],
    weight: Float[Tensor, "b n p"],
) -> Float[Tensor, ""]:
    """Weighted mean absolute error over the voxels of hidden patches, in float32; NaN where none has weight."""
    counted = weight * mask[..., None]
    return ((predicted.float() - target.float()).abs() * counted).sum() / counted.sum()
