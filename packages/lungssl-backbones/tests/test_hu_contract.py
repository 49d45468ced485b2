"""An encoder must keep absolute HU: the density change between exhale and inhale is what this project is about."""

import pytest
import torch
import torch.nn.functional as F
from lungssl_backbones import create_backbone
from lungssl_backbones.encoder import Encoder
from torch import Tensor

TRAIN, TEST = 128, 64
SMALL = {
    "vit3d_nano": {},
    "vit3d_ti": {"depth": 3},
    "resenc_tiny": {},
    "primus_ti": {"depth": 2, "crop_vox": (24, 32, 40)},
    "swin_unetr_s": {"feature_size": 12, "depths": (1, 1, 1, 1), "window": 4},
    "convnext3d_atto": {"widths": (16, 32, 64), "depths": (1, 1, 1), "stem_vox": 2, "kernel_vox": 5},
    "timm3d": {"model": "test_efficientnet"},
}
"""Encoders of 192 crops within seconds on one core; the other entries are the same classes, wider and deeper."""


def lung_crops(count: int, size_zyx: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Smooth random texture whose mean (-950 to -500 HU) and contrast (10 to 150 HU) are independent.

    Returns the network input [count, 1, z, y, x] and each crop's mean HU [count].
    """
    generator = torch.Generator().manual_seed(7)
    texture = torch.zeros(count, 1, *size_zyx)
    for coarse in (3, 9):
        noise = torch.randn(count, 1, coarse, coarse, coarse, generator=generator)
        texture += F.interpolate(noise, size=size_zyx, mode="trilinear")
    level, contrast = torch.rand(2, count, 1, 1, 1, 1, generator=generator)
    hu = -950 + 450 * level + (10 + 140 * contrast) * texture
    hu = hu.clamp(-1000, 400)
    return (hu + 1000) / 1400, hu.mean(dim=(1, 2, 3, 4))


@torch.no_grad()
def pooled(encoder: Encoder, x: Tensor) -> Tensor:
    rows = []
    for chunk in x.split(32):
        features = encoder(chunk)
        maps = [level.mean(dim=(2, 3, 4)) for level in features.pyramid]
        rows.append(torch.cat([features.embedding(), features.tokens.mean(dim=1), *maps], dim=1))
    return torch.cat(rows).double()


def held_out_r2(encoder: Encoder, size_zyx: tuple[int, int, int] = (24, 32, 40)) -> float:
    """R² on held-out crops of a ridge regression from pooled features to mean HU."""
    x, mean_hu = lung_crops(TRAIN + TEST, size_zyx)
    features, target = pooled(encoder, x), mean_hu.double()
    features = (features - features[:TRAIN].mean(0)) / features[:TRAIN].std(0).clamp_min(1e-9)
    train, offset = features[:TRAIN], target[:TRAIN].mean()
    weights = torch.linalg.solve(
        train.T @ train + TRAIN * 0.1 * torch.eye(train.shape[1]), train.T @ (target[:TRAIN] - offset)
    )
    error = features[TRAIN:] @ weights + offset - target[TRAIN:]
    return 1 - float(error.square().sum() / (target[TRAIN:] - target[TRAIN:].mean()).square().sum())


@pytest.mark.parametrize("name", SMALL)
def test_mean_hu_is_recovered_from_pooled_features(name: str) -> None:
    if name == "timm3d":
        pytest.importorskip("timm", exc_type=ImportError)
    torch.manual_seed(0)
    size_zyx = (32, 32, 32) if name in ("swin_unetr_s", "timm3d") else (24, 32, 40)
    assert held_out_r2(create_backbone(name, **SMALL[name]).eval(), size_zyx) >= 0.95


def test_an_instance_norm_stem_loses_mean_hu() -> None:
    torch.manual_seed(0)
    assert held_out_r2(create_backbone("resenc_tiny", stem_norm="instance").eval()) < 0.6


def test_the_dkfz_shape_loses_mean_hu_as_its_docstring_says() -> None:
    torch.manual_seed(0)
    encoder = create_backbone("resenc_l", widths=(8, 32, 64, 128), depths=(1, 1, 1, 1)).eval()
    assert held_out_r2(encoder) < 0.6
