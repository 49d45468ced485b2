"""The ResEnc-L of nnU-Net and nnssl, name for name, so that their weights load here and ours load there.

Source: Isensee et al. 2024, https://arxiv.org/abs/2404.09556, and `ResidualEncoder` of dynamic-network-architectures
0.4.4; skips pool before they project, as in He et al. 2019, https://arxiv.org/abs/1812.01187.
**It deletes absolute Hounsfield units.** An InstanceNorm follows the first convolution, so a crop and the same crop
200 HU brighter give the same features but at the border. The density change between exhale and inhale is such a change:
take `resenc_b` where it matters, and this one where published weights or nnU-Net do.
Differs from the source: parameters are registered once (theirs appear a second time under `all_modules`; see
`pretrained` and `export`), and masked voxels get a learned value that theirs does not have.
Axes: b batch, c channels, n tokens, z y x voxels with z from inferior to superior.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from lungssl_backbones.encoder import Features, token_grid
from lungssl_backbones.masking import MASK_VALUE, hide_voxels, refuse_keep

_SLOPE = 0.01
"""Of the LeakyReLU below zero: torch's default, which nnU-Net keeps."""


class ResEncDkfz(nn.Module):
    """Maps a CT crop to one feature map per stage, fine to coarse; its tokens are the coarsest map."""

    name: str = "resenc_l"
    """An entry of this class in `BACKBONES`; `create_backbone` writes the one that it was asked for."""
    supports_keep = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Size of a ResEncDkfz; the defaults are ResEnc-L."""

        widths: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
        """Channels per stage. Stage i has stride 2**i voxels."""
        depths: tuple[int, ...] = (1, 3, 4, 6, 6, 6)
        """Residual blocks per stage."""
        in_channels: int = 1
        """Channels of the crop."""
        spacing_mm: float = 1.0
        """Voxel size that the weights are meant for; nnssl's published ones: 1 mm."""

        def build(self) -> "ResEncDkfz":
            return ResEncDkfz(self)

    def __init__(self, config: Config) -> None:
        """Raises ValueError where `widths` and `depths` differ in length."""
        super().__init__()
        if len(config.widths) != len(config.depths):
            raise ValueError(f"widths {config.widths} and depths {config.depths} must name the same number of stages")
        self.config = config
        self.dim = config.widths[-1]
        self.token_stride_vox = 2 ** (len(config.widths) - 1)
        self.pyramid_channels = config.widths
        self.pyramid_strides_vox = tuple(2**i for i in range(len(config.widths)))
        self.spacing_mm = config.spacing_mm
        self.mask_value = nn.Parameter(torch.full((1,), MASK_VALUE))
        self.stem = nn.ModuleDict({"convs": nn.Sequential(_ConvNorm(config.in_channels, config.widths[0], 3))})
        self.stages = nn.Sequential()
        inputs = config.widths[0]
        for i, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            blocks = [_Block(inputs, width, 2 if i else 1)] + [_Block(width, width, 1) for _ in range(depth - 1)]
            self.stages.append(_Stage(blocks))
            inputs = width
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, a=_SLOPE, nonlinearity="leaky_relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Float[Tensor, "b c z y x"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        keep: Int64[Tensor, "b k"] | None = None,
        coords_mm: Float[Tensor, "b 3 z y x"] | None = None,
    ) -> Features:
        """See `encoder.Encoder`. `coords_mm` is not used: a convolution has no positions.

        Raises ValueError with `keep`, and for a crop of a single token, whose InstanceNorm would be 0/0.
        """
        refuse_keep(keep)
        z, y, x_vox = x.shape[2:]
        grid = token_grid((z, y, x_vox), self.token_stride_vox)
        if grid == (1, 1, 1):
            raise ValueError(
                f"a crop of {(z, y, x_vox)} voxels leaves one voxel to normalise in the last stage of {self.name}; "
                f"make one side {2 * self.token_stride_vox} voxels or longer"
            )
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
        x = x.contiguous(memory_format=torch.channels_last_3d)
        return F.leaky_relu(self.stem["convs"](x), _SLOPE)


class _Stage(nn.Module):
    def __init__(self, blocks: list["_Block"]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Float[Tensor, "b _c _z _y _x"]) -> Float[Tensor, "b _d _u _v _w"]:
        return self.blocks(x)


class _ConvNorm(nn.Module):
    """Convolution and affine InstanceNorm; the caller applies the nonlinearity."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=bias)
        self.norm = nn.InstanceNorm3d(outputs, eps=1e-5, affine=True)

    def forward(self, x: Float[Tensor, "b _c _z _y _x"]) -> Float[Tensor, "b _d _u _v _w"]:
        return self.norm(self.conv(x))


class _Block(nn.Module):
    """Two convolutions and a skip, which pools where the stride changes and projects where the width does."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _ConvNorm(inputs, outputs, 3, stride=stride)
        self.conv2 = _ConvNorm(outputs, outputs, 3)
        steps: list[nn.Module] = [nn.AvgPool3d(stride)] if stride > 1 else []
        if inputs != outputs:
            steps.append(_ConvNorm(inputs, outputs, 1, bias=False))
        self.skip = nn.Sequential(*steps)

    def forward(self, x: Float[Tensor, "b _c _z _y _x"]) -> Float[Tensor, "b _d _u _v _w"]:
        y = self.conv2(F.leaky_relu(self.conv1(x), _SLOPE))
        return F.leaky_relu(y + self.skip(x), _SLOPE)
