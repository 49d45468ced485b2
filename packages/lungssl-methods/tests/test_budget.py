"""T25: what a step costs, counted in two ways."""

from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lungssl_backbones import BACKBONES, create_backbone
from lungssl_data.batch import PairBatch
from lungssl_methods import METHODS, method_class
from lungssl_methods.budget import counted_flops, step_budget
from lungssl_methods.dino import Dino
from lungssl_methods.mae import Mae
from lungssl_methods.simclr import SimClr
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

MakeBatch = Callable[..., PairBatch]
SIZES = {"global_size": (32, 32, 32), "local_size": (16, 16, 16)}

NEEDS = {"jepa": "vit3d_nano", "phase_jepa": "vit3d_nano", "spark": "resenc_tiny"}
BOTH_KINDS = ("vit3d_nano", "resenc_tiny")


@pytest.mark.parametrize(
    ("name", "backbone"), [(name, b) for name in sorted(METHODS) for b in BOTH_KINDS if NEEDS.get(name, b) == b]
)
def test_flops_by_shapes_are_those_that_torch_counts(name: str, backbone: str, make_batch: MakeBatch) -> None:
    method = method_class(name).Config().build(create_backbone(backbone), total_steps=4)
    batch = make_batch(2, **asdict(method.typical_views), **SIZES)
    budget = step_budget(method, batch, step=3)
    counted = counted_flops(method, batch, step=3)
    assert counted > 0
    assert budget.flops == pytest.approx(counted, rel=0.01)


FAMILIES = {target: name for name, (target, _) in reversed(BACKBONES.items())}
"""Class -> its first entry in the registry, which is its smallest."""

SMALLER: dict[str, dict[str, Any]] = {
    "resenc_l": {"widths": (8, 16, 32), "depths": (1, 2, 2)},
    "swin_unetr_s": {"feature_size": 12, "window": 4},
}
"""Where the smallest entry takes half a minute on one core."""


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, SMALLER.get(name, {})) for name in FAMILIES.values()]
    + [("swin_unetr_s", {**SMALLER["swin_unetr_s"], "v2": True}), ("convnext3d_atto", {"response_norm": True})],
)
def test_flops_of_every_kind_of_encoder_are_those_that_torch_counts(
    name: str, options: dict[str, Any], make_batch: MakeBatch
) -> None:
    if name == "timm3d":
        pytest.importorskip("timm", exc_type=ImportError)
    # A small projector: most of the FLOPs are the encoder's.
    method = SimClr.Config(hidden=16, out=8).build(create_backbone(name, **options), total_steps=4)
    batch = make_batch(2, **asdict(method.typical_views), global_size=(32, 32, 32))
    assert step_budget(method, batch).flops == pytest.approx(counted_flops(method, batch), rel=0.01)


class _Sum(nn.Module):
    """Looks like a method whose loss is the sum of a layer's output."""

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.layer, self.x = layer, x

    def forward(self, batch: PairBatch, step: int) -> SimpleNamespace:
        return SimpleNamespace(loss=self.layer(self.x).sum())


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [nn.Conv3d, nn.ConvTranspose3d])
@pytest.mark.parametrize("first", [True, False])
def test_a_grouped_convolution_costs_as_much_as_its_groups_apart(
    groups: int, kind: type, first: bool, make_batch: MakeBatch
) -> None:
    x = torch.rand(2, 8, 5, 6, 7, requires_grad=not first)
    whole = kind(8, 12, 3, stride=2, padding=1, groups=groups)
    part = kind(8 // groups, 12 // groups, 3, stride=2, padding=1)
    with FlopCounterMode(display=False) as counter:
        part(x[:, : 8 // groups]).sum().backward()
    assert counted_flops(_Sum(whole, x), make_batch(1)) == groups * counter.get_total_flops()


def test_torch_s_own_count_of_a_depthwise_backward_is_the_one_in_the_docstring() -> None:
    layer, x = nn.Conv3d(40, 40, 7, padding=3, groups=40), torch.rand(1, 40, 8, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    product = 2 * 40 * 7**3 * 8**3
    assert counts[torch.ops.aten.convolution] == product
    assert counts[torch.ops.aten.convolution_backward] == product * (1 + 40) == pytest.approx(576e6, rel=1e-3)
    assert 2 * product == pytest.approx(28e6, rel=0.01)


def test_images_voxels_and_tokens_of_dino_are_those_of_its_views(make_batch: MakeBatch) -> None:
    method = Dino.Config(prototypes=64, head_hidden=32, head_bottleneck=16).build(
        create_backbone("vit3d_nano"), total_steps=4
    )
    assert isinstance(method, Dino)
    budget = step_budget(method, make_batch(3, **SIZES))
    tokens = (32 // method.stride_vox) ** 3, (16 // method.stride_vox) ** 3
    assert (budget.patients, budget.images_student, budget.images_teacher) == (3, 3 * 6, 3 * 2)
    assert budget.voxels_student == 3 * (2 * 32**3 + 4 * 16**3) and budget.voxels_teacher == 3 * 2 * 32**3
    assert budget.tokens_student == 3 * (2 * tokens[0] + 4 * tokens[1]) and budget.tokens_teacher == 6 * tokens[0]


def test_a_masked_autoencoder_encodes_only_what_it_sees(make_batch: MakeBatch) -> None:
    method = Mae.Config(mask_ratio=0.75).build(create_backbone("vit3d_nano"), total_steps=4)
    assert isinstance(method, Mae)
    budget = step_budget(method, make_batch(2, locals_per_slot=0, **SIZES))
    assert budget.tokens_student == 4 * (32 // method.patch_vox) ** 3 // 4
    assert budget.images_teacher == budget.tokens_teacher == 0
    assert budget.flops_backward == pytest.approx(2 * budget.flops_forward, rel=0.05)


def test_asking_for_the_cost_changes_nothing(make_batch: MakeBatch) -> None:
    config = Dino.Config(prototypes=64, head_hidden=32, head_bottleneck=16)
    batch = make_batch(2, **SIZES)
    results = []
    for ask in (False, True):
        torch.manual_seed(0)
        method = config.build(create_backbone("vit3d_nano"), total_steps=4)
        if ask:
            step_budget(method.eval(), batch)
            assert not method.training
        method.train()
        loss = method(batch, 0).loss
        method.after_optimizer_step(0)
        results.append((loss.item(), torch.rand(()).item(), method.state_dict()))
    (loss, draw, state), (again, other, after) = results
    assert (loss, draw) == (again, other)
    assert all(torch.equal(value, after[name]) for name, value in state.items())
