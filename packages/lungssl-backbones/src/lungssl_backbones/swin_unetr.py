"""The encoder of MONAI's SwinUNETR, name for name, so that its published weights load here and ours there.

Source: Swin UNETR, Hatamizadeh et al. 2022, https://arxiv.org/abs/2201.01266; V2, a residual convolution before each
stage, He et al. 2023, https://doi.org/10.1007/978-3-031-43901-8_40; `swinViT` of `monai.networks.nets.SwinUNETR` 1.6.
Kept from MONAI for the weights' sake: the order in which neighbours are merged (see `Config.merging`); a window larger
than the map reads the first rows of the bias index.
Differs from it: masked voxels get a learned value.
Axes: b batch, c channels, n tokens, w tokens in a window, z y x voxels with z from inferior to superior.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from lungssl_backbones.encoder import Features, token_grid
from lungssl_backbones.masking import MASK_VALUE, drop_samples, hide_voxels, refuse_keep

_Size = tuple[int, int, int]

_NEIGHBOURS: dict[str, tuple[_Size, ...]] = {
    "merging": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
    "mergingv2": ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)),
    "legacy": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)),
}
"""(z, y, x) of the voxels that become one, in the order of `reduction`'s columns."""


class SwinUnetr(nn.Module):
    """Maps a CT crop to five feature maps, strides 2 to 32; its tokens are the coarsest map."""

    name: str = "swin_unetr_b"
    """An entry of this class in `BACKBONES`; `create_backbone` writes the one that it was asked for."""
    supports_keep = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Size and behaviour of a SwinUnetr; the defaults are MONAI's for feature size 48."""

        feature_size: int = 48
        """Channels of the finest map; each of the next four has twice as many as the one before."""
        depths: tuple[int, int, int, int] = (2, 2, 2, 2)
        """Blocks per stage; every second one shifts its windows."""
        heads: tuple[int, int, int, int] = (3, 6, 12, 24)
        """Attention heads per stage."""
        window: int = 7
        """Side of an attention window in tokens."""
        v2: bool = False
        """Residual convolutions before each stage."""
        merging: Literal["merging", "mergingv2", "legacy"] = "merging"
        """Order in which 2x2x2 neighbours are merged. "merging" and "mergingv2" are MONAI 1.6.1's; "legacy" is what
        "merging" was until 2023 at least (MONAI issues 4757, 7324), which takes two neighbours twice and two never; the
        weights published in 2022 are of that kind. Weights of one order load into another without an error, and compute
        something else."""
        in_channels: int = 1
        """Channels of the crop."""
        drop_path: float = 0.0
        """Probability of skipping the last block, rising linearly from 0 at the first."""
        spacing_mm: float = 1.5
        """Voxel size that the weights are meant for."""

        def build(self) -> "SwinUnetr":
            return SwinUnetr(self)

    def __init__(self, config: Config) -> None:
        """Raises ValueError where a stage's channels do not split into its heads."""
        super().__init__()
        for i, heads in enumerate(config.heads):
            if config.feature_size * 2**i % heads:
                raise ValueError(
                    f"feature_size {config.feature_size}: the {config.feature_size * 2**i} channels of stage {i} do "
                    f"not split into {heads} heads; take a multiple of 12 with heads (3, 6, 12, 24)"
                )
        self.config = config
        self.dim = 16 * config.feature_size
        self.token_stride_vox = 32
        self.pyramid_channels = tuple(config.feature_size * 2**i for i in range(5))
        self.pyramid_strides_vox = (2, 4, 8, 16, 32)
        self.spacing_mm = config.spacing_mm
        self.mask_value = nn.Parameter(torch.full((1,), MASK_VALUE))
        self.swinViT = _SwinTransformer(config)

    def forward(
        self,
        x: Float[Tensor, "b c z y x"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        keep: Int64[Tensor, "b k"] | None = None,
        coords_mm: Float[Tensor, "b 3 z y x"] | None = None,
    ) -> Features:
        """See `encoder.Encoder`. `coords_mm` is not used: a window knows only its own tokens' order.

        Each map is normalised over its channels, as SwinUNETR's decoder gets it. Raises ValueError with `keep`.
        """
        refuse_keep(keep)
        z, y, x_vox = x.shape[2:]
        grid = token_grid((z, y, x_vox), self.token_stride_vox)
        x = hide_voxels(x, mask, grid=grid, stride_vox=self.token_stride_vox, value=self.mask_value)
        pyramid = self.swinViT(x)
        return Features(
            cls=None,
            tokens=pyramid[-1].flatten(2).mT,
            pyramid=tuple(pyramid),
            grid=grid,
            stride_mm=self.token_stride_vox * self.spacing_mm,
        )


class _SwinTransformer(nn.Module):
    """Stages under MONAI's names: `layers1` ... `layers4`, and with V2 `layers1c` ... `layers4c` before each."""

    def __init__(self, config: SwinUnetr.Config) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(config.in_channels, config.feature_size, 2, stride=2)})
        total = sum(config.depths)
        rates = [config.drop_path * i / max(total - 1, 1) for i in range(total)]
        for i, depth in enumerate(config.depths):
            dim = config.feature_size * 2**i
            first = sum(config.depths[:i])
            stage = _Stage(config, dim, config.heads[i], rates[first : first + depth])
            setattr(self, f"layers{i + 1}", nn.ModuleList([stage]))
            if config.v2:
                setattr(self, f"layers{i + 1}c", nn.ModuleList([_ConvBlock(dim)]))
        self.v2 = config.v2

    def forward(self, x: Float[Tensor, "b c z y x"]) -> list[Float[Tensor, "b _c _z _y _x"]]:
        x = self.patch_embed["proj"](x)
        pyramid = [_normalised(x)]
        for i in range(1, 5):
            if self.v2:
                x = getattr(self, f"layers{i}c")[0](x)
            x = getattr(self, f"layers{i}")[0](x)
            pyramid.append(_normalised(x))
        return pyramid


def _normalised(x: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b c z y x"]:
    return F.layer_norm(x.movedim(1, -1), (x.shape[1],)).movedim(-1, 1)


class _Stage(nn.Module):
    """Blocks in windows, then 2x2x2 neighbours merged into one token of twice the width."""

    def __init__(self, config: SwinUnetr.Config, dim: int, heads: int, rates: list[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _Block(dim, heads, config.window, shift=config.window // 2 if i % 2 else 0, drop_path=rate)
            for i, rate in enumerate(rates)
        )
        self.downsample = _Merge(dim, _NEIGHBOURS[config.merging])

    def forward(self, x: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b _d _u _v _w"]:
        x = x.movedim(1, -1)
        for block in self.blocks:
            x = block(x)
        return self.downsample(x).movedim(-1, 1)


class _Merge(nn.Module):
    def __init__(self, dim: int, neighbours: tuple[_Size, ...]) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(8 * dim)

    def forward(self, x: Float[Tensor, "b z y x c"]) -> Float[Tensor, "b _u _v _w _d"]:
        merged = torch.cat([x[:, i::2, j::2, k::2] for i, j, k in self.neighbours], dim=-1)
        return self.reduction(self.norm(merged))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, window: int, *, shift: int, drop_path: float) -> None:
        super().__init__()
        self.window = window
        self.shift = shift
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"linear1": nn.Linear(dim, 4 * dim), "linear2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Float[Tensor, "b z y x c"]) -> Float[Tensor, "b z y x c"]:
        x = x + drop_samples(self._attend(self.norm1(x)), self.drop_path, self.training)
        hidden = self.mlp["linear2"](F.gelu(self.mlp["linear1"](self.norm2(x))))
        return x + drop_samples(hidden, self.drop_path, self.training)

    def _attend(self, x: Float[Tensor, "b z y x c"]) -> Float[Tensor, "b z y x c"]:
        sides = (x.shape[1], x.shape[2], x.shape[3])
        z, y, x_side = sides
        wz, wy, wx = (min(side, self.window) for side in sides)
        # A side that one window covers is not shifted.
        sz, sy, sx = (self.shift if side > self.window else 0 for side in sides)
        x = F.pad(x, (0, 0, 0, -x_side % wx, 0, -y % wy, 0, -z % wz))
        padded = (x.shape[1], x.shape[2], x.shape[3])
        mask = None
        if sz or sy or sx:
            x = x.roll((-sz, -sy, -sx), (1, 2, 3))
            mask = _seam_mask(padded, (wz, wy, wx), (sz, sy, sx), x.device)
        x = self.attn(_windows(x, (wz, wy, wx)), mask)
        x = _unwindows(x, (wz, wy, wx), padded)
        if sz or sy or sx:
            x = x.roll((sz, sy, sx), (1, 2, 3))
        return x[:, :z, :y, :x_side]


class _WindowAttention(nn.Module):
    """Self-attention within each window, with a learned bias per difference of places."""

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        reach = 2 * window - 1
        self.relative_position_bias_table = nn.Parameter(torch.empty(reach**3, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        place = torch.stack(torch.meshgrid(*[torch.arange(window)] * 3, indexing="ij")).flatten(1)
        difference = place[:, :, None] - place[:, None, :] + window - 1
        index = (difference[0] * reach + difference[1]) * reach + difference[2]
        self.register_buffer("relative_position_index", index)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, tokens: Float[Tensor, "b v w c"], mask: Float[Tensor, "v w w"] | None
    ) -> Float[Tensor, "b v w c"]:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        size = tokens.shape[2]
        index = self.relative_position_index[:size, :size]
        bias = self.relative_position_bias_table[index].permute(2, 0, 1)[None]
        if mask is not None:
            bias = bias + mask[:, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))
        return self.proj(attended.transpose(2, 3).flatten(3))


class _ConvBlock(nn.Module):
    """V2's residual block: two convolutions with InstanceNorm (no weights); the skip keeps absolute HU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        convolution = [nn.Conv3d(dim, dim, 3, padding=1, bias=False) for _ in range(2)]
        self.layer = nn.ModuleDict({f"conv{i + 1}": nn.ModuleDict({"conv": c}) for i, c in enumerate(convolution)})

    def forward(self, x: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b c z y x"]:
        conv1, conv2 = (self.layer.get_submodule(f"conv{i}.conv") for i in (1, 2))
        y = F.leaky_relu(F.instance_norm(conv1(x)), 0.01)
        return F.leaky_relu(F.instance_norm(conv2(y)) + x, 0.01)


def _windows(x: Float[Tensor, "b z y x c"], window: _Size) -> Float[Tensor, "b v w c"]:
    wz, wy, wx = window
    x = x.unflatten(3, (-1, wx)).unflatten(2, (-1, wy)).unflatten(1, (-1, wz))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(1, 3)


def _unwindows(x: Float[Tensor, "b v w c"], window: _Size, sides: _Size) -> Float[Tensor, "b z y x c"]:
    counts = [side // size for side, size in zip(sides, window, strict=True)]
    x = x.unflatten(2, window).unflatten(1, counts)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def _seam_mask(sides: _Size, window: _Size, shift: _Size, device: torch.device) -> Float[Tensor, "v w w"]:
    """-100 between tokens that the roll brought together from opposite ends of the map, else 0."""
    part = torch.zeros(1, *sides, 1, device=device)
    for axis, (side, size, step) in enumerate(zip(sides, window, shift, strict=True)):
        place = torch.arange(side, device=device)
        along = (place >= side - size).float() + (place >= side - step).float() if step else torch.zeros_like(place)
        part = part * 3 + along.reshape([-1 if i == axis + 1 else 1 for i in range(5)])
    rows = _windows(part, window)[0, :, :, 0]
    return torch.where(rows[:, None] == rows[:, :, None], 0.0, -100.0)
