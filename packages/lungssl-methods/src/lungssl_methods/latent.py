"""Prediction in feature space: the predictor, its targets and the loss.

Source: I-JEPA, Assran et al. 2023, https://arxiv.org/abs/2301.08243 (narrow transformer, mask tokens with positions,
layer-normed EMA features); L1 is V-JEPA 2's (Assran et al. 2025, https://arxiv.org/abs/2506.09985).
Axes: b crops, k context tokens, m target tokens, d encoder features, w predictor width.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from lungssl_methods.choices import check_choice
from lungssl_methods.decoder_layer import DecoderLayer

LatentNorm = Literal["smooth_l1", "l1"]


class LatentPredictor(nn.Module):
    """Features at places that were not seen, from features at places that were. It starts at predicting 0."""

    def __init__(self, dim: int, *, width: int, depth: int, heads: int) -> None:
        """Raises ValueError where the width doesn't split into heads."""
        super().__init__()
        if width % heads:
            raise ValueError(f"predictor_width {width} must be a multiple of predictor_heads {heads}")
        self.width = width
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.blocks = nn.ModuleList(DecoderLayer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, dim)
        # A random start costs more than predicting 0, and the fall to it would look like learning.
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(
        self,
        context: Float[Tensor, "b k d"],
        context_place: Float[Tensor, "b k w"],
        target_place: Float[Tensor, "b m w"],
        extra: Float[Tensor, "b e w"] | None = None,
    ) -> Float[Tensor, "b m d"]:
        """Predicted features. Places are added to tokens; `extra` tokens are context without a place."""
        hidden = self.mask_token + target_place
        seen = self.embed(context) + context_place
        tokens = torch.cat([hidden.to(seen.dtype), seen, *([] if extra is None else [extra.to(seen.dtype)])], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.project(self.norm(tokens[:, : hidden.shape[1]]))


def latent_targets(tokens: Float[Tensor, "b n d"]) -> Float32[Tensor, "b n d"]:
    """A teacher's features, each token's of zero mean and unit variance, without gradient."""
    with torch.autocast(tokens.device.type, enabled=False):
        return F.layer_norm(tokens.detach().float(), (tokens.shape[-1],))


def take(values: Float[Tensor, "b n c"], index: Int64[Tensor, "b m"]) -> Float[Tensor, "b m c"]:
    """Rows of `values` by token index."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def latent_loss(
    predicted: Float[Tensor, "b m d"],
    target: Float[Tensor, "b m d"],
    weight: Float[Tensor, "b m"],
    *,
    norm: LatentNorm = "smooth_l1",
) -> Float[Tensor, ""]:
    """Mean over tokens, by weight, of the channels' mean |error| or smooth-L1 of it (quadratic below 1).

    Of targets that are unit Gaussian, predicting 0 costs sqrt(2 / pi) = 0.798, smooth-L1 0.424. 0, with a gradient of
    0, where all weights are. Raises ValueError for an unknown norm.
    """
    check_choice("latent_loss's norm", norm, get_args(LatentNorm))
    error = F.l1_loss if norm == "l1" else F.smooth_l1_loss
    each = error(predicted.float(), target, reduction="none").mean(dim=-1)
    return (each * weight).sum() / weight.sum().clamp_min(1e-6)


def target_std(target: Float[Tensor, "b m d"]) -> Float[Tensor, ""]:
    """Mean over channels of their spread over tokens: near 1 for features that differ, 0 once all are the same."""
    return target.flatten(0, 1).std(dim=0, correction=0).mean()
