"""The views of a training step beside the same chain in torch, op by op, and beside MONAI's, crop by crop."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lungssl_ops.ct_views import HU_WINDOW, ViewTable, ct_views, view_affine
from lungssl_ops.measure import Case

LOW, HIGH = HU_WINDOW


def cases(*, quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """Global and local views cut from two blocks; on a GPU as many as a step of 32 patients takes."""
    if quick:
        yield _case("ct_views", 2, 12, 24, device, compiled=compiled)
        return
    many = 32 if device.startswith("cuda") else 1
    yield _case("ct_views", 2 * many, 96, 160, device, compiled=compiled)
    yield _case("ct_views_local", 8 * many, 48, 160, device, compiled=compiled)


def _case(stem: str, views: int, side: int, block: int, device: str, *, compiled: bool) -> Case:
    generator = torch.Generator().manual_seed(0)
    # Neighbouring voxels of a CT are alike: noise, smoothed, of some 200 HU.
    smooth = F.avg_pool3d(torch.randn(2, 1, block, block, block, generator=generator), 5, stride=1, padding=2)[:, 0]
    volumes = (smooth * 2000 - 400).clamp(-1024, 1500).round().to(torch.int16).to(device)
    table = _table(views, side, block, generator)
    size = (side, side, side)
    eager = _eager(volumes, table, side)
    runs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ct_views(volumes, table, size, fill_hu=None),
        "reference": lambda: ct_views(volumes, table, size, fill_hu=None, backend="reference"),
        "eager": eager,
    }
    if compiled:
        runs["compile"] = torch.compile(eager)
    if device == "cpu" and (monai := _monai(volumes, table, side)) is not None:
        runs["monai"] = monai
    return Case(
        op="ct_views",
        size=f"{views}x{side}x{side}x{side}",
        floor_bytes=6 * views * side**3,  # reads int16, writes float32
        runs=runs,
        expected=lambda: ct_views(volumes, table, size, fill_hu=None, dtype=torch.float64),
        # The others' errors are shown: their noise is another draw, and MONAI's chain has no elastic part.
        tolerance={"ours": 1e-5, "reference": 1e-5},
        stem=stem,
        slow=("reference", "monai"),
    )


def _table(views: int, side: int, block: int, generator: torch.Generator) -> ViewTable:
    """What lungssl's recipes draw: zoom 0.8 to 1.25, up to 10 degrees about z, a lattice of 4^3, noise up to 25 HU."""
    angle = math.radians(10) * (2 * torch.rand(views, generator=generator) - 1)
    zoom = 0.8 + 0.45 * torch.rand(views, generator=generator)
    turn = torch.eye(3).repeat(views, 1, 1)
    turn[:, 0, 0] = turn[:, 1, 1] = angle.cos()
    turn[:, 1, 0], turn[:, 0, 1] = angle.sin(), -angle.sin()
    room = max(block - 1.4 * side, 0.0)
    centre = (block - 1) / 2 + room * (torch.rand(views, 3, generator=generator) - 0.5)
    return ViewTable(
        volume=torch.arange(2).repeat_interleave(views // 2),
        affine=view_affine((side, side, side), centre, turn * zoom[:, None, None]),
        lattice=2 * torch.randn(views, 3, 4, 4, 4, generator=generator),
        shift_hu=20 * torch.rand(views, generator=generator) - 10,
        gamma=0.9 + 0.2 * torch.rand(views, generator=generator),
        noise_hu=25 * torch.rand(views, generator=generator),
        seed=torch.arange(views),
    )


def _eager(volumes: Tensor, table: ViewTable, side: int) -> Callable[[], Tensor]:
    """Each volume is converted once and sampled once, by a grid of all its views."""
    device, n, views = volumes.device, len(volumes), len(table)
    affine, lattice = table.affine.to(device), _there(table.lattice).to(device)
    shift, gamma, noise_hu = (_there(t).to(device) for t in (table.shift_hu, table.gamma, table.noise_hu))
    last = torch.tensor(volumes.shape[:0:-1], device=device) - 1

    def chain() -> Tensor:
        axis = torch.arange(side, dtype=torch.float32, device=device)
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        voxels = torch.stack([x, y, z], -1).reshape(-1, 3)
        grid = torch.einsum("vij,pj->vpi", affine[:, :, :3], voxels) + affine[:, None, :, 3]
        elastic = F.interpolate(lattice, size=(side,) * 3, mode="trilinear", align_corners=True)
        grid = grid.reshape(views, side, side, side, 3) + elastic.permute(0, 2, 3, 4, 1)
        grid = (grid * (2 / last) - 1).reshape(n, -1, side, side, 3)
        hu = F.grid_sample(volumes[:, None].float(), grid, padding_mode="border", align_corners=True)
        hu = hu.reshape(views, 1, side, side, side)
        column = (-1, 1, 1, 1, 1)
        hu = hu + noise_hu.view(column) * torch.randn_like(hu) + shift.view(column)
        return ((hu - LOW) / (HIGH - LOW)).clamp(0, 1) ** gamma.view(column)

    return chain


def _monai(volumes: Tensor, table: ViewTable, side: int) -> Callable[[], Tensor] | None:
    """Affine, noise, window with shift, gamma; less than the op: MONAI's elastic transform smooths a dense field."""
    try:
        from monai.transforms.intensity.array import RandGaussianNoise, ScaleIntensityRange
        from monai.transforms.spatial.array import Affine
    except ImportError:
        return None
    half = (side - 1) / 2
    middle = (torch.tensor(volumes.shape[1:]) - 1) / 2
    chains = []
    shift, gamma, noise_hu = (_there(t).tolist() for t in (table.shift_hu, table.gamma, table.noise_hu))
    for view, volume in enumerate(table.volume.tolist()):
        # MONAI's positions are (z, y, x) from the centres of view and volume.
        linear = table.affine[view, :, :3].flip(0, 1)
        matrix = torch.eye(4)
        matrix[:3, :3], matrix[:3, 3] = linear, table.affine[view, :, 3].flip(0) + linear.sum(1) * half - middle
        chains.append(
            (
                volume,
                Affine(affine=matrix.numpy(), spatial_size=(side,) * 3, padding_mode="border", image_only=True),
                RandGaussianNoise(prob=1.0, std=noise_hu[view], sample_std=False),
                ScaleIntensityRange(LOW - shift[view], HIGH - shift[view], 0.0, 1.0, clip=True),
                gamma[view],
            )
        )

    def chain() -> Tensor:
        floats = volumes[:, None].float()
        views = [
            torch.as_tensor(window(noise(affine(floats[volume])))) ** power
            for volume, affine, noise, window, power in chains
        ]
        return torch.stack([view.as_subclass(Tensor) for view in views])

    return chain


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "_table fills every column"
    return tensor
