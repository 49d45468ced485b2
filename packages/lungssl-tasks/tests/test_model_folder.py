import json
from pathlib import Path

import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_tasks.model_folder import ModelFolderError, load_model, save_model
from lungssl_tasks.segmentation import SegmentationModel

LABELS = {1: "RUL", 2: "RML"}


def _model(seed: int = 0) -> SegmentationModel:
    torch.manual_seed(seed)
    encoder = create_backbone("resenc_tiny", widths=(8, 16, 16), depths=(1, 1, 1))
    return SegmentationModel.Config(base_width=8, max_width=16).build(encoder, 2).eval()


def _save(folder: Path, model: SegmentationModel) -> None:
    save_model(folder, model, labels=LABELS, spacing_mm=(3.0, 3.5, 4.0), roi_vox=(16, 24, 32), extra={"run": "a"})


@pytest.mark.parametrize("name", ["vit3d_nano", "resenc_tiny"])
def test_a_loaded_model_gives_the_same_logits_to_the_bit(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SegmentationModel.Config(base_width=8).build(create_backbone(name), 2).eval()
    _save(tmp_path / "runs" / "model", model)
    loaded, card = load_model(tmp_path / "runs" / "model")
    image = torch.rand(1, 1, 16, 24, 32)
    assert torch.equal(loaded(image), model(image))
    assert not loaded.training
    assert (card.backbone, card.labels, card.extra) == (name, LABELS, {"run": "a"})
    assert (card.spacing_mm, card.roi_vox) == ((3.0, 3.5, 4.0), (16, 24, 32))
    assert sorted(p.name for p in (tmp_path / "runs" / "model").iterdir()) == ["model.json", "model.safetensors"]


def test_saving_again_replaces_the_model_and_leaves_nothing_else(tmp_path: Path) -> None:
    _save(tmp_path / "model", _model(0))
    newer = _model(1)
    _save(tmp_path / "model", newer)
    assert torch.equal(load_model(tmp_path / "model")[0].head.weight, newer.head.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_model_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = _model(0)
    _save(tmp_path / "model", old)

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("lungssl_tasks.model_folder.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        _save(tmp_path / "model", _model(1))
    assert torch.equal(load_model(tmp_path / "model")[0].head.weight, old.head.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_no_model(name: str, tmp_path: Path) -> None:
    _save(tmp_path / "model", _model())
    (tmp_path / "model" / name).unlink()
    with pytest.raises(ModelFolderError, match=f"not a model folder: {name} is missing; give the folder"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "lungssl-segmentation-9"}, "format 'lungssl-segmentation-9'"),
        ({"hu_window": [-1024, 600]}, r"trained on the HU window \[-1024, 600\]"),
        ({"backbone": {"name": "resenc_tiny", "config": {"depth": 9}}}, "cannot build.*depth"),
        ({"decoder": {"base_width": 16}}, "does not fit model.json"),
    ],
)
def test_a_card_of_another_version_is_named(change: dict, message: str, tmp_path: Path) -> None:
    _save(tmp_path / "model", _model())
    path = tmp_path / "model" / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}))
    with pytest.raises(ModelFolderError, match=message):
        load_model(tmp_path / "model")


def test_cut_off_weights_are_an_error_not_a_crash(tmp_path: Path) -> None:
    _save(tmp_path / "model", _model())
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFolderError, match="does not fit"):
        load_model(tmp_path / "model")


def test_a_folder_of_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").write_text("three years of work")
    with pytest.raises(ModelFolderError, match="exists and is not a model folder"):
        _save(tmp_path, _model())
    assert (tmp_path / "thesis.docx").exists()


def test_labels_that_do_not_name_each_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"labels are \[1\], the model's classes are 1 to 2"):
        save_model(tmp_path / "m", _model(), labels={1: "RUL"}, spacing_mm=(3.0, 3.0, 3.0), roi_vox=(16, 16, 16))
