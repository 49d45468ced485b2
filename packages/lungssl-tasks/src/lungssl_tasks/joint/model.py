"""One model for a pair's displacements and the labels of both scans, on any encoder; how much the two share is a value.

Source: Elmahdy et al. 2021, https://arxiv.org/abs/2105.01844, whose four networks these are: two single-task ones, one
U-Net with two heads (dense), a shared encoder with two decoders (SEDD), two networks with cross-stitch units.
Differs from it: networks are ours (`registration.network`, `segmentation`), so each scan goes through alone and the
scans meet where features are correlated, not in the first convolution; whole lungs instead of patches; both scans are
segmented; the moving scan's labels are no input, for a new patient has none; cross-stitch units come after every stage
of the encoder but the deepest and every level that both decoders have, here in 3-D.
Axes: b batch, c channels, k classes with background first, z y x voxels; displacements are (x, y, z) in voxels.
"""

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lungssl_backbones.encoder import Encoder, StagedEncoder
from lungssl_data.views import scale_hu
from torch import Tensor, nn

from lungssl_tasks.joint.stitch import CrossStitch
from lungssl_tasks.registration.network import Match, RegistrationModel, conv_block, matched
from lungssl_tasks.segmentation import SegmentationModel

Architecture = Literal["separate", "dense", "sedd", "cross_stitch"]


class JointOutput(NamedTuple):
    """What a joint model says of a pair on one grid."""

    there: Float[Tensor, "b 3 z y x"]
    """v from fixed to moving: what is at p in one is at p + v(p) in the other; float32."""
    back: Float[Tensor, "b 3 z y x"]
    fixed_logits: Float[Tensor, "b k z y x"]
    moving_logits: Float[Tensor, "b k z y x"]


class JointModel(nn.Module):
    """Maps two scans on one grid to displacements both ways and to one logit per class and voxel of each."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """What is shared, and the size of what comes after the encoder."""

        architecture: Architecture = "cross_stitch"
        """`separate`: two networks side by side, the single-task twins; `dense`: one encoder and decoder with two
        heads; `sedd`: one encoder, two decoders; `cross_stitch`: two networks that mix their features."""
        register: RegistrationModel.Config = field(default_factory=RegistrationModel.Config)
        """Of the registration's half; `dense` has its width for the features that are matched."""
        segment: SegmentationModel.Config = field(default_factory=partial(SegmentationModel.Config, max_width=32))
        """Of the segmentation's decoder. `cross_stitch` needs its levels as wide as the registration's."""
        stitch_keep: float = 0.9
        """Of its own features, what a network has at first after a cross-stitch; the rest is the other's. 0.9 was best
        in Misra et al. 2016, https://arxiv.org/abs/1604.03539; the code of Elmahdy et al. has 0.5."""

        def build(self, encoder: Encoder, classes: int) -> "JointModel":
            """`classes` counts the foreground. Two networks have a copy of the encoder each."""
            return JointModel(self, encoder, classes)

    def __init__(self, config: Config, encoder: Encoder, classes: int) -> None:
        """Raises ValueError as the two halves do, and where networks can't be stitched together."""
        super().__init__()
        self.config, self.classes = config, classes
        self.stitch = nn.ModuleDict()
        if config.architecture == "dense":
            self.segmenter = config.segment.build(encoder, classes)
            self._build_matches(encoder)
            return
        self.registrar = config.register.build(encoder)
        two = config.architecture != "sedd"
        assert isinstance(encoder, nn.Module)
        self.segmenter = config.segment.build(copy.deepcopy(encoder) if two else encoder, classes)
        if not two:
            del self.segmenter.encoder  # held once: weight files refuse two names for the same weights
        if config.architecture == "cross_stitch":
            self._build_stitches(encoder)

    def _build_matches(self, encoder: Encoder) -> None:
        """A head that makes features to be matched of each level of the decoder; beyond them, of the encoder."""
        size, coarsest = self.config.register, encoder.pyramid_strides_vox[-1]
        if size.width % size.groups:
            raise ValueError(f"width {size.width} must be a multiple of groups, {size.groups}")
        self.head, self.match = nn.ModuleDict(), nn.ModuleDict()
        for stride in size.level_strides():
            inputs = self.segmenter.width_at(stride) if stride < coarsest else encoder.pyramid_channels[-1]
            self.head[str(stride)] = conv_block(inputs + 1, size.width, size.groups)
            self.match[str(stride)] = Match(size.width, size.reach, size.groups)

    def _build_stitches(self, encoder: Encoder) -> None:
        if not isinstance(encoder, StagedEncoder):
            raise ValueError(
                f"cross_stitch mixes encoders stage by stage, which {encoder.name} doesn't offer; take a resenc "
                f"backbone, or architecture sedd, dense or separate"
            )
        maps = list(zip(encoder.pyramid_strides_vox, encoder.pyramid_channels, strict=True))
        for stride, channels in maps[:-1]:
            self.stitch[f"encoder_{stride}"] = CrossStitch(channels, keep=self.config.stitch_keep)
        width = self.config.register.width
        for stride in self.registrar.merge:
            if stride not in self.segmenter.up:
                continue
            if self.segmenter.width_at(int(stride)) != width:
                raise ValueError(
                    f"cross_stitch needs decoders of one width, but at stride {stride} the segmentation's has "
                    f"{self.segmenter.width_at(int(stride))} channels and the registration's {width}; set "
                    f"segment.max_width={width} and segment.base_width of at least {width // 2}"
                )
            self.stitch[f"decoder_{stride}"] = CrossStitch(width, keep=self.config.stitch_keep)

    @property
    def encoder(self) -> Encoder:
        """The encoder; of two, the registration's."""
        return self.segmenter.encoder if self.config.architecture == "dense" else self.registrar.encoder

    def encoders(self) -> tuple[nn.Module, ...]:
        """All there are."""
        found = [self.encoder]
        if self.config.architecture in ("separate", "cross_stitch"):
            found.append(self.segmenter.encoder)
        return tuple(one for one in found if isinstance(one, nn.Module))

    @property
    def multiple(self) -> int:
        """What the sides of scans must be divided by, in voxels."""
        if self.config.architecture != "dense":
            return self.registrar.multiple
        return max(self.encoder.token_stride_vox, *self.config.register.level_strides())

    def forward(
        self,
        fixed_hu: Float[Tensor, "b 1 z y x"],
        fixed_lung: Float[Tensor, "b 1 z y x"],
        moving_hu: Float[Tensor, "b 1 z y x"],
        moving_lung: Float[Tensor, "b 1 z y x"],
    ) -> JointOutput:
        """Sides are multiples of `multiple`; voxels are the encoder's, lungs 0 or 1."""
        image = scale_hu(torch.cat([fixed_hu, moving_hu]))
        lung = torch.cat([fixed_lung, moving_lung])
        (there, back), logits = (
            self._dense(image, lung) if self.config.architecture == "dense" else self._two(image, lung)
        )
        fixed_logits, moving_logits = logits.chunk(2)
        return JointOutput(there, back, fixed_logits, moving_logits)

    def displacements(
        self,
        fixed_hu: Float[Tensor, "b 1 z y x"],
        fixed_lung: Float[Tensor, "b 1 z y x"],
        moving_hu: Float[Tensor, "b 1 z y x"],
        moving_lung: Float[Tensor, "b 1 z y x"],
    ) -> tuple[Float[Tensor, "b 3 z y x"], Float[Tensor, "b 3 z y x"]]:
        """As `DisplacementModel` has it."""
        output = self(fixed_hu, fixed_lung, moving_hu, moving_lung)
        return output.there, output.back

    def alphas(self) -> dict[str, Float[Tensor, "c 2 2"]]:
        """The cross-stitch matrices by level; the first row and column are the registration's."""
        return {name: unit.alpha().detach() for name, unit in self.stitch.items() if isinstance(unit, CrossStitch)}

    def _two(
        self, image: Float[Tensor, "b2 1 z y x"], lung: Float[Tensor, "b2 1 z y x"]
    ) -> tuple[tuple[Float[Tensor, "b 3 z y x"], Float[Tensor, "b 3 z y x"]], Float[Tensor, "b2 k z y x"]]:
        """Two decoders side by side, from coarse to fine."""
        pyramids = self._pyramids(image)
        parts, skips = self.registrar.parts(image, lung, pyramids[0]), self.segmenter.skips(image, pyramids[1])
        strides = {int(stride) for stride in (*self.registrar.merge, *self.segmenter.up)}
        above, logits_above, features = None, pyramids[1][-1], {}
        for stride in sorted(strides, reverse=True):
            if str(stride) in self.segmenter.up:
                logits_above = self.segmenter.level(stride, logits_above, skips)
            if str(stride) in self.registrar.merge:
                above = self.registrar.level(stride, above, parts)
                if f"decoder_{stride}" in self.stitch:
                    above, logits_above = self.stitch[f"decoder_{stride}"](above, logits_above)
                features[stride] = above
        return matched(self.registrar.match, features), self.segmenter.head(logits_above)

    def _pyramids(
        self, image: Float[Tensor, "b2 1 z y x"]
    ) -> tuple[tuple[Float[Tensor, "b2 _c _z _y _x"], ...], tuple[Float[Tensor, "b2 _c _z _y _x"], ...]]:
        """The encoder's maps for the registration and for the segmentation."""
        first = self.encoder
        if self.config.architecture == "sedd":
            shared = first(image).pyramid
            return shared, shared
        second = self.segmenter.encoder
        if self.config.architecture == "separate":
            return first(image).pyramid, second(image).pyramid
        assert isinstance(first, StagedEncoder) and isinstance(second, StagedEncoder)
        a, b, found = first.enter(image), second.enter(image), []
        for stride, one, two in zip(first.pyramid_strides_vox, first.stages, second.stages, strict=True):
            a, b = one(a), two(b)
            if f"encoder_{stride}" in self.stitch:
                a, b = self.stitch[f"encoder_{stride}"](a, b)
            found.append((a, b))
        return tuple(pair[0] for pair in found), tuple(pair[1] for pair in found)

    def _dense(
        self, image: Float[Tensor, "b2 1 z y x"], lung: Float[Tensor, "b2 1 z y x"]
    ) -> tuple[tuple[Float[Tensor, "b 3 z y x"], Float[Tensor, "b 3 z y x"]], Float[Tensor, "b2 k z y x"]]:
        """One decoder, whose levels are matched, too."""
        pyramid = self.encoder(image).pyramid
        coarsest, skips = self.encoder.pyramid_strides_vox[-1], self.segmenter.skips(image, pyramid)
        above = pyramid[-1]
        levels = {coarsest: above}
        for stride in self.segmenter.up:
            levels[int(stride)] = above = self.segmenter.level(int(stride), above, skips)
        features = {}
        for name, head in self.head.items():
            stride = int(name)
            maps = levels[stride] if stride <= coarsest else F.avg_pool3d(pyramid[-1], stride // coarsest)
            features[stride] = head(torch.cat([maps, F.avg_pool3d(lung, stride).to(maps.dtype)], dim=1))
        return matched(self.match, features), self.segmenter.head(above)
