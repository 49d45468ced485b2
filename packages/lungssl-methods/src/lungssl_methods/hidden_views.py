"""What methods that hide parts of global views have in common: the views together, their weights, masks and tokens."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from lungssl_backbones.encoder import Encoder, token_grid
from lungssl_data.batch import View
from lungssl_ops.patches import patchify
from torch import Tensor, nn

from lungssl_methods.masking import random_block_masks, visible_indices
from lungssl_methods.method import Gather, own_rows


def check_global_views_only(method: str, globals_per_slot: int, locals_per_slot: int) -> None:
    """ValueError without global views, and with local ones, which would be made for nothing."""
    if globals_per_slot < 1 or locals_per_slot > 0:
        raise ValueError(
            f"{method} hides parts of global views and uses no local ones, got globals_per_slot={globals_per_slot} "
            f"and locals_per_slot={locals_per_slot}; set globals_per_slot to at least 1 and locals_per_slot to 0"
        )


def stacked_images(views: Sequence[View], method: str) -> Float[Tensor, "g 1 z y x"]:
    """Images of all views after each other; ValueError for different sizes."""
    if len({view.image.shape for view in views}) != 1:
        raise ValueError(f"{method} needs global views of one size, got {[tuple(v.image.shape) for v in views]}")
    return torch.cat([view.image for view in views])


def lung_weight(views: Sequence[View], outside: float) -> Float[Tensor, "g z y x"]:
    """1 in the lung, `outside` elsewhere, 0 where nothing was measured."""
    lung, valid = torch.cat([view.lung for view in views]), torch.cat([view.valid for view in views])
    return torch.where(lung, 1.0, outside) * valid


def drawn_masks(
    image: Float[Tensor, "g 1 z y x"],
    stride_vox: int,
    *,
    views: int,
    ratio: float,
    unit: int,
    training: bool,
    gather: Gather,
) -> Bool[Tensor, "g n"]:
    """`random_block_masks` for `views` stacked views, on the CPU: from torch's global generator, held out always the
    same.

    So that held-out losses of different steps compare. Raises ValueError as they do.
    """
    z, y, x = image.shape[2:]
    generator = None if training else torch.Generator().manual_seed(0)
    grid = token_grid((z, y, x), stride_vox)
    masks = random_block_masks(len(image) * gather.ranks, grid, ratio=ratio, unit=unit, generator=generator)
    return own_rows(masks, gather, views=views)


def hidden_weight(
    voxel_weight: Float[Tensor, "g z y x"], mask: Bool[Tensor, "g n"], patch_vox: int
) -> Float[Tensor, "g n"]:
    """What each token's voxels count in a loss over the hidden ones."""
    return patchify(voxel_weight[:, None], (patch_vox, patch_vox, patch_vox)).sum(dim=2) * mask


class VisibleTokens(nn.Module):
    """A decoder's inputs: what the encoder says of visible tokens, and a learned token in hidden places.

    Encoders without `keep` see the masked crop, and what a convolution tells from around hidden tokens is used.
    """

    def __init__(self, encoder: Encoder, width: int) -> None:
        super().__init__()
        self.supports_keep = encoder.supports_keep
        self.embed = nn.Linear(encoder.dim, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)

    def forward(
        self, encoder: nn.Module, image: Float[Tensor, "g 1 z y x"], host_mask: Bool[Tensor, "g n"]
    ) -> Float[Tensor, "g n w"]:
        """`host_mask` is on the CPU, where it can be counted without waiting for a device."""
        if not self.supports_keep:
            return self.embed(encoder(image, mask=host_mask.to(image.device)).tokens)
        keep = visible_indices(host_mask).to(image.device)
        tokens = self.embed(encoder(image, keep=keep).tokens)
        full = self.mask_token.to(tokens.dtype).expand(*host_mask.shape, -1)
        return full.scatter(1, keep[..., None].expand_as(tokens), tokens)
