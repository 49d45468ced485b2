import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_backbones.param_groups import param_groups
from torch import nn

NAMES = ["vit3d_nano", "resenc_tiny"]


def by_name(module: nn.Module, **options: float) -> dict[str, dict]:
    groups = param_groups(module, **{"lr": 1.0, "weight_decay": 0.05, **options})
    owner = {id(p): group for group in groups for p in group["params"]}
    return {name: owner[id(p)] for name, p in module.named_parameters() if id(p) in owner}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_each_trainable_parameter_is_in_exactly_one_group(name: str, layer_decay: float) -> None:
    model = nn.Sequential(create_backbone(name), nn.Linear(4, 3))
    model[1].weight.requires_grad_(False)
    listed = [
        id(p) for g in param_groups(model, lr=1.0, weight_decay=0.1, layer_decay=layer_decay) for p in g["params"]
    ]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", NAMES)
def test_only_matrices_and_kernels_decay(name: str) -> None:
    model = nn.ModuleDict({"encoder": create_backbone(name), "head": nn.Linear(4, 3)})
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


def test_the_groups_drive_an_optimizer() -> None:
    model = nn.Linear(4, 3)
    model.weight.grad, model.bias.grad = torch.zeros(3, 4), torch.zeros(3)
    before = model.weight.detach().clone(), model.bias.detach().clone()
    torch.optim.AdamW(param_groups(model, lr=0.1, weight_decay=0.5)).step()
    torch.testing.assert_close(model.weight.detach(), before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias.detach(), before[1])
