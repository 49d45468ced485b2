"""Voxel-wise segmentation on any encoder: a U-shaped decoder, and the task that trains both.

Sources: U-Net, Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597; decoder and loss as in nnU-Net, Isensee et
al. 2021, doi:10.1038/s41592-020-01008-z; image skips where a transformer has no fine features, Hatamizadeh et al. 2022
(UNETR), https://arxiv.org/abs/2103.10504.
Differs from them: GroupNorm for InstanceNorm and no norm before the first nonlinearity (absolute HU survive, and maps
of one voxel work); one convolution per decoder level, as nnU-Net's ResEnc plans have; deep supervision only if asked
for.
Axes: b batch, c channels, k classes with background first, z y x voxels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from lungssl_backbones.encoder import Encoder
from lungssl_data.batch import PairBatch, StepOutput
from torch import Tensor, nn

IGNORE_LABEL = 255
"""Label of voxels that nobody annotated: neither loss nor metric sees them."""


class SegmentationModel(nn.Module):
    """Maps a crop to one logit per class and voxel.

    Each level of the decoder doubles the resolution and takes what there is at its stride: the encoder's feature map,
    or, finer than the encoder's finest, a small convolutional stem on the image.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Size of the decoder."""

        base_width: int = 16
        """Channels at full resolution, doubled at each coarser level; a multiple of `groups`. nnU-Net has 32; at half
        of that the level that costs most takes a quarter of the time."""
        max_width: int = 128
        """Most channels of a level; a multiple of `groups` (nnU-Net: 320)."""
        positions: bool = True
        """Give each decoder level three channels with the voxel's offset from the crop's centre (CoordConv, Liu et al.
        2018, https://arxiv.org/abs/1807.03247). Lobes look alike: only their place tells them apart, and convolutions
        see place through zero padding alone. Meaningful where crops span the lungs; ignored by training elsewhere."""
        groups: int = 4
        """Groups of every GroupNorm: few, since one channel per group is InstanceNorm, which loses absolute HU."""

        def build(self, encoder: Encoder, classes: int) -> "SegmentationModel":
            """`classes` counts the foreground: the model has `classes + 1` outputs."""
            return SegmentationModel(self, encoder, classes)

    def __init__(self, config: Config, encoder: Encoder, classes: int) -> None:
        """Raises ValueError where `groups` divides a width badly, `classes` is 0, or a stride is not a power of two."""
        super().__init__()
        if config.base_width % config.groups or config.max_width % config.groups:
            raise ValueError(
                f"base_width {config.base_width} and max_width {config.max_width} must be multiples of groups, "
                f"{config.groups}"
            )
        if not 1 <= classes < IGNORE_LABEL:
            raise ValueError(f"classes must be 1 to {IGNORE_LABEL - 1}, not counting background, got {classes}")
        strides = encoder.pyramid_strides_vox
        if list(strides) != sorted(set(strides)) or any(stride & (stride - 1) or stride < 1 for stride in strides):
            raise ValueError(f"pyramid strides must be powers of two, fine to coarse, got {tuple(strides)}")
        self.config = config
        self.classes = classes
        self.encoder = encoder
        self.encoder_strides = tuple(strides)
        skips = dict(zip(strides, encoder.pyramid_channels, strict=True))

        self.stem = nn.ModuleDict()
        inputs, stride = 1, 1
        while stride < strides[0]:
            width = self.width_at(stride)
            self.stem[str(stride)] = _FirstConv(width) if stride == 1 else _Block(inputs, width, 2, config.groups)
            skips[stride] = inputs = width
            stride *= 2

        self.up = nn.ModuleDict()
        self.blocks = nn.ModuleDict()
        inputs, stride = skips[strides[-1]], strides[-1] // 2
        while stride:
            width = self.width_at(stride)
            self.up[str(stride)] = nn.ConvTranspose3d(inputs, width, 2, stride=2)
            place = 3 if config.positions else 0
            self.blocks[str(stride)] = _Block(width + skips.get(stride, 0) + place, width, 1, config.groups)
            inputs, stride = width, stride // 2
        self.head = nn.Conv3d(inputs, classes + 1, 1)

    def width_at(self, stride: int) -> int:
        """Channels of the decoder's level of a stride."""
        return min(self.config.base_width * stride, self.config.max_width)

    def forward(self, image: Float[Tensor, "b 1 z y x"]) -> Float[Tensor, "b k z y x"]:
        """Logits at the image's resolution, background first.

        `image` is HU scaled to [0, 1]; its sides are multiples of `encoder.token_stride_vox`.
        """
        return self.decode(image, self.encoder(image).pyramid)

    def decode(
        self, image: Float[Tensor, "b 1 z y x"], pyramid: tuple[Float[Tensor, "b _c _z _y _x"], ...]
    ) -> Float[Tensor, "b k z y x"]:
        """`forward` after the encoder, whose maps of `image` are `pyramid`."""
        return self.head(self.levels(image, pyramid)[1])

    def levels(
        self, image: Float[Tensor, "b 1 z y x"], pyramid: tuple[Float[Tensor, "b _c _z _y _x"], ...]
    ) -> dict[int, Float[Tensor, "b _d _u _v _w"]]:
        """The decoder's maps by stride, from the encoder's coarsest to 1."""
        skips, features = self.skips(image, pyramid), pyramid[-1]
        found = {self.encoder_strides[-1]: features}
        for stride in self.up:
            found[int(stride)] = features = self.level(int(stride), features, skips)
        return found

    def skips(
        self, image: Float[Tensor, "b 1 z y x"], pyramid: tuple[Float[Tensor, "b _c _z _y _x"], ...]
    ) -> dict[int, Float[Tensor, "b _d _u _v _w"]]:
        """By stride, what the decoder's levels take beside what is above them."""
        skips = dict(zip(self.encoder_strides, pyramid, strict=True))
        features = image
        for stride, block in self.stem.items():
            skips[int(stride)] = features = block(features)
        return skips

    def level(
        self, stride: int, above: Float[Tensor, "b _c _z _y _x"], skips: dict[int, Float[Tensor, "b _d _u _v _w"]]
    ) -> Float[Tensor, "b _e _r _s _t"]:
        """One level of the decoder, of `width_at(stride)` channels, from the one of twice its stride."""
        features = self.up[str(stride)](above)
        parts = [features, *([skips[stride]] if stride in skips else [])]
        if self.config.positions:
            parts.append(_offsets(features, stride))
        return self.blocks[str(stride)](torch.cat(parts, dim=1))


class SegmentationTask(nn.Module):
    """Fine-tunes an encoder and its decoder on the labels of a batch's global views."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """What is trained, and how."""

        decoder: SegmentationModel.Config = SegmentationModel.Config()
        """Size of the decoder."""
        deep_levels: int = 0
        """Coarser levels of the decoder that are taught the labels, too, as far as there are any: deep supervision, as
        in nnU-Net, where each counts half of the next finer. Lobes learned from 2 labelled phantoms gain 0.02 in Dice
        (docs/guide/finetuning.md)."""
        freeze_encoder: bool = False
        """Train the decoder only; the encoder stays in eval mode."""

        def build(self, encoder: Encoder, classes: int) -> "SegmentationTask":
            """`classes` counts the foreground: labels run from 1 to `classes`."""
            return SegmentationTask(self, encoder, classes)

    def __init__(self, config: Config, encoder: Encoder, classes: int) -> None:
        """Raises ValueError for less than no level, and as the model does."""
        super().__init__()
        self.config = config
        self.model = config.decoder.build(encoder, classes)
        strides = sorted(int(stride) for stride in self.model.up)[1:]
        if config.deep_levels < 0:
            raise ValueError(f"deep_levels must be 0 or more, got {config.deep_levels}")
        self.deep = nn.ModuleDict(
            {str(s): nn.Conv3d(self.model.width_at(s), classes + 1, 1) for s in strides[: config.deep_levels]}
        )
        if config.freeze_encoder:
            self.model.get_submodule("encoder").requires_grad_(False)

    def train(self, mode: bool = True) -> "SegmentationTask":
        """As `nn.Module.train`, but a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.config.freeze_encoder:
            self.model.get_submodule("encoder").eval()
        return self

    def forward(self, batch: PairBatch, step: int) -> StepOutput:
        """Soft Dice + cross-entropy over the measured, annotated voxels of all global views.

        Metrics: `loss`; of the finest level `cross_entropy` (nats) and `dice` (hard, mean over the foreground classes
        in the batch).
        Raises ValueError where no global view carries labels, or a label is larger than `classes`.
        """
        views = [view for view in batch.global_views() if view.labels is not None]
        if not views:
            raise ValueError("no global view carries labels; load them, e.g. with CropConfig(labels='lobes')")
        image = torch.cat([view.image for view in views])
        labels = torch.cat([view.labels for view in views if view.labels is not None])
        known = torch.cat([view.valid for view in views]) & (labels != IGNORE_LABEL)
        # Reading the maximum waits for the device, microseconds against a 3-D step; an index out of range on a GPU
        # would end the process without saying why.
        largest = int(torch.where(known, labels, 0).max())
        if largest > self.model.classes:
            raise ValueError(
                f"label {largest} in the batch, but the model has classes 1 to {self.model.classes}; "
                f"build it with more classes, or map the labels (unknown voxels: {IGNORE_LABEL})"
            )
        levels = self.model.levels(image, self.model.encoder(image).pyramid)
        logits = self.model.head(levels[1]).float()  # bf16 would round class probabilities to 3 digits
        loss, cross_entropy = dice_ce_loss(logits, labels, known)
        total = loss
        for stride, head in self.deep.items():
            s = int(stride)
            at = (slice(None), *[slice(s // 2, None, s)] * 3)
            total = total + dice_ce_loss(head(levels[s]).float(), labels[at], known[at])[0] / s
        total = total / (1 + sum(1 / int(stride) for stride in self.deep))
        return StepOutput(
            loss=total,
            metrics={
                "loss": total.detach(),
                "cross_entropy": cross_entropy.detach(),
                "dice": hard_dice(logits.detach(), labels, known),
            },
        )

    def after_optimizer_step(self, step: int) -> None:
        """Nothing: the task keeps no state beside its weights."""

    def export_encoder(self) -> Encoder:
        """The encoder as trained so far."""
        return self.model.encoder


def dice_ce_loss(
    logits: Float[Tensor, "b k z y x"], labels: UInt8[Tensor, "b z y x"], known: Bool[Tensor, "b z y x"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(1 - soft Dice) + cross-entropy, and the cross-entropy alone (nats; ln k is chance), over `known` voxels.

    nnU-Net's loss (Isensee et al. 2021) with its batch Dice: sums run over the whole batch. Differs from it: the mean
    is over the foreground classes that the batch holds, since for an absent one soft Dice is 0 whatever is predicted
    and only the cross-entropy teaches. No known voxel gives 0.
    """
    target = torch.where(known, labels, IGNORE_LABEL).long()
    cross_entropy = F.cross_entropy(logits, target, ignore_index=IGNORE_LABEL, reduction="sum") / known.sum().clamp(1)
    truth = one_hot(target, logits.shape[1])
    soft = logits.softmax(dim=1)[:, 1:] * known[:, None]
    return 1 - mean_dice(soft, truth, empty=1.0) + cross_entropy, cross_entropy


def hard_dice(
    logits: Float[Tensor, "b k z y x"], labels: UInt8[Tensor, "b z y x"], known: Bool[Tensor, "b z y x"]
) -> Float[Tensor, ""]:
    """Mean Dice of the likeliest classes over the foreground classes that `labels` hold, in `known` voxels."""
    # max, not argmax: along the channels of a batch that is a tenth of the time (158 ms for 15, two views of 64^3)
    chosen = torch.where(known, logits.max(dim=1).indices, IGNORE_LABEL)
    target = torch.where(known, labels, IGNORE_LABEL).long()
    prediction, truth = one_hot(chosen, logits.shape[1]), one_hot(target, logits.shape[1])
    return mean_dice(prediction.float(), truth, empty=(~prediction.any()).float())


def one_hot(labels: Int64[Tensor, "b z y x"], classes: int) -> Bool[Tensor, "b foreground z y x"]:
    """A map for each of the classes 1 to `classes` - 1; labels beyond them are in none."""
    foreground = torch.arange(1, classes, device=labels.device)
    return labels[:, None] == foreground.view(1, -1, 1, 1, 1)


def mean_dice(
    prediction: Float[Tensor, "b foreground z y x"],
    truth: Bool[Tensor, "b foreground z y x"],
    *,
    empty: Float[Tensor, ""] | float,
) -> Float[Tensor, ""]:
    """Mean Dice over the classes that `truth` holds, each summed over the batch; `empty` where it holds none."""
    axes = (0, 2, 3, 4)
    volume = truth.sum(axes)
    dice = 2 * (prediction * truth).sum(axes) / (prediction.sum(axes) + volume).clamp(min=1)
    present = volume > 0
    return torch.where(present.any(), (dice * present).sum() / present.sum().clamp(min=1), empty)


def _offsets(features: Float[Tensor, "b c z y x"], stride_vox: int) -> Float[Tensor, "b 3 z y x"]:
    """Offset of each voxel from the crop's centre along z, y and x, in units of 32 image voxels (half a usual crop)."""
    axes = [(torch.arange(n) - (n - 1) / 2) * (stride_vox / 32) for n in features.shape[2:]]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return place.to(features).expand(len(features), -1, -1, -1, -1)


class _FirstConv(nn.Module):
    """The image's own features at full resolution: no norm before the nonlinearity, so absolute HU survive."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, width, 3, padding=1)

    def forward(self, image: Float[Tensor, "b 1 z y x"]) -> Float[Tensor, "b c z y x"]:
        return F.leaky_relu(self.conv(image), 0.01)


class _Block(nn.Module):
    """Convolution, GroupNorm, leaky ReLU (slope 0.01 as in nnU-Net)."""

    def __init__(self, inputs: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, width)

    def forward(self, x: Float[Tensor, "b _c z y x"]) -> Float[Tensor, "b _d _z _y _x"]:
        return F.leaky_relu(self.norm(self.conv(x)), 0.01)
