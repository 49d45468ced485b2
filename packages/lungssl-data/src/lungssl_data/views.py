"""Views of a batch of crops: all views of one size in one call of `lungssl_ops.ct_views`, on the device.

A view samples its block at centre + zoom * rotation * offset + elastic, once. It carries the LPS position of every
voxel that it sampled, so any two views of a scan correspond exactly, and views of two phases through the pair's map.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from lungssl_ops.ct_views import ViewTable, ct_views, mask_views, view_affine, view_coords_mm
from torch import Tensor

from lungssl_data.batch import HU_WINDOW, CropBatch, PairBatch, View

Kind = Literal["global", "local"]
Slot = Literal[0, 1]
SLOTS: tuple[Slot, Slot] = (0, 1)
BREATH_AXES = (0.11, 0.28, 0.61)
"""Share of a breath's log volume along x, y and z: the middles of deep breath-holds, 8, 14 and 40 mm (`domain.md` D1),
over lungs of 240, 160 and 200 mm."""

LATTICE = 4
"""Nodes of an elastic displacement along each axis of a view."""
MOST_SLOPE = 1 / 8
"""Of the displacement's standard deviation over what the nodes are apart. The map between two nodes folds where its
slope is -1, then 5.7 standard deviations off; with 3 mm for views of 24 voxels of 1.5 mm it folded in four of five."""


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
    """Source voxels per view voxel, log-uniform; about 1, because physical size carries meaning in CT. Above 1.5 each
    view voxel is a mean of several samples, so that fine structure fades and does not alias."""
    rotation_deg: float = 10.0
    """Largest rotation about each axis: patients lie a little askew, never upside down."""
    elastic_mm: float = 3.0
    """Standard deviation of the displacement at the nodes of a 4x4x4 lattice over the view, or `MOST_SLOPE` of what the
    nodes are apart, whichever is less."""
    flip_lr: float = 0.0
    """Chance to mirror left and right, in all views of a sample alike. 0: the thorax is not symmetric."""
    noise_hu: tuple[float, float] = (0.0, 25.0)
    """Standard deviation of added white noise, drawn per view: dose differs between phases (`domain.md` C2, D5)."""
    shift_hu: float = 10.0
    """Largest calibration error, per view; small, because absolute HU is the signal."""
    gamma: tuple[float, float] = (0.9, 1.1)
    """Exponent on the scaled window, log-uniform, per view."""

    breath: tuple[float, float] = (1.0, 1.0)
    """Volume after over before a synthetic breath, log-uniform, in slot 1 of samples that show one phase: the lungs'
    tissue thins by it and the view stretches (`synthetic_breath`). (1, 1): none. Deep breath-holds of the phantom's
    probe have 1.12 to 1.68 (`domain.md` D6)."""

    def build(self, *, rank: int = 0, ranks: int = 1) -> "ViewSampler":
        """The sampler of these views, for one of `ranks` processes that share a batch."""
        return ViewSampler(self, rank=rank, ranks=ranks)


class ViewSampler:
    """Turns a CropBatch into a PairBatch. Pure: all randomness comes from the generator handed in."""

    def __init__(self, config: ViewConfig, *, rank: int = 0, ranks: int = 1) -> None:
        """As one of several ranks, each with as many samples, it sees its samples as one process with all would."""
        self.config, self.rank, self.ranks = config, rank, ranks

    def __call__(self, crops: CropBatch, generator: torch.Generator) -> PairBatch:
        """Draw every view. `generator` is on the CPU; its state alone decides the result."""
        config = self.config
        if config.flip_lr > 0 and crops.labels is not None:
            raise ValueError(
                f"views.flip_lr={config.flip_lr} with labels: mirrored lobes would carry the wrong names; set it to 0"
            )
        draws = _Draws(generator, len(crops.patient), self.rank, self.ranks)
        flip = draws.rand() < config.flip_lr
        stretch = torch.ones(len(crops.patient), 3)
        if config.breath != (1.0, 1.0):
            crops, stretch = synthetic_breath(crops, draws.log_uniform(config.breath))
        plan: list[tuple[Kind, int, int]] = [
            ("global", config.global_vox, config.globals_per_slot),
            ("local", config.local_vox, config.locals_per_slot),
        ]
        views = [
            view
            for kind, side, count in plan
            for view in _sample(
                crops,
                kind,
                side,
                [self._draw(crops, slot, side, flip, stretch, draws) for _ in range(count) for slot in SLOTS],
            )
        ]
        return PairBatch(
            views=tuple(views),
            slot_phase=crops.slot_phase,
            patient=crops.patient,
            exhale_to_inhale=crops.exhale_to_inhale,
        )

    def plain(self, crops: CropBatch) -> PairBatch:
        """The central global view of each slot, undisturbed: for held-out figures and pictures."""
        side, batch = self.config.global_vox, len(crops.patient)
        centre = ((_block_xyz(crops) - 1) / 2).expand(batch, 3)
        affine = view_affine((side, side, side), centre, torch.eye(3).expand(batch, 3, 3))
        drawn = [_Drawn(slot=slot, affine=affine) for slot in SLOTS]
        return PairBatch(
            views=tuple(_sample(crops, "global", side, drawn)),
            slot_phase=crops.slot_phase,
            patient=crops.patient,
            exhale_to_inhale=crops.exhale_to_inhale,
        )

    def _draw(
        self, crops: CropBatch, slot: Slot, side: int, flip: Tensor, stretch: Tensor, draws: "_Draws"
    ) -> "_Drawn":
        config = self.config
        block = _block_xyz(crops)
        zoom = draws.log_uniform(config.zoom)
        angles = (2 * draws.rand(3) - 1) * math.radians(config.rotation_deg)
        slack = (block - 1 - (side - 1) * zoom[:, None]).clamp(min=0)
        centre = (block - 1) / 2 + (draws.rand(3) - 0.5) * slack
        turn = rotation(angles) * zoom[:, None, None]
        turn[:, :, 0] *= torch.where(flip, -1.0, 1.0)[:, None]
        if slot == 1:
            turn = turn / stretch[:, :, None]  # along the patient's axes, not the view's
        lattice = None
        if config.elastic_mm > 0:
            step_mm = torch.linalg.vector_norm(crops.voxel_to_mm[:, slot, :, :3].cpu(), dim=1)  # per index axis
            apart_mm = (side - 1) / (LATTICE - 1) * zoom * step_mm.amin(dim=1)
            sd_mm = (MOST_SLOPE * apart_mm).clamp(max=config.elastic_mm)
            drawn = draws.randn(3, LATTICE, LATTICE, LATTICE)
            lattice = drawn * (sd_mm[:, None] / step_mm).view(-1, 3, 1, 1, 1)
        low, high = config.noise_hu
        return _Drawn(
            slot=slot,
            affine=view_affine((side, side, side), centre, turn),
            lattice=lattice,
            noise_hu=low + (high - low) * draws.rand(),
            shift_hu=(2 * draws.rand() - 1) * config.shift_hu,
            gamma=draws.log_uniform(config.gamma),
            seed=draws.seeds(),
        )


class _Draws:
    """Random numbers of a batch's samples: those of all ranks are drawn, this rank's are given."""

    def __init__(self, generator: torch.Generator, samples: int, rank: int, ranks: int) -> None:
        self.generator, self.all = generator, samples * ranks
        self.own = slice(samples * rank, samples * (rank + 1))

    def rand(self, *row: int) -> Float32[Tensor, "b *row"]:
        return torch.rand(self.all, *row, generator=self.generator)[self.own]

    def randn(self, *row: int) -> Float32[Tensor, "b *row"]:
        return torch.randn(self.all, *row, generator=self.generator)[self.own]

    def log_uniform(self, bounds: tuple[float, float]) -> Float32[Tensor, " b"]:
        low, high = (math.log(b) for b in bounds)
        return (low + (high - low) * self.rand()).exp()

    def seeds(self) -> Int64[Tensor, " b"]:
        """A random one, and those that follow it."""
        return (torch.randint(2**62, (), generator=self.generator) + torch.arange(self.all))[self.own]


def synthetic_breath(crops: CropBatch, volume_ratio: Float32[Tensor, " b"]) -> tuple[CropBatch, Float32[Tensor, "b 3"]]:
    """Slot 1 as after a breath, for samples whose slots show one phase; and how much each axis (x, y, z) stretches.

    Mass is conserved: tissue fraction (HU + 1000) / 1000 in the lung is divided by the ratio (`domain.md` D2). The
    crops keep their grid: views of slot 1 are to be sampled 1 / stretch apart. A rival of the second scan (A7).
    """
    ratio = torch.where((crops.slot_phase[:, 0] == crops.slot_phase[:, 1]).cpu(), volume_ratio, 1.0)
    hu, lung = crops.ct_hu[:, 1].float(), crops.lung[:, 1] > 0
    thinned = (hu + 1000) / ratio.to(hu.device).view(-1, 1, 1, 1) - 1000
    ct_hu = crops.ct_hu.clone()
    ct_hu[:, 1] = torch.where(lung, thinned, hu).round().to(ct_hu.dtype)
    return replace(crops, ct_hu=ct_hu), ratio[:, None] ** torch.tensor(BREATH_AXES)


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """One view of every sample, as `ViewTable` has it."""

    slot: Slot
    affine: Tensor
    lattice: Tensor | None = None
    noise_hu: Tensor | None = None
    shift_hu: Tensor | None = None
    gamma: Tensor | None = None
    seed: Tensor | None = None


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


def _sample(crops: CropBatch, kind: Kind, side: int, drawn: list[_Drawn]) -> list[View]:
    """The views of one size, each of all samples, in the order drawn."""
    if not drawn:
        return []
    batch, size = len(crops.patient), (side, side, side)

    def column(name: str) -> Tensor | None:
        return None if getattr(drawn[0], name) is None else torch.cat([getattr(one, name) for one in drawn])

    # Blocks are numbered as they lie in memory: 2 * sample + slot.
    block = torch.cat([2 * torch.arange(batch) + one.slot for one in drawn])
    table = ViewTable(
        volume=block,
        affine=torch.cat([one.affine for one in drawn]),
        window_hu=torch.tensor([HU_WINDOW]).expand(len(block), 2),
        lattice=column("lattice"),
        noise_hu=column("noise_hu"),
        shift_hu=column("shift_hu"),
        gamma=column("gamma"),
        seed=column("seed"),
    )

    def masks(data: Tensor, rule: Literal["nearest", "wholly"]) -> tuple[Tensor, ...]:
        return mask_views(data.flatten(0, 1).view(torch.uint8), table, size, rule=rule).split(batch)

    @functools.cache
    def coords_mm() -> tuple[Tensor, ...]:
        voxel_to_mm = crops.voxel_to_mm.flatten(0, 1)[block.to(crops.voxel_to_mm.device)]
        return view_coords_mm(table, size, voxel_to_mm).split(batch)

    @functools.cache
    def lung() -> tuple[Tensor, ...]:
        return masks(crops.lung, "nearest")

    images = ct_views(crops.ct_hu.flatten(0, 1), table, size, fill_hu=None).split(batch)
    partner_mm: list[Tensor | None] = [None] * len(drawn)
    if crops.partner_mm is not None:
        for i, one in enumerate(drawn):
            if one.slot == 0:
                partner_mm[i] = _partner_mm(crops, crops.partner_mm, coords_mm()[i])
    valid = masks(crops.valid, "wholly")
    labels = None if crops.labels is None else masks(crops.labels, "nearest")
    return [
        View.later(
            {"coords_mm": lambda i=i: coords_mm()[i], "lung": lambda i=i: lung()[i] > 0},
            image=images[i],
            partner_mm=partner_mm[i],
            valid=valid[i] > 0,
            labels=None if labels is None else labels[i],
            shift_hu=None if one.shift_hu is None else one.shift_hu.to(images[i].device),
            gamma=None if one.gamma is None else one.gamma.to(images[i].device),
            slot=one.slot,
            kind=kind,
        )
        for i, one in enumerate(drawn)
    ]


def _partner_mm(
    crops: CropBatch, lattice_mm: Float32[Tensor, "b 3 _z _y _x"], coords_mm: Float32[Tensor, "b 3 z y x"]
) -> Float32[Tensor, "b 3 z y x"]:
    """Points of slot 0's blocks in slot 1's scan, linear between the lattice's nodes; NaN outside of the block."""
    affine = crops.voxel_to_mm[:, 0]
    inverse = torch.linalg.inv(affine[:, :, :3])
    relative = coords_mm - affine[:, :, 3, None, None, None]
    index = torch.einsum("bij,bjzyx->bzyxi", inverse, relative)
    last = _block_xyz(crops).to(index) - 1
    where = 2 * index / last - 1
    found = F.grid_sample(lattice_mm, where, align_corners=True, padding_mode="border")
    inside = (where.abs() <= 1 + 1e-4).all(dim=-1)[:, None]
    return torch.where(inside, found, torch.nan)


def _block_xyz(crops: CropBatch) -> Float32[Tensor, "3"]:
    return torch.tensor(crops.ct_hu.shape[:1:-1], dtype=torch.float32)
