"""The definitions of `cost_volume` and of the labelling step of `coupled_convex`."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Padding = Literal["replicate", "zero"]


def side_of(labels: int) -> int:
    """Displacements per axis, 2 reach + 1, of a number of labels; ValueError unless it is the cube of an odd number."""
    side = round(labels ** (1 / 3))
    if side**3 != labels or side % 2 == 0:
        raise ValueError(f"a cost volume has (2 reach + 1)^3 labels: 27, 125, 343, ...; got {labels}")
    return side


def pad_volume(
    volume: Float[Tensor, "b c _z _y _x"], voxels: tuple[int, ...], padding: Padding
) -> Float[Tensor, "b c z y x"]:
    """F.pad with `voxels` before and after along x, y, z: zeros, or the nearest voxel again."""
    return F.pad(volume, voxels, mode="replicate" if padding == "replicate" else "constant")


def box_mean(
    volume: Float[Tensor, "b c z y x"], *, radius: int, passes: int, padding: Padding
) -> Float[Tensor, "b c z y x"]:
    """Mean over (2 radius + 1)^3 voxels, `passes` times; voxels beyond the border count, as `padding` says."""
    for _ in range(passes if radius else 0):
        volume = F.avg_pool3d(pad_volume(volume, (radius,) * 6, padding), 2 * radius + 1, stride=1)
    return volume


def mean_features(features: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b c 1 1 1"]:
    """Mean over the voxels, the same bits for any strides and number of threads: torch never splits such short sums."""
    return features.contiguous().mean(dim=4, keepdim=True).mean(dim=3, keepdim=True).mean(dim=2, keepdim=True)


def cost_volume_reference(
    fixed: Float[Tensor, "b c z y x"],
    moving: Float[Tensor, "b c z y x"],
    *,
    reach: int,
    smoothing: int,
    passes: int,
    padding: Padding,
    mean: bool,
    dtype: torch.dtype,
) -> Float[Tensor, "b l z y x"]:
    """Squared feature differences of every voxel to the moving voxels around it, by a loop over the displacements.

    Computed in float32, or in float64 for such features. Differentiable in both.
    """
    work = torch.promote_types(fixed.dtype, torch.float32)
    fixed, moving = fixed.to(work), moving.to(work)
    z, y, x = fixed.shape[2:]
    padded = pad_volume(moving, (reach,) * 6, padding)
    side = 2 * reach + 1
    planes = []
    for k in range(side**3):
        jz, jy, jx = k // side**2, k // side % side, k % side
        squares = (fixed - padded[:, :, jz : jz + z, jy : jy + y, jx : jx + x]).square()
        cost = squares.mean(dim=1, keepdim=True) if mean else squares.sum(dim=1, keepdim=True)
        planes.append(box_mean(cost, radius=smoothing, passes=passes, padding=padding).to(dtype))
    return torch.cat(planes, dim=1)


def coupled_argmin_reference(
    cost: Float[Tensor, "b l z y x"], smooth: Float[Tensor, "b 3 z y x"], *, weight: float
) -> Float[Tensor, "b 3 z y x"]:
    """The displacement d of least cost + weight |d - smooth|^2 at every voxel; of equals, that of the lowest label.

    The sum is cost + ((w (dz - sz)^2 + w (dy - sy)^2) + w (dx - sx)^2), each operation rounded to the type of `smooth`:
    every backend does the same, so that all pick the same label.
    """
    side = side_of(cost.shape[1])
    steps = torch.arange(side, device=cost.device, dtype=smooth.dtype)[:, None, None, None] - side // 2
    qx, qy, qz = (weight * (steps - smooth[:, axis, None]).square() for axis in range(3))
    best = torch.full_like(smooth[:, 0], torch.inf)
    label = torch.zeros_like(best, dtype=torch.int64)
    for k in range(side**2):
        across = qz[:, k // side] + qy[:, k % side]
        value = cost[:, k * side : (k + 1) * side].to(smooth.dtype) + (across[:, None] + qx)
        least, at = value.min(dim=1)
        label = torch.where(least < best, k * side + at, label)
        best = torch.minimum(best, least)
    index = torch.stack([label % side, label // side % side, label // side**2], dim=1)
    return (index - side // 2).to(smooth.dtype)
