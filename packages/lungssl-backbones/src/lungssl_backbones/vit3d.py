"""Vision transformer over cubes of voxels, with register tokens and positions in millimetres.

Sources: ViT, Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929; registers, Darcet et al. 2023,
https://arxiv.org/abs/2309.16588; rotary positions, Su et al. 2021, https://arxiv.org/abs/2104.09864, one share of each
head per axis as in Heo et al. 2024, https://arxiv.org/abs/2403.13298.
Differs from them: wavelengths are millimetres, so that positions carry to other crop sizes, spacings and resampled
views; the patch bias starts large, so that the first LayerNorm cannot cancel absolute HU (see `_PATCH_BIAS_STD`).
Axes: b batch, d embedding, n tokens, h heads, z y x voxels with z from inferior to superior.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from lungssl_backbones.encoder import Features, token_grid

_PATCH_BIAS_STD = 0.3
"""A patch of constant density c embeds to c*w + bias, and LayerNorm sees only the direction of that: without a bias it
is the same for all c. Xavier weights give w a spread of about 1.2, so 0.3 turns the direction most around c = 0.25
(-650 HU), the middle of the lung's range. In the HU contract test R² is 0.990 to 0.996 without, 0.9998 with it."""


class Vit3d(nn.Module):
    """Maps a CT crop to a summary token and one token per cube of `patch_vox` voxels a side."""

    name: str = "vit3d_s"
    """An entry of this class in `BACKBONES`; `create_backbone` writes the one that it was asked for."""
    supports_keep = True

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
        self.patch_embed = nn.Linear(config.patch_vox**3, config.dim)
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

    def forward(
        self,
        x: Float[Tensor, "b 1 z y x"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        keep: Int64[Tensor, "b k"] | None = None,
        coords_mm: Float[Tensor, "b 3 z y x"] | None = None,
    ) -> Features:
        """See `encoder.Encoder`. Moving all of `coords_mm` by one vector changes nothing."""
        z, y, x_vox = x.shape[2:]
        grid = token_grid((z, y, x_vox), self.token_stride_vox)
        tokens = self.patch_embed(_patches(x, grid))
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        centres_mm = self._token_centres_mm(grid, coords_mm, x.device).expand(len(x), -1, -1)
        if keep is not None:
            tokens = tokens.gather(1, keep[..., None].expand(-1, -1, self.dim))
            centres_mm = centres_mm.gather(1, keep[..., None].expand(-1, -1, 3))
        extra = torch.cat([self.cls_token, self.register_tokens], dim=1).to(tokens.dtype)
        cos, sin = self._rotation(centres_mm, extra.shape[1])
        tokens = torch.cat([extra.expand(len(x), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens, cos, sin)
        tokens = self.norm(tokens)
        cls, tokens = tokens[:, 0], tokens[:, extra.shape[1] :]
        return Features(
            cls=cls,
            tokens=tokens,
            pyramid=() if keep is not None else (tokens.mT.unflatten(2, grid),),
            grid=grid,
            stride_mm=self.token_stride_vox * self.spacing_mm,
        )

    def _token_centres_mm(
        self, grid: tuple[int, int, int], coords_mm: Float[Tensor, "b 3 z y x"] | None, device: torch.device
    ) -> Float[Tensor, "_b n 3"]:
        """Token centres (x, y, z) relative to their mean: the summary token sits in the middle of the crop, and where
        the scanner put its origin tells nothing."""
        if coords_mm is None:
            axes = [torch.arange(n, device=device, dtype=torch.float32) for n in grid]
            index_zyx = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
            centres = index_zyx.flip(-1)[None] * (self.token_stride_vox * self.spacing_mm)
        else:
            centres = F.avg_pool3d(coords_mm.float(), self.token_stride_vox).flatten(2).mT
        return centres - centres.mean(dim=1, keepdim=True)

    def _rotation(
        self, centres_mm: Float[Tensor, "b n 3"], unplaced: int
    ) -> tuple[Float[Tensor, "b 1 t f"], Float[Tensor, "b 1 t f"]]:
        """Cosine and sine per token and channel pair; the first `unplaced` tokens (summary, registers) are not turned.

        Computed from the config, not kept in a buffer, so that no cast of the model can round it.
        """
        per_axis = self.dim // self.config.heads // 6
        shortest, longest = (math.log2(w) for w in self.config.wavelengths_mm)
        wavelengths_mm = torch.logspace(shortest, longest, per_axis, base=2.0, device=centres_mm.device)
        angle = (2 * math.pi * centres_mm[..., None] / wavelengths_mm).flatten(2)
        angle = F.pad(angle, (0, 0, unplaced, 0))[:, None]
        return angle.cos(), angle.sin()


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
        self.mlp = nn.Sequential(nn.Linear(config.dim, hidden), nn.GELU(), nn.Linear(hidden, config.dim))
        self.scale2 = nn.Parameter(torch.full((config.dim,), config.layer_scale))

    def forward(
        self, tokens: Float[Tensor, "b t d"], cos: Float[Tensor, "_b 1 t f"], sin: Float[Tensor, "_b 1 t f"]
    ) -> Float[Tensor, "b t d"]:
        tokens = tokens + self._drop(self.scale1 * self._attend(self.norm1(tokens), cos, sin))
        return tokens + self._drop(self.scale2 * self.mlp(self.norm2(tokens)))

    def _attend(
        self, tokens: Float[Tensor, "b t d"], cos: Float[Tensor, "_b 1 t f"], sin: Float[Tensor, "_b 1 t f"]
    ) -> Float[Tensor, "b t d"]:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        return self.proj(attended.transpose(1, 2).flatten(2))

    def _drop(self, branch: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        if not self.training or self.drop_path == 0:
            return branch
        survives = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * survives / (1 - self.drop_path)


def _rotate(
    x: Float[Tensor, "b h t c"], cos: Float[Tensor, "_b 1 t f"], sin: Float[Tensor, "_b 1 t f"]
) -> Float[Tensor, "b h t c"]:
    """Turn channel pairs (i, i + f); channels from 2f on, left over by the split in three axes, stay."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b, rest = x.split([cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


def _patches(x: Float[Tensor, "b 1 z y x"], grid: tuple[int, int, int]) -> Float[Tensor, "b n p"]:
    """Cubes flattened: a reshape and a Linear do the work of a strided convolution, without its slow kernels."""
    gz, gy, gx = grid
    cubes = x.unflatten(4, (gx, -1)).unflatten(3, (gy, -1)).unflatten(2, (gz, -1)).squeeze(1)
    return cubes.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
