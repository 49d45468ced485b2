"""A 2-D convolutional network of timm, inflated, as an encoder. Needs timm: `pip install lungssl-backbones[timm]`.

Axes: b batch, c channels, n tokens, z y x voxels with z from inferior to superior.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from lungssl_backbones.encoder import Features, token_grid
from lungssl_backbones.inflation import How, inflate_conv_net
from lungssl_backbones.masking import MASK_VALUE, hide_voxels, refuse_keep


class Timm3d(nn.Module):
    """Maps a CT crop to one feature map per stage, fine to coarse; its tokens are the coarsest map.

    Its batch norms mix the samples of a batch in training mode.
    """

    name: str = "timm3d"
    """An entry of this class in `BACKBONES`; `create_backbone` writes the one that it was asked for."""
    supports_keep = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Which network."""

        model: str = "resnet18"
        """timm's name of a convolutional network, e.g. "resnet50", "regnety_004", "efficientnet_b0"."""
        how: How = "centre"
        """Where a 2-D kernel goes along z; see `inflation`."""
        in_channels: int = 1
        """Channels of the crop."""
        spacing_mm: float = 1.5
        """Voxel size that the weights are meant for."""

        def build(self) -> "Timm3d":
            return Timm3d(self)

    def __init__(self, config: Config, *, pretrained: bool = False) -> None:
        """`pretrained`: start from timm's published weights, which are downloaded.

        Raises ImportError without timm, ValueError for a network that cannot be inflated.
        """
        super().__init__()
        self.config = config
        flat = _timm().create_model(config.model, pretrained=pretrained, features_only=True)
        self.net = inflate_conv_net(flat, how=config.how, in_channels=config.in_channels)
        self.pyramid_channels: tuple[int, ...] = tuple(flat.feature_info.channels())
        self.pyramid_strides_vox: tuple[int, ...] = tuple(flat.feature_info.reduction())
        self.dim = self.pyramid_channels[-1]
        self.token_stride_vox = self.pyramid_strides_vox[-1]
        self.spacing_mm = config.spacing_mm
        self.mask_value = nn.Parameter(torch.full((1,), MASK_VALUE))

    def forward(
        self,
        x: Float[Tensor, "b c z y x"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        keep: Int64[Tensor, "b k"] | None = None,
        coords_mm: Float[Tensor, "b 3 z y x"] | None = None,
    ) -> Features:
        """See `encoder.Encoder`. `coords_mm` is not used: a convolution has no positions.

        Raises ValueError with `keep`.
        """
        refuse_keep(keep)
        z, y, x_vox = x.shape[2:]
        grid = token_grid((z, y, x_vox), self.token_stride_vox)
        x = hide_voxels(x, mask, grid=grid, stride_vox=self.token_stride_vox, value=self.mask_value)
        pyramid = tuple(self.net(x))
        return Features(
            cls=None,
            tokens=pyramid[-1].flatten(2).mT,
            pyramid=pyramid,
            grid=grid,
            stride_mm=self.token_stride_vox * self.spacing_mm,
        )


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ImportError("timm3d needs timm; pip install 'lungssl-backbones[timm]'") from error
