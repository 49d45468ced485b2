"""Cost volume and coupled-convex optimisation beside the public formulations."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lungssl_ops.cost_volume import PUBLISHED_WEIGHTS, cost_volume, coupled_convex, label_displacements
from lungssl_ops.measure import Case


def cases(*, quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """The sizes of the README's table, or tiny ones; 12 channels are MIND's, 64 an encoder's."""
    grid = (7, 6, 9) if quick else (24, 24, 26)
    for channels, reach in ((12, 2),) if quick else ((12, 6), (64, 4)):
        yield _cost_volume(grid, channels, reach, device)
    if device.startswith("cuda") and not quick:
        # 192 x 192 x 208 voxels at a stride of 6, and an encoder's features: gigabytes of differences for eager.
        yield _cost_volume((32, 32, 35), 384, 6, device)
    yield _coupled_convex(grid, 2 if quick else 6, device)


def _features(grid: tuple[int, int, int], channels: int, device: str) -> tuple[Tensor, Tensor]:
    """Fixed and moving features of one smooth volume, shifted by two voxels along x, with noise."""
    generator = torch.Generator().manual_seed(0)
    z, y, x = grid
    features = F.avg_pool3d(torch.rand(1, channels, z, y, x + 2, generator=generator), 3, stride=1, padding=1)
    noise = 0.05 * torch.rand(2, 1, channels, z, y, x, generator=generator)
    return (features[..., 2:] + noise[0]).to(device), (features[..., :-2] + noise[1]).to(device)


def _slabs(fixed: Tensor, moving: Tensor, reach: int) -> Tensor:
    """The public formulation: all differences of a slab of displacements, their squares, two poolings."""
    z, y, x = fixed.shape[2:]
    side = 2 * reach + 1
    padded = F.pad(moving, (reach,) * 6, mode="replicate")
    windows = padded.unfold(3, y, 1).unfold(4, x, 1)  # 1 c z' side side y x
    slabs = []
    for jz in range(side):
        squares = (fixed[:, :, :, None, None] - windows[:, :, jz : jz + z]).square().sum(dim=1)  # 1 z side side y x
        slab = squares.permute(0, 2, 3, 1, 4, 5).reshape(1, side * side, z, y, x)
        for _ in range(2):
            slab = F.avg_pool3d(F.pad(slab, (1,) * 6, mode="replicate"), 3, stride=1)
        slabs.append(slab)
    return torch.cat(slabs, dim=1)


def _cost_volume(grid: tuple[int, int, int], channels: int, reach: int, device: str) -> Case:
    fixed, moving = _features(grid, channels, device)
    labels, voxels = (2 * reach + 1) ** 3, grid[0] * grid[1] * grid[2]
    runs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: cost_volume(fixed, moving, reach=reach),
        "ours_fp16": lambda: cost_volume(fixed, moving, reach=reach, dtype=torch.float16),
        "eager": lambda: _slabs(fixed, moving, reach),
    }
    return Case(
        op="cost_volume",
        size=f"{'x'.join(str(s) for s in grid)}_reach{reach}_C{channels}",
        floor_bytes=4 * voxels * (2 * channels + labels),
        floor_flops=2 * channels * labels * voxels,
        runs=runs,
        expected=lambda: _slabs(fixed.double(), moving.double(), reach),
        tolerance={"ours": 1e-5, "ours_fp16": 1e-3, "eager": 1e-5},
        stem="cost_volume" if (channels, reach) == (12, 6) else f"cost_volume_reach{reach}_C{channels}",
        slow=("eager",),
    )


def _coupled_convex(grid: tuple[int, int, int], reach: int, device: str) -> Case:
    cost = cost_volume(*_features(grid, 12, device), reach=reach)
    displacements = label_displacements(reach).to(device)
    voxels = grid[0] * grid[1] * grid[2]

    def smoothed(labels: Tensor) -> Tensor:
        field = displacements[labels].movedim(-1, 1)
        return F.avg_pool3d(F.pad(field, (1,) * 6, mode="replicate"), 3, stride=1)

    def materialised() -> Tensor:
        # The public formulation: per plane of voxels, the sum of cost and penalty for all labels, then its argmin.
        field = smoothed(cost.argmin(dim=1))
        for weight in PUBLISHED_WEIGHTS:
            planes = []
            for iz in range(grid[0]):
                away = displacements.T[None, :, :, None, None] - field[:, :, None, iz]
                planes.append((cost[:, :, iz] + weight * away.square().sum(dim=1)).argmin(dim=1))
            field = smoothed(torch.stack(planes, dim=1))
        return field

    return Case(
        op="coupled_convex",
        size=f"{'x'.join(str(s) for s in grid)}_reach{reach}",
        floor_bytes=4 * voxels * (2 * reach + 1) ** 3 * (1 + len(PUBLISHED_WEIGHTS)),
        runs={
            "ours": lambda: coupled_convex(cost),
            "reference": lambda: coupled_convex(cost, backend="reference"),
            "eager": materialised,
        },
        # A sum rounded in another order may tip a voxel to another label: exact against the definition, near eager.
        tolerance={"ours": 1e-12, "eager": 1e-2},
        stem="coupled_convex" if reach == 6 else f"coupled_convex_reach{reach}",
        slow=("eager", "reference"),
    )
