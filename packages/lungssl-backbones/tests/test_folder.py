import json
from pathlib import Path

import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_backbones.folder import ModelCard, from_pretrained, save_pretrained

CARD = ModelCard(
    title="Tiny: a test",
    method="Random weights.",
    data="None: 0 patients.",
    licence="cc-by-4.0",
)


def test_a_folder_holds_weights_config_and_card_and_loads_again(tmp_path: Path) -> None:
    encoder = create_backbone("vit3d_nano", dim=24, depth=1, heads=2, patch_vox=4, spacing_mm=2.0).eval()
    save_pretrained(encoder, tmp_path / "m", CARD)
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    again = from_pretrained(tmp_path / "m").eval()
    x = torch.rand(1, 1, 8, 12, 4)
    assert torch.equal(again(x).tokens, encoder(x).tokens)
    config = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    assert config["backbone"] == "vit3d_nano"
    assert config["config"]["patch_vox"] == 4
    assert config["input"] == "HU clipped to [-1000, 400], scaled to [0, 1]"


def test_the_card_says_what_a_reader_must_know(tmp_path: Path) -> None:
    encoder = create_backbone("resenc_tiny")
    save_pretrained(encoder, tmp_path, CARD)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    header, body = text.removeprefix("---\n").split("---\n", 1)
    assert header.splitlines()[:2] == ['license: "cc-by-4.0"', "library_name: lungssl"]
    for expected in ("# Tiny: a test", "Random weights.", "0 patients", "Research use only", "Not a medical device"):
        assert expected in body
    assert "`resenc_tiny`, 0.9 million parameters; tokens of 8 voxels; made for voxels of 1.5 mm" in body
    assert "## Citation" not in body


def test_an_empty_paragraph_or_a_full_folder_is_refused(tmp_path: Path) -> None:
    encoder = create_backbone("resenc_tiny")
    with pytest.raises(ValueError, match="card's data is empty; say it"):
        save_pretrained(encoder, tmp_path, ModelCard(title="t", method="m", data="", licence="l"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty; name another folder, or pass overwrite=True"):
        save_pretrained(encoder, tmp_path, CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    save_pretrained(encoder, tmp_path, CARD, overwrite=True)
    assert (tmp_path / "model.safetensors").exists()
