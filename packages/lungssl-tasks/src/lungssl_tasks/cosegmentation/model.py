"""A siamese network with co-attention: two crops of one lesion, a mask for each.

Sources: Agarwal et al. 2020, https://arxiv.org/abs/2001.08590, whose encoder and decoder are shared by the two images
and exchange attention at the bottleneck; the gate by the other image's channels, Chen et al. 2018,
https://arxiv.org/abs/1810.06859; the gate over places by pooled channels, Woo et al. 2018 (CBAM),
https://arxiv.org/abs/1807.06521.
Differs from them: encoder and decoder are ours; 3-D; the network is told where the lesion is by its diameters, not by
the crop's middle alone; a gate is 1 + tanh, so that at first both scans pass unchanged; the two masks are never made to
agree: a lesion that air re-enters at inhale is in one of them alone.
Axes: b batch, c channels, z y x voxels.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lungssl_backbones.encoder import Encoder
from lungssl_data.views import scale_hu
from torch import Tensor, nn

from lungssl_tasks.segmentation import SegmentationModel

Attention = Literal["co", "own", "none"]


class CoAttention(nn.Module):
    """Weighs one scan's features: its channels by what the other scan shows, its places by what it shows itself."""

    def __init__(self, channels: int, *, reduction: int = 4) -> None:
        """`reduction`: of the channels in the hidden layer (Hu et al. 2018, https://arxiv.org/abs/1709.01507: 16, for
        ten times as many).
        """
        super().__init__()
        hidden = max(channels // reduction, 4)
        self.channels = nn.Sequential(nn.Linear(channels, hidden), nn.LeakyReLU(0.01), nn.Linear(hidden, channels))
        self.places = nn.Conv3d(2, 1, 3, padding=1)
        for last in (self.channels[-1], self.places):
            assert isinstance(last, nn.Linear | nn.Conv3d) and last.bias is not None
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self, features: Float[Tensor, "b c z y x"], other: Float[Tensor, "b c _z _y _x"]
    ) -> Float[Tensor, "b c z y x"]:
        """features * (1 + tanh MLP(mean of other over places)) * (1 + tanh conv(mean and largest channel))."""
        by_channel = 1 + torch.tanh(self.channels(other.mean(dim=(2, 3, 4))))
        gated = features * by_channel[:, :, None, None, None]
        pooled = torch.cat([gated.mean(dim=1, keepdim=True), gated.amax(dim=1, keepdim=True)], dim=1)
        return gated * (1 + torch.tanh(self.places(pooled)))


class CosegmentationModel(nn.Module):
    """Maps two crops with a lesion to two logits a voxel, background and lesion, of each."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Size and attention."""

        segment: SegmentationModel.Config = field(default_factory=SegmentationModel.Config)
        """Of the decoder."""
        attention: Attention = "co"
        """Whose features decide about a scan's channels: `co`, the other's; `own`, its own; `none`: there is no gate,
        and the scans never meet. The two last are controls."""
        told: bool = True
        """Give each level what the diameters say of where the lesion is (`told_of`). Without it a network must find
        lesions by how they look, and which of several is meant only by where the crop lies."""

        def build(self, encoder: Encoder) -> "CosegmentationModel":
            """The model, with random weights after the encoder."""
            return CosegmentationModel(self, encoder)

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.segmenter = config.segment.build(encoder, 1)
        self.told = nn.ModuleList(nn.Conv3d(1, c, 1, bias=False) for c in encoder.pyramid_channels if config.told)
        for one in self.told:
            assert isinstance(one, nn.Conv3d)
            nn.init.zeros_(one.weight)  # at first a pretrained encoder's features are as they were
        self.attend = None if config.attention == "none" else CoAttention(encoder.pyramid_channels[-1])

    @property
    def encoder(self) -> Encoder:
        """The encoder, which both crops go through."""
        return self.segmenter.encoder

    def forward(
        self,
        exhale_hu: Float[Tensor, "b 1 z y x"],
        inhale_hu: Float[Tensor, "b 1 z y x"],
        exhale_told: Float[Tensor, "b 1 z y x"],
        inhale_told: Float[Tensor, "b 1 z y x"],
    ) -> tuple[Float[Tensor, "b 2 z y x"], Float[Tensor, "b 2 z y x"]]:
        """Logits of both; sides are multiples of the encoder's token stride. `..._told` as `told_of` has it."""
        image = scale_hu(torch.cat([exhale_hu, inhale_hu]))
        pyramid = self.encoder(image).pyramid
        if self.config.told:
            told, strides = torch.cat([exhale_told, inhale_told]), self.encoder.pyramid_strides_vox
            pyramid = tuple(
                maps + add(F.avg_pool3d(told, stride).to(maps.dtype))
                for maps, add, stride in zip(pyramid, self.told, strides, strict=True)
            )
        deepest = pyramid[-1]
        if self.attend is not None:
            other = torch.cat(deepest.chunk(2)[::-1]) if self.config.attention == "co" else deepest
            deepest = self.attend(deepest, other)
        exhale, inhale = self.segmenter.decode(image, (*pyramid[:-1], deepest)).chunk(2)
        return exhale, inhale
