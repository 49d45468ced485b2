"""T27: what a checkpoint of another wrapper, crop or number of channels does to an encoder."""

from pathlib import Path

import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_backbones.names import with_aliases, without_aliases
from lungssl_backbones.pretrained import import_checkpoint, load_pretrained
from safetensors.torch import save_file
from torch import Tensor, nn

TINY = {
    "vit3d_nano": {"dim": 24, "depth": 1, "heads": 2, "patch_vox": 4},
    "resenc_tiny": {"widths": (8, 16), "depths": (1, 1)},
    "resenc_l": {"widths": (4, 8), "depths": (1, 2)},
    "primus_ti": {"dim": 36, "heads": 2, "depth": 1, "patch_vox": 4, "crop_vox": (16, 16, 16)},
    "swin_unetr_s": {"feature_size": 12, "depths": (1, 1, 1, 1), "window": 2},
    "convnext3d_atto": {"widths": (8, 16), "depths": (1, 1), "stem_vox": 2, "kernel_vox": 3},
}


def tiny(name: str, seed: int, **overrides: object) -> nn.Module:
    torch.manual_seed(seed)
    return create_backbone(name, **{**TINY[name], **overrides}).eval()


def crop(encoder: nn.Module, channels: int = 1) -> Tensor:
    sides = [n * encoder.token_stride_vox for n in (2, 1, 2)]
    return torch.rand(1, channels, *sides, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.encoder."])
@pytest.mark.parametrize("name", TINY)
def test_every_encoder_loads_its_own_weights_under_any_wrapper(name: str, prefix: str) -> None:
    source, target = tiny(name, 1), tiny(name, 2)
    report = load_pretrained(target, {prefix + key: tensor for key, tensor in source.state_dict().items()})
    assert report.coverage == 1
    assert report.missing == report.unexpected == report.mismatched == report.reshaped == ()
    assert torch.equal(target(crop(target)).tokens, source(crop(source)).tokens)


@pytest.mark.parametrize("spelling", ["swin_vit.", "module.swinViT.", "module.", "model.swin_vit.", "encoder."])
def test_swin_weights_load_under_all_their_spellings(spelling: str) -> None:
    source, target = tiny("swin_unetr_s", 1), tiny("swin_unetr_s", 2)
    state = {}
    for key, tensor in source.state_dict().items():
        key = key.removeprefix("swinViT.")
        if spelling in ("module.", "encoder."):  # as MONAI's pretraining code wrote them
            key = key.replace("linear", "fc")
        if spelling == "encoder.":
            key = key.replace("s1.0.", "s1.0.0.").replace("s2.0.", "s2.0.0.")
        state[spelling + key] = tensor
    assert load_pretrained(target, state).coverage == 1
    assert torch.equal(target(crop(target)).tokens, source(crop(source)).tokens)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("channels", [(1, 3), (3, 2)])
def test_the_same_picture_in_every_channel_gives_the_same_features(name: str, channels: tuple[int, int]) -> None:
    before, after = channels
    source, target = tiny(name, 1, in_channels=before), tiny(name, 2, in_channels=after)
    report = load_pretrained(target, source.state_dict())
    assert report.coverage == 1
    assert len(report.reshaped) == 1
    x = crop(source)
    expected = source(x.expand(-1, before, -1, -1, -1)).tokens
    torch.testing.assert_close(target(x.expand(-1, after, -1, -1, -1)).tokens, expected, rtol=1e-4, atol=1e-4)


def test_positions_of_a_crop_of_96_serve_a_crop_of_160() -> None:
    small, large = {"patch_vox": 8, "crop_vox": (96, 96, 96)}, {"patch_vox": 8, "crop_vox": (160, 160, 160)}
    source, target = tiny("primus_ti", 1, **small), tiny("primus_ti", 2, **large)
    with torch.no_grad():  # a ramp along x: linear interpolation keeps it, up to the clamped ends
        ramp = torch.arange(12) + 0.5
        source.eva.pos_embed.copy_(ramp.expand(12, 12, 12).flatten()[None, :, None].expand(1, -1, 36))
    report = load_pretrained(target, source.state_dict())
    assert report.coverage == 1
    assert report.reshaped == ("eva.pos_embed: file (1, 1728, 36), encoder (1, 8000, 36)",)
    resized = target.eva.pos_embed.unflatten(1, (20, 20, 20))
    expected = ((torch.arange(20) + 0.5) * 12 / 20).clamp(0.5, 11.5)
    torch.testing.assert_close(resized[0, 3, 17, :, 5], expected)
    torch.testing.assert_close(resized, resized[:, :1, :1].expand_as(resized))


def test_positions_of_a_flat_crop_need_their_grid() -> None:
    source, target = tiny("primus_ti", 1, crop_vox=(8, 16, 24)), tiny("primus_ti", 2)
    with pytest.raises(ValueError, match=r"48 positions are no cube; say which \(z, y, x\) grid"):
        load_pretrained(target, source.state_dict())
    assert load_pretrained(target, source.state_dict(), position_grid=(2, 4, 6)).coverage == 1
    with pytest.raises(ValueError, match=r"a table of 48 positions is not 0 tokens and a grid of \(2, 4, 7\)"):
        load_pretrained(target, source.state_dict(), position_grid=(2, 4, 7))


def test_low_coverage_raises_and_reshaping_can_be_forbidden() -> None:
    source = tiny("primus_ti", 1, patch_vox=8, crop_vox=(48, 48, 48))
    target = tiny("primus_ti", 2, patch_vox=8)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    state = {name: tensor for name, tensor in source.state_dict().items() if "mlp" not in name}
    with pytest.raises(ValueError, match=r"less than 95%.*missing \(eva.blocks.0.mlp.fc1_g.weight"):
        load_pretrained(target, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    report = load_pretrained(target, source.state_dict(), allow_reshape=(), min_coverage=0.5)
    assert report.mismatched == ("eva.pos_embed: file (1, 216, 36), encoder (1, 8, 36)",)


def test_another_patch_is_no_other_number_of_channels() -> None:
    with pytest.raises(ValueError, match="1 of another shape"):
        load_pretrained(tiny("vit3d_nano", 1), tiny("vit3d_nano", 2, patch_vox=2).state_dict(), min_coverage=0.99)


def test_second_names_are_dropped_unless_they_disagree() -> None:
    source, target = tiny("resenc_l", 1), tiny("resenc_l", 2)
    state = with_aliases(source.state_dict())
    assert "stages.1.blocks.0.skip.1.all_modules.1.bias" in state
    assert without_aliases(state).keys() == source.state_dict().keys()
    network = {f"encoder.{name}": tensor for name, tensor in state.items()}
    network |= {f"decoder.encoder.{name}": tensor for name, tensor in state.items()}
    assert load_pretrained(target, network).coverage == 1
    assert torch.equal(target(crop(target)).tokens, source(crop(source)).tokens)
    network["encoder.stem.convs.0.all_modules.0.weight"] = torch.zeros(4, 1, 3, 3, 3)
    with pytest.raises(ValueError, match="are one tensor in dynamic-network-architectures, but differ here"):
        load_pretrained(target, network)


def test_a_safetensors_path_is_reported_with_its_sha256(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(tiny("vit3d_nano", 1).state_dict(), path)
    report = load_pretrained(tiny("vit3d_nano", 2), path)
    assert report.sha256 is not None
    assert len(report.sha256) == 64
    with pytest.raises(ValueError, match=rf"{path} covers .* less than"):
        load_pretrained(tiny("resenc_tiny", 2), path)


class _Foreign:
    """Something that only its own code can read."""


def test_foreign_checkpoints_are_read_without_running_their_code(tmp_path: Path) -> None:
    state = tiny("vit3d_nano", 1).state_dict()
    path = tmp_path / "c.pth"
    for content in (state, {"network_weights": state, "epoch": 3}, {"state_dict": state}, {"model": state}):
        torch.save(content, path)
        assert import_checkpoint(path).keys() == state.keys()
    torch.save({"teacher": state, "student": state, "epoch": 3}, path)
    assert import_checkpoint(path, key="teacher").keys() == state.keys()
    with pytest.raises(ValueError, match="no weights in its usual places; name one of teacher, student, epoch"):
        import_checkpoint(path)
    with pytest.raises(ValueError, match="no entry 'ema'; it has teacher, student, epoch"):
        import_checkpoint(path, key="ema")
    torch.save({"state_dict": state, "args": _Foreign()}, path)
    with pytest.raises(ValueError, match="only code of its own can read, and is not opened"):
        import_checkpoint(path)
