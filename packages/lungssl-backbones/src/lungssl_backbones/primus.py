"""Primus, the vision transformer of nnU-Net and nnssl, name for name, so that their weights load here and ours there.

Source: Wald et al. 2025, https://arxiv.org/abs/2503.01835, and `Primus` of dynamic-network-architectures 0.4.4, whose
blocks are EVA-02's, Fang et al. 2023, https://arxiv.org/abs/2303.11331: rotary and absolute positions, SwiGLU of 8/3
the width with a LayerNorm inside, LayerNorm of the attention's output, LayerScale.
Differs from the source: encoder only; other crop sizes interpolate the absolute positions; the patch bias starts large,
so that the first LayerNorm cannot cancel absolute HU, and so that air (0) is not the mask token, which is zero and not
learned (see `vit3d._PATCH_BIAS_STD`).
Axes: b batch, d embedding, n tokens, h heads, z y x voxels with z from inferior to superior.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from lungssl_ops.transformer import attend
from torch import Tensor, nn

from lungssl_backbones.encoder import Features, token_grid
from lungssl_backbones.masking import drop_samples, take_tokens

_PATCH_BIAS_STD = 0.3
"""As in `vit3d`: the direction of a constant patch's embedding then depends on its density."""

_TEMPERATURE = 10_000.0
"""Of the rotary bands, Su et al. 2021, https://arxiv.org/abs/2104.09864."""


class Primus(nn.Module):
    """Maps a CT crop to one token per cube of `patch_vox` voxels a side; it has no summary token."""

    mask_token: Tensor

    name: str = "primus_m"
    """An entry of this class in `BACKBONES`; `create_backbone` writes the one that it was asked for."""
    supports_keep = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Size and behaviour of a Primus; the defaults are Primus-M as nnssl trains it."""

        dim: int = 864
        """Embedding width; a multiple of 6 per head: a pair of channels per axis for the rotation."""
        depth: int = 16
        """Transformer blocks."""
        heads: int = 12
        """Attention heads."""
        patch_vox: int = 8
        """Side of a token's cube in voxels."""
        crop_vox: tuple[int, int, int] = (96, 96, 96)
        """Crop (z, y, x) that the table of absolute positions is made for; other crops interpolate it."""
        in_channels: int = 1
        """Channels of the crop."""
        registers: int = 0
        """Register tokens (Darcet et al. 2023, https://arxiv.org/abs/2309.16588)."""
        layer_scale: float = 0.1
        """Initial LayerScale."""
        drop_path: float = 0.2
        """Probability of skipping the last block, rising linearly from 0 at the first."""
        spacing_mm: float = 1.0
        """Voxel size that the weights are meant for; nnssl's published ones: 1 mm."""

        def build(self) -> "Primus":
            return Primus(self)

    def __init__(self, config: Config) -> None:
        """Raises ValueError where `dim` is not a multiple of 6 channels per head, or `crop_vox` of the patch."""
        super().__init__()
        if config.dim % (6 * config.heads):
            raise ValueError(
                f"dim {config.dim} does not split into {config.heads} heads of a multiple of 6 channels; "
                f"take a multiple of {6 * config.heads}"
            )
        self.config = config
        self.dim = config.dim
        self.token_stride_vox = config.patch_vox
        self.pyramid_channels = (config.dim,)
        self.pyramid_strides_vox = (config.patch_vox,)
        self.spacing_mm = config.spacing_mm
        self.position_grid = token_grid(config.crop_vox, config.patch_vox)
        embed = nn.Conv3d(config.in_channels, config.dim, config.patch_vox, stride=config.patch_vox)
        self.down_projection = nn.ModuleDict({"proj": embed})
        self.register_buffer("mask_token", torch.zeros(1, 1, config.dim))
        if config.registers:
            self.register_tokens = nn.Parameter(torch.empty(1, config.registers, config.dim))
        self.eva = _Eva(config, tokens=math.prod(self.position_grid))
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for module in self.eva.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # BEiT, Bao et al. 2021, https://arxiv.org/abs/2106.08254: deeper branches start smaller.
        for i, block in enumerate(self.eva.blocks):
            for branch in ("attn.proj.weight", "mlp.fc2.weight"):
                nn.init.trunc_normal_(block.get_parameter(branch), std=0.02 / math.sqrt(2 * (i + 1)))
        nn.init.trunc_normal_(self.eva.pos_embed, std=0.02)
        nn.init.kaiming_normal_(self.down_projection.get_parameter("proj.weight"), a=0.01)
        nn.init.normal_(self.down_projection.get_parameter("proj.bias"), std=_PATCH_BIAS_STD)
        if self.config.registers:
            nn.init.normal_(self.register_tokens, std=1e-6)

    def forward(
        self,
        x: Float[Tensor, "b c z y x"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        keep: Int64[Tensor, "b k"] | None = None,
        coords_mm: Float[Tensor, "b 3 z y x"] | None = None,
    ) -> Features:
        """See `encoder.Encoder`. `coords_mm` moves the rotary positions; the absolute ones are places in the crop."""
        z, y, x_vox = x.shape[2:]
        grid = token_grid((z, y, x_vox), self.token_stride_vox)
        tokens = self.down_projection["proj"](x).flatten(2).mT
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        table = resize_positions(self.eva.pos_embed, self.position_grid, grid, fixed=self.config.registers)
        tokens = tokens + table[:, self.config.registers :]
        places = self._places(grid, coords_mm, x.device).expand(x.shape[0], -1, -1)
        if keep is not None:
            tokens, places = take_tokens(tokens, keep), take_tokens(places, keep)
        if self.config.registers:
            registers = self.register_tokens + table[:, : self.config.registers]
            tokens = torch.cat([registers.to(tokens.dtype).expand(x.shape[0], -1, -1), tokens], dim=1)
        cos, sin = self._rotation(places)
        for block in self.eva.blocks:
            tokens = block(tokens, cos, sin)
        tokens = self.eva.norm(tokens)[:, self.config.registers :]
        return Features(
            cls=None,
            tokens=tokens,
            pyramid=() if keep is not None else (tokens.mT.unflatten(2, grid),),
            grid=grid,
            stride_mm=self.token_stride_vox * self.spacing_mm,
        )

    def _places(
        self, grid: tuple[int, int, int], coords_mm: Float[Tensor, "b 3 z y x"] | None, device: torch.device
    ) -> Float[Tensor, "_b n 3"]:
        """(z, y, x) of each token in units of a token, from the first one."""
        if coords_mm is None:
            axes = [torch.arange(n, device=device, dtype=torch.float32) for n in grid]
            return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)[None]
        centres = F.avg_pool3d(coords_mm.float(), self.token_stride_vox).flatten(2).mT.flip(-1)
        return (centres - centres[:, :1]) / (self.token_stride_vox * self.spacing_mm)

    def _rotation(self, places: Float[Tensor, "b n 3"]) -> tuple[Float[Tensor, "b 1 t f"], Float[Tensor, "b 1 t f"]]:
        """Cosine and sine per token and channel pair; registers are not turned."""
        per_axis = self.dim // self.config.heads // 6
        bands = _TEMPERATURE ** -(torch.arange(per_axis, device=places.device, dtype=torch.float32) / per_axis)
        angle = F.pad((places[..., None] * bands).flatten(2), (0, 0, self.config.registers, 0))[:, None]
        return angle.cos(), angle.sin()


def resize_positions(
    table: Float[Tensor, "1 t d"],
    source: tuple[int, int, int],
    target: tuple[int, int, int],
    *,
    fixed: int = 0,
) -> Float[Tensor, "1 u d"]:
    """A table of absolute positions for another grid of tokens, trilinear between cell centres as in nnU-Net.

    The first `fixed` rows (registers) stay. Raises ValueError where the table's length is not `source`'s.
    """
    if table.shape[1] != fixed + math.prod(source):
        raise ValueError(f"a table of {table.shape[1]} positions is not {fixed} tokens and a grid of {source}")
    if source == target:
        return table
    maps = table[:, fixed:].mT.unflatten(2, source)
    resized = F.interpolate(maps.float(), size=target, mode="trilinear", align_corners=False).to(table.dtype)
    return torch.cat([table[:, :fixed], resized.flatten(2).mT], dim=1)


class _Eva(nn.Module):
    """Holder of the blocks under the source's names."""

    def __init__(self, config: Primus.Config, *, tokens: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(1, config.registers + tokens, config.dim))
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(_Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.dim)


class _Block(nn.Module):
    """Pre-norm attention and SwiGLU, each scaled per channel and, in training, skipped at random per sample."""

    def __init__(self, config: Primus.Config, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.gamma_1 = nn.Parameter(torch.full((config.dim,), config.layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((config.dim,), config.layer_scale))
        self.norm1 = nn.LayerNorm(config.dim)
        self.attn = _Attention(config.dim, config.heads)
        self.norm2 = nn.LayerNorm(config.dim)
        self.mlp = _SwiGlu(config.dim, int(config.dim * (4 * 2 / 3)))

    def forward(
        self, tokens: Float[Tensor, "b t d"], cos: Float[Tensor, "b 1 t f"], sin: Float[Tensor, "b 1 t f"]
    ) -> Float[Tensor, "b t d"]:
        attended = self.gamma_1 * self.attn(self.norm1(tokens), cos, sin)
        tokens = tokens + drop_samples(attended, self.drop_path, self.training)
        return tokens + drop_samples(self.gamma_2 * self.mlp(self.norm2(tokens)), self.drop_path, self.training)


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, tokens: Float[Tensor, "b t d"], cos: Float[Tensor, "b 1 t f"], sin: Float[Tensor, "b 1 t f"]
    ) -> Float[Tensor, "b t d"]:
        q, k, v = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        return self.proj(self.norm(attended.transpose(1, 2).flatten(2)))


class _SwiGlu(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1_g = nn.Linear(dim, hidden)
        self.fc1_x = nn.Linear(dim, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.fc2(self.norm(F.silu(self.fc1_g(tokens)) * self.fc1_x(tokens)))


def _rotate(
    x: Float[Tensor, "b h t c"], cos: Float[Tensor, "b 1 t f"], sin: Float[Tensor, "b 1 t f"]
) -> Float[Tensor, "b h t c"]:
    """Turn channel pairs (2i, 2i + 1): timm's interleaved layout."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
