"""The contract of `Encoder`, over the whole of BACKBONES: an entry is tested the day it is added."""

import subprocess
import sys
from importlib.util import find_spec
from math import prod

import pytest
import torch
from lungssl_backbones import BACKBONES, backbone_config, create_backbone, list_backbones
from lungssl_backbones.encoder import Encoder, Features, token_grid
from torch import Tensor, nn

TINY = {
    "vit3d_nano": {},
    "vit3d_ti": {"depth": 2, "position": "sincos", "mlp": "swiglu"},
    "resenc_tiny": {},
    "resenc_l": {"widths": (4, 8, 8, 12), "depths": (1, 2, 1, 1)},
    "primus_ti": {"dim": 72, "heads": 2, "depth": 2, "crop_vox": (24, 16, 32), "registers": 2},
    "swin_unetr_s": {"feature_size": 12, "depths": (2, 1, 1, 1), "window": 4, "v2": True},
    "convnext3d_atto": {
        "widths": (8, 16, 24), "depths": (1, 1, 1), "stem_vox": 2, "kernel_vox": 3, "response_norm": True,
        "layer_scale": 1.0,
    },
    "timm3d": {"model": "test_efficientnet"},
}  # fmt: skip
"""One entry of each class (two of Vit3d), small enough for a CPU; every entry goes through the shape contract, on
`meta`, without memory."""

NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(name == "timm3d" and find_spec("timm") is None, reason="needs timm"))
    for name in TINY
]

GRIDS = {"swin_unetr_s": (1, 2, 2), "timm3d": (1, 2, 2)}
"""Tokens of the crop where (2, 3, 4) are too many voxels: a token of these is 32 wide."""

TOKEN_LEARNED_BY_MASKING = {"mask_token", "mask_value"}


def tiny(name: str, **overrides: object) -> nn.Module:
    torch.manual_seed(0)
    return create_backbone(name, **{**TINY[name], **overrides}).eval()


def crop(encoder: nn.Module, batch: int = 2, channels: int = 1) -> Tensor:
    sides = [n * encoder.token_stride_vox for n in grid_of(encoder.name)]
    return torch.rand(batch, channels, *sides, generator=torch.Generator().manual_seed(1))


def grid_of(name: str) -> tuple[int, int, int]:
    return GRIDS.get(name, (2, 3, 4))


def every_third(name: str) -> Tensor:
    mask = torch.zeros(2, prod(grid_of(name)), dtype=torch.bool)
    mask[:, ::3] = True
    return mask


def everything(features: Features) -> Tensor:
    parts = [features.tokens, *features.pyramid, *([] if features.cls is None else [features.cls])]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("grid", [(2, 3, 4), (3, 2, 5)])
@pytest.mark.parametrize("name", BACKBONES)
def test_shapes_are_those_that_the_encoder_announces(name: str, grid: tuple[int, int, int]) -> None:
    if name == "timm3d":
        pytest.importorskip("timm", exc_type=ImportError)
    with torch.device("meta"):
        encoder = create_backbone(name)
        sides = tuple(n * encoder.token_stride_vox for n in grid)
        features = encoder(torch.empty(2, 1, *sides))
    assert isinstance(encoder, Encoder)
    assert encoder.name == name
    assert features.grid == grid
    assert features.stride_mm == encoder.token_stride_vox * encoder.spacing_mm
    assert features.tokens.shape == (2, grid[0] * grid[1] * grid[2], encoder.dim)
    assert features.embedding().shape == (2, encoder.dim)
    assert [level.shape for level in features.pyramid] == [
        (2, channels, *(side // stride for side in sides))
        for channels, stride in zip(encoder.pyramid_channels, encoder.pyramid_strides_vox, strict=True)
    ]
    assert sorted(encoder.pyramid_strides_vox) == list(encoder.pyramid_strides_vox)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_pyramid_level_is_the_tokens_in_zyx_order(name: str) -> None:
    encoder = tiny(name)
    features = encoder(crop(encoder))
    torch.testing.assert_close(features.pyramid[-1].flatten(2).mT, features.tokens, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_two_evaluations_are_bit_equal_and_samples_do_not_mix(name: str) -> None:
    encoder = tiny(name, **({} if name.startswith(("resenc", "timm")) else {"drop_path": 0.5}))
    x = crop(encoder)
    assert torch.equal(everything(encoder(x)), everything(encoder(x)))
    torch.testing.assert_close(encoder(x[1:]).tokens, encoder(x).tokens[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_masked_voxels_leave_no_trace(name: str) -> None:
    encoder = tiny(name)
    x = crop(encoder)
    gz, gy, gx = grid_of(name)
    mask = torch.zeros(2, gz * gy * gx, dtype=torch.bool)
    mask[0, gx + 1] = mask[1, (gz - 1) * gy * gx] = True
    changed = x.clone()
    s = encoder.token_stride_vox
    changed[0, 0, :s, s : 2 * s, s : 2 * s] = 0.9  # token (0, 1, 1)
    changed[1, 0, (gz - 1) * s :, :s, :s] = 0.9  # token (gz - 1, 0, 0)
    assert not torch.allclose(encoder(changed).tokens, encoder(x).tokens, atol=1e-3)
    assert torch.equal(everything(encoder(changed, mask=mask)), everything(encoder(x, mask=mask)))
    assert not torch.allclose(encoder(x, mask=mask).tokens, encoder(x).tokens, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_does_not_read_as_air(name: str) -> None:
    encoder = tiny(name)
    air = torch.zeros_like(crop(encoder))
    mask = torch.zeros(2, prod(grid_of(name)), dtype=torch.bool)
    mask[:, 3] = True
    masked, seen = encoder(air, mask=mask).tokens[:, 3], encoder(air).tokens[:, 3]
    assert (masked - seen).norm() > min(0.1, 0.5 * masked.norm())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name: str, masked: bool) -> None:
    encoder = tiny(name).train()
    output = everything(encoder(crop(encoder), mask=every_third(name) if masked else None))
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(2)))
    without = {n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == (set() if masked else TOKEN_LEARNED_BY_MASKING & dict(encoder.named_parameters()).keys())


@pytest.mark.parametrize("name", NAMES)
def test_a_step_in_bf16_autocast_stays_finite(name: str) -> None:
    encoder = tiny(name).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = everything(encoder(crop(encoder), mask=every_third(name)))
    output.float().square().mean().backward()
    assert output.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_crop_that_does_not_fit_is_rejected_with_the_sizes_that_do(name: str) -> None:
    fits = (
        r"\(32, 32, 32\) or pad to \(64, 64, 64\)"
        if grid_of(name) == (1, 2, 2)
        else r"\(48, 48, 40\) or pad to \(56, 48, 48\)"
    )
    with pytest.raises(ValueError, match=rf"= \(50, 48, 44\) must be multiples.*{fits}"):
        tiny(name)(torch.zeros(1, 1, 50, 48, 44))
    with pytest.raises(ValueError, match="multiples of the token stride, 8 voxels"):
        token_grid((0, 8, 8), 8)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_channel_is_seen(name: str) -> None:
    encoder = tiny(name, in_channels=2)
    x = crop(encoder, batch=1, channels=2)
    changed = x.clone()
    changed[:, 1] = 1 - changed[:, 1]
    tokens = encoder(x).tokens
    assert (encoder(changed).tokens - tokens).abs().max() > 1e-3 * tokens.abs().max()


@pytest.mark.parametrize("name", [name for name in TINY if name.startswith(("vit3d", "primus"))])
def test_keeping_all_tokens_in_another_order_permutes_the_output(name: str) -> None:
    encoder = tiny(name)
    x = crop(encoder)
    keep = torch.stack([torch.randperm(24), torch.randperm(24)])
    whole, kept = encoder(x), encoder(x, keep=keep)
    expected = whole.tokens.gather(1, keep[..., None].expand(-1, -1, encoder.dim))
    torch.testing.assert_close(kept.tokens, expected, rtol=1e-4, atol=1e-5)
    assert kept.pyramid == ()
    assert kept.grid == (2, 3, 4)


@pytest.mark.parametrize("name", ["resenc_tiny", "resenc_l", "swin_unetr_s", "convnext3d_atto"])
def test_keep_is_rejected_with_the_way_out(name: str) -> None:
    encoder = tiny(name)
    assert not encoder.supports_keep
    with pytest.raises(ValueError, match="hide them with `mask`"):
        encoder(crop(encoder), keep=torch.zeros(2, 2, dtype=torch.int64))


def test_an_unknown_name_or_option_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown backbone 'vit3d_nono'; did you mean 'vit3d_nano'"):
        create_backbone("vit3d_nono")
    with pytest.raises(ValueError, match="no option 'pach_vox'; did you mean 'patch_vox'"):
        create_backbone("vit3d_nano", pach_vox=16)


def test_a_config_and_a_keyword_build_the_same_encoder() -> None:
    config, values = backbone_config("vit3d_nano")
    assert config(**{**values, "patch_vox": 16}) == create_backbone("vit3d_nano", patch_vox=16).config


def test_listing_names_imports_no_torch() -> None:
    code = "import sys, lungssl_backbones as b; print(*b.list_backbones(), 'torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert shown == [*list_backbones(), "False"]
