"""The key-compatible encoders compute what the networks that they are named after compute."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_backbones.pretrained import load_pretrained
from safetensors import safe_open
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
_spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
assert _spec is not None and _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

OURS = {
    "resenc_l": ("resenc_l", {"widths": (4, 8, 12, 12), "depths": (1, 2, 1, 2)}),
    "primus": ("primus_s", {"dim": 72, "heads": 2, "depth": 2, "crop_vox": (24, 16, 32)}),
    "primus_registers": ("primus_s", {"dim": 72, "heads": 2, "depth": 2, "crop_vox": (24, 16, 32), "registers": 2}),
    "swin_unetr": ("swin_unetr_s", {"feature_size": 12, "depths": (2, 2, 1, 1)}),
    "swin_unetr_v2": (
        "swin_unetr_s",
        {"feature_size": 12, "depths": (2, 2, 1, 1), "v2": True, "merging": "mergingv2", "window": 3},
    ),
}
CROPS = {"swin_unetr": (1, 1, 32, 32, 64), "swin_unetr_v2": (1, 1, 32, 32, 64)}


def ours(name: str) -> nn.Module:
    entry, config = OURS[name]
    torch.manual_seed(0)
    return create_backbone(entry, **config).eval()


@torch.no_grad()
def maps(encoder: nn.Module, name: str) -> list[Tensor]:
    return list(encoder(golden.volume(CROPS.get(name, (2, 1, 24, 16, 32)))).pyramid)


@pytest.mark.parametrize("name", OURS)
def test_forward_equals_the_peer_s_stored_output(name: str) -> None:
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
        expected = [file.get_tensor(f"output{i}") for i in range(len(file.keys()))]
    encoder = ours(name)
    indices = {k for k in shapes if k.endswith("_index")}  # tables of integers, not weights
    state = {key: golden.weight(key, tuple(shape)) for key, shape in shapes.items() if key not in indices}
    report = load_pretrained(encoder, state)
    assert set(report.missing) == indices | ({"mask_value"} & dict(encoder.named_parameters()).keys())
    assert all(key.startswith(("out.", "encoder")) for key in report.unexpected)  # SwinUNETR's skip convolutions
    found = golden.thin(maps(encoder, name))
    assert [f.shape for f in found] == [e.shape for e in expected]
    assert min(e.std() for e in expected) > 0.3
    assert max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)) < 1e-5


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OURS)
def test_forward_equals_the_peer_s_and_its_golden_file_is_current(name: str) -> None:
    distribution, make = golden.PEERS[name]
    pytest.importorskip(distribution.replace("-", "_"), exc_type=ImportError)
    if distribution == "monai":
        pytest.importorskip("einops")  # of MONAI's extras
    with torch.no_grad():
        peer, expected = make()
    encoder = ours(name)
    report = load_pretrained(encoder, peer.state_dict())
    assert report.mismatched == ()
    assert set(report.missing) <= {"mask_value"}
    assert max(float((f - e).abs().max()) for f, e in zip(maps(encoder, name), expected, strict=True)) < 1e-5
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        for i, output in enumerate(golden.thin(expected)):
            torch.testing.assert_close(file.get_tensor(f"output{i}"), output, rtol=0, atol=1e-5)


def test_the_legacy_order_of_merging_takes_two_neighbours_twice() -> None:
    encoder = create_backbone("swin_unetr_s", feature_size=12, depths=(1, 1, 1, 1), merging="legacy")
    merge = encoder.swinViT.layers1[0].downsample
    cube = torch.arange(8.0).reshape(1, 2, 2, 2, 1)  # 4 z + 2 y + x
    taken = [float(cube[0, i, j, k, 0]) for i, j, k in merge.neighbours]
    assert taken == [0, 4, 2, 1, 5, 2, 1, 7]
