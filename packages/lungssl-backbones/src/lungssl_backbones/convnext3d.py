"""ConvNeXt in three dimensions, under timm's parameter names, so that its 2-D weights inflate into it.

Sources: ConvNeXt, Liu et al. 2022, https://arxiv.org/abs/2201.03545; global response normalisation, ConvNeXt V2, Woo et
al. 2023, https://arxiv.org/abs/2301.00808; names of `timm.models.convnext`.
Differs from them: cubes for squares; the stem's bias starts large, so that the first LayerNorm cannot cancel absolute
HU (see `vit3d._PATCH_BIAS_STD`); masked voxels get a learned value.
Axes: b batch, c channels, n tokens, z y x voxels with z from inferior to superior.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from lungssl_backbones.encoder import Features, token_grid
from lungssl_backbones.masking import MASK_VALUE, drop_samples, hide_voxels, refuse_keep

_STEM_BIAS_STD = 0.3
"""As in `vit3d`: the direction of a constant cube's embedding then depends on its density."""


class ConvNext3d(nn.Module):
    """Maps a CT crop to one feature map per stage, fine to coarse; its tokens are the coarsest map."""

    name: str = "convnext3d_t"
    """An entry of this class in `BACKBONES`; `create_backbone` writes the one that it was asked for."""
    supports_keep = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Size and behaviour of a ConvNext3d; the defaults are ConvNeXt-T."""

        widths: tuple[int, ...] = (96, 192, 384, 768)
        """Channels per stage. Stage i has stride stem_vox * 2**i."""
        depths: tuple[int, ...] = (3, 3, 9, 3)
        """Blocks per stage."""
        stem_vox: int = 4
        """Side and stride of the stem's cubes in voxels; 4 in the source, 2 keeps finer maps."""
        kernel_vox: int = 7
        """Side of the depthwise kernels, odd."""
        layer_scale: float = 1e-6
        """Initial LayerScale; without effect where `response_norm` takes its place."""
        response_norm: bool = False
        """ConvNeXt V2: global response normalisation in the MLP, no LayerScale. A response is compared over the whole
        crop, so features of V2 depend on the crop's size."""
        in_channels: int = 1
        """Channels of the crop."""
        drop_path: float = 0.1
        """Probability of skipping the last block, rising linearly from 0 at the first."""
        spacing_mm: float = 1.5
        """Voxel size that the weights are meant for."""

        def build(self) -> "ConvNext3d":
            return ConvNext3d(self)

    def __init__(self, config: Config) -> None:
        """Raises ValueError where `widths` and `depths` differ in length or `kernel_vox` is even."""
        super().__init__()
        if len(config.widths) != len(config.depths):
            raise ValueError(f"widths {config.widths} and depths {config.depths} must name the same number of stages")
        if config.kernel_vox % 2 == 0:
            raise ValueError(f"kernel_vox must be odd to keep the map's size, got {config.kernel_vox}")
        self.config = config
        self.dim = config.widths[-1]
        self.pyramid_channels = config.widths
        self.pyramid_strides_vox = tuple(config.stem_vox * 2**i for i in range(len(config.widths)))
        self.token_stride_vox = self.pyramid_strides_vox[-1]
        self.spacing_mm = config.spacing_mm
        self.mask_value = nn.Parameter(torch.full((1,), MASK_VALUE))
        stem = nn.Conv3d(config.in_channels, config.widths[0], config.stem_vox, stride=config.stem_vox)
        self.stem = nn.Sequential(stem, _ChannelNorm(config.widths[0]))
        total = sum(config.depths)
        rates = [config.drop_path * i / max(total - 1, 1) for i in range(total)]
        self.stages = nn.ModuleList()
        for i, depth in enumerate(config.depths):
            first = sum(config.depths[:i])
            self.stages.append(_Stage(config, i, rates[first : first + depth]))
        for module in self.modules():
            if isinstance(module, (nn.Conv3d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Not 0.02 here: a stem that small leaves the bias alone to say the direction, and with it the density is lost.
        nn.init.xavier_uniform_(stem.weight.view(config.widths[0], -1))
        nn.init.normal_(self.stem.get_parameter("0.bias"), std=_STEM_BIAS_STD)

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
        x = self.stem(x)
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


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map, eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b c z y x"]:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class _Stage(nn.Module):
    """From the second stage on, a norm and a strided convolution; then blocks."""

    def __init__(self, config: ConvNext3d.Config, index: int, rates: list[float]) -> None:
        super().__init__()
        width = config.widths[index]
        self.downsample = nn.Identity()
        if index:
            inputs = config.widths[index - 1]
            self.downsample = nn.Sequential(_ChannelNorm(inputs), nn.Conv3d(inputs, width, 2, stride=2))
        self.blocks = nn.Sequential(*[_Block(config, width, rate) for rate in rates])

    def forward(self, x: Float[Tensor, "b _c _z _y _x"]) -> Float[Tensor, "b _d _u _v _w"]:
        return self.blocks(self.downsample(x))


class _Block(nn.Module):
    """Depthwise convolution, LayerNorm, MLP over channels, skip."""

    def __init__(self, config: ConvNext3d.Config, width: int, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.conv_dw = nn.Conv3d(width, width, config.kernel_vox, padding=config.kernel_vox // 2, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        if config.response_norm:
            self.mlp["grn"] = _ResponseNorm(4 * width)
        self.gamma = None if config.response_norm else nn.Parameter(torch.full((width,), config.layer_scale))

    def forward(self, x: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b c z y x"]:
        hidden = F.gelu(self.mlp["fc1"](self.norm(self.conv_dw(x).movedim(1, -1))))
        if self.gamma is None:
            hidden = self.mlp["grn"](hidden)
        branch = self.mlp["fc2"](hidden)
        if self.gamma is not None:
            branch = branch * self.gamma
        return x + drop_samples(branch.movedim(-1, 1), self.drop_path, self.training)


class _ResponseNorm(nn.Module):
    """Each channel by its length over the crop, relative to the mean channel; weight and bias start at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "b z y x c"]) -> Float[Tensor, "b z y x c"]:
        length = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
        relative = length / (length.mean(dim=-1, keepdim=True) + 1e-6)
        return x + self.weight * (x * relative) + self.bias
