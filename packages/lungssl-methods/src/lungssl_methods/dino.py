"""DINO over paired scans: a student matches, across views, what a slow average of itself says of the whole crop.

Source: Caron et al. 2021, https://arxiv.org/abs/2104.14294 (multi-crop, centring, sharpening, EMA teacher). Optional,
off unless a weight says otherwise: iBOT's patch term (Zhou et al. 2022, https://arxiv.org/abs/2111.07832), KoLeo and
Sinkhorn targets (DINOv2, https://arxiv.org/abs/2304.07193), Gram anchoring (DINOv3, https://arxiv.org/abs/2508.10104).
Differs from them: which views are matched is a policy over slots (see `pairing`); what goes into the head's MLP and
what comes out is standardised (see `moments`); the centre has no start-up bias and moves once per optimizer step, not
per forward, so that accumulated micro-batches act as one batch; prototypes are fewer, for small batches.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

import torch
from jaxtyping import Bool, Float, Int64
from lungssl_backbones.encoder import Features, token_grid
from lungssl_data.batch import PairBatch, StepOutput, View
from torch import Tensor, nn

from lungssl_methods.auto import Auto, BaseRate, RunSize, auto_momentum, auto_prototypes
from lungssl_methods.choices import check_choices
from lungssl_methods.correspondence import token_mean
from lungssl_methods.distillation import Centering, Distillation, DistillationConfig
from lungssl_methods.masking import MASK_WIDTH_VOX, varied_block_masks
from lungssl_methods.method import (
    Gather,
    LocalGather,
    ViewCounts,
    checked_encoder,
    mean_over_ranks,
    own_rows,
    rank_part,
)
from lungssl_methods.pairing import PairPolicy, measured_views, pair_weight, policy_weights, slot_pair_weight
from lungssl_methods.regularisers import gram, koleo
from lungssl_methods.schedules import cosine_momentum, linear_warmup_then_constant
from lungssl_methods.teacher import follow, slow_copy
from lungssl_methods.variance import direction_spread

SINKHORN_FROM_ROWS = 256
"""Teacher rows per step from which Sinkhorn's even shares say something (`ssl.md` B.1); below, the moving centre."""
KOLEO_FROM_PATIENTS = 16
"""Fewer distinct patients in a step are near neighbours of nobody (`ssl.md` B.1)."""


class Distil(TypedDict):
    """What all cross-entropies of a step have in common."""

    student_temperature: float
    teacher_temperature: float
    frozen: bool


class Dino(nn.Module):
    """Self-distillation of the crop's summary embedding. In `eval()`: the final teacher temperature, no state moves."""

    typical_views = ViewCounts(globals_per_slot=1, locals_per_slot=2)
    needs_correspondences = False
    may_collapse = True

    @property
    def batch_separable(self) -> bool:
        """Not with Sinkhorn or KoLeo, which compare the samples of a forward; the centre is of earlier steps."""
        return self.config.centering == "ema" and self.config.koleo_weight == 0

    base_rate = BaseRate(lr=1e-3, batch=256, source="ssl.md B.1")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Defaults are for 16 to 64 samples per step (`ssl.md` B.1)."""

        pairs: PairPolicy = "all"
        """Which views are matched: "all", "cross" (different slots), "within" (same slot), or the weights of
        (cross, within) pairs, e.g. [1.0, 0.5]."""
        prototypes: int | Literal["auto"] = 4096
        """Size k of the output distribution. DINO's 65536 leaves small batches with uniform targets. "auto": as many as
        the run's rows can tell apart (`auto.auto_prototypes`)."""
        head_hidden: int = 2048
        """Width of the projection head's two hidden layers (DINO's)."""
        head_bottleneck: int = 256
        """Width of the L2-normalised input of the prototypes (DINO's)."""
        student_temperature: float = 0.1
        """Divides the student's logits (DINO's)."""
        teacher_temperature: tuple[float, float] = (0.04, 0.06)
        """At the first step and after warm-up; DINO found more than 0.07 unstable."""
        temperature_warmup: float = 0.3
        """Share of the run over which the teacher's temperature rises."""
        centering: Centering | Literal["auto"] = "auto"
        """What keeps targets from collapsing: "ema", a moving centre, or "sinkhorn", 3 iterations over the rows of a
        forward. "auto": Sinkhorn from 256 teacher rows in a step on, unless those are accumulated."""
        centre_momentum: float = 0.9
        """EMA momentum of the teacher logits' mean that is subtracted before sharpening (DINO's)."""
        momentum: float | None = None
        """The teacher's EMA momentum at step 0, rising to 1 over the run. None: `schedules.auto_momentum`."""
        freeze_prototypes: float = 0.02
        """Share of the run during which the prototypes don't move (DINO: the first epoch)."""
        patch_weight: float = 0.0
        """Weight of iBOT's term, over hidden tokens of the global views; 1 in iBOT and DINOv2."""
        mask_share: float = 0.5
        """Share of the global views in which tokens are hidden (DINOv2)."""
        mask_ratio: tuple[float, float] = (0.2, 0.7)
        """Share of tokens hidden in them (`ssl.md` B.1)."""
        mask_unit_tokens: int | None = None
        """Side of a hidden block in tokens. None: as many as make 16 voxels, at least 1."""
        koleo_weight: float = 0.0
        """Weight of the spread of the global views' embeddings, before the head; 0.1 in DINOv2. Counts only in batches
        of 16 patients or more."""
        gram_weight: float = 0.0
        """Weight of Gram anchoring; 2 in DINOv3, for runs long enough that dense features decay."""
        gram_refresh: float = 0.1
        """Share of the run after which the anchor becomes the teacher of that time; it begins with the second part."""

        def settled(self, run: RunSize) -> tuple["Dino.Config", dict[str, str]]:
            """The same with every "auto" and the momentum replaced, and the reasons by key."""
            found: dict[str, Auto] = {}
            if self.prototypes == "auto":
                found["prototypes"] = auto_prototypes(run)
            if self.momentum is None:
                found["momentum"] = auto_momentum(run)
            if self.centering == "auto":
                found["centering"] = _auto_centering(run)
            values = {key: auto.value for key, auto in found.items()}
            return replace(self, **values), {key: auto.reason for key, auto in found.items()}

        def build(
            self, encoder: nn.Module, *, total_steps: int, effective_batch: int = 32, gather: Gather | None = None
        ) -> "Dino":
            """A DINO around `encoder`, which becomes the student and is copied for the teacher.

            `effective_batch`: samples per optimizer step over all ranks and accumulated micro-batches.
            """
            return Dino(
                self, encoder, total_steps=total_steps, effective_batch=effective_batch, gather=gather or LocalGather()
            )

    def __init__(
        self, config: Config, encoder: nn.Module, *, total_steps: int, effective_batch: int, gather: Gather
    ) -> None:
        """Raises ValueError for a module that is no Encoder, an impossible pair policy, or an unknown choice."""
        super().__init__()
        check_choices("dino", config)
        policy_weights(config.pairs)
        checked = checked_encoder(encoder)
        run = RunSize(effective_batch=effective_batch, total_steps=total_steps, patients=0)
        config, _ = config.settled(run)
        assert config.momentum is not None and config.prototypes != "auto" and config.centering != "auto"
        self.config = config
        self.total_steps = total_steps
        self.base_momentum = config.momentum
        self.prototypes = config.prototypes
        self.stride_vox = checked.token_stride_vox
        self.encoder = encoder
        self.teacher_encoder = slow_copy(encoder)
        self.gather = gather
        self.head_config = DistillationConfig(
            prototypes=config.prototypes,
            hidden=config.head_hidden,
            bottleneck=config.head_bottleneck,
            centering=config.centering,
            centre_momentum=config.centre_momentum,
        )
        self.summary = Distillation(self.summary_dim(checked.dim), self.head_config, gather)
        self.patches = Distillation(checked.dim, self.head_config, gather) if config.patch_weight > 0 else None
        self.anchor = slow_copy(encoder) if config.gram_weight > 0 else None

    def train(self, mode: bool = True) -> "Dino":
        """The teacher always stays in evaluation mode: no dropped paths in its targets."""
        super().train(mode)
        for module in (self.teacher_encoder, self.anchor):
            if module is not None:
                module.eval()
        return self

    def check_views(self, *, globals_per_slot: int, locals_per_slot: int) -> None:
        """Raises ValueError where the pair policy finds no pair among so many views per slot."""
        if globals_per_slot < 1:
            raise ValueError(f"dino needs at least 1 global view per slot for its teacher, got {globals_per_slot}")
        teachers = [0, 1] * globals_per_slot
        slot_pair_weight(teachers + [0, 1] * locals_per_slot, teachers, self.config.pairs)

    def forward(self, batch: PairBatch, step: int) -> StepOutput:
        """Loss in nats and, in units of ln k, its summary term, the teacher's entropy and KL(teacher, student).

        The student has learned to match the teacher where the KL is small; with small loss and entropy near 0, or
        entropy near 1, it has collapsed. `embedding_std` is the spread of L2-normalised embeddings times sqrt(dim): 1
        for directions all over the sphere, 0 where every crop looks the same. `patch_loss_lnk` is iBOT's, per hidden
        token. In `eval()`, `prototypes_used` is the perplexity of the mean target. Views and tokens without one
        measured voxel count for nothing, also as neighbours or in averages.
        """
        config = self.config
        weight = pair_weight(batch, config.pairs)
        temperature = self.teacher_temperature(step)
        views = batch.global_views()
        measured = measured_views(views)
        mask = self._mask(views) if config.patch_weight > 0 else None
        wants = self.wants_tokens()
        student = encode_views(self.encoder, batch.views, mask=mask, tokens=wants)
        with torch.no_grad():
            teacher = encode_views(self.teacher_encoder, views, tokens=wants)
        embeddings = torch.stack([one.embedding() for one in student])
        distil: Distil = {
            "student_temperature": config.student_temperature,
            "teacher_temperature": temperature,
            "frozen": step < config.freeze_prototypes * self.total_steps,
        }
        targets = self.summary_part(torch.stack([one.embedding() for one in teacher]))
        loss, teacher_entropy = self.summary(self.summary_part(embeddings), targets, weight, **distil)
        with torch.no_grad():
            teacher_share = weight.sum(dim=0) / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)
            entropy = (teacher_share * teacher_entropy).sum()
            ln_k = math.log(self.prototypes)
            metrics = {
                "loss_lnk": loss.detach() / ln_k,
                "teacher_entropy_lnk": entropy / ln_k,
                "teacher_kl_lnk": (loss.detach() - entropy) / ln_k,
                "embedding_std": direction_spread(embeddings[: len(teacher)], valid=measured),
                "ema_momentum": torch.tensor(self.momentum(step)),
                "teacher_temperature": torch.tensor(temperature),
            }
            if not self.training:
                metrics["prototypes_used"] = self.summary.prototypes_used(targets, weight.any(dim=0), temperature)
        total = loss
        if mask is not None:
            seen = torch.cat([token_mean(view.valid[:, None].float(), self.stride_vox)[..., 0] > 0 for view in views])
            patch = self._patch_loss(student, teacher, mask & seen, distil)
            # As iBOT: averaged over all views, masked or not, of all ranks.
            number = torch.stack([part.any(dim=1).float().sum() for part in (mask & seen, seen)])
            masked, all_views = mean_over_ranks(number, self.gather) if self.training else number
            total = total + config.patch_weight * patch * (masked / all_views.clamp_min(1e-6))
            metrics["patch_loss_lnk"] = patch.detach() / ln_k
        if config.koleo_weight > 0:
            patient = self.gather.rows(batch.patient)
            valid = self.gather.rows(measured.T).T
            if len(patient[valid.any(dim=0)].unique()) >= KOLEO_FROM_PATIENTS:
                rows = [self.gather.rows(one) for one in embeddings[: len(teacher)]]
                spreads = [koleo(one, patient, valid=there) for one, there in zip(rows, valid, strict=True)]
                spread = torch.stack(spreads).mean()
                total = total + config.koleo_weight * spread
                metrics["koleo"] = spread.detach()
        if self.anchor is not None and step >= self._refresh_steps():
            with torch.no_grad():
                kept = encode_views(self.anchor, views)
            pairs = zip(student[: len(kept)], kept, measured, strict=True)
            drifts = [rank_part(gram(a.tokens, b.tokens, valid=there), there, self.gather) for a, b, there in pairs]
            drift = torch.stack(drifts).mean()
            total = total + config.gram_weight * drift
            metrics["gram"] = drift.detach()
        for name, (scale, term) in self.more_terms(batch, student, teacher, distil).items():
            total = total + scale * term
            metrics[name] = term.detach()
        return StepOutput(loss=total, metrics={"loss": total.detach(), **metrics})

    def summary_dim(self, dim: int) -> int:
        """Width of what the summary's head is given, of the encoder's `dim`."""
        return dim

    def summary_part(self, embedding: Float[Tensor, "v b d"]) -> Float[Tensor, "v b e"]:
        """What of the embedding is matched across views: all of it."""
        return embedding

    def heads(self) -> list[Distillation]:
        """All pairs of heads, whose teachers and centres move after the optimizer's step."""
        return [self.summary] if self.patches is None else [self.summary, self.patches]

    def wants_tokens(self) -> bool:
        """Whether any term of the loss reads more of an encoder than its summaries."""
        return self.patches is not None or self.anchor is not None

    def more_terms(
        self, batch: PairBatch, student: list[Features], teacher: list[Features], distil: Distil
    ) -> dict[str, tuple[float, Tensor]]:
        """Further terms by name, with their weights: none. `student` has all views, `teacher` the global ones."""
        return {}

    def teacher_temperature(self, step: int) -> float:
        """Warms up in training; always final in `eval()`, so that held-out losses of different steps compare."""
        start, end = self.config.teacher_temperature
        if not self.training:
            return end
        warmup_steps = round(self.config.temperature_warmup * self.total_steps)
        return linear_warmup_then_constant(step, start=start, end=end, warmup_steps=warmup_steps)

    def momentum(self, step: int) -> float:
        """The teacher's EMA momentum at a step."""
        return cosine_momentum(step, base=self.base_momentum, total_steps=self.total_steps)

    @torch.no_grad()
    def after_optimizer_step(self, step: int) -> None:
        """Move the centres by the teacher logits of this step, then the teacher: parameters by EMA, buffers copied."""
        heads = self.heads()
        for head in heads:
            head.update()
        follow(
            [(self.teacher_encoder, self.encoder), *((head.teacher, head.student) for head in heads)],
            self.momentum(step),
        )
        if self.anchor is not None and (step + 1) % self._refresh_steps() == 0:
            self.anchor.load_state_dict(self.teacher_encoder.state_dict())

    def export_encoder(self) -> nn.Module:
        """The teacher's encoder: an average over steps, and the better one downstream (Caron et al. 2021, fig. 6)."""
        return self.teacher_encoder

    def _refresh_steps(self) -> int:
        return max(1, round(self.config.gram_refresh * self.total_steps))

    def _mask(self, views: tuple[View, ...]) -> Bool[Tensor, "g n"]:
        """Hidden tokens of all global views, which are of one size. Held out, always the same."""
        z, y, x = views[0].image.shape[2:]
        unit = self.config.mask_unit_tokens
        generator = None if self.training else torch.Generator().manual_seed(0)
        masks = varied_block_masks(
            sum(len(view.image) for view in views) * self.gather.ranks,
            token_grid((z, y, x), self.stride_vox),
            ratio=self.config.mask_ratio,
            share=self.config.mask_share,
            unit=max(1, MASK_WIDTH_VOX // self.stride_vox) if unit is None else unit,
            generator=generator,
        )
        return own_rows(masks, self.gather, views=len(views)).to(views[0].image.device)

    def _patch_loss(
        self, student: list[Features], teacher: list[Features], mask: Bool[Tensor, "g n"], distil: Distil
    ) -> Float[Tensor, ""]:
        """Mean over masked views of the mean over their hidden tokens (Zhou et al. 2022, eq. 2)."""
        assert self.patches is not None
        weight = (mask / mask.sum(dim=1, keepdim=True).clamp_min(1)).flatten()
        found = weighted_rows(weight)
        sides = (torch.cat([one.tokens for one in side[: len(teacher)]]) for side in (student, teacher))
        rows, targets = (tokens.flatten(0, 1)[found][None] for tokens in sides)
        loss, _ = self.patches(rows, targets, weight[found][None, None], **distil)
        return loss


def weighted_rows(weight: Float[Tensor, " n"]) -> Int64[Tensor, " k"]:
    """Indices of rows of positive weight; of the first row where none has any, so that a loss keeps a gradient of 0:
    distributed training waits for every parameter's."""
    found = weight.nonzero()[:, 0]
    return found if len(found) > 0 else found.new_zeros(1)


def _auto_centering(run: RunSize) -> Auto:
    rows = 2 * run.effective_batch
    if run.accumulate > 1:
        return Auto(value="ema", reason=f"{run.accumulate} accumulated micro-batches; Sinkhorn sees one at a time")
    return Auto(
        value="sinkhorn" if rows >= SINKHORN_FROM_ROWS else "ema",
        reason=f"{rows} teacher rows a step; Sinkhorn from {SINKHORN_FROM_ROWS} on (ssl.md B.1)",
    )


def encode_views(
    encoder: nn.Module, views: tuple[View, ...], *, mask: Bool[Tensor, "g n"] | None = None, tokens: bool = True
) -> list[Features]:
    """Features of each view, in their order; views of one size share a forward, and of all sizes where the encoder
    takes those. `mask` hides tokens of global ones.

    Without `tokens` only summaries are made where the encoder can leave out the rest: the same ones, at less cost.
    """
    wanted = {} if tokens or not getattr(encoder, "supports_summary_only", False) else {"summary_only": True}
    sizes: dict[tuple[str, torch.Size], list[int]] = {}
    for index, view in enumerate(views):
        kind = view.kind if mask is not None else "any"
        sizes.setdefault((kind, view.image.shape), []).append(index)
    images = [torch.cat([views[i].image for i in indices]) for indices in sizes.values()]
    if mask is None and len(images) > 1 and getattr(encoder, "supports_sizes", False):
        encoded = encoder(images, **wanted)
    else:
        encoded = [
            encoder(image, mask=mask, **wanted) if kind == "global" else encoder(image, **wanted)
            for (kind, _), image in zip(sizes, images, strict=True)
        ]
    found: dict[int, Features] = {}
    for features, indices in zip(encoded, sizes.values(), strict=True):
        found |= dict(zip(indices, split_features(features, len(indices)), strict=True))
    return [found[index] for index in range(len(views))]


def summaries(encoder: nn.Module, views: tuple[View, ...]) -> Float[Tensor, "v b d"]:
    """The embedding of each view."""
    return torch.stack([one.embedding() for one in encode_views(encoder, views, tokens=False)])


def split_features(features: Features, count: int) -> list[Features]:
    """Features of `count` views that were encoded together."""
    tokens = features.tokens.chunk(count)
    summaries = [None] * count if features.cls is None else features.cls.chunk(count)
    pyramids = (
        zip(*(level.chunk(count) for level in features.pyramid), strict=True) if features.pyramid else [()] * count
    )
    return [
        Features(cls=cls, tokens=part, pyramid=tuple(pyramid), grid=features.grid, stride_mm=features.stride_mm)
        for cls, part, pyramid in zip(summaries, tokens, pyramids, strict=True)
    ]
