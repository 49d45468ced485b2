"""PairedDense: a point's features are found again in the other phase, among those of all other points.

`ssl.md` C3. Points of slot 0 and their places in slot 1, by the cache's displacement; InfoNCE (van den Oord et al.
2018, https://arxiv.org/abs/1807.03748) between the L2-normalised features of the whole pyramid, without a projector:
the features themselves are what registration will use. As in SAM (Yan et al. 2022, https://arxiv.org/abs/2012.02383)
points nearby are no negatives; here they are soft positives, as far as the displacement is expected to err. A part of
the loss is of two views of one scan, whose warp is known exactly: features that only ever saw the registration's answer
would learn its mistakes too.

Without a displacement, the partners can be those that a slow copy of the encoder finds by its own features
(`taught.taught_matches`); at least half of the loss must then be of known warps, lest it confirms its own mistakes.

Features of a stride above 2 voxels can hardly tell points 3 mm apart: it takes an encoder with a fine first level
(convolutional, or patches of 2) to make this useful. Others work with the levels that they have.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from lungssl_backbones.encoder import Features
from lungssl_data.batch import PairBatch, StepOutput, View
from torch import Tensor, nn

from lungssl_methods.auto import BaseRate, RunSize, auto_momentum
from lungssl_methods.choices import check_choices
from lungssl_methods.contrast import dense_infonce, far_or_strangers, soft_positives
from lungssl_methods.correspondence import check_correspondences, features_at
from lungssl_methods.dino import encode_views
from lungssl_methods.method import Gather, LocalGather, ViewCounts, checked_encoder
from lungssl_methods.points import (
    PointPairs,
    check_pyramid,
    matched_points,
    neighbours,
    over_ranks,
    point_pairs,
    slot_pairs,
)
from lungssl_methods.schedules import cosine_momentum
from lungssl_methods.simclr import check_global_pairs
from lungssl_methods.taught import taught_matches
from lungssl_methods.teacher import follow, slow_copy
from lungssl_methods.variance import direction_spread


class PairedDense(nn.Module):
    """Contrast of corresponding points across phases. In `eval()` the points are always the same."""

    typical_views = ViewCounts(globals_per_slot=2, locals_per_slot=0)
    base_rate = BaseRate(lr=3e-4, source="as vox2vec, ssl.md B.3")
    needs_correspondences = True
    may_collapse = True
    batch_separable = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Which points are the same, near, or different (`ssl.md` C3)."""

        points: int = 128
        """Per crop. C3 has 1024; the logits' matrix, of (points samples)^2 floats, would then take 1 GB at 16 samples,
        and takes 17 MB at 128."""
        temperature: float = 0.1
        """Divides cosines (C3)."""
        sigma_mm: float = 3.0
        """Standard deviation of the soft positives: the displacement's expected error (C3). 0: only itself."""
        far_mm: float = 20.0
        """Points of one scan farther apart are negatives (C3); those between 3 sigma and this are neither."""
        known_share: float = 0.5
        """Share of the loss that is of two views of one slot, whose warp is known (C3); needs 2 global views per
        slot. 0: none."""
        matched_by: Literal["cache", "teacher"] = "cache"
        """What says which points correspond across the phases: the cache's displacement, or the teacher's features,
        around the coarse affine's place; then `known_share` must be at least 0.5 (C3: 50 % synthetic always)."""
        reach_mm: float = 20.0
        """How far the teacher looks: the coarse affine errs by at most 18.9 mm on phantoms (docs/log.md)."""
        residual_mm: float = 3.0
        """Of the teacher's way there and back, for a match to count (C3)."""
        momentum: float | None = None
        """The teacher's EMA momentum at step 0, rising to 1 over the run. None: `auto.auto_momentum`."""

        def settled(self, run: RunSize) -> tuple["PairedDense.Config", dict[str, str]]:
            """The same with the momentum that the run's size decides, and the reason by key."""
            if self.momentum is not None or self.matched_by != "teacher":
                return self, {}
            auto = auto_momentum(run)
            return replace(self, momentum=auto.value), {"momentum": auto.reason}

        def build(
            self, encoder: nn.Module, *, total_steps: int, effective_batch: int = 32, gather: Gather | None = None
        ) -> "PairedDense":
            """A PairedDense around `encoder`. Negatives are the points of all ranks."""
            config, _ = self.settled(RunSize(effective_batch=effective_batch, total_steps=total_steps, patients=0))
            return PairedDense(config, encoder, gather or LocalGather(), total_steps=total_steps)

    def __init__(self, config: Config, encoder: nn.Module, gather: Gather, *, total_steps: int) -> None:
        """Raises ValueError for a module that is no Encoder or has no pyramid, and for impossible shares or lengths."""
        super().__init__()
        check_choices("paired_dense", config)
        if not 0 <= config.known_share < 1:
            raise ValueError(
                f"known_share must be at least 0 and less than 1, got {config.known_share}; for views of one scan "
                f"alone take vox2vec"
            )
        if not 0 <= 3 * config.sigma_mm <= config.far_mm:
            raise ValueError(
                f"sigma_mm {config.sigma_mm} and far_mm {config.far_mm} make points both positive and negative; "
                f"take a far_mm of at least 3 sigma_mm"
            )
        taught = config.matched_by == "teacher"
        if taught and config.known_share < 0.5:
            raise ValueError(
                f"known_share {config.known_share} with matched_by='teacher': features that are taught by their own "
                f"matches alone confirm their mistakes; set it to at least 0.5, or matched_by to cache"
            )
        checked = checked_encoder(encoder)
        check_pyramid(checked, "paired_dense")
        self.config = config
        self.gather = gather
        self.total_steps = total_steps
        self.needs_correspondences = not taught
        self.strides_vox = tuple(checked.pyramid_strides_vox)
        self.encoder = encoder
        self.teacher_encoder = slow_copy(encoder) if taught else None

    def train(self, mode: bool = True) -> "PairedDense":
        """The teacher always stays in evaluation mode."""
        super().train(mode)
        if self.teacher_encoder is not None:
            self.teacher_encoder.eval()
        return self

    def check_views(self, *, globals_per_slot: int, locals_per_slot: int) -> None:
        """Raises ValueError for one global view per slot where known warps are wanted, and with local views."""
        check_global_pairs("paired_dense", "cross", globals_per_slot, locals_per_slot)
        if self.config.known_share > 0 and globals_per_slot < 2:
            raise ValueError(
                f"paired_dense learns known warps from two global views of one slot (known_share="
                f"{self.config.known_share}), got globals_per_slot={globals_per_slot}; set it to 2, or known_share to 0"
            )

    def forward(self, batch: PairBatch, step: int) -> StepOutput:
        """Loss in nats, and its parts `cross_loss` and `known_loss`.

        `match_error_mm` is the median distance, in slot 1's scan, between a point's true place and that of the sampled
        point of its own crop with the most similar features; `chance_mm` is what a random one of these points is away.
        Both are missing where no point is known in both phases. `matched_share` is the share that is;
        `embedding_std` is the spread of the points' features: 1 all over the sphere, 0 collapsed. Points are drawn
        from torch's global CPU generator, on any device. Where a teacher matches, all of this is by its matches, and
        `taught_error_mm` is their median distance to the true places, where crops were read with these.

        Raises ValueError where the crops were read without the correspondences that are needed.
        """
        if self.needs_correspondences:
            check_correspondences(batch, "paired_dense")
        views = batch.global_views()
        features = encode_views(self.encoder, views)
        generator = None if self.training else torch.Generator().manual_seed(0)
        if self.teacher_encoder is None:
            cross, taught = [self._points(views, features, pair, generator) for pair in slot_pairs(views)], {}
        else:
            cross, taught = self._taught_points(batch, features, self.teacher_encoder, generator)
        cross_loss = torch.stack([self._loss(points, batch) for points in cross]).mean()
        metrics = {"cross_loss": cross_loss.detach(), **match_metrics(cross), **taught}
        loss, share = cross_loss, self.config.known_share
        if share > 0:
            known = [self._points(views, features, pair, generator) for pair in neighbours(views)]
            known_loss = torch.stack([self._loss(points, batch) for points in known]).mean()
            loss = torch.lerp(cross_loss, known_loss, share)
            metrics["known_loss"] = known_loss.detach()
        return StepOutput(loss=loss, metrics={"loss": loss.detach(), **metrics})

    def after_optimizer_step(self, step: int) -> None:
        """Move the teacher, if there is one: parameters by EMA, buffers copied."""
        if self.teacher_encoder is not None and self.config.momentum is not None:
            momentum = cosine_momentum(step, base=self.config.momentum, total_steps=self.total_steps)
            follow([(self.teacher_encoder, self.encoder)], momentum)

    def export_encoder(self) -> nn.Module:
        """The trained encoder."""
        return self.encoder

    def _points(
        self,
        views: tuple[View, ...],
        features: list[Features],
        pair: tuple[int, int],
        generator: torch.Generator | None,
    ) -> PointPairs:
        i, j = pair
        return point_pairs(
            (views[i], views[j]),
            (features[i], features[j]),
            self.strides_vox,
            self.config.points,
            generator=generator,
            gather=self.gather,
        )

    def _taught_points(
        self, batch: PairBatch, features: list[Features], teacher: nn.Module, generator: torch.Generator | None
    ) -> tuple[list[PointPairs], dict[str, Tensor]]:
        views = batch.global_views()
        with torch.no_grad():
            seen = encode_views(teacher, views)
        pairs, errors = [], []
        for i, j in slot_pairs(views):
            matches = taught_matches(
                views[i],
                views[j],
                (seen[i], seen[j]),
                self.strides_vox,
                self.config.points,
                affine=batch.exhale_to_inhale,
                reach_mm=self.config.reach_mm,
                residual_mm=self.config.residual_mm,
                generator=generator,
                gather=self.gather,
            )
            pairs.append(matched_points(matches, (features[i], features[j]), self.strides_vox))
            if (partner_mm := views[i].partner_mm) is not None:
                away = matches.second_mm - features_at(partner_mm, matches.first_vox, 1)
                errors.append(torch.linalg.vector_norm(away, dim=-1)[matches.valid])
        known = torch.cat(errors) if errors else torch.empty(0)
        known = known[known.isfinite()]
        return pairs, {"taught_error_mm": known.median()} if len(known) > 0 else {}

    def _loss(self, points: PointPairs, batch: PairBatch) -> Tensor:
        points, groups = over_ranks(points, batch.patient[points.sample], self.gather)
        return dense_infonce(
            points.first,
            points.second,
            soft_positives(points.distance_mm, self.config.sigma_mm),
            far_or_strangers(points.distance_mm, groups, points.valid, far_mm=self.config.far_mm),
            temperature=self.config.temperature,
        )


@torch.no_grad()
def match_metrics(pairs: list[PointPairs]) -> dict[str, Tensor]:
    """How far from the truth the nearest neighbours in feature space are, beside chance; see `PairedDense.forward`."""
    errors, chances = [], []
    for points in pairs:
        with torch.autocast(points.first.device.type, enabled=False):
            similarity = F.normalize(points.first, dim=-1) @ F.normalize(points.second, dim=-1).mT
        comparable = ~points.distance_mm.isnan()
        best = similarity.masked_fill(~comparable, -torch.inf).argmax(dim=1, keepdim=True)
        errors.append(points.distance_mm.gather(1, best)[points.valid, 0])
        chances.append(points.distance_mm[comparable])
    error, chance = torch.cat(errors), torch.cat(chances)
    metrics = {
        "matched_share": torch.stack([points.valid for points in pairs]).float().mean(),
        "embedding_std": direction_spread(torch.cat([points.first for points in pairs])),
    }
    if len(error) > 0:
        metrics |= {"match_error_mm": error.median(), "chance_mm": chance.mean()}
    return metrics
