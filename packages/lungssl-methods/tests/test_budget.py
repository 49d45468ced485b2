"""T25: what a step costs, counted in two ways."""

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_data.batch import PairBatch
from lungssl_methods import METHODS, method_class
from lungssl_methods.budget import counted_flops, step_budget
from lungssl_methods.dino import Dino
from lungssl_methods.mae import Mae

MakeBatch = Callable[..., PairBatch]
SIZES = {"global_size": (32, 32, 32), "local_size": (16, 16, 16)}


NEEDS = {"jepa": "vit3d_nano", "phase_jepa": "vit3d_nano", "spark": "resenc_tiny"}
BACKBONES = ("vit3d_nano", "resenc_tiny")


@pytest.mark.parametrize(
    ("name", "backbone"), [(name, b) for name in sorted(METHODS) for b in BACKBONES if NEEDS.get(name, b) == b]
)
def test_flops_by_shapes_are_those_that_torch_counts(name: str, backbone: str, make_batch: MakeBatch) -> None:
    method = method_class(name).Config().build(create_backbone(backbone), total_steps=4)
    batch = make_batch(2, **asdict(method.typical_views), **SIZES)
    budget = step_budget(method, batch, step=3)
    counted = counted_flops(method, batch, step=3)
    assert counted > 0
    assert budget.flops == pytest.approx(counted, rel=0.01)


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
