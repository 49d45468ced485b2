import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_data.batch import PairBatch, View
from lungssl_tasks import TASKS
from lungssl_tasks.segmentation import IGNORE_LABEL, SegmentationModel, SegmentationTask, dice_ce_loss
from torch import Tensor

SMALL = SegmentationModel.Config(base_width=8, max_width=16)


def _batch(image: Tensor, labels: Tensor | None, valid: Tensor | None = None) -> PairBatch:
    b, _, z, y, x = image.shape
    view = View(
        image=image,
        coords_mm=torch.zeros(b, 3, z, y, x),
        valid=torch.ones(b, z, y, x, dtype=torch.bool) if valid is None else valid,
        lung=torch.ones(b, z, y, x, dtype=torch.bool),
        labels=labels,
        slot=0,
        kind="global",
    )
    unlabelled_local = replace(view, labels=None, slot=1, kind="local")
    return PairBatch(
        views=(view, unlabelled_local),
        slot_phase=torch.tensor([[0, 1]]).expand(b, 2),
        patient=torch.arange(b),
        exhale_to_inhale=torch.eye(3, 4).expand(b, 3, 4),
    )


def _two_organs() -> tuple[Tensor, Tensor]:
    """A dark ball (1) and a bright ellipsoid (2) in noise."""
    generator = torch.Generator().manual_seed(3)
    z, y, x = torch.meshgrid(torch.arange(12.0), torch.arange(16.0), torch.arange(24.0), indexing="ij")
    first = (z - 6) ** 2 + (y - 8) ** 2 + (x - 7) ** 2 < 20
    second = ((z - 5) / 4) ** 2 + ((y - 7) / 6) ** 2 + ((x - 17) / 4) ** 2 < 1
    labels = first.to(torch.uint8) + 2 * second.to(torch.uint8)
    image = 0.5 - 0.4 * first.float() + 0.4 * second.float()
    image = image + 0.05 * torch.randn(image.shape, generator=generator)
    return image[None, None], labels[None]


@pytest.mark.parametrize("strides", [(1,), (2,), (8,), (1, 2, 4), (2, 8)])
def test_logits_have_the_crops_size_wherever_the_encoders_pyramid_begins(
    strides: tuple[int, ...], tiny_encoder: Callable
) -> None:
    model = SMALL.build(tiny_encoder(strides), 5)
    assert model(torch.rand(2, 1, 8, 16, 24)).shape == (2, 6, 8, 16, 24)


@pytest.mark.parametrize("name", ["vit3d_nano", "resenc_tiny"])
def test_every_weight_of_a_real_encoder_that_the_tokens_need_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    encoder = create_backbone(name)
    model = SegmentationModel.Config().build(encoder, 2)
    side = encoder.token_stride_vox
    model(torch.rand(1, 1, 2 * side, side, 3 * side)).square().mean().backward()
    # Mask tokens are for pretraining only.
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert {name.rsplit(".", 1)[-1] for name in silent} <= {"mask_token", "mask_value"}


def test_the_stem_keeps_absolute_density(tiny_encoder: Callable) -> None:
    model = SegmentationModel.Config().build(tiny_encoder((8,)), 1)
    for conv in model.encoder.get_submodule("convs").parameters():
        torch.nn.init.zeros_(conv)  # what the encoder says is not the stem's
    air, lung = (model(torch.full((1, 1, 16, 16, 16), value))[..., 6:10, 6:10, 6:10] for value in (0.1, 0.3))
    assert (air - lung).abs().max() > 0.05


def test_a_tiny_volume_is_learnt_to_dice_090(tiny_encoder: Callable) -> None:
    image, labels = _two_organs()
    task = SegmentationTask.Config(decoder=SMALL).build(tiny_encoder((4,)), 2)
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    batch = _batch(image, labels)
    assert task(batch, 0).metrics["dice"] < 0.5
    for step in range(120):
        optimizer.zero_grad()
        task(batch, step).loss.backward()
        optimizer.step()
        task.after_optimizer_step(step)
    assert task.eval()(batch, 120).metrics["dice"] >= 0.9


def test_coarser_levels_are_taught_and_the_model_stays_the_same(tiny_encoder: Callable) -> None:
    image, labels = _two_organs()
    torch.manual_seed(0)
    plain = SegmentationTask.Config(decoder=SMALL).build(tiny_encoder((4,)), 2)
    deep = SegmentationTask.Config(decoder=SMALL, deep_levels=1).build(tiny_encoder((4,)), 2)
    deep.model.load_state_dict(plain.model.state_dict())
    levels = plain.model.levels(image, plain.model.encoder(image).pyramid)
    assert [tuple(levels[stride].shape[2:]) for stride in (4, 2, 1)] == [(3, 4, 6), (6, 8, 12), (12, 16, 24)]
    coarse = deep.deep["2"](levels[2])
    every = torch.ones(1, 12, 16, 24, dtype=torch.bool)
    corner = labels[:, 1::2, 1::2, 1::2]
    extra = dice_ce_loss(coarse, corner, every[:, 1::2, 1::2, 1::2])[0]
    alone, both = plain(_batch(image, labels), 0), deep(_batch(image, labels), 0)
    torch.testing.assert_close(both.loss, (alone.loss + extra / 2) / 1.5)
    assert both.metrics["dice"] == alone.metrics["dice"]
    assert list(SegmentationTask.Config(decoder=SMALL, deep_levels=9).build(tiny_encoder((8,)), 2).deep) == ["2", "4"]
    with pytest.raises(ValueError, match="deep_levels must be 0 or more, got -1"):
        SegmentationTask.Config(decoder=SMALL, deep_levels=-1).build(tiny_encoder((4,)), 2)


def test_loss_of_uniform_logits_is_as_computed_by_hand() -> None:
    # 24 voxels, 6 of class 1, 12 of class 2, p = 1/3: Dice 2*2 / (8 + 6) and 2*4 / (8 + 12), cross-entropy ln 3
    labels = torch.zeros(1, 2, 3, 4, dtype=torch.uint8)
    labels.view(-1)[:6], labels.view(-1)[6:18] = 1, 2
    loss, cross_entropy = dice_ce_loss(torch.zeros(1, 3, 2, 3, 4), labels, torch.ones(1, 2, 3, 4, dtype=torch.bool))
    assert cross_entropy.item() == pytest.approx(math.log(3), rel=1e-6)
    assert loss.item() == pytest.approx(1 - (4 / 14 + 8 / 20) / 2 + math.log(3), rel=1e-6)


def test_a_class_that_the_batch_lacks_does_not_count_in_dice() -> None:
    labels = torch.ones(1, 2, 3, 4, dtype=torch.uint8)
    sure = torch.zeros(1, 4, 2, 3, 4)
    sure[:, 1] = 30.0
    loss, _ = dice_ce_loss(sure, labels, torch.ones(1, 2, 3, 4, dtype=torch.bool))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_unmeasured_and_unannotated_voxels_teach_nothing(tiny_encoder: Callable) -> None:
    image, labels = _two_organs()
    task = SegmentationTask.Config(decoder=SMALL).build(tiny_encoder((4,)), 2)
    valid = torch.ones_like(labels, dtype=torch.bool)
    valid[:, :4] = False
    labels[:, 4:6] = IGNORE_LABEL
    expected = task(_batch(image, labels, valid), 0)
    scrambled = labels.clone()
    scrambled[:, :4] = 77
    assert task(_batch(image, scrambled, valid), 0).metrics == expected.metrics
    scrambled[:, 6:8] = 1
    assert task(_batch(image, scrambled, valid), 0).loss != expected.loss


def test_a_batch_without_any_known_voxel_has_zero_loss_and_finite_gradients(tiny_encoder: Callable) -> None:
    image, labels = _two_organs()
    task = SegmentationTask.Config(decoder=SMALL).build(tiny_encoder((4,)), 2)
    output = task(_batch(image, torch.full_like(labels, IGNORE_LABEL)), 0)
    output.loss.backward()
    assert output.loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


def test_bf16_autocast_changes_the_loss_by_less_than_two_percent(tiny_encoder: Callable) -> None:
    image, labels = _two_organs()
    task = SegmentationTask.Config(decoder=SMALL).build(tiny_encoder((4,)), 2)
    exact = task(_batch(image, labels), 0).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = task(_batch(image, labels), 0).loss.item()
    assert rounded == pytest.approx(exact, rel=0.02)


def test_a_frozen_encoder_gets_no_gradient_and_stays_in_eval_mode(tiny_encoder: Callable) -> None:
    image, labels = _two_organs()
    encoder = tiny_encoder((4,))
    task = SegmentationTask.Config(decoder=SMALL, freeze_encoder=True).build(encoder, 2).train()
    task(_batch(image, labels), 0).loss.backward()
    assert not encoder.training and task.model.head.training
    assert all(p.grad is None for p in encoder.parameters())
    assert task.model.head.weight.grad is not None
    assert task.export_encoder() is encoder


def test_a_label_beyond_the_classes_is_named(tiny_encoder: Callable) -> None:
    image, labels = _two_organs()
    with pytest.raises(ValueError, match="label 2 in the batch, but the model has classes 1 to 1"):
        SegmentationTask.Config(decoder=SMALL).build(tiny_encoder((4,)), 1)(_batch(image, labels), 0)


def test_a_batch_without_labels_says_how_to_load_them(tiny_encoder: Callable) -> None:
    image, _ = _two_organs()
    with pytest.raises(ValueError, match=r"labels='lobes'"):
        SegmentationTask.Config(decoder=SMALL).build(tiny_encoder((4,)), 2)(_batch(image, None), 0)


def test_strides_that_are_not_powers_of_two_are_rejected(tiny_encoder: Callable) -> None:
    with pytest.raises(ValueError, match=r"powers of two, fine to coarse, got \(3,\)"):
        SMALL.build(tiny_encoder((3,)), 2)


def test_the_registry_names_the_task() -> None:
    module, name = TASKS["segment"].split(":")
    assert (module, name) == (SegmentationTask.__module__, SegmentationTask.__name__)
