import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_backbones.param_groups import param_groups
from torch import nn

TINY = {
    "vit3d_nano": {},
    "resenc_tiny": {},
    "resenc_l": {"widths": (4, 8), "depths": (1, 2)},
    "primus_ti": {"dim": 72, "heads": 2, "depth": 2, "crop_vox": (16, 16, 16), "registers": 2},
    "swin_unetr_s": {"feature_size": 12, "v2": True},
    "convnext3d_atto": {"widths": (8, 16), "depths": (1, 2)},
}


def by_name(module: nn.Module, **options: float) -> dict[str, dict]:
    groups = param_groups(module, **{"lr": 1.0, "weight_decay": 0.05, **options})
    owner = {id(p): group for group in groups for p in group["params"]}
    return {name: owner[id(p)] for name, p in module.named_parameters() if id(p) in owner}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_each_trainable_parameter_is_in_exactly_one_group(name: str, layer_decay: float) -> None:
    model = nn.Sequential(create_backbone(name, **TINY[name]), nn.Linear(4, 3))
    model[1].weight.requires_grad_(False)
    listed = [
        id(p) for g in param_groups(model, lr=1.0, weight_decay=0.1, layer_decay=layer_decay) for p in g["params"]
    ]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", TINY)
def test_only_matrices_and_kernels_decay(name: str) -> None:
    model = nn.ModuleDict({"encoder": create_backbone(name, **TINY[name]), "head": nn.Linear(4, 3)})
    decaying = {n for n, group in by_name(model).items() if group["weight_decay"] == 0.05}
    weights = {
        f"{n}.weight" for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv3d))
    }  # so no norm, bias, LayerScale, class, register or mask token
    assert decaying == weights


def test_layer_decay_counts_the_layers_above_as_beit_does() -> None:
    model = nn.ModuleDict({"encoder": create_backbone("vit3d_nano"), "blocks": nn.ModuleList([nn.Linear(4, 3)])})
    scale = {name: group["lr_scale"] for name, group in by_name(model, layer_decay=0.5).items()}
    assert scale["encoder.patch_embed.weight"] == scale["encoder.cls_token"] == 0.5**5
    assert [scale[f"encoder.blocks.{i}.qkv.weight"] for i in range(4)] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert scale["encoder.norm.weight"] == scale["blocks.0.weight"] == 1
    conv = {
        name: group["lr"] for name, group in by_name(create_backbone("resenc_tiny"), lr=2.0, layer_decay=0.5).items()
    }
    assert conv["stem.weight"] == 2 * 0.5**5
    assert [conv[f"stages.{i}.0.conv1.weight"] for i in range(4)] == [2 * 0.5**e for e in (4, 3, 2, 1)]


def test_a_module_may_learn_faster_than_the_others() -> None:
    class Fast(nn.Linear):
        rate_scale = 10.0

    inner = nn.Sequential(nn.Linear(2, 3), Fast(3, 4))
    inner.rate_scale = 0.5
    groups = by_name(nn.ModuleDict({"first": inner, "other": nn.Linear(4, 2)}), lr=2.0)
    assert {name: (group["lr_scale"], group["lr"]) for name, group in groups.items() if name.endswith("weight")} == {
        "first.0.weight": (0.5, 1.0),
        "first.1.weight": (5.0, 10.0),
        "other.weight": (1.0, 2.0),
    }


def test_layers_are_found_under_the_names_of_other_libraries() -> None:
    expected = {
        "resenc_l": {"stem.convs.0.conv.weight": 3, "stages.0.blocks.0.conv1.conv.weight": 2, "mask_value": 3}
        | {f"stages.1.blocks.{i}.conv2.norm.bias": 1 for i in range(2)},
        "primus_ti": {"eva.pos_embed": 3, "down_projection.proj.weight": 3, "eva.blocks.0.attn.q_proj.weight": 2}
        | {"eva.blocks.1.gamma_2": 1, "eva.norm.weight": 0},
        "swin_unetr_s": {"swinViT.patch_embed.proj.bias": 5, "swinViT.layers1.0.blocks.1.attn.qkv.weight": 4}
        | {"swinViT.layers1c.0.layer.conv1.conv.weight": 4, "swinViT.layers4.0.downsample.norm.weight": 1},
        "convnext3d_atto": {"stem.0.weight": 3, "stages.0.blocks.0.mlp.fc1.weight": 2, "stages.1.downsample.1.bias": 1},
    }
    for name, above in expected.items():
        groups = by_name(create_backbone(name, **TINY[name]), layer_decay=0.5)
        assert {key: groups[key]["lr_scale"] for key in above} == {key: 0.5**n for key, n in above.items()}


def test_the_groups_drive_an_optimizer() -> None:
    model = nn.Linear(4, 3)
    model.weight.grad, model.bias.grad = torch.zeros(3, 4), torch.zeros(3)
    before = model.weight.detach().clone(), model.bias.detach().clone()
    torch.optim.AdamW(param_groups(model, lr=0.1, weight_decay=0.5)).step()
    torch.testing.assert_close(model.weight.detach(), before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias.detach(), before[1])
