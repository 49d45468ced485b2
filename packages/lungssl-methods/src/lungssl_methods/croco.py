"""Cross-phase completion: rebuild the hidden nine tenths of one phase from what is left of it and the whole other one.

Source: CroCo, Weinzaepfel et al. 2022, https://arxiv.org/abs/2210.10716; `ssl.md` C2. What can't be guessed from a
tenth of the exhale scan is copied from the inhale scan, from the right place: so the decoder's cross-attention becomes
a registration without any deformation loss, and its distance from the true place, attention-TRE in mm, is reported.
Differs from it: 3-D; both directions in every step; positions are those of the lungs, not of the crop; lung counts
fully and the rest a tenth, because ribs and table are copied without moving anything. Four predictors that learn
nothing are reported beside it. Where both slots are crops of one scan, it is CropMAE-like completion of that scan.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from lungssl_data.batch import PairBatch, StepOutput, View
from lungssl_ops.patches import patchify
from torch import Tensor, nn

from lungssl_methods.auto import BaseRate
from lungssl_methods.choices import check_choices
from lungssl_methods.completion_baselines import COPIES, Copy, attention_tre_mm, copied, places_mm
from lungssl_methods.correspondence import (
    check_correspondences,
    pairs_of_slots,
    places_in,
    token_centres_mm,
    token_mean,
)
from lungssl_methods.cross_decoder import CrossDecoder
from lungssl_methods.hidden_views import (
    VisibleTokens,
    check_global_views_only,
    drawn_masks,
    hidden_weight,
    lung_weight,
    stacked_images,
)
from lungssl_methods.losses import mae_loss, ratio_to_still
from lungssl_methods.masking import MASK_WIDTH_VOX
from lungssl_methods.method import Gather, LocalGather, ViewCounts, checked_encoder, rank_part

_OCTAVES = (-2.0, 1.0)
"""Frequencies of a position, as powers of 2, in half periods per spread of the lungs: from one over which no two places
of the lungs are alike, to two tokens of 20 mm. Of five ranges tried on phantoms of 5 mm, attention starts nearest to
the true place with it: 12.7 mm, where 0 to 4 gave 59 (decision 0006)."""


class Croco(nn.Module):
    """Completes each slot's global views with the other slot's. In `eval()` the masks are always the same."""

    typical_views = ViewCounts(globals_per_slot=1, locals_per_slot=0)
    needs_correspondences = False
    may_collapse = False
    batch_separable = True
    base_rate = BaseRate(lr=3e-4, source="ssl.md B.2")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """What is hidden, how it is rebuilt and what counts."""

        mask_ratio: float = 0.9
        """Share of blocks hidden in the view that is completed (CroCo's): with less, the other scan isn't needed."""
        mask_unit_tokens: int | None = None
        """Side of a hidden block in tokens. None: as many as make 16 voxels, at least 1."""
        directions: Literal["both", "exhale", "inhale"] = "both"
        """Which slot's views are completed: both, or only slot 0's or slot 1's."""
        decoder_width: int = 384
        """Decoder embedding; a multiple of `decoder_heads` (CroCo: 512 for images of 224)."""
        decoder_depth: int = 4
        """Decoder blocks, each with self- and cross-attention (CroCo: 8)."""
        decoder_heads: int = 6
        """Attention heads of each."""
        norm: Literal["patch", "none"] = "patch"
        """Targets of zero mean and unit variance per patch, or plain network input, in which density shows."""
        variance_floor: float = (20 / 1400) ** 2
        """Least variance that a target is divided by: (20 HU)^2 of a 1400 HU window, about CT noise."""
        outside_lung_weight: float = 0.1
        """Weight of measured voxels outside the lung, where inside is 1 (`ssl.md` C2)."""

        def build(
            self, encoder: nn.Module, *, total_steps: int, effective_batch: int = 32, gather: Gather | None = None
        ) -> "Croco":
            """A completion around `encoder`. It has no schedule."""
            return Croco(self, encoder, gather or LocalGather())

    def __init__(self, config: Config, encoder: nn.Module, gather: Gather) -> None:
        """Raises ValueError for a module that is no Encoder, and for unknown directions or an unknown norm."""
        super().__init__()
        check_choices("croco", config)
        checked = checked_encoder(encoder)
        self.config = config
        self.gather = gather
        self.encoder = encoder
        self.patch_vox = checked.token_stride_vox
        unit = config.mask_unit_tokens
        self.unit_tokens = max(1, MASK_WIDTH_VOX // self.patch_vox) if unit is None else unit
        width = config.decoder_width
        self.visible = VisibleTokens(checked, width)
        self.embed_memory = nn.Linear(checked.dim, width)
        self.decoder = CrossDecoder(width, depth=config.decoder_depth, heads=config.decoder_heads)
        self.predict = nn.Linear(width, self.patch_vox**3)
        nn.init.zeros_(self.predict.weight)  # start at predicting 0, as mae does
        nn.init.zeros_(self.predict.bias)

    def check_views(self, *, globals_per_slot: int, locals_per_slot: int) -> None:
        """Raises ValueError without global views, and with local ones, which would be made for nothing."""
        check_global_views_only("croco", globals_per_slot, locals_per_slot)

    def forward(self, batch: PairBatch, step: int) -> StepOutput:
        """Loss over hidden voxels; `loss_vs_zero` is its ratio to that of predicting 0, 1 where nothing is learned.

        In `eval()` also, for slot 0: `loss_vs_identity`, `_affine`, `_warp` and `_density`, its ratio to that of copies
        of slot 1 (below 1 is better; normalised per patch as the targets are) on the voxels that the copy knows,
        `loss_vs_scaled_identity` and so on, to that of the copy times the factor that suits this batch best, which a
        copy of much that differs needs (0 is predicting nothing); and
        `attention_tre_mm`, of the head that looks nearest (one is enough to copy from the right place; it is chosen on
        this very batch, see `head_tre_mm`), and `attention_tre_mean_mm`, of the last block's mean attention, beside
        `identity_tre_mm` and `affine_tre_mm`: medians over lung tokens whose place is known.
        Figures that nothing is known of are left out. `step` changes nothing.

        Raises ValueError where the views differ in size, or their tokens don't split into blocks to hide.
        """
        pairs = pairs_of_slots(batch)
        image, weight, mask, tokens, memory = self._hidden_and_encoded(batch, pairs)
        predicted = self.predict(self.decoder(tokens, memory))
        loss = self._loss(predicted, image, mask, weight)
        part = rank_part(loss, hidden_weight(weight, mask, self.patch_vox), self.gather)
        with torch.no_grad():
            metrics = {
                "loss": part.detach(),
                "loss_vs_zero": ratio_to_still(loss, self._loss(torch.zeros_like(predicted), image, mask, weight)),
                "masked_share": mask.float().mean(),
            }
            if not self.training and self.config.directions != "inhale":
                rows = sum(len(first.image) for first, _ in pairs)
                metrics |= self._against_copies(batch, pairs, predicted[:rows], mask[:rows])
                metrics |= self._tre(batch, pairs, tokens[:rows], memory[:rows])
        return StepOutput(loss=part, metrics=metrics)

    @torch.no_grad()
    def head_tre_mm(self, batch: PairBatch) -> Float[Tensor, "blocks heads"]:
        """Attention-TRE of each head of each block, mm: medians over slot 0's lung tokens whose place is known.

        `attention_tre_mm` is the least of them, so chosen by the answer; for a figure without that, fix the head on
        some patients and read it off here for others. NaN where no place is known. In `eval()` the masks are those of
        `forward`.

        Raises ValueError for crops read without correspondences, and where only slot 1 is completed.
        """
        check_correspondences(batch, "croco's head_tre_mm")
        if self.config.directions == "inhale":
            raise ValueError(
                "head_tre_mm is of slot 0's tokens, which directions='inhale' doesn't complete; take 'both' or 'exhale'"
            )
        pairs = pairs_of_slots(batch)
        *_, tokens, memory = self._hidden_and_encoded(batch, pairs)
        rows = sum(len(first.image) for first, _ in pairs)
        places = self._true_and_looked_mm(pairs)
        return _each_head_tre_mm(self.decoder.attention(tokens[:rows], memory[:rows]), *places)

    def after_optimizer_step(self, step: int) -> None:
        """Nothing moves between steps."""

    def export_encoder(self) -> nn.Module:
        """The trained encoder."""
        return self.encoder

    def _hidden_and_encoded(
        self, batch: PairBatch, pairs: list[tuple[View, View]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Images to complete, their voxels' weights, what of them is hidden, and both sides' tokens."""
        targets, references = self._sides(pairs)
        image = stacked_images((*targets, *references), "croco").chunk(2)[0]
        host_mask = drawn_masks(
            image,
            self.patch_vox,
            views=len(targets),
            ratio=self.config.mask_ratio,
            unit=self.unit_tokens,
            training=self.training,
            gather=self.gather,
        )
        tokens, memory = self._tokens(batch, targets, references, host_mask)
        return image, self._weight(targets), host_mask.to(image.device), tokens, memory

    def _sides(self, pairs: list[tuple[View, View]]) -> tuple[list[View], list[View]]:
        """Views to complete, slot 0's first, and what each is completed from."""
        firsts, seconds = ([pair[slot] for pair in pairs] for slot in (0, 1))
        return {
            "both": (firsts + seconds, seconds + firsts),
            "exhale": (firsts, seconds),
            "inhale": (seconds, firsts),
        }[self.config.directions]

    def _tokens(
        self, batch: PairBatch, targets: list[View], references: list[View], host_mask: Bool[Tensor, "r n"]
    ) -> tuple[Float[Tensor, "r n w"], Float[Tensor, "r n w"]]:
        """What the decoder is given: the targets' tokens, hidden ones replaced, and the references' whole ones."""
        here, there = zip(
            *(self._positions(batch, a, b) for a, b in zip(targets, references, strict=True)), strict=True
        )
        whole, image = (torch.cat([view.image for view in views]) for views in (references, targets))
        memory = self.embed_memory(self.encoder(whole).tokens) + torch.cat(there)
        return self.visible(self.encoder, image, host_mask) + torch.cat(here), memory

    def _positions(self, batch: PairBatch, one: View, other: View) -> tuple[Tensor, Tensor]:
        """Encoded places of both views' tokens, in units of the lungs' spread around their centre, in slot 1's scan."""
        places = [token_mean(self._in_slot_1(batch, view), self.patch_vox) for view in (one, other)]
        lungs = [token_mean(view.lung[:, None].float(), self.patch_vox) + 1e-3 for view in (one, other)]
        place, lung = torch.cat(places, dim=1), torch.cat(lungs, dim=1)
        lung = lung / lung.sum(dim=1, keepdim=True)
        centre = (place * lung).sum(dim=1, keepdim=True)
        spread = ((place - centre).square() * lung).sum(dim=1, keepdim=True).mean(dim=2, keepdim=True).sqrt()
        width = self.config.decoder_width
        first, second = (encoded_positions((p - centre) / spread.clamp_min(1.0), width) for p in places)
        return first, second

    def _in_slot_1(self, batch: PairBatch, view: View) -> Float[Tensor, "b 3 z y x"]:
        return view.coords_mm if view.slot == 1 else places_mm(batch, view, "affine")

    def _weight(self, views: list[View]) -> Float[Tensor, "r z y x"]:
        return lung_weight(views, self.config.outside_lung_weight)

    def _loss(
        self,
        predicted: Float[Tensor, "r n p"],
        image: Float[Tensor, "r 1 z y x"],
        mask: Bool[Tensor, "r n"],
        weight: Float[Tensor, "r z y x"],
    ) -> Float[Tensor, ""]:
        floor = self.config.variance_floor
        return mae_loss(
            predicted, image, mask, weight, patch_vox=self.patch_vox, norm=self.config.norm, variance_floor=floor
        )

    def _against_copies(
        self, batch: PairBatch, pairs: list[tuple[View, View]], predicted: Float[Tensor, "r n p"], mask: Tensor
    ) -> dict[str, Tensor]:
        firsts = [first for first, _ in pairs]
        image, weight = torch.cat([view.image for view in firsts]), self._weight(firsts)
        found = {}
        for how in COPIES:
            copies = [copied(batch, first, second, how) for first, second in pairs]
            known = weight * torch.cat([there for _, there in copies])
            hidden = patchify(known[:, None], (self.patch_vox, self.patch_vox, self.patch_vox)).sum(dim=2) > 0
            if not (hidden & mask).any():
                continue
            copy = self._copy_patches(torch.cat([values for values, _ in copies]), known)
            ours, theirs, nothing, opposite = (
                self._loss(one, image, mask, known) for one in (predicted, copy, torch.zeros_like(copy), -copy)
            )
            # The loss of `factor` times the copy is nothing - 2 factor product + factor^2 square.
            product, square = (opposite - theirs) / 4, (opposite + theirs) / 2 - nothing
            scaled = nothing - product.clamp_min(0.0).square() / square.clamp_min(1e-6)
            found[f"loss_vs_{how}"] = ours / theirs.clamp_min(1e-6)  # an exact copy costs nothing
            found[f"loss_vs_scaled_{how}"] = ours / scaled.clamp_min(1e-6)
        return found

    def _copy_patches(
        self, image: Float[Tensor, "r 1 z y x"], known: Float[Tensor, "r z y x"]
    ) -> Float[Tensor, "r n p"]:
        """Patches as `masked_patch_mse` normalises its targets: by their voxels of positive weight.

        By all voxels a perfect copy of which a part is known would differ from its target.
        """
        patch = (self.patch_vox, self.patch_vox, self.patch_vox)
        patches = patchify(image.float(), patch)
        if self.config.norm == "none":
            return patches
        counted = (patchify(known[:, None], patch) > 0).float()
        count = counted.sum(dim=-1, keepdim=True)
        centred = patches - (patches * counted).sum(dim=-1, keepdim=True) / count.clamp_min(1.0)
        variance = (centred.square() * counted).sum(dim=-1, keepdim=True) / (count - 1.0).clamp_min(1.0)
        return centred * variance.clamp_min(self.config.variance_floor).rsqrt()

    def _tre(
        self, batch: PairBatch, pairs: list[tuple[View, View]], tokens: Tensor, memory: Tensor
    ) -> dict[str, Tensor]:
        if pairs[0][0].partner_mm is None:
            return {}
        true_mm, memory_mm = self._true_and_looked_mm(pairs)
        there = true_mm.isfinite().all(dim=-1)
        if not there.any():
            return {}
        weights = self.decoder.attention(tokens, memory)
        found = {
            "attention_tre_mm": _each_head_tre_mm(weights, true_mm, memory_mm).min(),
            "attention_tre_mean_mm": attention_tre_mm(weights[-1].mean(dim=1), memory_mm, true_mm),
        }
        starts: tuple[Copy, ...] = ("identity", "affine")
        for how in starts:
            start_mm = torch.cat([token_mean(places_mm(batch, first, how), self.patch_vox) for first, _ in pairs])
            found[f"{how}_tre_mm"] = torch.linalg.vector_norm(start_mm - true_mm, dim=-1)[there].median()
        return found

    def _true_and_looked_mm(
        self, pairs: list[tuple[View, View]]
    ) -> tuple[Float[Tensor, "r n 3"], Float[Tensor, "r m 3"]]:
        """Places in slot 1's scan: of slot 0's tokens, NaN outside of the lung or not known, and of slot 1's."""
        lungs = [token_mean(first.lung[:, None].float(), self.patch_vox) > 0.5 for first, _ in pairs]
        true_mm = torch.cat([places_in(first, second, self.patch_vox) for first, second in pairs])
        looked_mm = torch.cat([token_centres_mm(second, self.patch_vox) for _, second in pairs])
        return torch.where(torch.cat(lungs), true_mm, torch.nan), looked_mm


def _each_head_tre_mm(
    weights: Float[Tensor, "blocks r heads n m"], true_mm: Float[Tensor, "r n 3"], memory_mm: Float[Tensor, "r m 3"]
) -> Float[Tensor, "blocks heads"]:
    heads = [attention_tre_mm(one, memory_mm, true_mm) for one in weights.transpose(1, 2).flatten(0, 1)]
    return torch.stack(heads).view(weights.shape[0], weights.shape[2])


def encoded_positions(place: Float[Tensor, "b n 3"], width: int) -> Float[Tensor, "b n w"]:
    """Sines and cosines of places in units of the lungs' spread; the width % 6 channels that don't share out are 0."""
    octaves = torch.linspace(*_OCTAVES, width // 6, device=place.device)
    angle = (place[..., None] * (torch.pi * 2.0**octaves)).flatten(2)
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=-1), (0, width % 6))
