"""A registration network on any encoder: both scans through it, matched from coarse to fine; and its training.

At each level one scan's features are warped by the field so far and correlated with the other's over neighbouring
places; where the best match lies, corrected by convolutions, is added. Both ways, from features computed once. Trained
on the loss of `descent.py`, without truth, and where a displacement is known also on its error, as asked for.

Sources: siamese encoder, warping and local correlation from coarse to fine, Sun et al. 2018 (PWC-Net),
https://arxiv.org/abs/1709.02371; expected place of a correlation, Heinrich 2019 (PDD-Net),
https://arxiv.org/abs/1907.10931; unsupervised loss, Balakrishnan et al. 2019 (VoxelMorph),
https://arxiv.org/abs/1809.05231; levels, Mok & Chung 2020 (LapIRN), https://arxiv.org/abs/2006.16148.
Differs from them: the encoder sees whole scans as it was pretrained, a small stem sees the lung masks too; the pair has
been brought together by an affine first. Displacements are (x, y, z) in voxels; axes b batch, c channels, z y x voxels.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from lungssl_backbones.encoder import Encoder
from lungssl_data.batch import StepOutput
from lungssl_data.pair import PhaseScan
from lungssl_data.views import scale_hu
from lungssl_ops.cost_volume import inverse_consistent
from lungssl_ops.warp import warp
from torch import Tensor, nn

from lungssl_tasks.registration.common_grid import common_grid
from lungssl_tasks.registration.field_loss import FieldWeights, field_loss
from lungssl_tasks.registration.register import Coarse
from lungssl_tasks.registration.training_pairs import TrainingPair

FINEST = 2
"""Stride of the finest level, voxels; finer, the field is interpolated, and descent takes over."""


class RegistrationModel(nn.Module):
    """Maps two scans on one grid to displacements v both ways: what is at p in one is at p + v(p) in the other."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Size of what comes after the encoder."""

        width: int = 32
        """Channels of every level; a multiple of `groups`."""
        levels: int = 3
        """Strides FINEST, twice, four times that: at voxels of 4 mm places are looked for 32, 16 and 8 mm around."""
        reach: int = 1
        """Voxels of a level looked at around the field so far, along each axis."""
        groups: int = 4
        """Groups of every GroupNorm."""

        def level_strides(self) -> tuple[int, ...]:
            """Of the levels, coarse to fine, voxels."""
            return tuple(FINEST << level for level in reversed(range(self.levels)))

        def build(self, encoder: Encoder) -> "RegistrationModel":
            """The model, with random weights after the encoder."""
            return RegistrationModel(self, encoder)

    def __init__(self, config: Config, encoder: Encoder) -> None:
        """Raises ValueError where `groups` doesn't divide the width or a stride isn't a power of two."""
        super().__init__()
        if config.width % config.groups:
            raise ValueError(f"width {config.width} must be a multiple of groups, {config.groups}")
        strides = encoder.pyramid_strides_vox
        if list(strides) != sorted(set(strides)) or any(stride & (stride - 1) or stride < 1 for stride in strides):
            raise ValueError(f"pyramid strides must be powers of two, fine to coarse, got {tuple(strides)}")
        self.config, self.encoder = config, encoder
        width, groups = config.width, config.groups
        level_strides = config.level_strides()
        coarsest = max(strides[-1], level_strides[0])
        every = [1 << k for k in range(1, coarsest.bit_length())]  # strides 2, 4, ... coarsest

        self.stem = nn.ModuleDict()
        inputs = 2
        for stride in (stride for stride in every if stride < max(strides[0], FINEST + 1)):
            self.stem[str(stride)] = conv_block(inputs, width, groups, stride=2)
            inputs = width
        self.deeper = nn.ModuleDict()
        inputs = encoder.pyramid_channels[-1]
        for stride in (stride for stride in every if stride > strides[-1]):
            self.deeper[str(stride)] = conv_block(inputs, width, groups, stride=2)
            inputs = width
        held = dict(zip(strides, encoder.pyramid_channels, strict=True))
        self.merge = nn.ModuleDict()
        above = 0
        for stride in reversed(every):
            here = held.get(stride, 0) + (width if str(stride) in self.stem or str(stride) in self.deeper else 0)
            self.merge[str(stride)] = conv_block(above + here, width, groups)
            above = width
        self.match = nn.ModuleDict({str(s): Match(width, config.reach, groups) for s in level_strides})

    @property
    def multiple(self) -> int:
        """What the sides of scans must be divided by, in voxels."""
        return max(self.encoder.token_stride_vox, *(int(stride) for stride in self.merge))

    def forward(
        self,
        fixed_hu: Float[Tensor, "b 1 z y x"],
        fixed_lung: Float[Tensor, "b 1 z y x"],
        moving_hu: Float[Tensor, "b 1 z y x"],
        moving_lung: Float[Tensor, "b 1 z y x"],
    ) -> tuple[Float[Tensor, "b 3 z y x"], Float[Tensor, "b 3 z y x"]]:
        """v from fixed to moving and back, float32. Sides are multiples of `multiple`; voxels are the encoder's."""
        features = self.features(torch.cat([fixed_hu, moving_hu]), torch.cat([fixed_lung, moving_lung]))
        return matched(self.match, features)

    def displacements(
        self,
        fixed_hu: Float[Tensor, "b 1 z y x"],
        fixed_lung: Float[Tensor, "b 1 z y x"],
        moving_hu: Float[Tensor, "b 1 z y x"],
        moving_lung: Float[Tensor, "b 1 z y x"],
    ) -> tuple[Float[Tensor, "b 3 z y x"], Float[Tensor, "b 3 z y x"]]:
        """As `DisplacementModel` has it: `forward`."""
        return self(fixed_hu, fixed_lung, moving_hu, moving_lung)

    def features(
        self, hu: Float[Tensor, "b 1 z y x"], lung: Float[Tensor, "b 1 z y x"]
    ) -> dict[int, Float[Tensor, "b c _z _y _x"]]:
        """By stride, from the coarsest to FINEST."""
        image = scale_hu(hu)
        parts = self.parts(image, lung, self.encoder(image).pyramid)
        found, above = {}, None
        for stride in self.merge:
            found[int(stride)] = above = self.level(int(stride), above, parts)
        return found

    def parts(
        self,
        image: Float[Tensor, "b 1 z y x"],
        lung: Float[Tensor, "b 1 z y x"],
        pyramid: tuple[Float[Tensor, "b _c _z _y _x"], ...],
    ) -> dict[int, list[Float[Tensor, "b _d _u _v _w"]]]:
        """By stride, what the levels take beside what is above them; `pyramid` are the encoder's maps of `image`."""
        held: dict[int, list[Tensor]] = {
            stride: [maps] for stride, maps in zip(self.encoder.pyramid_strides_vox, pyramid, strict=True)
        }
        for some, x in ((self.stem, torch.cat([image, lung], dim=1)), (self.deeper, pyramid[-1])):
            for stride, block in some.items():
                x = block(x)
                held.setdefault(int(stride), []).append(x)
        return held

    def level(
        self,
        stride: int,
        above: Float[Tensor, "b c _z _y _x"] | None,
        parts: dict[int, list[Float[Tensor, "b _d _u _v _w"]]],
    ) -> Float[Tensor, "b c _r _s _t"]:
        """Features of one stride, from those of twice the stride; None above the coarsest."""
        here = parts.get(stride, [])
        if above is not None:
            here = [F.interpolate(above, scale_factor=2, mode="trilinear", align_corners=False), *here]
        return self.merge[str(stride)](torch.cat([part.to(here[0].dtype) for part in here], dim=1))


@runtime_checkable
class DisplacementModel(Protocol):
    """What gives displacements of a pair both ways: this network, or a joint one."""

    @property
    def encoder(self) -> Encoder:
        """For voxels of its `spacing_mm`."""
        ...

    @property
    def multiple(self) -> int:
        """What the sides of scans must be divided by, in voxels."""
        ...

    def displacements(
        self,
        fixed_hu: Float[Tensor, "b 1 z y x"],
        fixed_lung: Float[Tensor, "b 1 z y x"],
        moving_hu: Float[Tensor, "b 1 z y x"],
        moving_lung: Float[Tensor, "b 1 z y x"],
    ) -> tuple[Float[Tensor, "b 3 z y x"], Float[Tensor, "b 3 z y x"]]:
        """v from fixed to moving and back, voxels, components (x, y, z)."""
        ...


class RegistrationTask(nn.Module):
    """Trains an encoder and what comes after it on pairs, most of which nobody registered."""

    @dataclass(frozen=True, kw_only=True)
    class Config(FieldWeights):
        """What is trained, and on what."""

        model: RegistrationModel.Config = RegistrationModel.Config()
        """Size of the model."""
        freeze_encoder: bool = False
        """Train what comes after the encoder only; the encoder stays in eval mode."""

        def build(self, encoder: Encoder) -> "RegistrationTask":
            """The task with a new model on the encoder."""
            return RegistrationTask(self, encoder)

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.model = config.model.build(encoder)
        if config.freeze_encoder:
            self.model.get_submodule("encoder").requires_grad_(False)

    def train(self, mode: bool = True) -> "RegistrationTask":
        """As `nn.Module.train`, but a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.config.freeze_encoder:
            self.model.get_submodule("encoder").eval()
        return self

    def forward(self, batch: list[TrainingPair], step: int) -> StepOutput:
        """Mean over the pairs and both ways of 1 - LNCC in the lung with the field's regularisers; of what there and
        back misses by, and of the error.

        Metrics: `loss`, `lncc`, `folding` (mean of relu(-det J)), `disagreement_mm` (there and back, mean of the lung);
        `error_mm` from fixed to moving where a displacement is known.
        """
        each = [self.one(pair) for pair in batch]
        loss = torch.stack([metrics["loss"] for metrics in each]).mean()
        names = dict.fromkeys(name for metrics in each for name in metrics)
        return StepOutput(
            loss=loss,
            metrics={
                name: torch.stack([metrics[name].detach() for metrics in each if name in metrics]).mean()
                for name in names
            },
        )

    def one(self, pair: TrainingPair) -> dict[str, Float[Tensor, ""]]:
        """Loss and figures of one pair."""
        grid = pair.grid
        there, back = self.model(grid.fixed_hu, grid.fixed_lung, grid.moving_hu, grid.moving_lung)
        return field_loss(pair, there, back, self.config)

    def after_optimizer_step(self, step: int) -> None:
        """Nothing: the task keeps no state beside its weights."""

    def export_encoder(self) -> Encoder:
        """The encoder as trained so far."""
        return self.model.encoder


def predict(model: DisplacementModel, fixed: PhaseScan, moving: PhaseScan, affine: Float[np.ndarray, "3 4"]) -> Coarse:
    """The network's field after an affine, fixed to moving LPS mm, and how far both ways disagree.

    On the model's device, left in eval mode. Raises ValueError for scans that don't have the encoder's voxels.
    """
    spacing_mm = model.encoder.spacing_mm
    for name, scan in (("fixed", fixed), ("moving", moving)):
        if max(abs(mm - spacing_mm) for mm in scan.spacing_mm) > 1e-3:
            raise ValueError(f"the {name} scan has voxels of {scan.spacing_mm} mm, the network's are {spacing_mm:g}")
    assert isinstance(model, nn.Module)
    device = next(model.parameters()).device
    pair = common_grid(fixed, moving, affine, multiple=model.multiple, device=device)
    model.eval()
    scans = (pair.fixed_hu, pair.fixed_lung), (pair.moving_hu, pair.moving_lung)
    with torch.inference_mode():
        there, back = model.displacements(*scans[0], *scans[1])
        miss = torch.linalg.vector_norm(there + warp(back, there), dim=1)[0][pair.fixed_lung[0, 0] > 0]
        there, _ = inverse_consistent(there, back)
    z, y, x = fixed.ct_hu.shape
    return Coarse(
        v_mm=(there[0, :, :z, :y, :x] * spacing_mm).cpu().numpy(),
        grid=fixed.geometry(),
        disagreement_mm=float(miss.median()) * spacing_mm if len(miss) else math.nan,
    )


def matched(
    levels: nn.ModuleDict, features: dict[int, Float[Tensor, "b2 c _z _y _x"]]
) -> tuple[Float[Tensor, "b 3 z y x"], Float[Tensor, "b 3 z y x"]]:
    """v both ways at full resolution, from features of the fixed scans and, after them, the moving ones.

    `levels`: `Match` by stride, from the coarsest to FINEST.
    """
    v_vox = None
    for stride, match in levels.items():
        here = features[int(stride)].float()
        there = torch.cat(here.chunk(2)[::-1])
        v_vox = here.new_zeros(len(here), 3, *here.shape[2:]) if v_vox is None else _doubled(v_vox)
        v_vox = match(here, there, v_vox)
    assert v_vox is not None
    forward, back = _doubled(v_vox).chunk(2)
    return forward, back


class Match(nn.Module):
    """One level: where the moving features fit best around the field so far."""

    def __init__(self, width: int, reach: int, groups: int) -> None:
        super().__init__()
        labels = (2 * reach + 1) ** 3
        self.reach = reach
        self.sharpness = nn.Parameter(torch.tensor(10.0))
        """Of the softmax over places, for correlations of -1 to 1."""
        self.blocks = nn.Sequential(
            conv_block(labels + width + 3, width, groups),
            conv_block(width, width, groups),
            nn.Conv3d(width, 3, 3, padding=1),
        )
        last = self.blocks[-1]
        assert isinstance(last, nn.Conv3d) and last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        moves = [(x, y, z) for z, y, x in itertools.product(range(-reach, reach + 1), repeat=3)]
        self.moves: Tensor
        self.register_buffer("moves", torch.tensor(moves, dtype=torch.float32), persistent=False)

    def forward(
        self, fixed: Float[Tensor, "b c z y x"], moving: Float[Tensor, "b c z y x"], v_vox: Float[Tensor, "b 3 z y x"]
    ) -> Float[Tensor, "b 3 z y x"]:
        with torch.autocast(fixed.device.type, enabled=False):
            fixed = F.normalize(fixed, dim=1)
            alike = correlations(fixed, warp(F.normalize(moving, dim=1), v_vox), self.reach)
            place = (alike * self.sharpness).softmax(dim=1)
            step = torch.einsum("blzyx,lk->bkzyx", place, self.moves)
        return v_vox + step + self.blocks(torch.cat([alike, fixed, v_vox], dim=1)).float()


def correlations(
    fixed: Float[Tensor, "b c z y x"], moving: Float[Tensor, "b c z y x"], reach: int
) -> Float[Tensor, "b l z y x"]:
    """Inner product of each fixed voxel's features with those of the moving voxels around it, x fastest; beyond the
    border, 0.
    """
    z, y, x = fixed.shape[2:]
    padded = F.pad(moving, (reach,) * 6)
    return torch.stack(
        [
            (fixed * padded[:, :, k : k + z, j : j + y, i : i + x]).sum(dim=1)
            for k, j, i in itertools.product(range(2 * reach + 1), repeat=3)
        ],
        dim=1,
    )


def _doubled(v_vox: Float[Tensor, "b 3 z y x"]) -> Float[Tensor, "b 3 Z Y X"]:
    """On a grid of half the voxels."""
    return 2 * F.interpolate(v_vox, scale_factor=2, mode="trilinear", align_corners=False)


def conv_block(inputs: int, width: int, groups: int, *, stride: int = 1) -> nn.Sequential:
    """Convolution, GroupNorm, leaky ReLU. A kernel of 4 where the stride is 2, so that a coarse voxel's features are
    of its middle."""
    return nn.Sequential(
        nn.Conv3d(inputs, width, 2 + stride, stride=stride, padding=1, bias=False),
        nn.GroupNorm(groups, width),
        nn.LeakyReLU(0.01),
    )
