"""DINO over paired scans: a student matches, across views, what a slow average of itself says of the whole crop.

Source: Caron et al. 2021, https://arxiv.org/abs/2104.14294 (multi-crop, centring, sharpening, EMA teacher).
Differs from it: which views are matched is a policy over slots (see `pairing`); what goes into the head's MLP and what
comes out is standardised (see `moments`); the centre has no start-up bias and moves once per optimizer step, not per
forward, so that accumulated micro-batches act as one batch; prototypes are fewer, for small batches.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from lungssl_data.batch import PairBatch, StepOutput, View
from lungssl_ops.ema import ema_update_
from lungssl_ops.prototype_ce import centering_bias, mean_logits, prototype_cross_entropy
from torch import Tensor, nn

from lungssl_methods.losses import update_centre
from lungssl_methods.method import Gather, LocalGather, checked_encoder
from lungssl_methods.moments import RunningMoments
from lungssl_methods.pairing import PairPolicy, pair_weight, policy_weights, slot_pair_weight
from lungssl_methods.schedules import auto_momentum, cosine_momentum, linear_warmup_then_constant


class Dino(nn.Module):
    """Self-distillation of the crop's summary embedding. In `eval()`: the final teacher temperature, no state moves."""

    centre: Float32[Tensor, " k"]
    _logit_sum: Float32[Tensor, " k"]

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Defaults are for 16 to 64 samples per step (`ssl.md` B.1)."""

        pairs: PairPolicy = "all"
        """Which views are matched: "all", "cross" (different slots), "within" (same slot), or the weights of
        (cross, within) pairs, e.g. [1.0, 0.5]."""
        prototypes: int = 4096
        """Size k of the output distribution. DINO's 65536 leaves small batches with uniform targets."""
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
        centre_momentum: float = 0.9
        """EMA momentum of the teacher logits' mean that is subtracted before sharpening (DINO's)."""
        momentum: float | None = None
        """The teacher's EMA momentum at step 0, rising to 1 over the run. None: `schedules.auto_momentum`."""
        freeze_prototypes: float = 0.02
        """Share of the run during which the prototypes don't move (DINO: the first epoch)."""

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
        """Raises ValueError for a module that is no Encoder or an impossible pair policy."""
        super().__init__()
        policy_weights(config.pairs)
        self.config = config
        self.total_steps = total_steps
        self.gather = gather
        auto = auto_momentum(effective_batch=effective_batch, total_steps=total_steps)
        self.base_momentum = auto if config.momentum is None else config.momentum
        self.encoder = encoder
        self.head = _Head(checked_encoder(encoder).dim, config)
        self.teacher_encoder = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False).eval()
        self.embedding_moments = RunningMoments(self.teacher_head.dim, config.centre_momentum)
        self.bottleneck_moments = RunningMoments(config.head_bottleneck, config.centre_momentum)
        self.register_buffer("centre", torch.zeros(config.prototypes))
        # Teacher logits summed since the last optimizer step, and their rows: none whenever a checkpoint is taken.
        self.register_buffer("_logit_sum", torch.zeros(config.prototypes), persistent=False)
        self._rows = 0

    def train(self, mode: bool = True) -> "Dino":
        """The teacher always stays in evaluation mode: no dropped paths in its targets."""
        super().train(mode)
        self.teacher_encoder.eval()
        self.teacher_head.eval()
        return self

    @property
    def moments(self) -> tuple[RunningMoments, RunningMoments]:
        """What standardises the input and the output of both heads' MLPs."""
        return self.embedding_moments, self.bottleneck_moments

    def check_views(self, *, globals_per_slot: int, locals_per_slot: int) -> None:
        """Raises ValueError where the pair policy finds no pair among so many views per slot."""
        if globals_per_slot < 1:
            raise ValueError(f"dino needs at least 1 global view per slot for its teacher, got {globals_per_slot}")
        teachers = [0, 1] * globals_per_slot
        slot_pair_weight(teachers + [0, 1] * locals_per_slot, teachers, self.config.pairs)

    def forward(self, batch: PairBatch, step: int) -> StepOutput:
        """Loss in nats and, in units of ln k, the loss, the teacher's entropy and KL(teacher, student).

        The student has learned to match the teacher where the KL is small; with small loss and entropy near 0, or
        entropy near 1, it has collapsed. `embedding_std` is the spread of L2-normalised embeddings times sqrt(dim): 1
        for directions all over the sphere, 0 where every crop looks the same.
        """
        config = self.config
        weight = pair_weight(batch, config.pairs)
        embeddings = _encode(self.encoder, batch.views)
        frozen = step < config.freeze_prototypes * self.total_steps
        temperature = self.teacher_temperature(step)
        student = self.head.rows(embeddings, self.moments)
        prototypes = self.head.directions(frozen=frozen)
        with torch.no_grad():
            teacher_embeddings = _encode(self.teacher_encoder, batch.global_views())
            teacher = self.teacher_head.rows(teacher_embeddings, self.moments, collect=self.training)
            teacher_prototypes = self.teacher_head.directions()
            bias = centering_bias(self.unbiased_centre(), temperature)
            if self.training:
                rows = teacher.shape[0] * teacher.shape[1]
                self._logit_sum += rows * mean_logits(teacher, teacher_prototypes)
                self._rows += rows
        loss, teacher_entropy = prototype_cross_entropy(
            student,
            teacher,
            prototypes,
            teacher_prototypes,
            weight,
            bias=bias,
            student_temperature=config.student_temperature,
            teacher_temperature=temperature,
        )
        with torch.no_grad():
            teacher_share = weight.sum(dim=0) / weight.sum()
            entropy = (teacher_share * teacher_entropy).sum()
            ln_k = math.log(config.prototypes)
            directions = F.normalize(embeddings[: len(teacher)].float(), dim=-1).flatten(0, 1)
            metrics = {
                "loss": loss.detach(),
                "loss_lnk": loss.detach() / ln_k,
                "teacher_entropy_lnk": entropy / ln_k,
                "teacher_kl_lnk": (loss.detach() - entropy) / ln_k,
                "embedding_std": directions.std(dim=0).mean() * math.sqrt(directions.shape[1]),
                "ema_momentum": torch.tensor(self.momentum(step)),
                "teacher_temperature": torch.tensor(temperature),
            }
        return StepOutput(loss=loss, metrics=metrics)

    def teacher_temperature(self, step: int) -> float:
        """Warms up in training; always final in `eval()`, so that held-out losses of different steps compare."""
        start, end = self.config.teacher_temperature
        if not self.training:
            return end
        warmup_steps = round(self.config.temperature_warmup * self.total_steps)
        return linear_warmup_then_constant(step, start=start, end=end, warmup_steps=warmup_steps)

    def unbiased_centre(self) -> Float32[Tensor, " k"]:
        """The centre without its start-up bias towards 0, as Adam's averages: right from the first update on.

        A centre that lags by tens of steps lets all crops of a short run fall onto the same few prototypes first.
        """
        return self.centre / self.embedding_moments.weight().float().clamp_min(1.0 - self.config.centre_momentum)

    def momentum(self, step: int) -> float:
        """The teacher's EMA momentum at a step."""
        return cosine_momentum(step, base=self.base_momentum, total_steps=self.total_steps)

    @torch.no_grad()
    def after_optimizer_step(self, step: int) -> None:
        """Move the centre by the teacher logits of this step, then the teacher: parameters by EMA, buffers copied."""
        assert self._rows > 0, "after_optimizer_step needs a forward in train() before it"
        rows = torch.tensor(float(self._rows), device=self.centre.device)
        momentum = self.config.centre_momentum
        self.centre = update_centre(self.centre, self._logit_sum, rows, momentum=momentum, gather=self.gather)
        for moments in self.moments:
            moments.update(self.gather)
        self._logit_sum.zero_()
        self._rows = 0
        pairs = ((self.teacher_encoder, self.encoder), (self.teacher_head, self.head))
        teacher = [p for module, _ in pairs for p in module.parameters()]
        student = [p for _, module in pairs for p in module.parameters()]
        ema_update_(teacher, student, self.momentum(step))
        for teacher_module, student_module in pairs:
            for kept, moved in zip(teacher_module.buffers(), student_module.buffers(), strict=True):
                kept.copy_(moved)

    def export_encoder(self) -> nn.Module:
        """The teacher's encoder: an average over steps, and the better one downstream (Caron et al. 2021, fig. 6)."""
        return self.teacher_encoder


class _Head(nn.Module):
    """Three-layer MLP between two standardisations, L2 normalisation, cosine to the prototypes.

    Prototypes are normalised: DINO's weight norm with its gain frozen at 1 (`norm_last_layer`), so that |logit| <= 1.
    """

    def __init__(self, dim: int, config: Dino.Config) -> None:
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(
            nn.Linear(dim, config.head_hidden),
            nn.GELU(),
            nn.Linear(config.head_hidden, config.head_hidden),
            nn.GELU(),
            nn.Linear(config.head_hidden, config.head_bottleneck),
        )
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, config.head_bottleneck))

    def rows(
        self,
        embedding: Float[Tensor, "v b d"],
        moments: tuple[RunningMoments, RunningMoments],
        *,
        collect: bool = False,
    ) -> Float32[Tensor, "v b bottleneck"]:
        """What meets the prototypes; `moments` standardise the MLP's input and output, and count it if `collect`."""
        before, after = moments
        bottleneck = self.mlp(before(embedding))
        if collect:
            before.collect(embedding)
            after.collect(bottleneck)
        return F.normalize(after(bottleneck), dim=-1)

    def directions(self, *, frozen: bool = False) -> Float32[Tensor, "k bottleneck"]:
        """The prototypes, normalised."""
        prototypes = self.prototypes
        if frozen:
            # A zero gradient, not none: distributed training waits for every parameter's gradient.
            prototypes = prototypes.detach() + 0.0 * prototypes
        return F.normalize(prototypes.float(), dim=-1)

    def forward(
        self, embedding: Float[Tensor, "v b d"], moments: tuple[RunningMoments, RunningMoments]
    ) -> Float32[Tensor, "v b k"]:
        """All logits at once, which the loss does without."""
        rows = self.rows(embedding, moments)
        # fp32: at temperature 0.04 rounding logits to bf16 moves probabilities by 2 %.
        with torch.autocast(embedding.device.type, enabled=False):
            return F.linear(rows, self.directions())


def _encode(encoder: nn.Module, views: tuple[View, ...]) -> Float[Tensor, "v b d"]:
    """Embeddings of views in their order; views of one size share a forward."""
    sizes: dict[torch.Size, list[int]] = {}
    for index, view in enumerate(views):
        sizes.setdefault(view.image.shape, []).append(index)
    embeddings: list[Tensor] = [torch.empty(0)] * len(views)
    for indices in sizes.values():
        features = encoder(torch.cat([views[i].image for i in indices]))
        for i, embedding in zip(indices, features.embedding().chunk(len(indices)), strict=True):
            embeddings[i] = embedding
    return torch.stack(embeddings)
