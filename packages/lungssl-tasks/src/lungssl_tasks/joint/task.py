"""Training a joint model on pairs: fields without truth, labels where there are some, and labels that fields carry.

Source: Elmahdy et al. 2021, https://arxiv.org/abs/2105.01844: L1 similarity and smoothness of the field, L2 1 - Dice of
the moving labels it warps with the fixed ones, L3 1 - Dice of the predicted labels.
Differs from it: L1 and L3 are those of the single-task twins (`field_loss`, `dice_ce_loss`), both ways and for both
scans; labels are warped as one-hot maps read linearly, so that L2 has a gradient in the field (their code takes the
nearest, which has none); pairs without labels teach the field alone.
"""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from lungssl_backbones.encoder import Encoder
from lungssl_data.batch import StepOutput
from lungssl_ops.warp import warp
from torch import Tensor, nn

from lungssl_tasks.joint.model import JointModel
from lungssl_tasks.joint.weighting import LossWeights, Weighting
from lungssl_tasks.registration.field_loss import FieldWeights, field_loss
from lungssl_tasks.registration.training_pairs import TrainingPair
from lungssl_tasks.segmentation import IGNORE_LABEL, dice_ce_loss, hard_dice, mean_dice, one_hot

FIELD, WARPED, LABELS = "field", "warped", "labels"
"""L1, L2, L3."""


class JointTask(nn.Module):
    """Trains both halves of a joint model on pairs, some of which are labelled."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """What is trained, and on what."""

        model: JointModel.Config = dataclasses.field(default_factory=JointModel.Config)
        """What is shared, and its size."""
        field: FieldWeights = dataclasses.field(default_factory=FieldWeights)
        """The field's loss, as in task `register`."""
        guided: bool = True
        """Whether the labels that a field warps count (L2). The paper's single-task registration has none: `separate`
        with false."""
        labelled_share: float = 0.5
        """Of the samples, those that are drawn from labelled pairs alone; the others are of all. With few labels most
        steps would teach no lobes otherwise. Ours."""
        segment_rate: float = 5.0
        """Factor on the learning rate of what is the segmentation's alone: from random weights a U-Net wants a larger
        one than a registration network (recipes finetune/segment and register). On phantoms of 6 mm with 4 labels,
        160 steps: validation Dice 0.85; with 1 and train.lr 2.5 times higher, 0.27 after 120."""
        weighting: Weighting = "equal"
        """How the losses become one (`weighting.py`)."""
        freeze_encoder: bool = False
        """Train what comes after the encoders only; they stay in eval mode."""

        def build(self, encoder: Encoder, classes: int) -> "JointTask":
            """`classes` counts the foreground: labels run from 1 to `classes`."""
            return JointTask(self, encoder, classes)

    def __init__(self, config: Config, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.config = config
        self.model = config.model.build(encoder, classes)
        segmenter = self.model.segmenter
        (segmenter.head if config.model.architecture == "dense" else segmenter).rate_scale = config.segment_rate
        self.weights = LossWeights((FIELD, WARPED, LABELS) if config.guided else (FIELD, LABELS), config.weighting)
        if config.freeze_encoder:
            for one in self.model.encoders():
                one.requires_grad_(False)

    def train(self, mode: bool = True) -> "JointTask":
        """As `nn.Module.train`, but frozen encoders stay in eval mode."""
        super().train(mode)
        if self.config.freeze_encoder:
            for one in self.model.encoders():
                one.eval()
        return self

    def forward(self, batch: list[TrainingPair], step: int) -> StepOutput:
        """The weighted losses, each its mean over the pairs that have it.

        Metrics: `loss`; `field`, `warped`, `labels`, unweighted, with `weight_...` of each; `lncc`, `folding`,
        `disagreement_mm`, `error_mm` as in `RegistrationTask`; `dice` (predicted labels, hard) and `warped_dice`
        (labels that fields carry, soft), means over foreground classes, scans and both ways, where pairs have labels.
        Raises ValueError where a label is larger than `classes`.
        """
        each = [self.one(pair) for pair in batch]
        names = dict.fromkeys(name for figures in each for name in figures)
        means = {name: torch.stack([f[name] for f in each if name in f]).mean() for name in names}
        loss = self.weights({name: means[name] for name in self.weights.names if name in means})
        weights = {f"weight_{name}": weight.detach() for name, weight in self.weights.weights().items()}
        metrics = {name: mean.detach() for name, mean in means.items()}
        return StepOutput(loss=loss, metrics={"loss": loss.detach(), **metrics, **weights})

    def one(self, pair: TrainingPair) -> dict[str, Float[Tensor, ""]]:
        """Losses and figures of one pair."""
        grid = pair.grid
        output = self.model(grid.fixed_hu, grid.fixed_lung, grid.moving_hu, grid.moving_lung)
        figures = field_loss(pair, output.there, output.back, self.config.field)
        figures[FIELD] = figures.pop("loss")
        scans = [
            (logits.float(), self._checked(labels))
            for logits, labels in ((output.fixed_logits, pair.fixed_labels), (output.moving_logits, pair.moving_labels))
            if labels is not None
        ]
        with torch.autocast(output.there.device.type, enabled=False):
            if scans:
                losses = [dice_ce_loss(logits, labels, labels != IGNORE_LABEL)[0] for logits, labels in scans]
                figures[LABELS] = torch.stack(losses).mean()
                hard = [hard_dice(logits.detach(), labels, labels != IGNORE_LABEL) for logits, labels in scans]
                figures["dice"] = torch.stack(hard).mean()
            if pair.fixed_labels is not None and pair.moving_labels is not None:
                fixed, moving, classes = pair.fixed_labels, pair.moving_labels, self.model.classes
                ways = (
                    warped_dice(moving, fixed, output.there, classes=classes, seen=grid.moving_seen > 0),
                    warped_dice(fixed, moving, output.back, classes=classes),
                )
                figures["warped_dice"] = torch.stack(ways).mean()
                figures[WARPED] = 1 - figures["warped_dice"]
        return figures

    def _checked(self, labels: UInt8[Tensor, "1 z y x"]) -> UInt8[Tensor, "1 z y x"]:
        largest = int(torch.where(labels == IGNORE_LABEL, 0, labels).max())
        if largest > self.model.classes:
            raise ValueError(f"label {largest} in the batch, but the model has classes 1 to {self.model.classes}")
        return labels

    def after_optimizer_step(self, step: int) -> None:
        """Nothing: what `dwa` remembers is noted with each loss."""

    def export_encoder(self) -> Encoder:
        """The encoder as trained so far; of two, the registration's."""
        return self.model.encoder


def warped_dice(
    moving: UInt8[Tensor, "1 z y x"],
    fixed: UInt8[Tensor, "1 z y x"],
    v_vox: Float[Tensor, "1 3 z y x"],
    *,
    classes: int,
    seen: Bool[Tensor, "1 1 z y x"] | None = None,
) -> Float[Tensor, ""]:
    """Soft Dice of moving labels where the field finds them with the fixed ones, mean over the fixed scan's classes.

    One-hot maps, read linearly: the gradient in the field lives at the labels' borders. Voxels of IGNORE_LABEL count
    neither where they are fixed nor where a field leads to them, nor those that lead out of what is `seen` or of the
    grid. 1 is a perfect match; no known voxel of a class gives 1.
    """
    known_there = (moving != IGNORE_LABEL)[:, None]
    if seen is not None:
        known_there = known_there & seen
    warped = warp(one_hot(moving.long(), classes + 1).float(), v_vox)
    known = (fixed != IGNORE_LABEL)[:, None] & (warp(known_there.float(), v_vox.detach(), padding="zeros") > 0.99)
    return mean_dice(warped * known, one_hot(fixed.long(), classes + 1) & known, empty=1.0)
