"""The contract of `Encoder`, over the whole of BACKBONES: an entry is tested the day it is added."""

import subprocess
import sys

import pytest
import torch
from lungssl_backbones import BACKBONES, backbone_config, create_backbone, list_backbones
from lungssl_backbones.encoder import Encoder, Features, token_grid
from torch import Tensor, nn

SMALL = ["vit3d_nano", "vit3d_ti", "resenc_tiny"]
"""What a CPU runs within seconds; every other entry goes through the shape contract without memory, on `meta`."""

TOKEN_LEARNED_BY_MASKING = {"mask_token", "mask_value"}


def small(name: str, **overrides: object) -> nn.Module:
    torch.manual_seed(0)
    return create_backbone(name, **overrides).eval()


def crop(encoder: nn.Module, grid: tuple[int, int, int] = (2, 3, 4), batch: int = 2) -> Tensor:
    sides = [n * encoder.token_stride_vox for n in grid]
    return torch.rand(batch, 1, *sides, generator=torch.Generator().manual_seed(1))


def everything(features: Features) -> Tensor:
    parts = [features.tokens, *features.pyramid, *([] if features.cls is None else [features.cls])]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("grid", [(2, 3, 4), (3, 2, 5)])
@pytest.mark.parametrize("name", BACKBONES)
def test_shapes_are_those_that_the_encoder_announces(name: str, grid: tuple[int, int, int]) -> None:
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


@pytest.mark.parametrize("name", SMALL)
def test_the_last_pyramid_level_is_the_tokens_in_zyx_order(name: str) -> None:
    encoder = small(name)
    features = encoder(crop(encoder))
    torch.testing.assert_close(features.pyramid[-1].flatten(2).mT, features.tokens, rtol=0, atol=0)


@pytest.mark.parametrize("name", SMALL)
def test_two_evaluations_are_bit_equal_and_samples_do_not_mix(name: str) -> None:
    encoder = small(name, **({"drop_path": 0.5} if name.startswith("vit") else {}))
    x = crop(encoder)
    assert torch.equal(everything(encoder(x)), everything(encoder(x)))
    torch.testing.assert_close(encoder(x[1:]).tokens, encoder(x).tokens[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_masked_voxels_leave_no_trace(name: str) -> None:
    encoder = small(name)
    x = crop(encoder)
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[0, 5] = mask[1, 12] = True
    changed = x.clone()
    s = encoder.token_stride_vox
    changed[0, 0, :s, s : 2 * s, s : 2 * s] = 0.9  # token 5 of a (2, 3, 4) grid is (0, 1, 1)
    changed[1, 0, s:, :s, :s] = 0.9  # token 12 is (1, 0, 0)
    assert not torch.allclose(encoder(changed).tokens, encoder(x).tokens, atol=1e-3)
    assert torch.equal(everything(encoder(changed, mask=mask)), everything(encoder(x, mask=mask)))
    assert not torch.allclose(encoder(x, mask=mask).tokens, encoder(x).tokens, atol=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_a_mask_does_not_read_as_air(name: str) -> None:
    encoder = small(name)
    air = torch.zeros_like(crop(encoder))
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[:, 7] = True
    assert (encoder(air, mask=mask).tokens[:, 7] - encoder(air).tokens[:, 7]).norm() > 0.1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_every_parameter(name: str, masked: bool) -> None:
    encoder = small(name).train()
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[:, ::3] = True
    output = everything(encoder(crop(encoder), mask=mask if masked else None))
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(2)))
    without = {n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == (set() if masked else TOKEN_LEARNED_BY_MASKING & dict(encoder.named_parameters()).keys())


@pytest.mark.parametrize("name", SMALL)
def test_a_step_in_bf16_autocast_stays_finite(name: str) -> None:
    encoder = small(name).train()
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[:, ::3] = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = everything(encoder(crop(encoder), mask=mask))
    output.float().square().mean().backward()
    assert output.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_a_crop_that_does_not_fit_is_rejected_with_the_sizes_that_do(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"= \(50, 48, 44\) must be multiples.*\(48, 48, 40\) or pad to \(56, 48, 48\)"
    ):
        small(name)(torch.zeros(1, 1, 50, 48, 44))
    with pytest.raises(ValueError, match="multiples of the token stride, 8 voxels"):
        token_grid((0, 8, 8), 8)


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
