"""Training a co-segmentation network on lesions whose labels are pseudo-masks.

Source: Agarwal et al. 2020, https://arxiv.org/abs/2001.08590 (pseudo-masks from diameters, pairs).
"""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from lungssl_backbones.encoder import Encoder
from lungssl_data.batch import StepOutput
from torch import Tensor, nn

from lungssl_tasks.cosegmentation.grabcut import GrabCutConfig
from lungssl_tasks.cosegmentation.lesion_pairs import LesionPair, Supervision
from lungssl_tasks.cosegmentation.model import CosegmentationModel
from lungssl_tasks.segmentation import IGNORE_LABEL, dice_ce_loss, hard_dice


class CosegmentationTask(nn.Module):
    """Trains a co-segmentation network on crops of lesions in both phases."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """What is trained, and on what."""

        model: CosegmentationModel.Config = dataclasses.field(default_factory=CosegmentationModel.Config)
        """Size of the model, and its attention."""
        supervision: Supervision = "diameters"
        """What labels are made of: `diameters`, by GrabCut, or the whole `masks`."""
        grabcut: GrabCutConfig = dataclasses.field(default_factory=GrabCutConfig)
        """How diameters become masks."""
        side_vox: int = 32
        """Of the crops; a multiple of the encoder's token stride."""
        shift_vox: int | None = None
        """The most that a training crop's middle is off the lesion's, along each axis; None: as `judged_shift` has it,
        so that lesions aren't found by where they are."""
        flips: bool = True
        """Mirror training crops, both scans alike, along each axis with a chance of a half."""

        def build(self, encoder: Encoder) -> "CosegmentationTask":
            """The task with a new model on the encoder."""
            return CosegmentationTask(self, encoder)

    def __init__(self, config: Config, encoder: Encoder) -> None:
        """Raises ValueError for a side that the encoder can't take, and a shift that would lose the lesion."""
        super().__init__()
        if config.side_vox % encoder.token_stride_vox or config.side_vox < 1:
            raise ValueError(
                f"side_vox {config.side_vox} must be a multiple of the token stride, {encoder.token_stride_vox} voxels"
            )
        if config.shift_vox is not None and not 0 <= config.shift_vox < config.side_vox // 2:
            raise ValueError(
                f"shift_vox {config.shift_vox}: the lesion's middle would leave the crop; take 0 to "
                f"{config.side_vox // 2 - 1} for crops of {config.side_vox}"
            )
        self.config = config
        self.model = config.model.build(encoder)

    def forward(self, batch: list[LesionPair], step: int) -> StepOutput:
        """Soft Dice + cross-entropy over the known voxels of both phases.

        Metrics: `loss`; `dice` with the labels, `truth_dice` with what somebody drew, where that is known for all;
        hard, over the whole batch.
        """
        names = ("exhale_hu", "inhale_hu", "exhale_told", "inhale_told")
        scans = [torch.cat([getattr(pair, name) for pair in batch]) for name in names]
        labels = _both(batch, "labels")
        assert labels is not None
        logits = torch.cat(self.model(*scans)).float()
        loss, _ = dice_ce_loss(logits, labels, labels != IGNORE_LABEL)
        metrics = {"loss": loss.detach(), "dice": hard_dice(logits.detach(), labels, labels != IGNORE_LABEL)}
        truth = _both(batch, "truth")
        if truth is not None:
            metrics["truth_dice"] = hard_dice(logits.detach(), truth, truth != IGNORE_LABEL)
        return StepOutput(loss=loss, metrics=metrics)

    def after_optimizer_step(self, step: int) -> None:
        """Nothing: the task keeps no state beside its weights."""

    def export_encoder(self) -> Encoder:
        """The encoder as trained so far."""
        return self.model.encoder


def _both(batch: list[LesionPair], what: str) -> UInt8[Tensor, "b2 z y x"] | None:
    """Labels of all exhale crops, then of all inhale crops; None where some have none."""
    held = [getattr(pair, f"{phase}_{what}") for phase in ("exhale", "inhale") for pair in batch]
    return None if any(one is None for one in held) else torch.cat(held)
