"""T27: what a checkpoint of another wrapper, crop or number of channels does to an encoder."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lungssl_backbones import BACKBONES, create_backbone
from lungssl_backbones.names import with_aliases, without_aliases
from lungssl_backbones.pretrained import import_checkpoint, in_projection, load_pretrained
from lungssl_backbones.weights import load_weights, save_encoder
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


@pytest.mark.parametrize(("name", "option"), [("vit3d_nano", "patch_vox"), ("convnext3d_atto", "stem_vox")])
@pytest.mark.parametrize(("theirs", "ours"), [(4, 2), (2, 4), (8, 4), (6, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_another_patch_is_no_other_number_of_channels(
    name: str, option: str, theirs: int, ours: int, channels: int
) -> None:
    source = tiny(name, 1, **{option: theirs, "in_channels": channels})
    target = tiny(name, 2, **{option: ours})
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    sizes = re.escape(f"for patches of {(theirs,) * 3} voxels (z, y, x), the encoder's, ")
    with pytest.raises(ValueError, match=rf"{sizes}.* for {re.escape(str((ours,) * 3))}; .* {option}={theirs}"):
        load_pretrained(target, source.state_dict(), min_coverage=0.0)
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())


def test_primus_patches_differ_by_their_kernels() -> None:
    source = tiny("primus_ti", 1, patch_vox=8, crop_vox=(32, 32, 32))
    with pytest.raises(ValueError, match=r"patches of \(8, 8, 8\) voxels .* for \(4, 4, 4\); build .* patch_vox=8"):
        load_pretrained(tiny("primus_ti", 2), source.state_dict(), min_coverage=0.0)


def test_more_than_four_channels_of_flat_patches_must_be_said() -> None:
    source, target = tiny("vit3d_nano", 1, in_channels=8), tiny("vit3d_nano", 2)
    with pytest.raises(ValueError, match="more than 4 channels, say how many with in_channels"):
        load_pretrained(target, source.state_dict())
    assert len(load_pretrained(target, source.state_dict(), in_channels=8).reshaped) == 1
    with pytest.raises(ValueError, match=r"\(24, 512\) has 8 channels of the encoder's patch, expected in_channels=1"):
        load_pretrained(target, source.state_dict(), in_channels=1)
    # As long as one channel of patches of 8: only the number that is said can tell.
    with pytest.raises(ValueError, match="has 8 channels of the encoder's patch, expected in_channels=1"):
        load_pretrained(source, tiny("vit3d_nano", 3, patch_vox=8).state_dict(), in_channels=1)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_layer_that_reads_the_crop_is_the_one_that_channels_change(name: str) -> None:
    if name == "timm3d":
        pytest.importorskip("timm", exc_type=ImportError)
    with torch.device("meta"):
        one, two = create_backbone(name).state_dict(), create_backbone(name, in_channels=2)
    changed = [key for key, tensor in two.state_dict().items() if tensor.shape != one[key].shape]
    assert changed == [f"{in_projection(two)}.weight"]


@pytest.mark.parametrize("leaf", ["weight", "bias"])
@pytest.mark.parametrize("name", TINY)
def test_weights_without_the_layer_that_reads_the_crop_are_refused(name: str, leaf: str) -> None:
    state, target = tiny(name, 1).state_dict(), tiny(name, 2)
    layer = f"{in_projection(target)}.{leaf}"
    del state[layer]
    with pytest.raises(ValueError, match=rf"{re.escape(layer)} must be loaded, found nothing for it"):
        load_pretrained(target, state, min_coverage=0.0)
    assert load_weights(target, state, min_coverage=0.0).missing == (layer,)


def test_a_first_layer_of_another_shape_is_refused_where_reshaping_is_forbidden() -> None:
    state = tiny("resenc_l", 1, in_channels=2).state_dict()
    with pytest.raises(
        ValueError, match=r"must be loaded, found stem.*: file \(4, 2, 3, 3, 3\), encoder \(4, 1, 3, 3, 3\)"
    ):
        load_pretrained(tiny("resenc_l", 2), state, min_coverage=0.0, allow_reshape=())


def test_a_table_shorter_than_the_registers_is_refused() -> None:
    target = tiny("primus_ti", 1, registers=6)
    state = {**target.state_dict(), "eva.pos_embed": torch.zeros(1, 4, 36)}
    with pytest.raises(ValueError, match="a table of 4 positions leaves no grid beside the encoder's 6 registers"):
        load_pretrained(target, state)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: torch.full_like(t, torch.nan), r"numbers are not finite in torch\.float32; .* take an earlier"),
        (lambda t: t.double() + 1e300, r"numbers are not finite in torch\.float32"),
        (lambda t: t.to(torch.complex64), r"is torch\.complex64, expected torch\.float32 or its like; quantised"),
        (lambda t: t.to(torch.int8), r"is torch\.int8, expected torch\.float32"),
        (lambda t: t.to_sparse(), "is sparse or without data, expected a dense tensor"),
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_what_is_no_weight_is_refused(spoil: Callable[[Tensor], Tensor], message: str, adapted: bool) -> None:
    options = {"in_channels": 2} if adapted else {}
    spoiled = {key: spoil(tensor) for key, tensor in tiny("primus_ti", 1, **options).state_dict().items()}
    target = tiny("primus_ti", 2)
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_pretrained(target, spoiled)
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())


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


def test_files_that_are_no_checkpoint_or_torn_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    for content in (b"", b"hello\n", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>"):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"begins with {re.escape(repr(content[:4]))}, not as files of torch.save"
        ):
            import_checkpoint(path)
    state = tiny("vit3d_nano", 1).state_dict()
    for zipped in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for length in (4, 10, 1000, len(whole) // 2, len(whole) - 10):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"not a whole checkpoint of torch\.save .*; copy or export it again"):
                import_checkpoint(path)
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        import_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        import_checkpoint(tmp_path / "none.pth")


def test_tensors_without_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    numbered = dict(enumerate(tiny("vit3d_nano", 1).state_dict().values()))
    for content in (numbered, {"state_dict": numbered}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="calls a tensor 0, expected names such as"):
            import_checkpoint(path)
    torch.save({1: 2}, path)
    with pytest.raises(ValueError, match="no weights in its usual places; name one of 1"):
        import_checkpoint(path)


def test_a_path_may_be_text_and_a_folder_is_no_file(tmp_path: Path) -> None:
    encoder = create_backbone("resenc_tiny")
    save_encoder(encoder, tmp_path / "model.safetensors")
    assert load_pretrained(create_backbone("resenc_tiny"), str(tmp_path / "model.safetensors")).coverage == 1.0
    with pytest.raises(ValueError, match=r"is a folder, expected a file of weights; give .*model\.safetensors"):
        load_pretrained(encoder, tmp_path)
