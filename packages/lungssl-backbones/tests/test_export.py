import json
from pathlib import Path

import pytest
import torch
from lungssl_backbones import create_backbone, export
from lungssl_backbones.export import adaptation_plan, peer_state_dict, save_nnssl, save_program
from lungssl_backbones.pretrained import import_checkpoint, load_pretrained
from safetensors import safe_open
from torch import nn

GOLDEN = Path(__file__).parent / "golden"
RESENC = {"widths": (4, 8, 12, 12), "depths": (1, 2, 1, 2)}
PRIMUS = {"dim": 72, "heads": 2, "depth": 2, "crop_vox": (24, 16, 32)}
PRIMUS_S = {"depth": 12, "crop_vox": (16, 24, 16)}
SWIN = {"feature_size": 12, "depths": (2, 2, 1, 1), "window": 3}


def tiny(name: str, seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return create_backbone(name, **config).eval()


@pytest.mark.parametrize(
    ("golden", "prefix", "name", "config"),
    [
        ("resenc_l", "encoder.", "resenc_l", RESENC),
        ("primus", "", "primus_s", PRIMUS),
        ("swin_unetr_v2", "", "swin_unetr_s", {**SWIN, "v2": True}),
    ],
)
def test_names_and_shapes_are_exactly_the_peer_s(golden: str, prefix: str, name: str, config: dict) -> None:
    with safe_open(GOLDEN / f"{golden}.safetensors", framework="pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
    expected = {prefix + key: tuple(shape) for key, shape in shapes.items()}
    if golden == "swin_unetr_v2":
        expected = {key: shape for key, shape in expected.items() if key.startswith("swinViT.")}
    found = {key: tuple(tensor.shape) for key, tensor in peer_state_dict(tiny(name, **config)).items()}
    assert found == expected


@pytest.mark.parametrize(
    ("name", "config", "crop_vox"),
    [("resenc_l", RESENC, (16, 24, 16)), ("primus_s", PRIMUS, (24, 16, 32))],
)
def test_an_nnssl_checkpoint_round_trips_without_pickled_code(
    name: str, config: dict, crop_vox: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(export._PRIMUS_NAMES, (72, 2, 2), "PrimusS")  # the real ones take seconds to build
    source, target = tiny(name, 1, **config), tiny(name, 2, **config)
    path = tmp_path / "checkpoint_final.pth"
    save_nnssl(source, path, crop_vox=crop_vox, citations=["Lübeck et al."])
    content = torch.load(path, weights_only=True)
    plan, weights = content["nnssl_adaptation_plan"], content["network_weights"]
    assert content["citations"] == ["Lübeck et al."]
    assert content["lungssl"]["backbone"] == name
    # What nnU-Net's preprocess_like_nnssl and PretrainedTrainer read:
    first = next(iter(plan["pretrain_plan"]["configurations"].values()))
    assert (first["spacing"], first["patch_size"]) == ([1.0, 1.0, 1.0], list(crop_vox))
    assert plan["recommended_downstream_patchsize"] == list(crop_vox)
    assert plan["pretrain_num_input_channels"] == 1
    assert plan["architecture_plans"].keys() == {"arch_class_name", "arch_kwargs", "arch_kwargs_requiring_import"}
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        assert any(weight.startswith(f"{key}.") for weight in weights)
    assert all(weights[f"{key}.weight"].shape[1] == 1 for key in plan["keys_to_in_proj"])
    assert plan["key_to_lpe"] is None or plan["key_to_lpe"] in weights
    json.dumps(plan)
    report = load_pretrained(target, import_checkpoint(path))
    assert report.coverage > 0.9999
    x = torch.rand(1, 1, *crop_vox)
    assert torch.equal(target(x).tokens, source(x).tokens)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_dkfz_shape_goes_by_its_name_and_others_by_their_arguments() -> None:
    with torch.device("meta"):
        whole, small = create_backbone("resenc_l"), create_backbone("resenc_l", **RESENC)
        medium = create_backbone("primus_m")
    plan = adaptation_plan(whole, crop_vox=(160, 160, 160))["architecture_plans"]
    assert plan == {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    plan = adaptation_plan(small, crop_vox=(16, 16, 16))["architecture_plans"]
    assert plan["arch_class_name"] == "ResidualEncoderUNet"
    assert plan["arch_kwargs"]["features_per_stage"] == [4, 8, 12, 12]
    assert all(plan["arch_kwargs"][key].startswith("torch.nn.") for key in plan["arch_kwargs_requiring_import"])
    plan = adaptation_plan(medium, crop_vox=(96, 96, 96))
    assert plan["architecture_plans"]["arch_class_name"] == "PrimusM"


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "config"), [("resenc_l", RESENC), ("primus_s", PRIMUS_S)])
def test_the_peer_s_submodules_take_the_weights_as_nnunet_loads_them(name: str, config: dict) -> None:
    pytest.importorskip("dynamic_network_architectures", exc_type=ImportError)
    encoder = tiny(name, **config)
    plan = adaptation_plan(encoder, crop_vox=(16, 24, 16))
    weights = peer_state_dict(encoder)
    if name == "resenc_l":
        from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

        kwargs = dict(plan["architecture_plans"]["arch_kwargs"])
        for key in plan["architecture_plans"]["arch_kwargs_requiring_import"]:
            kwargs[key] = getattr(nn, kwargs[key].rpartition(".")[2])
        peer = ResidualEncoderUNet(input_channels=1, num_classes=2, **kwargs)
    else:
        from dynamic_network_architectures.architectures.primus import Primus

        peer = Primus(1, 396, (8, 8, 8), 2, 12, 6, (16, 24, 16), init_values=0.1, scale_attn_inner=True)
    assert plan["key_to_encoder"] == peer.key_to_encoder
    assert plan["key_to_stem"] == peer.key_to_stem
    assert plan["keys_to_in_proj"] == list(peer.keys_to_in_proj)
    assert plan["key_to_lpe"] == peer.key_to_lpe
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        part = {n.removeprefix(f"{key}."): t for n, t in weights.items() if n.startswith(f"{key}.")}
        peer.get_submodule(key).load_state_dict(part)  # strict


def test_what_nnssl_cannot_build_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nnssl has no Vit3d"):
        adaptation_plan(tiny("vit3d_nano"), crop_vox=(16, 16, 16))
    with pytest.raises(ValueError, match="patches of 8 voxels and no registers, not 72 wide"):
        adaptation_plan(tiny("primus_s", **PRIMUS), crop_vox=(24, 16, 32))
    with torch.device("meta"), pytest.raises(ValueError, match=r"crops of \(16, 24, 16\), not \(32, 32, 32\)"):
        adaptation_plan(create_backbone("primus_s", **PRIMUS_S), crop_vox=(32, 32, 32))
    with pytest.raises(ValueError, match="must be multiples of the token stride"):
        adaptation_plan(tiny("resenc_l", **RESENC), crop_vox=(20, 16, 16))
    with pytest.raises(ValueError, match=r"name it c\.pth"):
        save_nnssl(tiny("resenc_l", **RESENC), tmp_path / "c.safetensors", crop_vox=(16, 16, 16))
    with pytest.raises(ValueError, match="no other library has the network of ResEnc;"):
        peer_state_dict(tiny("resenc_tiny"))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "config", "crop_vox"),
    [
        ("vit3d_nano", {"dim": 24, "depth": 2, "heads": 2, "drop_path": 0.5}, (16, 24, 16)),
        ("resenc_tiny", {"widths": (8, 16), "depths": (1, 1)}, (8, 4, 6)),
        ("resenc_l", {"widths": (4, 8), "depths": (1, 1)}, (8, 4, 6)),
        ("primus_ti", {"dim": 36, "heads": 2, "depth": 1, "crop_vox": (16, 16, 16)}, (16, 24, 16)),
        ("convnext3d_atto", {"widths": (8, 16), "depths": (1, 1), "stem_vox": 2, "kernel_vox": 3}, (8, 4, 12)),
        ("swin_unetr_s", {"feature_size": 12, "depths": (2, 0, 0, 0), "window": 3}, (32, 32, 32)),
    ],
)
def test_an_exported_program_computes_the_same_for_any_batch(
    name: str, config: dict, crop_vox: tuple[int, int, int], tmp_path: Path
) -> None:
    encoder = tiny(name, **config).train()
    save_program(encoder, tmp_path / "e.pt2", crop_vox=crop_vox)
    assert encoder.training
    program = torch.export.load(tmp_path / "e.pt2").module()
    x = torch.rand(3, 1, *crop_vox)
    features = encoder.eval()(x)
    expected = (features.embedding(), features.tokens, *features.pyramid)
    for found, wanted in zip(program(x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
