"""Batches and encoders made by hand, so that the tests need no scans."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from jaxtyping import Bool, Float, Int64
from lungssl_backbones.encoder import Features, token_grid
from lungssl_data.batch import PairBatch, View
from torch import Tensor, nn

STRIDE = 4


class TinyEncoder(nn.Module):
    """A linear map per token and its mean: enough to be an Encoder. It has a parameter, a buffer and a norm."""

    def __init__(self, dim: int = 12, *, supports_keep: bool = True) -> None:
        super().__init__()
        self.name = "tiny"
        self.config = None
        self.dim = dim
        self.supports_keep = supports_keep
        self.token_stride_vox = STRIDE
        self.pyramid_channels = (dim,)
        self.pyramid_strides_vox = (STRIDE,)
        self.spacing_mm = 2.0
        self.embed = nn.Conv3d(1, dim, STRIDE, STRIDE)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.norm = nn.LayerNorm(dim)
        self.calls: list[tuple[int, ...]] = []
        self.register_buffer("seen", torch.zeros(()))

    def forward(
        self,
        x: Float[Tensor, "b 1 z y x"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        keep: Int64[Tensor, "b k"] | None = None,
        coords_mm: Float[Tensor, "b 3 z y x"] | None = None,
    ) -> Features:
        self.calls.append(tuple(x.shape))
        if self.training:
            self.seen += len(x)
        z, y, x_vox = x.shape[2:]
        tokens = self.embed(x).flatten(2).mT
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token, tokens)
        if keep is not None:
            tokens = tokens.gather(1, keep[..., None].expand(-1, -1, self.dim))
        tokens = self.norm(tokens)
        grid = token_grid((z, y, x_vox), STRIDE)
        pyramid = (tokens.mT.unflatten(2, grid),) if keep is None else ()
        return Features(cls=None, tokens=tokens, pyramid=pyramid, grid=grid, stride_mm=STRIDE * self.spacing_mm)


MakeBatch = Callable[..., PairBatch]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def encoder() -> TinyEncoder:
    return TinyEncoder()


@pytest.fixture
def convolutional_encoder() -> TinyEncoder:
    return TinyEncoder(supports_keep=False)


@pytest.fixture
def make_batch() -> MakeBatch:
    def view(b: int, size: tuple[int, int, int], slot: Literal[0, 1], kind: Literal["global", "local"]) -> View:
        place = torch.meshgrid(*(2.0 * torch.arange(side) for side in size), indexing="ij")
        coords_mm = torch.stack(place[::-1]) + torch.rand(b, 3, 1, 1, 1)  # 2 mm voxels, each view a little elsewhere
        return View(
            image=torch.rand(b, 1, *size),
            coords_mm=coords_mm,
            partner_mm=coords_mm + 1.0 if slot == 0 else None,
            valid=torch.ones(b, *size, dtype=torch.bool),
            lung=torch.rand(b, *size) < 0.5,
            slot=slot,
            kind=kind,
        )

    def batch(
        b: int = 3,
        *,
        globals_per_slot: int = 1,
        locals_per_slot: int = 2,
        global_size: tuple[int, int, int] = (8, 12, 16),
        local_size: tuple[int, int, int] = (4, 8, 4),
        paired: bool = True,
    ) -> PairBatch:
        slots: tuple[Literal[0, 1], Literal[0, 1]] = (0, 1)
        views = [view(b, global_size, slot, "global") for _ in range(globals_per_slot) for slot in slots]
        views += [view(b, local_size, slot, "local") for _ in range(locals_per_slot) for slot in slots]
        return PairBatch(
            views=tuple(views),
            slot_phase=torch.tensor([[0, 1 if paired else 0]]).repeat(b, 1),
            patient=torch.arange(b),
            exhale_to_inhale=torch.eye(3, 4).repeat(b, 1, 1),
        )

    return batch
