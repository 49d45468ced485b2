"""VICReg and Barlow Twins over paired scans: two global views agree, and the batch's statistics forbid collapse.

Sources: Bardes et al. 2022, https://arxiv.org/abs/2105.04906; Zbontar et al. 2021, https://arxiv.org/abs/2103.03230.
Differs from them: which views are compared is a policy over slots (see `pairing`), and the expander is narrower: theirs
of 8192 is for batches of 2048. Statistics are those of one forward on all ranks; accumulation would add no samples to
them. Without negatives, other scans of a patient need no exception.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from lungssl_data.batch import PairBatch, StepOutput
from torch import Tensor, nn

from lungssl_methods.auto import BaseRate
from lungssl_methods.choices import check_choices
from lungssl_methods.dino import summaries
from lungssl_methods.method import Gather, LocalGather, ViewCounts, checked_encoder
from lungssl_methods.pairing import PairPolicy, policy_weights
from lungssl_methods.projector import Projector
from lungssl_methods.simclr import check_global_pairs, global_pairs
from lungssl_methods.variance import barlow_twins, direction_spread, vicreg_terms


class VicReg(nn.Module):
    """Agreement of whole crops without negatives."""

    typical_views = ViewCounts(globals_per_slot=1, locals_per_slot=0)
    base_rate = BaseRate(lr=1e-3, batch=256, source="as dino, ssl.md B.1; VICReg's own is for LARS")
    needs_correspondences = False
    may_collapse = True
    batch_separable = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """What is compared, and what holds against collapse."""

        pairs: PairPolicy = "all"
        """Which global views are compared: "all", "cross" (different slots), "within" (same slot), or the weights of
        (cross, within) pairs."""
        objective: Literal["vicreg", "barlow_twins"] = "vicreg"
        """Which of the two losses."""
        invariance_weight: float = 25.0
        """Weight of VICReg's mean squared difference (its)."""
        variance_weight: float = 25.0
        """Weight of its hinge on standard deviations below 1 (its)."""
        covariance_weight: float = 1.0
        """Weight of its squared covariances (its)."""
        redundancy_weight: float = 5e-3
        """Weight of Barlow Twins' off-diagonal terms (its)."""
        expander: tuple[int, ...] = (2048, 2048, 2048)
        """Widths of the expander, hidden ones then the output's; 8192 in both sources."""

        def build(
            self, encoder: nn.Module, *, total_steps: int, effective_batch: int = 32, gather: Gather | None = None
        ) -> "VicReg":
            """A VICReg around `encoder`. It has no schedule. Statistics are those of all ranks."""
            return VicReg(self, encoder, gather or LocalGather())

    def __init__(self, config: Config, encoder: nn.Module, gather: Gather) -> None:
        """Raises ValueError for a module that is no Encoder, an impossible pair policy, or an unknown objective."""
        super().__init__()
        check_choices("vicreg", config)
        policy_weights(config.pairs)
        self.config = config
        self.gather = gather
        self.projector = Projector(checked_encoder(encoder).dim, config.expander)
        self.encoder = encoder

    def check_views(self, *, globals_per_slot: int, locals_per_slot: int) -> None:
        """Raises ValueError where the policy finds no pair of global views, and with local ones."""
        check_global_pairs("vicreg", self.config.pairs, globals_per_slot, locals_per_slot)

    def forward(self, batch: PairBatch, step: int) -> StepOutput:
        """The loss; with VICReg its terms unweighted; `embedding_std`, the spread of the encoder's embeddings: 1 all
        over the sphere, 0 collapsed. `step` changes nothing.

        Pairs in which fewer than two samples were measured at all add nothing. Raises ValueError for a batch of one.
        """
        samples = len(self.gather.rows(batch.patient))
        if samples < 2:
            raise ValueError(
                f"vicreg needs at least 2 samples in each forward for its statistics, got {samples}; "
                f"raise the batch, and drop a last batch that is smaller"
            )
        embeddings = summaries(self.encoder, batch.global_views())
        # Before the projector, whose norms then see the rows of all ranks.
        projected = self.projector(self.gather.rows(embeddings.transpose(0, 1)).transpose(0, 1))
        # A start of 0 that hangs on the graph: where no pair counts, every parameter still gets a gradient.
        loss, terms, total = 0.0 * projected.sum(), {}, 0.0
        for i, j, weight, measured in global_pairs(batch, self.config.pairs):
            valid = self.gather.rows(measured)
            total += weight
            if valid.sum() < 2:
                continue
            one, parts = self._pair_loss(projected[i][valid], projected[j][valid])
            loss = loss + weight * one
            for name, part in parts.items():
                terms[name] = terms.get(name, 0.0) + weight * part.detach()
        loss = loss / total
        metrics = {"loss": loss.detach(), "embedding_std": direction_spread(embeddings)}
        return StepOutput(loss=loss, metrics=metrics | {name: term / total for name, term in terms.items()})

    def after_optimizer_step(self, step: int) -> None:
        """Nothing moves between steps."""

    def export_encoder(self) -> nn.Module:
        """The trained encoder."""
        return self.encoder

    def _pair_loss(
        self, first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        config = self.config
        if config.objective == "barlow_twins":
            return barlow_twins(first, second, redundancy_weight=config.redundancy_weight), {}
        invariance, variance, covariance = vicreg_terms(first, second)
        loss = (
            config.invariance_weight * invariance
            + config.variance_weight * variance
            + config.covariance_weight * covariance
        )
        return loss, {"invariance": invariance, "variance": variance, "covariance": covariance}
