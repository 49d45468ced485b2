"""Vision transformer over cubes of voxels, with register tokens and positions in millimetres.

Sources: ViT, Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929; registers, Darcet et al. 2023,
https://arxiv.org/abs/2309.16588; rotary positions, Su et al. 2021, https://arxiv.org/abs/2104.09864, one share of each
head per axis as in Heo et al. 2024, https://arxiv.org/abs/2403.13298; SwiGLU, Shazeer 2020,
https://arxiv.org/abs/2002.05202.
Differs from them: wavelengths are millimetres, so that positions carry to other crop sizes, spacings and resampled
views; the patch bias starts large, so that the first LayerNorm cannot cancel absolute HU (see `_PATCH_BIAS_STD`).
Axes: b batch, d embedding, n tokens, h heads, z y x voxels with z from inferior to superior.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from lungssl_ops.transformer import Affine, Counts, Rotation, add_branch, residual_attention, residual_mlp
from torch import Tensor, nn

from lungssl_backbones.encoder import Features, token_grid
from lungssl_backbones.masking import drop_samples, take_tokens, token_centres_mm

_PATCH_BIAS_STD = 0.3
"""A patch of constant density c embeds to c*w + bias, and LayerNorm sees only the direction of that: without a bias it
is the same for all c. Xavier weights give w a spread of about 1.2, so 0.3 turns the direction most around c = 0.25
(-650 HU), the middle of the lung's range. In the HU contract test R² is 0.990 to 0.996 without, 0.9998 with it."""


class Vit3d(nn.Module):
    """Maps a CT crop to a summary token and one token per cube of `patch_vox` voxels a side."""

    name: str = "vit3d_s"
    """An entry of this class in `BACKBONES`; `create_backbone` writes the one that it was asked for."""
    supports_keep = True
    supports_summary_only = True
    supports_sizes = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Size and behaviour of a Vit3d."""

        dim: int = 384
        """Embedding width; a multiple of `heads`."""
        depth: int = 12
        """Transformer blocks."""
        heads: int = 6
        """Attention heads, each at least 6 wide: a pair of channels per axis for the positions."""
        mlp_ratio: float = 4.0
        """Hidden width of the MLP over `dim`."""
        mlp: Literal["gelu", "swiglu"] = "gelu"
        """"swiglu" gates the MLP; its hidden width is 2/3 of the other's, so that both have as many weights."""
        position: Literal["rope", "sincos"] = "rope"
        """"rope" turns queries and keys by their token's place; "sincos" adds fixed waves to the tokens, once. Both run
        over `wavelengths_mm`."""
        in_channels: int = 1
        """Channels of the crop."""
        patch_vox: int = 8
        """Side of a token's cube in voxels."""
        registers: int = 4
        """Register tokens (four in Darcet et al. 2023)."""
        layer_scale: float = 0.1
        """Initial LayerScale: 0.1 for up to 18 blocks in CaiT, Touvron et al. 2021, https://arxiv.org/abs/2103.17239;
        the 1e-5 of deeper models starts slower. Toy task that needs attention (predict the right-hand neighbour's
        level, vit3d_nano, AdamW 1e-3), squared error after 50 and 100 steps: 0.78, 0.005; with 1e-5 0.91, 0.016."""
        drop_path: float = 0.0
        """Probability of skipping the last block, rising linearly from 0 at the first (Huang et al. 2016)."""
        wavelengths_mm: tuple[float, float] = (48.0, 800.0)
        """Shortest and longest wavelength of the positions. 48 mm: two patches of 16 voxels at 1.5 mm. 800 mm: twice
        an adult thorax, so that the slowest phase never wraps round."""
        spacing_mm: float = 1.5
        """Voxel size that the weights are meant for; places tokens where no `coords_mm` is given."""

        def build(self) -> "Vit3d":
            return Vit3d(self)

    def __init__(self, config: Config) -> None:
        """Raises ValueError where `dim` does not split into heads of 6 channels or more."""
        super().__init__()
        if config.dim % config.heads or config.dim // config.heads < 6:
            raise ValueError(
                f"dim {config.dim} does not split into {config.heads} heads of at least 6 channels; "
                "take a multiple of heads, e.g. 64 per head"
            )
        self.config = config
        self.dim = config.dim
        self.token_stride_vox = config.patch_vox
        self.pyramid_channels = (config.dim,)
        self.pyramid_strides_vox = (config.patch_vox,)
        self.spacing_mm = config.spacing_mm
        self.patch_embed = nn.Linear(config.in_channels * config.patch_vox**3, config.dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.register_tokens = nn.Parameter(torch.empty(1, config.registers, config.dim))
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.dim))
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(_Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        # Xavier everywhere, as in MAE (He et al. 2021): unlike a fixed 0.02 it suits narrow models too.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.patch_embed.bias, std=_PATCH_BIAS_STD)
        for token in (self.cls_token, self.register_tokens, self.mask_token):
            nn.init.normal_(token, std=0.02)

    @overload
    def forward(
        self,
        x: Float[Tensor, "b c z y x"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        keep: Int64[Tensor, "b k"] | None = None,
        coords_mm: Float[Tensor, "b 3 z y x"] | None = None,
        summary_only: bool = False,
    ) -> Features: ...

    @overload
    def forward(self, x: Sequence[Float[Tensor, "_b c _z _y _x"]], *, summary_only: bool = False) -> list[Features]: ...

    def forward(
        self,
        x: Float[Tensor, "b c z y x"] | Sequence[Float[Tensor, "_b c _z _y _x"]],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        keep: Int64[Tensor, "b k"] | None = None,
        coords_mm: Float[Tensor, "b 3 z y x"] | None = None,
        summary_only: bool = False,
    ) -> Features | list[Features]:
        """See `encoder.Encoder`. Moving all of `coords_mm` by one vector changes nothing.

        `x`: crops, or crops of several sizes, [b, c, z, y, x] each: they go through the blocks together, which reads
        every weight once, and each size has its own features; `mask`, `keep` and `coords_mm` are for one size.
        `summary_only`: `cls` alone is wanted, so that the last block asks only for it; there are no tokens.
        """
        if isinstance(x, Tensor):
            sizes = [self._enter(x, mask, keep, coords_mm)]
        elif mask is None and keep is None and coords_mm is None:
            sizes = [self._enter(one, None, None, None) for one in x]
        else:
            raise ValueError("crops of several sizes take no mask, keep or coords_mm; encode each size by itself")
        counts = [size.tokens.shape[:2] for size in sizes]
        rows = torch.cat([size.tokens.flatten(0, 1) for size in sizes])
        rotation = [size.rotation for size in sizes] if self.config.position == "rope" else None
        for number, block in enumerate(self.blocks, start=1):
            last = number == len(self.blocks)
            rows, counts = block(rows, counts, rotation, first=1 if summary_only and last else None)
        parts = self.norm(rows).split([b * t for b, t in counts])
        whole = keep is None and not summary_only
        found = [
            self._leave(part.unflatten(0, count), size.grid, pyramid=whole)
            for part, count, size in zip(parts, counts, sizes, strict=True)
        ]
        return found[0] if isinstance(x, Tensor) else found

    def _enter(
        self,
        x: Float[Tensor, "b c z y x"],
        mask: Bool[Tensor, "b n"] | None,
        keep: Int64[Tensor, "b k"] | None,
        coords_mm: Float[Tensor, "b 3 z y x"] | None,
    ) -> "_Entered":
        """Tokens of crops as the first block takes them, and how they turn."""
        z, y, x_vox = x.shape[2:]
        grid = token_grid((z, y, x_vox), self.token_stride_vox)
        patches = _patches(x, grid)
        if keep is not None:  # before they cost anything
            patches = take_tokens(patches, keep)
            mask = None if mask is None else mask.gather(1, keep)
        tokens = self.patch_embed(patches)
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        centres_mm = token_centres_mm(
            grid,
            stride_vox=self.token_stride_vox,
            spacing_mm=self.spacing_mm,
            coords_mm=coords_mm,
            device=x.device,
        )
        if keep is not None:
            centres_mm = take_tokens(centres_mm.expand(x.shape[0], -1, -1), keep)
        extra = torch.cat([self.cls_token, self.register_tokens], dim=1).to(tokens.dtype)
        if self.config.position == "sincos":
            tokens = tokens + self._waves(centres_mm).to(tokens.dtype)
        tokens = torch.cat([extra.expand(x.shape[0], -1, -1), tokens], dim=1)
        return _Entered(tokens, self._rotation(centres_mm, extra.shape[1]), grid)

    def _leave(self, tokens: Float[Tensor, "b t d"], grid: tuple[int, int, int], *, pyramid: bool) -> Features:
        cls, tokens = tokens[:, 0], tokens[:, 1 + self.config.registers :]
        return Features(
            cls=cls,
            tokens=tokens,
            pyramid=(tokens.mT.unflatten(2, grid),) if pyramid else (),
            grid=grid,
            stride_mm=self.token_stride_vox * self.spacing_mm,
        )

    def _rotation(self, centres_mm: Float[Tensor, "_b n 3"], unplaced: int) -> Rotation:
        """Cosine and sine per token and channel pair; the first `unplaced` tokens (summary, registers) are not turned.

        Computed from the config, not kept in a buffer, so that no cast of the model can round it.
        """
        angle = self._angles(centres_mm, self.dim // self.config.heads // 6)
        angle = F.pad(angle, (0, 0, unplaced, 0))
        return angle.cos(), angle.sin()

    def _waves(self, centres_mm: Float[Tensor, "_b n 3"]) -> Float[Tensor, "_b n d"]:
        """Sines, then cosines, of the same angles as the rotation's, a sixth of the channels per axis and kind;
        channels left over by the split stay 0."""
        angle = self._angles(centres_mm, self.dim // 6)
        return F.pad(torch.cat([angle.sin(), angle.cos()], dim=-1), (0, self.dim - 2 * angle.shape[-1]))

    def _angles(self, centres_mm: Float[Tensor, "_b n 3"], per_axis: int) -> Float[Tensor, "_b n f"]:
        shortest, longest = (math.log2(w) for w in self.config.wavelengths_mm)
        wavelengths_mm = torch.logspace(shortest, longest, per_axis, base=2.0, device=centres_mm.device)
        return (2 * math.pi * centres_mm[..., None] / wavelengths_mm).flatten(2)


class _Entered(NamedTuple):
    tokens: Float[Tensor, "b t d"]
    rotation: Rotation
    grid: tuple[int, int, int]


class _Block(nn.Module):
    """Pre-norm attention and MLP, each scaled per channel and, in training, skipped at random per sample."""

    def __init__(self, config: Vit3d.Config, drop_path: float) -> None:
        super().__init__()
        hidden = round(config.dim * config.mlp_ratio)
        self.heads = config.heads
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)
        self.scale1 = nn.Parameter(torch.full((config.dim,), config.layer_scale))
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        if config.mlp == "swiglu":
            self.mlp = _SwiGlu(config.dim, round(hidden * 2 / 3))
        else:
            self.mlp = nn.Sequential(nn.Linear(config.dim, hidden), nn.GELU(), nn.Linear(hidden, config.dim))
        self.scale2 = nn.Parameter(torch.full((config.dim,), config.layer_scale))

    def forward(
        self,
        rows: Float[Tensor, "r d"],
        counts: Counts,
        rotation: Sequence[Rotation] | None,
        first: int | None = None,
    ) -> tuple[Float[Tensor, "_r d"], Counts]:
        """Rows are the tokens of all samples, `counts` those that belong together; with `first` so many of each."""
        norm, joint, out = (Affine(part.weight, part.bias) for part in (self.norm1, self.qkv, self.proj))
        scale1, scale2 = self._scale(self.scale1, counts), self._scale(self.scale2, counts)
        rows = residual_attention(
            rows, norm, joint, out, counts=counts, heads=self.heads, rotation=rotation, scale=scale1, first=first
        )
        counts = counts if first is None else [torch.Size([b, first]) for b, _ in counts]
        if isinstance(self.mlp, _SwiGlu):
            return add_branch(rows, self.mlp(self.norm2(rows)), counts, scale2), counts
        norm, widen, narrow = (Affine(part.weight, part.bias) for part in (self.norm2, self.mlp[0], self.mlp[2]))
        return residual_mlp(rows, norm, widen, narrow, counts=counts, scale=scale2), counts

    def _scale(self, scale: Float[Tensor, " d"], counts: Counts) -> Float[Tensor, "_s d"]:
        """Of all samples or, in training with dropped branches, of each."""
        if not self.training or self.drop_path == 0:
            return scale[None]
        return drop_samples(scale.expand(sum(b for b, _ in counts), -1), self.drop_path, self.training)


class _SwiGlu(nn.Module):
    """`down(silu(gate(t)) * up(t))`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        return self.down(F.silu(self.gate(tokens)) * self.up(tokens))


def _patches(x: Float[Tensor, "b c z y x"], grid: tuple[int, int, int]) -> Float[Tensor, "b n p"]:
    """Cubes flattened, channel by channel: a reshape and a Linear do the work of a strided convolution, without its
    slow kernels."""
    gz, gy, gx = grid
    cubes = x.unflatten(4, (gx, -1)).unflatten(3, (gy, -1)).unflatten(2, (gz, -1))
    return cubes.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
