"""The definition of `mind_ssc`: a loop over the twelve pairs of neighbours."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

NEIGHBOURS = ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1))
"""Offsets (z, y, x) of the six patches around a voxel, in units of the dilation."""
PAIRS = ((1, 2), (3, 0), (2, 0), (3, 1), (2, 4), (3, 5), (4, 0), (1, 5), (3, 4), (5, 2), (1, 4), (5, 0))
"""Which two NEIGHBOURS each channel compares: all pairs but the opposite ones, in the order of the authors' code."""
LEAST_VARIANCE, MOST_VARIANCE = 0.001, 1000.0
"""Bounds of a voxel's variance in units of the image's mean variance, as in the authors' code."""


def mind_ssc_reference(
    image: Float[Tensor, "b 1 z y x"], *, radius: int, dilation: int, dtype: torch.dtype
) -> Float[Tensor, "b 12 z y x"] | UInt8[Tensor, "b 12 z y x"]:
    """Twelve self-similarities of each voxel's surroundings, in [0, 1]; the formulas are those of `mind_ssc`.

    Computed in float32, or in float64 for such images. Differentiable, but for dtype uint8; where two distances are
    the smallest, they share the gradient of the minimum.
    """
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    z, y, x = image.shape[2:]
    padded = F.pad(image, (dilation,) * 6, mode="replicate")
    shifted = []
    for offset in NEIGHBOURS:
        dz, dy, dx = (dilation * (1 + o) for o in offset)
        shifted.append(padded[:, :, dz : dz + z, dy : dy + y, dx : dx + x])
    distances = torch.cat([_box_mean((shifted[i] - shifted[j]).square(), radius) for i, j in PAIRS], dim=1)
    distances = distances - distances.amin(dim=1, keepdim=True)
    variance = distances.mean(dim=1, keepdim=True)
    overall = variance.mean(dim=(1, 2, 3, 4), keepdim=True)
    variance = variance.clamp(LEAST_VARIANCE * overall, MOST_VARIANCE * overall)
    # In a constant image all distances and the variance are 0, and 0 / tiny is the 0 that is meant.
    similarity = torch.exp(-distances / variance.clamp_min(torch.finfo(image.dtype).tiny))
    return torch.round(255 * similarity).to(dtype) if dtype == torch.uint8 else similarity.to(dtype)


def _box_mean(volume: Float[Tensor, "b 1 z y x"], radius: int) -> Float[Tensor, "b 1 z y x"]:
    """Mean over (2 radius + 1)^3 voxels; beyond the border the voxels of the border repeat."""
    return F.avg_pool3d(F.pad(volume, (radius,) * 6, mode="replicate"), 2 * radius + 1, stride=1)
