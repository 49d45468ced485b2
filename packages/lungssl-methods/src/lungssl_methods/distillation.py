"""Student and teacher heads onto prototypes, the teacher's targets, and the cross-entropy between the two.

One for the crops' summaries (DINO), another for their tokens (iBOT, and tokens of the other phase): see `dino.py`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32
from lungssl_ops.prototype_ce import centering_bias, mean_logits, prototype_cross_entropy, sinkhorn_bias
from torch import Tensor, nn

from lungssl_methods.choices import check_choices
from lungssl_methods.losses import update_centre
from lungssl_methods.method import Gather, mean_over_ranks
from lungssl_methods.moments import RunningMoments
from lungssl_methods.teacher import slow_copy

Centering = Literal["ema", "sinkhorn"]


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Sizes of the heads and how targets are kept from collapsing."""

    prototypes: int
    hidden: int
    bottleneck: int
    centering: Centering
    centre_momentum: float

    def __post_init__(self) -> None:
        """Raises ValueError for a momentum with which centre and moments would never move, or run away, and for an
        unknown centring."""
        check_choices("distillation", self)
        if not 0 <= self.centre_momentum < 1:
            raise ValueError(
                f"centre_momentum must be at least 0 and below 1, got {self.centre_momentum}; DINO has 0.9"
            )


class PrototypeHead(nn.Module):
    """Three-layer MLP between two standardisations, L2 normalisation, cosine to the prototypes.

    Prototypes are normalised: DINO's weight norm with its gain frozen at 1 (`norm_last_layer`), so that |logit| <= 1.
    """

    def __init__(self, dim: int, *, prototypes: int, hidden: int, bottleneck: int) -> None:
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def rows(
        self,
        embedding: Float[Tensor, "v b d"],
        moments: tuple[RunningMoments, RunningMoments],
        *,
        collect: Bool[Tensor, "v b"] | None = None,
    ) -> Float32[Tensor, "v b bottleneck"]:
        """What meets the prototypes; `moments` standardise the MLP's input and output, and count the rows `collect`."""
        before, after = moments
        bottleneck = self.mlp(before(embedding))
        if collect is not None:
            before.collect(embedding, collect)
            after.collect(bottleneck, collect)
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


class Distillation(nn.Module):
    """A pair of heads, the moments that standardise both, and the centre of the teacher's logits.

    `centering`: "ema" subtracts the average of the teacher's logits over steps (Caron et al. 2021); "sinkhorn" shares
    the rows of this forward out evenly over the prototypes (Caron et al. 2020, https://arxiv.org/abs/2006.09882),
    which needs many rows at a time.
    """

    centre: Float32[Tensor, " k"]
    _logit_sum: Float32[Tensor, " k"]
    _rows: Float32[Tensor, ""]

    def __init__(self, dim: int, config: DistillationConfig, gather: Gather) -> None:
        super().__init__()
        self.config = config
        self.gather = gather
        self.student = PrototypeHead(
            dim, prototypes=config.prototypes, hidden=config.hidden, bottleneck=config.bottleneck
        )
        self.teacher = slow_copy(self.student)
        self.embedding_moments = RunningMoments(dim, config.centre_momentum)
        self.bottleneck_moments = RunningMoments(config.bottleneck, config.centre_momentum)
        self.register_buffer("centre", torch.zeros(config.prototypes))
        # Teacher logits summed since the last optimizer step, and their rows: none whenever a checkpoint is taken.
        self.register_buffer("_logit_sum", torch.zeros(config.prototypes), persistent=False)
        self.register_buffer("_rows", torch.zeros(()), persistent=False)

    def train(self, mode: bool = True) -> "Distillation":
        """The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    @property
    def moments(self) -> tuple[RunningMoments, RunningMoments]:
        """What standardises the input and the output of both heads' MLPs."""
        return self.embedding_moments, self.bottleneck_moments

    def forward(
        self,
        student: Float[Tensor, "s b d"],
        teacher: Float[Tensor, "t b d"],
        weight: Float[Tensor, "s t"] | Float[Tensor, "s t b"],
        *,
        student_temperature: float,
        teacher_temperature: float,
        frozen: bool = False,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "t b"]]:
        """Weighted mean cross-entropy of embeddings, and the teacher's entropy of each row, in nats.

        Teacher's rows in no pair of any weight say nothing of a scan: they are kept out of Sinkhorn's shares and, in
        `train()`, of what the next `update` counts. Without a pair the loss is 0, with a gradient of 0. On several
        ranks, in `train()`, the ranks' mean of it is the mean over all pairs. `frozen` prototypes get a gradient of 0.
        """
        if weight.ndim == 2:
            weight = weight[:, :, None].expand(-1, -1, student.shape[1])
        counted, own = (weight > 0).any(dim=0), weight.sum()
        rows = self.student.rows(student, self.moments)
        directions = self.student.directions(frozen=frozen)
        with torch.no_grad():
            targets = self.teacher.rows(teacher, self.moments, collect=counted if self.training else None)
            prototypes = self.teacher.directions()
            bias = self._bias(targets, counted, prototypes, teacher_temperature)
            if self.training:
                self._logit_sum += counted.numel() * mean_logits(targets * counted[..., None], prototypes)
                self._rows += counted.sum()
        # Where all weights are 0 their mean would be NaN, and so would 0 times it.
        some = torch.where(own > 0, weight, torch.ones_like(weight))
        loss, entropy = prototype_cross_entropy(
            rows,
            targets,
            directions,
            prototypes,
            some,
            bias=bias,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
        )
        whole = mean_over_ranks(own, self.gather) if self.training else own
        tiny = torch.finfo(own.dtype).tiny
        return loss * (own / whole.clamp_min(tiny)), entropy

    @torch.no_grad()
    def prototypes_used(
        self, teacher: Float[Tensor, "t b d"], counted: Bool[Tensor, "t b"], temperature: float
    ) -> Float32[Tensor, ""]:
        """exp of the entropy of the mean target over the rows `counted`: 1 where one prototype takes all of them.

        It makes all targets at once, so it is for held-out batches.
        """
        rows, prototypes = self.teacher.rows(teacher, self.moments), self.teacher.directions()
        bias = self._bias(rows, counted, prototypes, temperature)
        targets = (rows.float() @ prototypes.T / temperature + bias).softmax(dim=-1) * counted[..., None]
        return torch.special.entr(targets.sum(dim=(0, 1)) / counted.sum().clamp_min(1)).sum().exp()

    def unbiased_centre(self) -> Float32[Tensor, " k"]:
        """The centre without its start-up bias towards 0, as Adam's averages: right from the first update on.

        A centre that lags by tens of steps lets all crops of a short run fall onto the same few prototypes first.
        """
        return self.centre / self.embedding_moments.weight().float().clamp_min(1.0 - self.config.centre_momentum)

    @torch.no_grad()
    def update(self) -> None:
        """Once per optimizer step: move centre and moments by the teacher's rows since the last one, of all ranks.

        Without a row they stay.
        """
        momentum = self.config.centre_momentum
        self.centre = update_centre(self.centre, self._logit_sum, self._rows, momentum=momentum, gather=self.gather)
        for moments in self.moments:
            moments.update(self.gather)
        self.forget()

    def forget(self) -> None:
        """Drop what was counted since the last update."""
        for moments in self.moments:
            moments.forget()
        self._logit_sum.zero_()
        self._rows.zero_()

    def _bias(
        self,
        rows: Float[Tensor, "t b d"],
        counted: Bool[Tensor, "t b"],
        prototypes: Float[Tensor, "k d"],
        temperature: float,
    ) -> Float[Tensor, " k"]:
        if self.config.centering == "ema":
            return centering_bias(self.unbiased_centre(), temperature)
        over_ranks = self._logsumexp_over_ranks
        return sinkhorn_bias(rows[counted], prototypes, temperature=temperature, over_ranks=over_ranks)

    def _logsumexp_over_ranks(self, value: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """By one sum: cosines over a temperature are far from overflow in float64. 0 where no rank has a row."""
        total = self.gather.sum(value.double().exp())
        return torch.where(total > 0, total, 1.0).log().to(value.dtype)
