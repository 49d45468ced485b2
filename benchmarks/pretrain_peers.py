"""DINO and MAE as a user of lightly, MONAI and plain PyTorch would write them, for `bench_pretrain.py`.

Written after lightly's examples of both (MIT, github.com/lightly-ai/lightly), and made fast as far as a user would:
views of one size share a forward (the examples loop over views); the whole cohort lies decoded in memory as int16
(`CacheDataset`, nothing copied); crop, zoom, rotation and shift are one sampling (`RandAffine`); metadata tracking is
off; DINO's loss has lightly's `DINOLoss`, head and `update_momentum` (torch's foreach), MAE decodes and predicts as in
lightly's example, the loss on hidden tokens alone. Workers persist and hold two batches ready each.

The backbone is ours on both sides, its layers by their definitions: plain PyTorch, with attention by products, which is
faster on CPUs than torch's fused one. With `plain=False` they run as ours do. AdamW is fused on both sides.

What ours does and the peer doesn't: elastic deformation (MONAI's smooths a whole field), masks of what was measured and
of the lung at each view's place and their weights in the loss, positions of voxels, standardised embeddings in the
head, matched places of the two phases. All that is to the peer's advantage.
"""

import copy
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from lightly.loss import DINOLoss  # pyright: ignore[reportMissingImports]
from lightly.models import utils  # pyright: ignore[reportMissingImports]
from lightly.models.modules import DINOProjectionHead  # pyright: ignore[reportMissingImports]
from lightly.utils.scheduler import cosine_schedule  # pyright: ignore[reportMissingImports]
from lungssl.config import Recipe
from lungssl.training.precision import autocast
from lungssl_backbones import create_backbone
from lungssl_data.batch import HU_WINDOW, PHASES
from lungssl_data.cache import PairCache
from lungssl_data.views import ViewConfig
from lungssl_methods.mae import Mae, sincos_positions
from lungssl_ops.dispatch import forced
from lungssl_ops.patches import patchify
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from torch.utils.flop_counter import FlopCounterMode

STEPS = 10**6


def cohort_arrays(cache: PairCache, patients: list[str]) -> list[dict[str, Any]]:
    """Every scan decoded, int16 [1, z, y, x]: what the peer's `CacheDataset` holds."""
    return [
        {
            phase: cache.read(patient, phase, "ct", (0, 0, 0), cache.phase_record(patient, phase).shape)[None]
            for phase in PHASES
        }
        for patient in patients
    ]


def make_peer(method: str, recipe: Recipe, arrays: list[dict[str, Any]], *, workers: int, plain: bool = True) -> "Peer":
    """The peer of our `dino` or `mae` with this recipe's sizes; `plain`: transformer layers in plain PyTorch."""
    return {"dino": PeerDino, "mae": PeerMae}[method](recipe, arrays, workers=workers, plain=plain)


class TwoPhaseViews:
    """A patient's views in one order: all global ones, then all local ones, one of each phase in turn."""

    def __init__(self, config: ViewConfig, crop_vox: tuple[int, int, int]) -> None:
        from monai.data.meta_obj import set_track_meta
        from monai.transforms.croppad.array import RandSpatialCrop

        set_track_meta(False)
        self.config = config
        self.crop = RandSpatialCrop(crop_vox, random_size=False)
        self.globals = _view_transform(config, config.global_vox, crop_vox)
        self.locals = _view_transform(config, config.local_vox, crop_vox)

    def __call__(self, scans: dict[str, Any]) -> list[Tensor]:
        """Views [2 globals_per_slot, 1, z, y, x] and [2 locals_per_slot, 1, z, y, x]; none of the latter, no tensor."""
        blocks = [self.crop(scans[phase]) for phase in PHASES]
        config = self.config
        plan = ((self.globals, config.globals_per_slot), (self.locals, config.locals_per_slot))
        return [torch.stack([view(block) for _ in range(n) for block in blocks]) for view, n in plan if n]


def _view_transform(config: ViewConfig, side: int, crop_vox: tuple[int, int, int]) -> Any:
    """The ranges of our recipe by MONAI's names."""
    from monai.transforms.compose import Compose
    from monai.transforms.intensity.array import (
        RandAdjustContrast,
        RandGaussianNoise,
        RandShiftIntensity,
        ScaleIntensityRange,
    )
    from monai.transforms.spatial.array import RandAffine
    from monai.transforms.utility.array import EnsureType

    low, high = config.zoom
    return Compose(
        [
            EnsureType(dtype=torch.float32),
            RandAffine(
                prob=1.0,
                rotate_range=(np.deg2rad(config.rotation_deg),) * 3,
                scale_range=((low - 1, high - 1),) * 3,
                translate_range=tuple((crop - side) / 2 for crop in crop_vox),
                spatial_size=(side,) * 3,
                padding_mode="border",
                cache_grid=True,
            ),
            RandGaussianNoise(prob=1.0, std=config.noise_hu[1], sample_std=True),
            RandShiftIntensity(offsets=config.shift_hu, prob=1.0),
            ScaleIntensityRange(*HU_WINDOW, 0.0, 1.0, clip=True),
            RandAdjustContrast(prob=1.0, gamma=config.gamma),
        ]
    )


def collate(samples: list[list[Tensor]]) -> list[Tensor]:
    """Views [v, b, 1, z, y, x] of each size."""
    return [torch.stack(views, dim=1) for views in zip(*samples, strict=True)]


class Peer:
    """What both have in common: loader, optimizer, one step."""

    def __init__(self, recipe: Recipe, arrays: list[dict[str, Any]], *, workers: int, plain: bool) -> None:
        from monai.data.dataset import CacheDataset

        self.recipe, self.plain = recipe, plain
        train = recipe.train
        self.prefetched = 2 * workers
        dataset = CacheDataset(
            arrays, TwoPhaseViews(recipe.views, recipe.data.crop_vox), copy_cache=False, progress=False, num_workers=0
        )
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=train.patients(),
            num_workers=workers,
            collate_fn=collate,
            sampler=RandomSampler(dataset, replacement=True, num_samples=STEPS * train.patients()),
        )
        self.loader = iter(loader)
        self.number = 0
        self.backbone = create_backbone(recipe.backbone.name, **_fields(recipe.backbone.config))
        self.build()
        self.optimizer = torch.optim.AdamW(
            [p for module in self.trained() for p in module.parameters() if p.requires_grad],
            lr=train.rate(),
            betas=train.betas,
            weight_decay=train.weight_decay,
            fused=True,
        )

    def build(self) -> None:
        """Modules beside the backbone."""
        raise NotImplementedError

    def trained(self) -> list[nn.Module]:
        """Modules with trained parameters."""
        raise NotImplementedError

    def loss(self, views: list[Tensor]) -> Tensor:
        """Of a batch."""
        raise NotImplementedError

    def before_backward(self) -> None:
        """The teacher's move, as in lightly's example."""

    def after_backward(self) -> None:
        """What happens to gradients."""

    def step(self) -> None:
        """One step, data included."""
        with self._layers():
            self._step()

    def _layers(self) -> AbstractContextManager[None]:
        """Our backbone's transformer layers by their definitions, or as ours run."""
        by = {"residual_attention": "reference", "residual_mlp": "reference"} if self.plain else {}
        return forced(**by)  # pyright: ignore[reportArgumentType]

    def _step(self) -> None:
        views = next(self.loader)
        self.before_backward()
        with autocast(torch.device("cpu"), self.recipe.train.precision, self.backbone):
            loss = self.loss(views)
        loss.backward()
        self.after_backward()
        nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 3.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.number += 1
        loss.item()

    def flops(self) -> int:
        """Of forward and backward."""
        views = next(self.loader)
        with self._layers(), FlopCounterMode(display=False) as counter:
            with autocast(torch.device("cpu"), self.recipe.train.precision, self.backbone):
                loss = self.loss(views)
            loss.backward()
        self.optimizer.zero_grad()
        return counter.get_total_flops()


class PeerDino(Peer):
    """lightly's `examples/pytorch/dino.py` with a 3-D backbone."""

    def build(self) -> None:
        config: Any = self.recipe.method.config  # pyright: ignore[reportOptionalMemberAccess]
        sizes = (self.backbone.dim, config.head_hidden, config.head_bottleneck, config.prototypes)
        self.head = DINOProjectionHead(*sizes, freeze_last_layer=1)
        self.teacher_backbone, self.teacher_head = copy.deepcopy(self.backbone), DINOProjectionHead(*sizes)
        for module in (self.teacher_backbone, self.teacher_head):
            utils.deactivate_requires_grad(module)
        self.criterion = DINOLoss(output_dim=config.prototypes, warmup_teacher_temp_epochs=5)

    def trained(self) -> list[nn.Module]:
        return [self.backbone, self.head]

    def loss(self, views: list[Tensor]) -> Tensor:
        global_views = views[0].flatten(0, 1)
        with torch.no_grad():
            teacher = self.teacher_head(self.teacher_backbone(global_views).embedding())
        student = [self.head(self.backbone(size.flatten(0, 1)).embedding()) for size in views]
        counts = [len(size) for size in views]
        student_out = [one for rows, n in zip(student, counts, strict=True) for one in rows.chunk(n)]
        return self.criterion(list(teacher.chunk(counts[0])), student_out, epoch=1)

    def before_backward(self) -> None:
        momentum = cosine_schedule(self.number, STEPS, 0.996, 1)
        utils.update_momentum(self.backbone, self.teacher_backbone, m=momentum)
        utils.update_momentum(self.head, self.teacher_head, m=momentum)

    def after_backward(self) -> None:
        self.head.cancel_last_layer_gradients(current_epoch=1)


class PeerMae(Peer):
    """lightly's `examples/pytorch/mae.py`: loss on hidden tokens, targets normalised per patch, our decoder's sizes."""

    def build(self) -> None:
        config: Any = self.recipe.method.config  # pyright: ignore[reportOptionalMemberAccess]
        assert isinstance(config, Mae.Config)
        self.ratio, width = config.mask_ratio, config.decoder_width
        encoder: Any = self.backbone
        self.patch: int = encoder.token_stride_vox
        self.embed = nn.Linear(encoder.dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, config.decoder_heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(config.decoder_depth)
            ),
            nn.LayerNorm(width),
        )
        self.predict = nn.Linear(width, self.patch**3)
        side = self.recipe.views.global_vox // self.patch
        self.positions = sincos_positions((side, side, side), width)
        self.criterion = nn.MSELoss()

    def trained(self) -> list[nn.Module]:
        return [self.backbone, self.embed, self.decoder, self.predict, nn.ParameterList([self.mask_token])]

    def loss(self, views: list[Tensor]) -> Tensor:
        image = views[0].flatten(0, 1)
        size = (len(image), len(self.positions))
        keep, hidden = utils.random_token_mask(size, mask_ratio=self.ratio, mask_class_token=True)
        encoded = self.embed(self.backbone(image, keep=keep).tokens)
        tokens = utils.repeat_token(self.mask_token, size).to(encoded.dtype)
        tokens = utils.set_at_index(tokens, keep, encoded) + self.positions
        predicted = self.predict(utils.get_at_index(self.decoder(tokens), hidden))
        target = utils.get_at_index(patchify(image, (self.patch, self.patch, self.patch)), hidden)
        return self.criterion(predicted, utils.normalize_mean_var(target))


def _fields(config: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(config)
