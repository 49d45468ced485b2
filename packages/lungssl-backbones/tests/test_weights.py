import hashlib
import json
from pathlib import Path

import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_backbones.resenc import ResEnc
from lungssl_backbones.vit3d import Vit3d
from lungssl_backbones.weights import load_encoder, load_weights, read_metadata, save_encoder
from safetensors.torch import save_file
from torch import nn

CONFIGS = [
    Vit3d.Config(dim=24, depth=2, heads=2, wavelengths_mm=(40.0, 900.0)),
    ResEnc.Config(widths=(8, 16), depths=(1, 2), stem_norm="instance"),
]


def tiny(seed: int = 0) -> Vit3d:
    torch.manual_seed(seed)
    return Vit3d.Config(dim=24, depth=2, heads=2).build()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_is_bit_equal(config: Vit3d.Config | ResEnc.Config, dtype: torch.dtype, tmp_path: Path) -> None:
    encoder = config.build().to(dtype)
    save_encoder(encoder, tmp_path / "e.safetensors", extra={"note": "Lübeck"})
    again = load_encoder(tmp_path / "e.safetensors")
    assert again.config == config
    assert again.name == encoder.name
    assert again.state_dict().keys() == encoder.state_dict().keys()
    for name, tensor in encoder.state_dict().items():
        assert again.state_dict()[name].dtype == dtype
        assert torch.equal(again.state_dict()[name], tensor)
    assert read_metadata(tmp_path / "e.safetensors")["extra"] == {"note": "Lübeck"}
    assert [path.name for path in tmp_path.iterdir()] == ["e.safetensors"]


def test_a_file_from_before_an_option_existed_gets_its_default(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    encoder = tiny()
    config = {"dim": 24, "depth": 2, "heads": 2, "mlp_ratio": 4.0, "patch_vox": 8, "registers": 4}  # 0.1.0's, in part
    metadata = {"format": "lungssl-encoder", "format_version": "1", "backbone": "vit3d_s", "extra": "{}"}
    save_file(encoder.state_dict(), path, {**metadata, "config": json.dumps({**config, "drop_path": 0.0})})
    assert load_encoder(path).config == encoder.config


def test_integer_tables_keep_their_type_and_do_not_count(tmp_path: Path) -> None:
    encoder = create_backbone("swin_unetr_s", feature_size=12, depths=(1, 1, 1, 1), window=2).to(torch.bfloat16)
    save_encoder(encoder, tmp_path / "e.safetensors")
    again = load_encoder(tmp_path / "e.safetensors")
    assert {t.dtype for t in again.state_dict().values()} == {torch.bfloat16, torch.int64}
    floats = {name: t for name, t in encoder.state_dict().items() if t.is_floating_point()}
    report = load_weights(again, floats)
    assert report.coverage == 1
    assert all(name.endswith("relative_position_index") for name in report.missing)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e.safetensors"
    save_encoder(tiny(), path)
    before = path.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_encoder(tiny(seed=1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "encoder.", "teacher.encoder.", "module.student.backbone."]
)
def test_wrapper_names_are_stripped_and_heads_are_reported(prefix: str) -> None:
    source, target = tiny(1), tiny(2)
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    report = load_weights(target, {**state, "head.weight": torch.ones(3)})
    assert report.coverage == 1
    assert report.unexpected == ("head.weight",)
    assert report.missing == report.mismatched == ()
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in target.state_dict().items())


def test_a_file_of_any_writer_loads_with_its_sha256(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file(tiny(1).state_dict(), path)
    report = load_weights(tiny(2), path)
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="not written by save_encoder; build the encoder with create_backbone"):
        load_encoder(path)


def test_low_coverage_raises_with_counts_and_names_and_changes_nothing() -> None:
    state = tiny(1).state_dict()
    state["patch_embed.weight"] = torch.zeros(24, 64)
    del state["blocks.1.qkv.weight"]
    target = tiny(2)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_weights(target, {**state, "other": torch.ones(1)})
    assert "1 missing (blocks.1.qkv.weight)" in str(error.value)
    assert "1 of another shape (patch_embed.weight: file (24, 64), encoder (24, 512))" in str(error.value)
    assert "1 unexpected (other)" in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_coverage_is_the_share_of_numbers_loaded() -> None:
    target = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4, bias=False))  # 15 + 5 + 20 numbers
    report = load_weights(target, {"1.weight": torch.full((4, 5), 7.0)}, min_coverage=0.5)
    assert report.coverage == 0.5
    assert report.missing == ("0.weight", "0.bias")
    assert target[1].weight.unique().tolist() == [7.0]


def test_student_and_teacher_in_one_file_are_not_guessed_between() -> None:
    state = {f"{who}.{name}": t for who in ("student", "teacher") for name, t in tiny().state_dict().items()}
    with pytest.raises(ValueError, match=r"both 'student.cls_token' and 'teacher.cls_token' are 'cls_token'"):
        load_weights(tiny(), state)


def test_pickles_torn_files_newer_formats_and_strange_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pickled ones can run code"):
        load_encoder(tmp_path / "model.pt")
    path = tmp_path / "e.safetensors"
    save_encoder(tiny(), path)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_weights(tiny(), torn)
    metadata = {"format": "lungssl-encoder", "format_version": "2", "config": "{}", "extra": "{}"}
    save_file({"w": torch.ones(1)}, path, metadata)
    with pytest.raises(ValueError, match="encoder format 2, this lungssl-backbones reads 1"):
        load_encoder(path)
    metadata |= {"format_version": "1", "backbone": "os:system"}
    save_file({"w": torch.ones(1)}, path, metadata)
    with pytest.raises(ValueError, match="unknown backbone 'os:system'"):
        load_encoder(path)
    with pytest.raises(ValueError, match="unwrap the encoder"):
        save_encoder(nn.Sequential(create_backbone("vit3d_nano")), path)
