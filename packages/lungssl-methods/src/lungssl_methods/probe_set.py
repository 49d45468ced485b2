"""Fixed held-out views, and what an encoder's features of them say while it trains; nothing here is trained.

One pooled embedding per view gives the spectrum, paired retrieval and the phase probe; tokens give the drift of their
similarities and the error of a landmark that is looked up in the other phase.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lungssl_backbones.encoder import Encoder, Features
from lungssl_backbones.representation import (
    effective_rank,
    off_diagonal_cosine,
    paired_retrieval,
    phase_auc,
    rankme,
)
from lungssl_data.batch import PairBatch, View
from torch import Tensor, nn

from lungssl_methods.correspondence import features_at, pairs_of_slots, sample_matches, token_centres_mm, token_mean
from lungssl_methods.method import checked_encoder
from lungssl_methods.regularisers import gram
from lungssl_methods.variance import direction_spread

LANDMARKS = 64
"""Points looked up per pair of views: the median's standard error is then a sixth of their spread."""


class ProbeSet:
    """Batches of plain global views, and the tokens that the encoder gave for them when the set was made."""

    def __init__(self, batches: Sequence[PairBatch], encoder: nn.Module) -> None:
        """`encoder` as it is before the first step. Raises ValueError without batches and for a module that is no
        Encoder."""
        if not batches:
            raise ValueError("ProbeSet needs at least one batch of held-out views, got none")
        self.batches = tuple(batches)
        with torch.no_grad():
            self._first = [one.tokens.float() for batch in self.batches for one in _encode(encoder, batch)]

    def figures(self, encoder: nn.Module) -> dict[str, float]:
        """What `encoder` makes of the set; it is put into `eval()` for the time of the call. NaN where features are.

        `effective_rank`, `rankme`, `embedding_std` and `off_diagonal_cosine` of the embeddings of all views;
        `patch_gram_drift`: root mean square change of the tokens' cosine similarities since the set was made.
        With two patients and more, each by its first sample: `retrieval_top1` and `retrieval_mrr` of slot 1 by slot 0;
        with both phases of them also `phase_auc`. `landmark_mm` and its floor `landmark_floor_mm`, where the views say
        what corresponds: medians over points in the lung, see `landmark_errors_mm`.
        """
        with torch.no_grad():
            encoded = [_encode(encoder, batch) for batch in self.batches]
        flat = [one for views in encoded for one in views]
        embeddings = torch.cat([one.embedding().float() for one in flat])
        if not all(bool(one.tokens.isfinite().all()) for one in flat) or not bool(embeddings.isfinite().all()):
            return dict.fromkeys(("effective_rank", "rankme", "embedding_std", "off_diagonal_cosine"), float("nan"))
        figures = {
            "effective_rank": effective_rank(embeddings),
            "rankme": rankme(embeddings),
            "embedding_std": float(direction_spread(embeddings.double())),
            "off_diagonal_cosine": off_diagonal_cosine(embeddings),
        }
        drift = [gram(one.tokens, first) for one, first in zip(flat, self._first, strict=True)]
        figures["patch_gram_drift"] = float(torch.stack(drift).mean().sqrt())
        figures |= self._of_patients(encoded)
        return figures | self._of_landmarks(encoded, checked_encoder(encoder).token_stride_vox)

    def _of_patients(self, encoded: Sequence[Sequence[Features]]) -> dict[str, float]:
        first: dict[int, tuple[Tensor, Tensor, bool]] = {}  # patient -> slot 0, slot 1, of two phases
        for batch, views in zip(self.batches, encoded, strict=True):
            of_slot = {
                view.slot: one.embedding().float().cpu() for view, one in zip(batch.global_views(), views, strict=True)
            }
            for row, (patient, paired) in enumerate(zip(batch.patient.tolist(), batch.paired().tolist(), strict=True)):
                first.setdefault(patient, (of_slot[0][row], of_slot[1][row], paired))
        if len(first) < 2:
            return {}
        one, other = (torch.stack(side) for side in zip(*((a, b) for a, b, _ in first.values()), strict=True))
        found = paired_retrieval(one, other)
        figures = {"retrieval_top1": found.top1, "retrieval_mrr": found.mrr}
        if all(paired for _, _, paired in first.values()):
            number = torch.arange(len(first)).repeat(2)
            figures["phase_auc"] = phase_auc(
                torch.cat([one, other]), torch.arange(2 * len(first)) >= len(first), number
            )
        return figures

    def _of_landmarks(self, encoded: Sequence[Sequence[Features]], stride_vox: int) -> dict[str, float]:
        found: list[tuple[Tensor, Tensor]] = []
        for batch, views in zip(self.batches, encoded, strict=True):
            features = dict(zip(map(id, batch.global_views()), views, strict=True))
            for first, second in pairs_of_slots(batch):
                if first.partner_mm is not None:
                    pair = features[id(first)], features[id(second)]
                    found.append(landmark_errors_mm(first, second, *pair, stride_vox))
        errors, floor = (torch.cat([pair[i] for pair in found]) if found else torch.empty(0) for i in (0, 1))
        if not len(errors):
            return {}
        return {"landmark_mm": float(errors.median()), "landmark_floor_mm": float(floor.median())}


def landmark_errors_mm(
    first: View, second: View, of_first: Features, of_second: Features, stride_vox: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """How far from the truth points of `first` are found in `second`, and the least that its tokens allow, in mm.

    At most LANDMARKS random points in the lung per sample, the same at every call. Each is looked up by the cosine of
    its feature, interpolated between tokens, among the tokens of `second` that hold lung.
    """
    matches = sample_matches(first, second, LANDMARKS, generator=torch.Generator().manual_seed(0))
    one = of_first.tokens.float().mT.unflatten(2, of_first.grid)
    query = F.normalize(features_at(one, matches.first_vox, stride_vox), dim=-1)
    centres = token_centres_mm(second, stride_vox)
    usable = (token_mean(second.lung[:, None].float(), stride_vox)[..., 0] > 0) & ~centres.isnan().any(dim=-1)
    scores = query @ F.normalize(of_second.tokens.float(), dim=-1).mT
    best = scores.masked_fill(~usable[:, None], -torch.inf).argmax(dim=2)
    centres = centres.nan_to_num(0.0)
    found = centres.gather(1, best[..., None].expand(-1, -1, 3))
    away = torch.cdist(matches.second_mm.nan_to_num(0.0), centres).masked_fill(~usable[:, None], torch.inf)
    valid = matches.valid & usable.any(dim=1, keepdim=True)
    errors = torch.linalg.vector_norm(found - matches.second_mm, dim=-1)
    return errors[valid].cpu(), away.amin(dim=2)[valid].cpu()


def _encode(encoder: nn.Module, batch: PairBatch) -> list[Features]:
    """Features of each global view, in `eval()`."""
    checked: Encoder = checked_encoder(encoder)
    was_training = encoder.training
    encoder.eval()
    try:
        return [checked(view.image) for view in batch.global_views()]
    finally:
        encoder.train(was_training)
