"""Views of a batch of crops: all geometry composed into one grid per view, sampled once, on the device.

Grid = block voxel coordinates of (centre + zoom * rotation * offset + elastic). Each view carries the LPS position of
every voxel it sampled, so any two views of a scan correspond exactly, and views of two phases through the pair's map.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from lungssl_data.batch import HU_WINDOW, CropBatch, PairBatch, View

Kind = Literal["global", "local"]
Slot = Literal[0, 1]
SLOTS: tuple[Slot, Slot] = (0, 1)


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How many views a step sees, how large they are and how they are disturbed. Ranges are uniform unless said."""

    global_vox: int = 48
    """Side of a global view."""
    local_vox: int = 24
    """Side of a local view."""
    globals_per_slot: int = 1
    """One per phase, two for both: the least that a teacher and a student need (`ssl.md` C1)."""
    locals_per_slot: int = 2
    """Students' small views, as many from each phase."""
    zoom: tuple[float, float] = (0.8, 1.25)
    """Source voxels per view voxel, log-uniform; about 1, because physical size carries meaning in CT."""
    rotation_deg: float = 10.0
    """Largest rotation about each axis: patients lie a little askew, never upside down."""
    elastic_mm: float = 3.0
    """Standard deviation of the displacement at the nodes of a 4x4x4 lattice over the view."""
    flip_lr: float = 0.0
    """Chance to mirror left and right, in all views of a sample alike. 0: the thorax is not symmetric."""
    noise_hu: tuple[float, float] = (0.0, 25.0)
    """Standard deviation of added white noise, drawn per view: dose differs between phases (`domain.md` C2, D5)."""
    shift_hu: float = 10.0
    """Largest calibration error, per view; small, because absolute HU is the signal."""
    gamma: tuple[float, float] = (0.9, 1.1)
    """Exponent on the scaled window, log-uniform, per view."""

    def build(self) -> "ViewSampler":
        """The sampler of these views."""
        return ViewSampler(self)


class ViewSampler:
    """Turns a CropBatch into a PairBatch. Pure: all randomness comes from the generator handed in."""

    def __init__(self, config: ViewConfig) -> None:
        self.config = config

    def __call__(self, crops: CropBatch, generator: torch.Generator) -> PairBatch:
        """Draw every view. `generator` is on the CPU; its state alone decides the result."""
        config = self.config
        if config.flip_lr > 0 and crops.labels is not None:
            raise ValueError(
                f"views.flip_lr={config.flip_lr} with labels: mirrored lobes would carry the wrong names; set it to 0"
            )
        flip = torch.rand(len(crops.patient), generator=generator) < config.flip_lr
        plan: list[tuple[Kind, int, int]] = [
            ("global", config.global_vox, config.globals_per_slot),
            ("local", config.local_vox, config.locals_per_slot),
        ]
        views = [
            self._view(crops, slot, kind, side, flip, generator)
            for kind, side, count in plan
            for _ in range(count)
            for slot in SLOTS
        ]
        return PairBatch(
            views=tuple(views),
            slot_phase=crops.slot_phase,
            patient=crops.patient,
            exhale_to_inhale=crops.exhale_to_inhale,
        )

    def plain(self, crops: CropBatch) -> PairBatch:
        """The central global view of each slot, undisturbed: for held-out figures and pictures."""
        side = self.config.global_vox
        batch = len(crops.patient)
        centre = (_block_xyz(crops) - 1) / 2
        grid = (centre + _offsets(side)).reshape(1, side, side, side, 3).expand(batch, -1, -1, -1, -1)
        return PairBatch(
            views=tuple(_sample(crops, slot, "global", grid, scale_hu) for slot in SLOTS),
            slot_phase=crops.slot_phase,
            patient=crops.patient,
            exhale_to_inhale=crops.exhale_to_inhale,
        )

    def _view(
        self, crops: CropBatch, slot: Slot, kind: Kind, side: int, flip: Tensor, generator: torch.Generator
    ) -> View:
        config = self.config
        batch = len(crops.patient)
        block = _block_xyz(crops)
        zoom = _log_uniform(config.zoom, batch, generator)
        angles = (2 * torch.rand(batch, 3, generator=generator) - 1) * math.radians(config.rotation_deg)
        slack = (block - 1 - (side - 1) * zoom[:, None]).clamp(min=0)
        centre = (block - 1) / 2 + (torch.rand(batch, 3, generator=generator) - 0.5) * slack
        turn = rotation(angles) * zoom[:, None, None]
        turn[:, :, 0] *= torch.where(flip, -1.0, 1.0)[:, None]
        grid = torch.einsum("bij,nj->bni", turn, _offsets(side)) + centre[:, None]
        grid = grid.reshape(batch, side, side, side, 3)
        if config.elastic_mm > 0:
            step_mm = torch.linalg.vector_norm(crops.voxel_to_mm[:, slot, :, :3].cpu(), dim=1)  # per index axis
            lattice = (
                torch.randn(batch, 3, 4, 4, 4, generator=generator) * config.elastic_mm / step_mm.view(-1, 3, 1, 1, 1)
            )
            elastic = F.interpolate(lattice, size=(side,) * 3, mode="trilinear", align_corners=True)
            grid = grid + elastic.permute(0, 2, 3, 4, 1)
        return _sample(crops, slot, kind, grid, self._intensity(batch, generator))

    def _intensity(self, batch: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """Noise, calibration error and gamma of one view, drawn now, applied to its HU later."""
        config = self.config
        low, high = config.noise_hu
        sigma = low + (high - low) * torch.rand(batch, generator=generator)
        shift = (2 * torch.rand(batch, generator=generator) - 1) * config.shift_hu
        gamma = _log_uniform(config.gamma, batch, generator)
        seed = int(torch.randint(2**62, (), generator=generator))

        def apply(hu: Tensor) -> Tensor:
            per_sample = [v.to(hu.device).view(-1, 1, 1, 1, 1) for v in (sigma, shift, gamma)]
            noise = torch.randn(hu.shape, generator=torch.Generator(hu.device).manual_seed(seed), device=hu.device)
            return scale_hu(hu + per_sample[0] * noise + per_sample[1]) ** per_sample[2]

        return apply


def rotation(angles: Float[Tensor, "b 3"]) -> Float[Tensor, "b 3 3"]:
    """Rotation matrices R_z R_y R_x from angles in radians about x, y and z."""
    zero, one = torch.zeros_like(angles[:, 0]), torch.ones_like(angles[:, 0])
    (cx, cy, cz), (sx, sy, sz) = angles.cos().unbind(1), angles.sin().unbind(1)
    about_x = torch.stack([one, zero, zero, zero, cx, -sx, zero, sx, cx], 1).reshape(-1, 3, 3)
    about_y = torch.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy], 1).reshape(-1, 3, 3)
    about_z = torch.stack([cz, -sz, zero, sz, cz, zero, zero, zero, one], 1).reshape(-1, 3, 3)
    return about_z @ about_y @ about_x


def scale_hu(hu: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Network input: HU clipped to HU_WINDOW and scaled to [0, 1]."""
    low, high = HU_WINDOW
    return ((hu - low) / (high - low)).clamp(0, 1)


def _sample(
    crops: CropBatch,
    slot: Slot,
    kind: Kind,
    grid_vox: Float32[Tensor, "b z y x 3"],
    intensity: Callable[[Tensor], Tensor],
) -> View:
    """Sample one slot at block voxel coordinates (x, y, z); `intensity` maps HU to network input."""
    grid_vox = grid_vox.to(crops.ct_hu.device)
    grid = grid_vox * (2 / (_block_xyz(crops).to(grid_vox) - 1)) - 1

    def at_grid(data: Tensor, mode: str, padding_mode: str) -> Tensor:
        return F.grid_sample(
            data[:, slot, None].float(), grid, mode=mode, padding_mode=padding_mode, align_corners=True
        )

    affine = crops.voxel_to_mm[:, slot]
    coords_mm = torch.einsum("bij,bzyxj->bizyx", affine[:, :, :3], grid_vox) + affine[:, :, 3, None, None, None]
    return View(
        image=intensity(at_grid(crops.ct_hu, "bilinear", "border")),
        coords_mm=coords_mm,
        valid=at_grid(crops.valid, "bilinear", "zeros")[:, 0] > 0.999,  # 1 but for rounding of the weights
        lung=at_grid(crops.lung, "nearest", "zeros")[:, 0] > 0,
        labels=None if crops.labels is None else at_grid(crops.labels, "nearest", "zeros")[:, 0].to(torch.uint8),
        slot=slot,
        kind=kind,
    )


def _block_xyz(crops: CropBatch) -> Float32[Tensor, "3"]:
    return torch.tensor(crops.ct_hu.shape[:1:-1], dtype=torch.float32)


def _offsets(side: int) -> Float32[Tensor, "n 3"]:
    """Voxel offsets (x, y, z) from the centre of a cube, in (z, y, x) order."""
    axis = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    return torch.stack([x, y, z], -1).reshape(-1, 3)


def _log_uniform(bounds: tuple[float, float], count: int, generator: torch.Generator) -> Float32[Tensor, " count"]:
    low, high = (math.log(b) for b in bounds)
    return (low + (high - low) * torch.rand(count, generator=generator)).exp()
