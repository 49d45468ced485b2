"""Masked autoencoder in 3-D, on any encoder.

Source: He et al. 2022, https://arxiv.org/abs/2111.06377 (0.75 masked, targets normalised per patch, loss on masked
patches only, small transformer decoder). Differs from it for CT: variances of targets have a floor at CT noise, padding
counts for nothing, voxels outside the lung for little, and masks come in blocks of tokens 16 voxels wide, because a
single small token is read off its neighbours. Encoders without `keep` see the masked crop instead of the kept tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from lungssl_backbones.encoder import token_grid
from lungssl_data.batch import PairBatch, StepOutput
from torch import Tensor, nn

from lungssl_methods.auto import BaseRate
from lungssl_methods.choices import check_choices
from lungssl_methods.decoder_layer import DecoderLayer
from lungssl_methods.hidden_views import (
    VisibleTokens,
    check_global_views_only,
    drawn_masks,
    hidden_weight,
    lung_weight,
    stacked_images,
)
from lungssl_methods.losses import mae_loss_and_ratio
from lungssl_methods.masking import MASK_WIDTH_VOX
from lungssl_methods.method import Gather, LocalGather, ViewCounts, checked_encoder, rank_part


class Mae(nn.Module):
    """Reconstructs hidden blocks of the global views of both slots. In `eval()` the masks are always the same."""

    typical_views = ViewCounts(globals_per_slot=1, locals_per_slot=0)
    needs_correspondences = False
    may_collapse = False
    batch_separable = True
    base_rate = BaseRate(lr=3e-4, source="ssl.md B.2")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """What is hidden, how it is rebuilt and what counts."""

        mask_ratio: float = 0.75
        """Share of blocks that is hidden; the count is exact in every sample."""
        mask_unit_tokens: int | None = None
        """Side of a hidden block in tokens. None: as many as make 16 voxels, at least 1."""
        decoder_width: int = 384
        """Decoder embedding; a multiple of `decoder_heads`."""
        decoder_depth: int = 4
        """Decoder blocks."""
        decoder_heads: int = 6
        """Decoder attention heads."""
        norm: Literal["patch", "none"] = "patch"
        """Targets of zero mean and unit variance per patch, or plain network input."""
        variance_floor: float = (20 / 1400) ** 2
        """Least variance that a target is divided by: (20 HU)^2 of a 1400 HU window, about CT noise."""
        outside_lung_weight: float = 0.1
        """Weight of measured voxels outside the lung, where inside is 1 (`ssl.md` C2)."""

        def build(
            self, encoder: nn.Module, *, total_steps: int, effective_batch: int = 32, gather: Gather | None = None
        ) -> "Mae":
            """An autoencoder around `encoder`. It has no schedule: the other arguments are those of every method."""
            return Mae(self, encoder, gather or LocalGather())

    def __init__(self, config: Config, encoder: nn.Module, gather: Gather) -> None:
        """Raises ValueError for a module that is no Encoder, and for an unknown norm."""
        super().__init__()
        check_choices("mae", config)
        checked = checked_encoder(encoder)
        self.config = config
        self.gather = gather
        self.encoder = encoder
        self.patch_vox = checked.token_stride_vox
        unit = config.mask_unit_tokens
        self.unit_tokens = max(1, MASK_WIDTH_VOX // self.patch_vox) if unit is None else unit
        width = config.decoder_width
        self.visible = VisibleTokens(checked, width)
        self.decoder = nn.ModuleList(DecoderLayer(width, config.decoder_heads) for _ in range(config.decoder_depth))
        self.predict = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.patch_vox**3))
        # Start at predicting 0, the mean of a normalised patch: a random start costs 1.36 times that, and the fall to
        # 1 would look like learning.
        nn.init.zeros_(self.predict[1].weight)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(self.predict[1].bias)  # pyright: ignore[reportArgumentType]

    def check_views(self, *, globals_per_slot: int, locals_per_slot: int) -> None:
        """Raises ValueError without global views, and with local ones, which would be made for nothing."""
        check_global_views_only("mae", globals_per_slot, locals_per_slot)

    def forward(self, batch: PairBatch, step: int) -> StepOutput:
        """Loss over hidden voxels; `loss_vs_zero` is its ratio to that of predicting 0, 1 where nothing is learned.

        Masks are drawn from torch's global CPU generator, on any device. `step` changes nothing.

        Raises ValueError where the views differ in size, or their tokens don't split into blocks to hide.
        """
        views = batch.global_views()
        image = stacked_images(views, "mae")
        weight = lung_weight(views, self.config.outside_lung_weight)
        host_mask = drawn_masks(
            image,
            self.patch_vox,
            views=len(views),
            ratio=self.config.mask_ratio,
            unit=self.unit_tokens,
            training=self.training,
            gather=self.gather,
        )
        mask = host_mask.to(image.device)
        z, y, x = image.shape[2:]
        pred = self._decode(self.visible(self.encoder, image, host_mask), token_grid((z, y, x), self.patch_vox))
        loss, still = mae_loss_and_ratio(
            pred,
            image,
            mask,
            weight,
            patch_vox=self.patch_vox,
            norm=self.config.norm,
            variance_floor=self.config.variance_floor,
        )
        loss = rank_part(loss, hidden_weight(weight, mask, self.patch_vox), self.gather)
        metrics = {
            "loss": loss.detach(),
            "loss_vs_zero": still,
            "masked_share": mask.float().mean(),
        }
        return StepOutput(loss=loss, metrics=metrics)

    def after_optimizer_step(self, step: int) -> None:
        """Nothing moves between steps."""

    def export_encoder(self) -> nn.Module:
        """The trained encoder."""
        return self.encoder

    def _decode(self, tokens: Float[Tensor, "b n w"], grid: tuple[int, int, int]) -> Float[Tensor, "b n p"]:
        tokens = tokens + sincos_positions(grid, tokens.shape[-1]).to(tokens)
        for block in self.decoder:
            tokens = block(tokens)
        return self.predict(tokens)


def sincos_positions(grid: tuple[int, int, int], width: int) -> Float32[Tensor, "n width"]:
    """Fixed 3-D positions of token centres: sines and cosines of each axis side by side, in (z, y, x) token order.

    Wavelengths run from 2 pi to 20000 pi tokens, as in Vaswani et al. 2017, https://arxiv.org/abs/1706.03762. The
    width % 6 channels that don't share out are 0.
    """
    frequencies = 10000.0 ** -torch.linspace(0.0, 1.0, width // 6)
    index = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float32) for side in grid))
    angle = (index[:, :, None] * frequencies).flatten(1)
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, width % 6))
