"""vox2vec: a voxel's features are the same in two crops of the scan, and differ from those of other voxels.

Source: Goncharov et al. 2023, https://arxiv.org/abs/2307.14725 (voxels of the overlap of two crops, NT-Xent over all
voxels of the batch, features of the whole pyramid side by side). Differs from it: points are drawn in the lung, with
replacement; points at the same place or of another sample of the same patient are no negatives; optionally the two
crops are of two phases, matched by the cache's displacement.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from lungssl_data.batch import PairBatch, StepOutput
from torch import nn

from lungssl_methods.auto import BaseRate
from lungssl_methods.choices import check_choices
from lungssl_methods.contrast import chance_nats, far_or_strangers, twin_contrast
from lungssl_methods.correspondence import check_correspondences
from lungssl_methods.dino import encode_views
from lungssl_methods.method import Gather, LocalGather, ViewCounts, checked_encoder
from lungssl_methods.points import check_pyramid, neighbours, over_ranks, point_pairs, slot_pairs
from lungssl_methods.projector import Projector
from lungssl_methods.simclr import check_global_pairs
from lungssl_methods.variance import direction_spread


class Vox2Vec(nn.Module):
    """Dense contrast of voxels. In `eval()` the points are always the same.

    Any encoder will do; one whose pyramid is a single level says little about voxels where its stride is large.
    """

    typical_views = ViewCounts(globals_per_slot=2, locals_per_slot=0)
    base_rate = BaseRate(lr=3e-4, source="ssl.md B.3")
    needs_correspondences = False
    may_collapse = True
    batch_separable = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Which voxels are compared."""

        pairs: Literal["within", "cross"] = "within"
        """Two global views of each slot, as the source; or one of each slot, which needs correspondences."""
        points: int = 128
        """Per crop. vox2vec has 1024; the logits' matrix, of (2 points samples)^2 floats, would then take 4 GB at 16
        samples, and takes 67 MB at 128."""
        temperature: float = 0.1
        """Divides cosines (vox2vec's)."""
        near_mm: float = 0.0
        """Points of one crop up to so far from each other are no negatives. 0: all but the same voxel are, as in the
        source."""
        hidden: int | None = None
        """Width of the projector's two hidden layers. None: that of the pyramid, all levels together (vox2vec's)."""
        out: int = 128
        """Width of its output (vox2vec's)."""

        def build(
            self, encoder: nn.Module, *, total_steps: int, effective_batch: int = 32, gather: Gather | None = None
        ) -> "Vox2Vec":
            """A vox2vec around `encoder`. It has no schedule. Negatives are the points of all ranks."""
            return Vox2Vec(self, encoder, gather or LocalGather())

    def __init__(self, config: Config, encoder: nn.Module, gather: Gather) -> None:
        """Raises ValueError for a module that is no Encoder or has no pyramid, and for an unknown policy."""
        super().__init__()
        check_choices("vox2vec", config)
        checked = checked_encoder(encoder)
        check_pyramid(checked, "vox2vec")
        self.config = config
        self.gather = gather
        self.strides_vox = tuple(checked.pyramid_strides_vox)
        dim = sum(checked.pyramid_channels)
        hidden = dim if config.hidden is None else config.hidden
        self.projector = Projector(dim, (hidden, hidden, config.out))
        self.encoder = encoder
        self.needs_correspondences = config.pairs == "cross"

    def check_views(self, *, globals_per_slot: int, locals_per_slot: int) -> None:
        """Raises ValueError for one global view per slot with pairs "within", and with local views."""
        check_global_pairs("vox2vec", self.config.pairs, globals_per_slot, locals_per_slot)

    def forward(self, batch: PairBatch, step: int) -> StepOutput:
        """Loss in nats; `loss_lnk` is 1 where all voxels look alike, K being the points that a point is told from.

        `matched_share` is the share of points that are known to be in both views; without one the loss is 0.
        `embedding_std` is the spread of the points' features: 1 all over the sphere, 0 collapsed. Points are drawn
        from torch's global CPU generator, on any device. `step` changes nothing.

        Raises ValueError with pairs "cross" where the crops were read without correspondences.
        """
        if self.needs_correspondences:
            check_correspondences(batch, "vox2vec with pairs='cross'")
        views = batch.global_views()
        features = encode_views(self.encoder, views)
        generator = None if self.training else torch.Generator().manual_seed(0)
        pairs = (slot_pairs if self.needs_correspondences else neighbours)(views)
        found = [
            point_pairs(
                (views[i], views[j]),
                (features[i], features[j]),
                self.strides_vox,
                self.config.points,
                generator=generator,
                gather=self.gather,
            )
            for i, j in pairs
        ]
        raw = torch.stack([side for points in found for side in (points.first, points.second)])
        shared = [over_ranks(points, batch.patient[points.sample], self.gather) for points in found]
        projected = self.projector(
            torch.stack([side for points, _ in shared for side in (points.first, points.second)])
        )
        losses, chances = [], []
        for index, (points, groups) in enumerate(shared):
            stranger = far_or_strangers(points.distance_mm, groups, points.valid, far_mm=self.config.near_mm)
            first, second = projected[2 * index], projected[2 * index + 1]
            losses.append(
                twin_contrast(first, second, stranger, temperature=self.config.temperature, valid=points.valid)
            )
            chances.append(chance_nats(stranger, points.valid))
        loss = torch.stack(losses).mean()
        metrics = {
            "loss": loss.detach(),
            "loss_lnk": loss.detach() / torch.stack(chances).mean().clamp_min(1e-6),
            "matched_share": torch.stack([points.valid for points in found]).float().mean(),
            "embedding_std": direction_spread(raw),
        }
        return StepOutput(loss=loss, metrics=metrics)

    def after_optimizer_step(self, step: int) -> None:
        """Nothing moves between steps."""

    def export_encoder(self) -> nn.Module:
        """The trained encoder."""
        return self.encoder
