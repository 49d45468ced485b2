"""Makes a forward and a backward displacement field inverses of each other."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def inverse_consistent(
    forward: Float[Tensor, "b 3 z y x"], backward: Float[Tensor, "b 3 z y x"], *, iterations: int = 15
) -> tuple[Float[Tensor, "b 3 z y x"], Float[Tensor, "b 3 z y x"]]:
    """Both fields, changed until going there and back ends near the start; components (x, y, z) in voxels of the grid.

    Each iteration replaces u(v) by (u(v) - w(v + u(v))) / 2 and w by its counterpart, w interpolated trilinearly and
    repeated beyond the border: the update of ConvexAdam's code, which takes zeros beyond the border. Plain torch, on
    any device: the grids are coarse. Differentiable.

    Raises ValueError for fields of different shapes or types.
    """
    alike = forward.shape == backward.shape and forward.dtype == backward.dtype
    if not alike or forward.ndim != 5 or forward.shape[1] != 3 or iterations < 0:
        raise ValueError(
            f"inverse_consistent needs two fields [b, 3, z, y, x] of one shape and type and 0 or more iterations, got "
            f"{tuple(forward.shape)} {forward.dtype}, {tuple(backward.shape)} {backward.dtype} and {iterations}"
        )
    sizes = forward.shape[:1:-1]  # x y z
    axes = [torch.arange(size, device=forward.device, dtype=forward.dtype) for size in reversed(sizes)]
    voxels = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1])
    # From voxels to grid_sample's -1 .. 1; in an axis of one voxel there is only 0.
    scale = torch.tensor([2 / max(size - 1, 1) for size in sizes], device=forward.device, dtype=forward.dtype)
    for _ in range(iterations):
        forward, backward = (
            (forward - _at(backward, voxels + forward, scale)) / 2,
            (backward - _at(forward, voxels + backward, scale)) / 2,
        )
    return forward, backward


def _at(
    field: Float[Tensor, "b 3 z y x"], positions: Float[Tensor, "b 3 z y x"], scale: Float[Tensor, "3"]
) -> Float[Tensor, "b 3 z y x"]:
    """The field at positions in voxels."""
    grid = positions.movedim(1, -1) * scale - 1
    return F.grid_sample(field, grid, mode="bilinear", padding_mode="border", align_corners=True)
