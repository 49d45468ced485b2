"""Training a co-segmentation network on lesions whose labels are pseudo-masks, later on what it is sure of itself.

Source: Agarwal et al. 2020, https://arxiv.org/abs/2001.08590 (pseudo-masks from diameters, pairs); confident
predictions of a mean teacher as labels, `domain.md` E2 (Tarvainen & Valpola 2017, https://arxiv.org/abs/1703.01780).
"""

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
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
        shift_vox: int = 3
        """The most that a training crop's middle is off the lesion's, along each axis."""
        flips: bool = True
        """Mirror training crops, both scans alike, along each axis with a chance of a half."""
        teach_after: int = 0
        """Steps after which labels are what a mean teacher is sure of, and the others where it isn't are unknown;
        0: never."""
        sure: float = 0.9
        """Of a class's probability (`domain.md` E2)."""
        momentum: float = 0.99
        """Of the teacher's weights, a step."""

        def build(self, encoder: Encoder) -> "CosegmentationTask":
            """The task with a new model on the encoder."""
            return CosegmentationTask(self, encoder)

    def __init__(self, config: Config, encoder: Encoder) -> None:
        """Raises ValueError for a side that the encoder can't take."""
        super().__init__()
        if config.side_vox % encoder.token_stride_vox or config.side_vox < 1:
            raise ValueError(
                f"side_vox {config.side_vox} must be a multiple of the token stride, {encoder.token_stride_vox} voxels"
            )
        self.config = config
        self.model = config.model.build(encoder)
        self.teacher = copy.deepcopy(self.model).requires_grad_(False) if config.teach_after else None

    def train(self, mode: bool = True) -> "CosegmentationTask":
        """As `nn.Module.train`, but the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, batch: list[LesionPair], step: int) -> StepOutput:
        """Soft Dice + cross-entropy over the known voxels of both phases.

        Metrics: `loss`; `dice` with the labels, `truth_dice` with what somebody drew, where that is known for all;
        hard, over the whole batch.
        """
        scans = torch.cat([pair.exhale_hu for pair in batch]), torch.cat([pair.inhale_hu for pair in batch])
        labels = _both(batch, "labels")
        assert labels is not None
        logits = torch.cat(self.model(*scans)).float()
        if self.training and self.teacher is not None and step >= self.config.teach_after:
            with torch.no_grad():
                labels = self.taught(torch.cat(self.teacher(*scans)).float(), labels)
        loss, _ = dice_ce_loss(logits, labels, labels != IGNORE_LABEL)
        metrics = {"loss": loss.detach(), "dice": hard_dice(logits.detach(), labels, labels != IGNORE_LABEL)}
        truth = _both(batch, "truth")
        if truth is not None:
            metrics["truth_dice"] = hard_dice(logits.detach(), truth, truth != IGNORE_LABEL)
        return StepOutput(loss=loss, metrics=metrics)

    def taught(self, logits: Float[Tensor, "b 2 z y x"], labels: UInt8[Tensor, "b z y x"]) -> UInt8[Tensor, "b z y x"]:
        """1 or 0 where the teacher is sure of either, unknown elsewhere and where `labels` are."""
        lesion = logits.softmax(dim=1)[:, 1]
        sure = torch.full_like(labels, IGNORE_LABEL)
        sure[lesion > self.config.sure] = 1
        sure[lesion < 1 - self.config.sure] = 0
        return torch.where(labels == IGNORE_LABEL, IGNORE_LABEL, sure)

    @torch.no_grad()
    def after_optimizer_step(self, step: int) -> None:
        """Move the teacher: a mean of the weights over some 1 / (1 - momentum) steps, all while there are fewer."""
        if self.teacher is None:
            return
        keep = min(self.config.momentum, step / (step + 1))
        held: Iterable[tuple[Tensor, Tensor]] = zip(self.teacher.parameters(), self.model.parameters(), strict=True)
        for old, new in held:
            old.lerp_(new, 1 - keep)

    def export_encoder(self) -> Encoder:
        """The encoder as trained so far."""
        return self.model.encoder


def _both(batch: list[LesionPair], what: str) -> UInt8[Tensor, "b2 z y x"] | None:
    """Labels of all exhale crops, then of all inhale crops; None where some have none."""
    held = [getattr(pair, f"{phase}_{what}") for phase in ("exhale", "inhale") for pair in batch]
    return None if any(one is None for one in held) else torch.cat(held)
