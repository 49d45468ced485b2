"""Residual 3-D encoder that keeps absolute Hounsfield units.

Source: ResEnc of nnU-Net, Isensee et al. 2024, https://arxiv.org/abs/2404.09556.
Differs from it, so its weights do not load: no normalisation before the first nonlinearity nor on the skips, and
GroupNorm (Wu & He 2018, https://arxiv.org/abs/1803.08494) for InstanceNorm. InstanceNorm maps a crop and the same crop
200 HU brighter to the same features, which deletes the density change between exhale and inhale; here the skips carry
it to every stage.
Axes: b batch, c channels, n tokens, z y x voxels with z from inferior to superior.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from lungssl_backbones.encoder import Features, token_grid
from lungssl_backbones.masking import MASK_VALUE, hide_voxels, refuse_keep

_SLOPE = 0.01
"""Of the LeakyReLU below zero, as in nnU-Net."""

_BRANCH_SCALE = 0.2
"""Starting gain of a block's normalised branch, so that the skips speak first (LayerScale's idea, Touvron et al. 2021,
https://arxiv.org/abs/2103.17239; zero, as in Goyal et al. 2017, would leave the convolutions without gradient).
Measured with resenc_tiny in the HU contract test, 3 seeds: R² 0.998 to 1.000, where a gain of 1 gives 0.97 to 0.998."""


class ResEnc(nn.Module):
    """Maps a CT crop to one feature map per stage, fine to coarse; its tokens are the coarsest map."""

    name: str = "resenc_b"
    """An entry of this class in `BACKBONES`; `create_backbone` writes the one that it was asked for."""
    supports_keep = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Size and behaviour of a ResEnc."""

        widths: tuple[int, ...] = (32, 64, 128, 256, 320)
        """Channels per stage; multiples of `groups`. Stage i has stride 2**i voxels."""
        depths: tuple[int, ...] = (1, 2, 2, 2, 2)
        """Residual blocks per stage."""
        groups: int = 4
        """Groups of every GroupNorm. Few, because a group of one channel is an InstanceNorm."""
        stem_norm: Literal["none", "instance"] = "none"
        """"instance" normalises before the first nonlinearity, as nnU-Net does, and loses absolute HU."""
        in_channels: int = 1
        """Channels of the crop."""
        spacing_mm: float = 1.5
        """Voxel size that the weights are meant for."""

        def build(self) -> "ResEnc":
            return ResEnc(self)

    def __init__(self, config: Config) -> None:
        """Raises ValueError where `widths` and `depths` differ in length or `groups` does not divide every width."""
        super().__init__()
        if len(config.widths) != len(config.depths):
            raise ValueError(f"widths {config.widths} and depths {config.depths} must name the same number of stages")
        if any(width % config.groups for width in config.widths):
            raise ValueError(f"widths {config.widths} must be multiples of groups, {config.groups}")
        stages = len(config.widths)
        self.config = config
        self.dim = config.widths[-1]
        self.token_stride_vox = 2 ** (stages - 1)
        self.pyramid_channels = config.widths
        self.pyramid_strides_vox = tuple(2**i for i in range(stages))
        self.spacing_mm = config.spacing_mm
        self.mask_value = nn.Parameter(torch.full((1,), MASK_VALUE))
        self.stem = nn.Conv3d(config.in_channels, config.widths[0], 3, padding=1)
        self.stem_norm = nn.InstanceNorm3d(config.widths[0]) if config.stem_norm == "instance" else nn.Identity()
        self.stages = nn.ModuleList()
        inputs = config.widths[0]
        for i, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            blocks = [_Block(inputs, width, 2 if i else 1, config.groups)]
            blocks += [_Block(width, width, 1, config.groups) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(*blocks))
            inputs = width
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, a=_SLOPE, nonlinearity="leaky_relu")
            elif isinstance(module, _Block):
                nn.init.constant_(module.norm2.weight, _BRANCH_SCALE)

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
        x = self.enter(x)
        pyramid = []
        for stage in self.stages:
            x = stage(x)
            pyramid.append(x)
        return Features(
            cls=None,
            tokens=x.flatten(2).mT,
            pyramid=tuple(pyramid),
            grid=grid,
            stride_mm=self.token_stride_vox * self.spacing_mm,
        )

    def enter(self, x: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b _d z y x"]:
        """What the first stage takes, of a crop's voxels (`encoder.StagedEncoder`)."""
        # Channels last from here on: a training step of resenc_tiny takes 0.36 s instead of 0.43 s on two AVX2 cores.
        x = self.stem(x).contiguous(memory_format=torch.channels_last_3d)
        return F.leaky_relu(self.stem_norm(x), _SLOPE)


class _Block(nn.Module):
    """Two convolutions and a skip, which pools and projects where the stride or the width changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, outputs)
        self.conv2 = nn.Conv3d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.skip = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.AvgPool3d(stride), nn.Conv3d(inputs, outputs, 1, bias=False))

    def forward(self, x: Float[Tensor, "b _c _z _y _x"]) -> Float[Tensor, "b _d _u _v _w"]:
        y = F.leaky_relu(_norm(self.norm1, self.conv1(x)), _SLOPE)
        return F.leaky_relu(_norm(self.norm2, self.conv2(y)) + self.skip(x), _SLOPE)


def _norm(norm: nn.GroupNorm, x: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b c z y x"]:
    """The norm, in fp32 on a CPU: forward and backward over 2 samples of 8 channels of 48 voxels, channels last, take
    torch 2.15 63 ms with bf16 and 9 with fp32 (one thread of a Xeon with AMX)."""
    return norm(x.float()).to(x.dtype) if x.device.type == "cpu" and x.dtype == torch.bfloat16 else norm(x)
