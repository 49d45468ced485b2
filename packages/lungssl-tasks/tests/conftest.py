from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Bool, Float, Int64
from lungssl_backbones.encoder import Features
from torch import Tensor, nn


class TinyEncoder(nn.Module):
    """One strided convolution per pyramid level: the protocol's attributes and nothing to wait for."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        strides: tuple[int, ...]
        width: int

    def __init__(self, strides: tuple[int, ...], width: int = 8) -> None:
        super().__init__()
        self.name = "tiny"
        self.config = TinyEncoder.Config(strides=strides, width=width)
        self.dim = width
        self.supports_keep = False
        self.token_stride_vox = strides[-1]
        self.pyramid_strides_vox = strides
        self.pyramid_channels = (width,) * len(strides)
        self.spacing_mm = 3.0
        self.convs = nn.ModuleList(nn.Conv3d(1, width, stride, stride) for stride in strides)

    def forward(
        self,
        x: Float[Tensor, "b 1 z y x"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        keep: Int64[Tensor, "b k"] | None = None,
        coords_mm: Float[Tensor, "b 3 z y x"] | None = None,
    ) -> Features:
        pyramid = tuple(conv(x).relu() for conv in self.convs)
        z, y, x_tokens = pyramid[-1].shape[2:]
        tokens = pyramid[-1].flatten(2).mT
        return Features(cls=None, tokens=tokens, pyramid=pyramid, grid=(z, y, x_tokens), stride_mm=3.0)


@pytest.fixture
def tiny_encoder() -> Callable[..., TinyEncoder]:
    torch.manual_seed(0)
    return TinyEncoder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are so small that threads cost more than they save, ten times more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
