"""What encoders have in common where tokens are hidden, dropped or placed.

Axes: b batch, c channels, d embedding, n tokens, k kept tokens, z y x voxels with z from inferior to superior.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

MASK_VALUE = -1.0
"""Starting value of masked voxels: as far below air (0) as soft tissue is above, so that a mask never reads as air."""


def hide_voxels(
    x: Float[Tensor, "b c z y x"],
    mask: Bool[Tensor, "b n"] | None,
    *,
    grid: tuple[int, int, int],
    stride_vox: int,
    value: Float[Tensor, "1"],
) -> Float[Tensor, "b c z y x"]:
    """The crop with every voxel of a masked token set to `value`; the crop itself where `mask` is None."""
    if mask is None:
        return x
    blocks = mask.unflatten(1, grid)[:, None]
    for axis in (2, 3, 4):
        blocks = blocks.repeat_interleave(stride_vox, dim=axis)
    return torch.where(blocks, value.to(x.dtype), x)


def refuse_keep(keep: Int64[Tensor, "b k"] | None) -> None:
    """Raises ValueError where `keep` is given: for encoders that need the whole crop."""
    if keep is not None:
        raise ValueError("a convolutional encoder cannot process only some tokens (`keep`); hide them with `mask`")


def take_tokens(tokens: Float[Tensor, "b n d"], keep: Int64[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """The kept tokens of each sample, in the order of `keep`."""
    return tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[2]))


def token_centres_mm(
    grid: tuple[int, int, int],
    *,
    stride_vox: int,
    spacing_mm: float,
    coords_mm: Float[Tensor, "b 3 z y x"] | None,
    device: torch.device,
) -> Float[Tensor, "_b n 3"]:
    """Token centres (x, y, z) relative to their mean, in mm; one row of the batch where `coords_mm` is None.

    Relative, because a summary token sits in the middle of the crop, and the scanner's origin tells nothing.
    """
    if coords_mm is None:
        axes = [torch.arange(n, device=device, dtype=torch.float32) for n in grid]
        index_zyx = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
        centres = index_zyx.flip(-1)[None] * (stride_vox * spacing_mm)
    else:
        centres = F.avg_pool3d(coords_mm.float(), stride_vox).flatten(2).mT
    return centres - centres.mean(dim=1, keepdim=True)


def drop_samples(branch: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth (Huang et al. 2016, https://arxiv.org/abs/1603.09382): zero a residual branch for whole samples,
    scaled so that its mean stays. Returns `branch` itself outside training."""
    if not training or rate == 0:
        return branch
    survives = torch.rand(branch.shape[0], *(1,) * (branch.ndim - 1), device=branch.device) >= rate
    return branch * survives / (1 - rate)
