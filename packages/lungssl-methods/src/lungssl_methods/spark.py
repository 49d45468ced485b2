"""SparK in 3-D: masked modelling for convolutions, by an encoder that sees no hidden voxel and a decoder with skips.

Source: Tian et al. 2023, https://arxiv.org/abs/2301.03580 (0.6 masked, features of every stage made dense by a learned
token and added to a light decoder, targets normalised per patch, loss on hidden patches only). Differs from it for CT
as `mae` does: variances of targets have a floor at CT noise, padding counts for nothing, voxels outside the lung for
little.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from lungssl_backbones.encoder import token_grid
from lungssl_data.batch import PairBatch, StepOutput
from lungssl_ops.patches import patchify
from torch import Tensor, nn

from lungssl_methods.auto import BaseRate
from lungssl_methods.hidden_views import (
    check_global_views_only,
    drawn_masks,
    hidden_weight,
    lung_weight,
    stacked_images,
)
from lungssl_methods.losses import mae_loss_and_ratio
from lungssl_methods.masking import MASK_WIDTH_VOX
from lungssl_methods.method import Gather, LocalGather, ViewCounts, checked_encoder, rank_part
from lungssl_methods.sparse import check_sparse, hidden_from, widen

_LEAST_WIDTH = 16
"""Channels of the decoder's finest stages, where each costs most; a multiple of `_GROUPS`."""
_GROUPS = 4
"""Of the decoder's GroupNorms, as in `resenc`."""


class Spark(nn.Module):
    """Rebuilds hidden blocks of the global views of both slots. In `eval()` the masks are always the same."""

    typical_views = ViewCounts(globals_per_slot=1, locals_per_slot=0)
    needs_correspondences = False
    may_collapse = False
    batch_separable = True
    base_rate = BaseRate(lr=3e-4, source="as mae, ssl.md B.2")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """What is hidden, how it is rebuilt and what counts."""

        mask_ratio: float = 0.6
        """Share of blocks that is hidden (SparK's)."""
        mask_unit_tokens: int | None = None
        """Side of a hidden block in tokens. None: as many as make 16 voxels, at least 1 (SparK: 32 pixels of 224)."""
        decoder_width: int = 128
        """Channels at the coarsest stage, halved at each finer one down to 16 (SparK: 768 in 2-D); a multiple of 4."""
        variance_floor: float = (20 / 1400) ** 2
        """Least variance that a target is divided by: (20 HU)^2 of a 1400 HU window, about CT noise."""
        outside_lung_weight: float = 0.1
        """Weight of measured voxels outside the lung, where inside is 1 (`ssl.md` C2)."""

        def build(
            self, encoder: nn.Module, *, total_steps: int, effective_batch: int = 32, gather: Gather | None = None
        ) -> "Spark":
            """A masked model around `encoder`. It has no schedule."""
            return Spark(self, encoder, gather or LocalGather())

    def __init__(self, config: Config, encoder: nn.Module, gather: Gather) -> None:
        """Raises ValueError for a module that is no Encoder, and for one that is not made of convolutions."""
        super().__init__()
        checked = checked_encoder(encoder)
        check_sparse(encoder)
        if config.decoder_width % _GROUPS:
            raise ValueError(f"decoder_width must be a multiple of {_GROUPS}, got {config.decoder_width}")
        self.config = config
        self.gather = gather
        self.encoder = encoder
        self.patch_vox = checked.token_stride_vox
        unit = config.mask_unit_tokens
        self.unit_tokens = max(1, MASK_WIDTH_VOX // self.patch_vox) if unit is None else unit
        self.decoder = _Decoder(checked.pyramid_channels, checked.pyramid_strides_vox, config.decoder_width)

    def check_views(self, *, globals_per_slot: int, locals_per_slot: int) -> None:
        """Raises ValueError without global views, and with local ones, which would be made for nothing."""
        check_global_views_only("spark", globals_per_slot, locals_per_slot)

    def forward(self, batch: PairBatch, step: int) -> StepOutput:
        """Loss over hidden voxels; `loss_vs_zero` is its ratio to that of predicting 0, 1 where nothing is learned.

        Masks are drawn from torch's global CPU generator, on any device. `step` changes nothing.

        Raises ValueError where the views differ in size, or their tokens don't split into blocks to hide.
        """
        views = batch.global_views()
        image = stacked_images(views, "spark")
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
        z, y, x = image.shape[2:]
        hidden = mask.unflatten(1, token_grid((z, y, x), self.patch_vox))
        with hidden_from(self.encoder, hidden):
            pyramid = self.encoder(image * ~widen(hidden, image.shape[2:])).pyramid
        predicted = patchify(self.decoder(pyramid, hidden), (self.patch_vox, self.patch_vox, self.patch_vox))
        loss, still = mae_loss_and_ratio(
            predicted,
            image,
            mask,
            weight,
            patch_vox=self.patch_vox,
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


class _Decoder(nn.Module):
    """From the coarsest stage to the finest: enlarge, add the stage's features made dense, convolve."""

    def __init__(self, channels: tuple[int, ...], strides_vox: tuple[int, ...], width: int) -> None:
        super().__init__()
        widths = [max(_LEAST_WIDTH, width >> i) // _GROUPS * _GROUPS for i in range(len(channels))]
        self.tokens = nn.ParameterList([nn.Parameter(0.02 * torch.randn(wide)) for wide in widths])
        self.skips = nn.ModuleList([nn.Conv3d(c, wide, 1) for c, wide in zip(reversed(channels), widths, strict=True)])
        self.narrow = nn.ModuleList([nn.Conv3d(a, b, 1) for a, b in pairwise(widths)])
        self.mix = nn.ModuleList(
            [nn.Sequential(nn.Conv3d(w, w, 3, padding=1), nn.GroupNorm(_GROUPS, w), nn.GELU()) for w in widths]
        )
        self.finest_vox = min(strides_vox)
        self.predict = nn.Conv3d(widths[-1], self.finest_vox**3, 1)
        # Start at predicting 0, the mean of a normalised patch; see `mae`.
        nn.init.zeros_(self.predict.weight)
        nn.init.zeros_(self.predict.bias)  # pyright: ignore[reportArgumentType]

    def forward(
        self, pyramid: tuple[Float[Tensor, "b _c _z _y _x"], ...], hidden: Bool[Tensor, "b z y x"]
    ) -> Float[Tensor, "b 1 _u _v _w"]:
        """Voxels of the whole crop."""
        x = None
        for i, features in enumerate(reversed(pyramid)):
            dense = torch.where(
                widen(hidden, features.shape[2:]), self.tokens[i].view(1, -1, 1, 1, 1), self.skips[i](features)
            )
            if x is not None:
                dense = dense + self.narrow[i - 1](F.interpolate(x, size=features.shape[2:], mode="trilinear"))
            x = self.mix[i](dense)
        assert x is not None
        return _unpatched(self.predict(x), self.finest_vox)


def _unpatched(x: Float[Tensor, "b p z y x"], side: int) -> Float[Tensor, "b 1 _u _v _w"]:
    """Cells of `side`^3 voxels, in (z, y, x) order, put in their places."""
    b, _, z, y, x_cells = x.shape
    cells = x.view(b, side, side, side, z, y, x_cells)
    return cells.permute(0, 4, 1, 5, 2, 6, 3).reshape(b, 1, z * side, y * side, x_cells * side)
