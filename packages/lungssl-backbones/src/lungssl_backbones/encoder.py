"""What every encoder offers, whatever its architecture.

Axes: b batch, c channels, d embedding, n tokens, z y x voxels with z from inferior to superior.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Features:
    """Everything an encoder says about a crop."""

    cls: Float[Tensor, "b d"] | None
    """Summary token; None for encoders without one."""
    tokens: Float[Tensor, "b n d"]
    """Local features, flattened in (z, y, x) order; with `keep`, only the kept ones in the order of `keep`; none where
    the summary alone was asked for."""
    pyramid: tuple[Float[Tensor, "b _c _z _y _x"], ...]
    """Feature maps, fine to coarse; empty when `keep` was given, or the summary alone was asked for."""
    grid: tuple[int, int, int]
    """Tokens along (z, y, x) of the whole crop."""
    stride_mm: float
    """Distance of neighbouring tokens at the encoder's nominal spacing."""

    def embedding(self) -> Float[Tensor, "b d"]:
        """One vector per crop: the summary token, else the mean token."""
        return self.cls if self.cls is not None else self.tokens.mean(dim=1)


@runtime_checkable
class Encoder(Protocol):
    """A 3-D encoder. All are `nn.Module`s built by `Config.build()` or `create_backbone(name, **config)`."""

    name: str
    """Registry name that `create_backbone` knows; with `config` it rebuilds the encoder."""
    config: Any
    """The frozen `Config` dataclass that the encoder was built from."""
    dim: int
    """Width of `cls` and `tokens`."""
    supports_keep: bool
    """Whether `keep` works (transformers)."""
    token_stride_vox: int
    """Voxels per token along each axis; crop sides must be multiples of it."""
    pyramid_channels: tuple[int, ...]
    pyramid_strides_vox: tuple[int, ...]
    spacing_mm: float
    """Voxel size that the weights are meant for."""

    def __call__(
        self,
        x: Float[Tensor, "b c z y x"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        keep: Int64[Tensor, "b k"] | None = None,
        coords_mm: Float[Tensor, "b 3 z y x"] | None = None,
    ) -> Features:
        """Encode crops.

        `mask`: tokens to replace by a learned mask token (convolutional encoders: voxels by a learned value).
        `keep`: indices of the only tokens to process (transformers; others raise ValueError).
        `coords_mm`: LPS position of each voxel, used for positions instead of the regular grid where the encoder
        has positions.
        Encoders that can leave out what the summary doesn't need have `supports_summary_only = True` and take
        `summary_only=True`; those that take a list of crops of several sizes, and give a list, `supports_sizes = True`.
        """
        ...


@runtime_checkable
class StagedEncoder(Encoder, Protocol):
    """An encoder whose pyramid is what its stages give one after another, so that two can go in step."""

    stages: Iterable[Callable[[Tensor], Tensor]]
    """From fine to coarse, one for each map of the pyramid."""

    def enter(self, x: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b _d z y x"]:
        """What the first stage takes."""
        ...


def token_grid(crop_vox: tuple[int, int, int], stride_vox: int) -> tuple[int, int, int]:
    """Tokens along (z, y, x) of a crop.

    Raises ValueError where a side is not a positive multiple of the stride, with the nearest sizes that are.
    """
    if any(side < stride_vox or side % stride_vox for side in crop_vox):
        up = tuple(-(-side // stride_vox) * stride_vox for side in crop_vox)
        down = tuple(max(side // stride_vox, 1) * stride_vox for side in crop_vox)
        raise ValueError(
            f"crop sides (z, y, x) = {tuple(crop_vox)} must be multiples of the token stride, {stride_vox} voxels; "
            f"crop to {down} or pad to {up}"
        )
    z, y, x = (side // stride_vox for side in crop_vox)
    return z, y, x
