"""SimCLR over paired scans: two global views of a patient are told from all views of other patients.

Source: Chen et al. 2020, https://arxiv.org/abs/2002.05709. Differs from it: which views are positives is a policy over
slots (see `pairing`); no view of the same patient is ever a negative. Negatives are those of one forward on all ranks:
further ranks add some, gradient accumulation adds none, so the samples of one forward set how hard the task is.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from lungssl_data.batch import PairBatch, StepOutput
from torch import Tensor, nn

from lungssl_methods.auto import BaseRate
from lungssl_methods.choices import check_choices
from lungssl_methods.contrast import chance_nats, nt_xent
from lungssl_methods.dino import summaries
from lungssl_methods.method import Gather, LocalGather, ViewCounts, checked_encoder
from lungssl_methods.pairing import PairPolicy, measured_views, policy_weights, slot_pair_weight
from lungssl_methods.projector import Projector
from lungssl_methods.variance import direction_spread


class SimClr(nn.Module):
    """Contrast of whole crops."""

    typical_views = ViewCounts(globals_per_slot=1, locals_per_slot=0)
    base_rate = BaseRate(lr=1e-3, batch=256, source="as dino, ssl.md B.1; SimCLR's own is for LARS")
    needs_correspondences = False
    may_collapse = True
    batch_separable = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """What is a positive, and how hard the contrast is."""

        pairs: PairPolicy = "all"
        """Which global views are positives: "all", "cross" (different slots), "within" (same slot), or the weights of
        (cross, within) pairs."""
        temperature: float = 0.5
        """Divides cosines: SimCLR's for small batches, and nnssl's in 3-D (`ssl.md` B.3)."""
        hidden: int = 2048
        """Width of the projector's hidden layer (SimCLR's)."""
        out: int = 128
        """Width of its output (SimCLR's)."""

        def build(
            self, encoder: nn.Module, *, total_steps: int, effective_batch: int = 32, gather: Gather | None = None
        ) -> "SimClr":
            """A SimCLR around `encoder`. It has no schedule. Negatives are the patients of all ranks.

            Raises ValueError for a batch of one sample, which has no negatives.
            """
            if effective_batch < 2:
                raise ValueError(
                    f"simclr's negatives are the batch's other patients, got effective_batch={effective_batch}; "
                    f"take at least 2, or a method without negatives (dino)"
                )
            return SimClr(self, encoder, gather or LocalGather())

    def __init__(self, config: Config, encoder: nn.Module, gather: Gather) -> None:
        """Raises ValueError for a module that is no Encoder or an impossible pair policy."""
        super().__init__()
        check_choices("simclr", config)
        policy_weights(config.pairs)
        self.config = config
        self.gather = gather
        self.projector = Projector(checked_encoder(encoder).dim, (config.hidden, config.out))
        self.encoder = encoder

    def check_views(self, *, globals_per_slot: int, locals_per_slot: int) -> None:
        """Raises ValueError where the policy finds no pair of global views, and with local ones."""
        check_global_pairs("simclr", self.config.pairs, globals_per_slot, locals_per_slot)

    def forward(self, batch: PairBatch, step: int) -> StepOutput:
        """Loss in nats; `loss_lnk` is 1 where all crops look alike, K being the views that a view is told from.

        `negatives` is their number: a batch of one patient has none, and then a loss of 0. `embedding_std` is the
        spread of the encoder's embeddings: 1 all over the sphere, 0 collapsed. `step` changes nothing.
        """
        embeddings = summaries(self.encoder, batch.global_views())
        # Before the projector, whose norms then see the rows of all ranks.
        projected = self.projector(self.gather.rows(embeddings.transpose(0, 1)).transpose(0, 1))
        patient = self.gather.rows(batch.patient)
        stranger = patient[:, None] != patient[None]
        losses, chances, negatives, weights = [], [], [], []
        for i, j, weight, measured in global_pairs(batch, self.config.pairs):
            valid = self.gather.rows(measured)
            losses.append(nt_xent(projected[i], projected[j], patient, self.config.temperature, valid=valid))
            chances.append(chance_nats(stranger, valid))
            negatives.append(2.0 * (stranger & valid).sum(dim=1).float().mean())
            weights.append(weight)
        share = torch.tensor(weights, device=patient.device) / sum(weights)
        loss = (torch.stack(losses) * share).sum()
        metrics = {
            "loss": loss.detach(),
            "loss_lnk": loss.detach() / (torch.stack(chances) * share).sum().clamp_min(1e-6),
            "negatives": (torch.stack(negatives) * share).sum(),
            "embedding_std": direction_spread(embeddings),
        }
        return StepOutput(loss=loss, metrics=metrics)

    def after_optimizer_step(self, step: int) -> None:
        """Nothing moves between steps."""

    def export_encoder(self) -> nn.Module:
        """The trained encoder."""
        return self.encoder


def check_global_pairs(method: str, policy: PairPolicy, globals_per_slot: int, locals_per_slot: int) -> None:
    """Raises ValueError where `policy` finds no pair among so many global views, and with local ones."""
    if globals_per_slot < 1 or locals_per_slot > 0:
        raise ValueError(
            f"{method} compares global views and uses no local ones, got globals_per_slot={globals_per_slot} and "
            f"locals_per_slot={locals_per_slot}; set globals_per_slot to at least 1 and locals_per_slot to 0"
        )
    if policy_weights(policy)[0] == 0 and globals_per_slot < 2:
        raise ValueError(
            f"{method} with pairs={policy!r} compares two global views of each slot, got globals_per_slot="
            f"{globals_per_slot}; set it to 2, or pairs to 'cross'"
        )


def global_pairs(batch: PairBatch, policy: PairPolicy) -> list[tuple[int, int, float, Bool[Tensor, " b"]]]:
    """Pairs of global views that the policy wants: their indices, their weight, and where both were measured at all.

    Raises ValueError where the views leave the policy no pair.
    """
    views = batch.global_views()
    slots = [int(view.slot) for view in views]
    weight = slot_pair_weight(slots, slots, policy)
    measured = measured_views(views)
    return [
        (i, j, weight[i, j].item(), measured[i] & measured[j])
        for i in range(len(views))
        for j in range(i + 1, len(views))
        if weight[i, j] > 0
    ]
