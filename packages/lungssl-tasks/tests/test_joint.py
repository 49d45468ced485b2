"""Joint models: what is shared, stitched and weighed; labels that fields carry; folders."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_data.pair import PhaseScan
from lungssl_tasks.joint.inference import predicted_labels, warped_labels
from lungssl_tasks.joint.model import Architecture, JointModel
from lungssl_tasks.joint.stitch import CrossStitch
from lungssl_tasks.joint.task import JointTask, warped_dice
from lungssl_tasks.joint.weighting import LossWeights
from lungssl_tasks.model_folder import ModelFolderError, load_displacements, load_joint, load_registration, save_joint
from lungssl_tasks.registration import Registration, Trust
from lungssl_tasks.registration.common_grid import common_grid, labels_at
from lungssl_tasks.registration.network import DisplacementModel, RegistrationModel
from lungssl_tasks.registration.training_pairs import TrainingPair, pair_labels
from lungssl_tasks.segmentation import IGNORE_LABEL, SegmentationModel

ARCHITECTURES = get_args(Architecture)
REGISTER = RegistrationModel.Config(width=8, groups=2)
SEGMENT = SegmentationModel.Config(base_width=4, max_width=8, groups=2)
CLASSES = 3


def resenc() -> Any:
    torch.manual_seed(0)
    return create_backbone("resenc_tiny", widths=(8, 16, 16), depths=(1, 1, 1), spacing_mm=4.0)


def model(architecture: Architecture, encoder: Any = None, **more: Any) -> JointModel:
    config = JointModel.Config(architecture=architecture, register=REGISTER, segment=SEGMENT, **more)
    built = config.build(encoder or resenc(), CLASSES)
    torch.manual_seed(1)
    for parameter in built.parameters():  # new layers at 0 would hide what reaches them
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return built


def scans(side: tuple[int, int, int] = (16, 24, 16)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(4, 1, *(n // 4 for n in side), generator=generator)
    fine = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="trilinear")
    return [fine[:1] * 900 - 950, (fine[1:2] > 0.3).float(), fine[2:3] * 900 - 950, (fine[3:] > 0.3).float()]


def test_a_stitch_is_a_matrix_for_each_channel() -> None:
    unit = CrossStitch(2, keep=0.9)
    torch.testing.assert_close(unit.alpha()[1], torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
    with torch.no_grad():
        unit.a_from_b[1], unit.b_from_a[1], unit.b_from_b[1] = 2.0, -1.0, 0.5
    a = torch.tensor([1.0, 10.0]).reshape(1, 2, 1, 1, 1).expand(1, 2, 2, 3, 1)
    b = torch.tensor([5.0, 4.0]).reshape(1, 2, 1, 1, 1).expand(1, 2, 2, 3, 1)
    mixed_a, mixed_b = unit(a, b)
    torch.testing.assert_close(mixed_a[0, :, 1, 2, 0], torch.tensor([0.9 + 0.5, 9.0 + 8.0]))
    torch.testing.assert_close(mixed_b[0, :, 0, 0, 0], torch.tensor([0.1 + 4.5, -10.0 + 2.0]))
    independent = torch.einsum("cij,jczyx->iczyx", unit.alpha(), torch.cat([a, b]))
    torch.testing.assert_close(torch.cat([mixed_a, mixed_b]), independent)
    with pytest.raises(ValueError, match=r"keeps 1\.5"):
        CrossStitch(2, keep=1.5)


def test_equal_and_homoscedastic_weights_are_hand_computed() -> None:
    losses = {"field": torch.tensor(0.8), "labels": torch.tensor(2.0)}
    assert float(LossWeights(("field", "labels"), "equal")(losses)) == pytest.approx(2.8)
    learnt = LossWeights(("field", "labels"), "homoscedastic")
    assert learnt(losses).item() == pytest.approx(2.8)
    with torch.no_grad():  # sigma 1/2 and 2
        learnt.log_variance.copy_(torch.tensor([2 * math.log(0.5), 2 * math.log(2.0)]))
    assert learnt(losses).item() == pytest.approx(0.8 * 4 + 2.0 / 4 + math.log(0.5) + math.log(2.0))
    assert learnt({"labels": torch.tensor(2.0)}).item() == pytest.approx(0.5 + math.log(2.0))
    # d/d sigma (L / sigma^2 + ln sigma) = 0 where sigma^2 = 2 L.
    with torch.no_grad():
        learnt.log_variance.copy_(torch.tensor([1.6, 4.0]).log())
    learnt(losses).backward()
    assert learnt.log_variance.grad is not None and learnt.log_variance.grad.abs().max() < 1e-6
    with pytest.raises(ValueError, match="no loss to weigh, expected some of field, labels"):
        learnt({})


def test_dwa_favours_the_loss_that_falls_more_slowly() -> None:
    weighed = LossWeights(("field", "labels"), "dwa", window=2).train()

    def step(field: float, labels: float | None) -> float:
        losses = {"field": torch.tensor(field)} | ({} if labels is None else {"labels": torch.tensor(labels)})
        return float(weighed(losses))

    assert [step(4.0, 8.0), step(2.0, None), step(2.0, 4.0)] == [12.0, 2.0, 6.0]  # at first all weights are 1
    assert step(1.0, 4.0) == 5.0 and step(9.0, 4.0) > 0
    # windows of the field: mean 3, then 1.5; of the labels: (8 + 4) / 2, then (4 + 4) / 2
    rates = [0.5, 4 / 6]
    shares = [math.exp(rate / 2) for rate in rates]
    expected = [2 * share / sum(shares) for share in shares]
    assert [float(w) for w in weighed.weights().values()] == pytest.approx(expected)
    again = LossWeights(("field", "labels"), "dwa", window=2)
    again.load_state_dict(weighed.state_dict())
    assert [float(w) for w in again.weights().values()] == pytest.approx(expected)
    weighed.eval()
    for _ in range(2):
        step(100.0, 100.0)
    assert [float(w) for w in weighed.weights().values()] == pytest.approx(expected)


def box(low: int, high: int, length: int = 10) -> torch.Tensor:
    labels = torch.zeros(1, 3, 4, length, dtype=torch.uint8)
    labels[..., low:high] = 2
    return labels


def test_carried_labels_overlap_as_computed_by_hand_and_pull_the_field() -> None:
    fixed, moving = box(3, 6), box(4, 7)
    shift = torch.zeros(1, 3, 3, 4, 10)
    shift[:, 0] = 0.5  # half of the way: voxels 3..5 read 0.5, 1, 1, voxel 6 reads 0.5
    shift.requires_grad_(True)
    dice = warped_dice(moving, fixed, shift, classes=2)
    assert dice.item() == pytest.approx(2 * 2.5 / (3 + 3))
    dice.backward()
    assert shift.grad is not None
    pull = shift.grad[0, 0, 1, 1]
    assert pull[3] > 0 and pull[6] > 0 and pull[:3].abs().max() == 0 and shift.grad[:, 1:].abs().max() == 0
    whole = torch.zeros(1, 3, 3, 4, 10)
    whole[:, 0] = 1.0
    assert float(warped_dice(moving, fixed, whole, classes=2)) == 1.0


def test_unknown_voxels_count_neither_here_nor_there() -> None:
    fixed, moving = box(3, 6), box(3, 6)
    still = torch.zeros(1, 3, 3, 4, 10)
    fixed[..., 5] = IGNORE_LABEL
    moving[..., 3] = IGNORE_LABEL
    moving[..., 5] = 0
    assert float(warped_dice(moving, fixed, still, classes=2)) == 1.0
    moving[..., 4] = 0
    assert float(warped_dice(moving, fixed, still, classes=2)) == 0.0
    seen = torch.ones(1, 1, 3, 4, 10, dtype=torch.bool)
    seen[..., 4] = False
    assert float(warped_dice(moving, fixed, still, classes=2, seen=seen)) == 1.0  # no known voxel of a class


def test_what_lies_beyond_the_grid_is_unknown() -> None:
    fixed, moving = box(5, 10), box(9, 10)
    far = torch.zeros(1, 3, 3, 4, 10)
    far[:, 0] = 4.0  # voxel 5 reads the last voxel, which is the lobe's; 6 to 9 read beyond it
    assert float(warped_dice(moving, fixed, far, classes=2)) == 1.0
    moving[..., 9] = 0
    assert float(warped_dice(moving, fixed, far, classes=2)) == 0.0  # voxel 5 is known, and missed


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_scans_are_answered_alike(architecture: Architecture) -> None:
    built = model(architecture).eval()
    assert isinstance(built, DisplacementModel)
    fixed_hu, fixed_lung, moving_hu, moving_lung = scans()
    with torch.no_grad():
        one = built(fixed_hu, fixed_lung, moving_hu, moving_lung)
        other = built(moving_hu, moving_lung, fixed_hu, fixed_lung)
    assert one.there.shape == (1, 3, 16, 24, 16) and one.fixed_logits.shape == (1, CLASSES + 1, 16, 24, 16)
    torch.testing.assert_close(one.there, other.back)
    torch.testing.assert_close(one.moving_logits, other.fixed_logits)
    assert not torch.allclose(one.fixed_logits, one.moving_logits) and one.there.abs().max() > 0


def reached(loss: torch.Tensor, built: JointModel) -> set[str]:
    built.zero_grad()
    loss.backward(retain_graph=True)
    parts = {name: "encoders" if ".encoder." in name else name.split(".")[0] for name, _ in built.named_parameters()}
    if built.config.architecture in ("separate", "cross_stitch"):
        for name in parts:
            parts[name] = ".".join(name.split(".")[: 2 if ".encoder." in name else 1])
    return {parts[name] for name, p in built.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize(
    ("architecture", "field", "labels"),
    [
        ("separate", {"registrar", "registrar.encoder"}, {"segmenter", "segmenter.encoder"}),
        ("sedd", {"registrar", "encoders"}, {"segmenter", "encoders"}),
        ("dense", {"segmenter", "encoders", "head", "match"}, {"segmenter", "encoders"}),
        (
            "cross_stitch",
            {"registrar", "registrar.encoder", "segmenter", "segmenter.encoder", "stitch"},
            {"registrar", "registrar.encoder", "segmenter", "segmenter.encoder", "stitch"},
        ),
    ],
)
def test_each_loss_teaches_what_the_architecture_shares(
    architecture: Architecture, field: set[str], labels: set[str]
) -> None:
    built = model(architecture)
    output = built(*scans())
    assert reached(output.there.square().mean(), built) == field
    assert reached(output.fixed_logits.square().mean(), built) == labels


def test_unstitched_networks_and_a_shared_encoder_are_the_single_tasks() -> None:
    """Stitches that keep all of a network's own give what two networks apart give, to the last bit."""
    encoder, given = resenc(), scans()
    apart, config = model("separate", encoder), JointModel.Config(register=REGISTER, segment=SEGMENT, stitch_keep=1.0)
    stitched = config.build(encoder, CLASSES)
    stitched.load_state_dict(apart.state_dict(), strict=False)
    shared = model("sedd", encoder)
    image = (torch.cat([given[0], given[2]]) + 1000) / 1400
    with torch.no_grad():
        for one, two in zip(apart(*given), stitched(*given), strict=True):
            assert torch.equal(one, two)
        alone = shared.registrar(*given)
        pyramid = shared.encoder(image.clamp(0, 1)).pyramid
        logits = shared.segmenter.decode(image.clamp(0, 1), pyramid)
        output = shared(*given)
    assert torch.equal(output.there, alone[0]) and torch.equal(output.back, alone[1])
    torch.testing.assert_close(torch.cat([output.fixed_logits, output.moving_logits]), logits)
    assert set(stitched.alphas()) == {"encoder_1", "encoder_2", "decoder_2"}
    assert not apart.alphas()


@pytest.mark.parametrize("architecture", ["separate", "sedd", "dense"])
@pytest.mark.parametrize("strides", [(8,), (2, 4), (4, 16)])
def test_any_encoder_does_but_for_stitching(
    architecture: Architecture, strides: tuple[int, ...], tiny_encoder: Callable[..., Any]
) -> None:
    built = model(architecture, tiny_encoder(strides))
    side = built.multiple
    output = built(*scans((side, side, 2 * side)))
    assert output.there.shape == (1, 3, side, side, 2 * side) == (1, 3, *output.moving_logits.shape[2:])


def test_what_cannot_be_stitched_is_said(tiny_encoder: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="stage by stage, which tiny doesn't offer"):
        model("cross_stitch", tiny_encoder((2, 4)))
    wide = JointModel.Config(register=REGISTER, segment=dataclasses.replace(SEGMENT, max_width=16, base_width=8))
    with pytest.raises(ValueError, match=r"at stride 2 the segmentation's has 16 channels .* set segment.max_width=8"):
        wide.build(resenc(), CLASSES)


def training_pair(*, labelled: bool) -> TrainingPair:
    """Two boxes of texture in tissue; in the moving scan they lie one voxel farther along x."""
    generator = torch.Generator().manual_seed(3)
    texture = torch.nn.functional.interpolate(torch.rand(1, 1, 8, 12, 8, generator=generator), scale_factor=2)
    lung = torch.zeros(1, 1, 16, 24, 16)
    lung[..., 3:13, 3:11, 3:12], lung[..., 3:13, 13:21, 3:12] = 1, 1
    labels = torch.zeros(1, 16, 24, 16, dtype=torch.uint8)
    labels[..., 3:13, 3:11, 3:12], labels[..., 3:13, 13:21, 3:12] = 1, 3
    hu = torch.where(lung > 0, texture * 500 - 900, 50.0)

    def moved(values: torch.Tensor) -> torch.Tensor:
        return values.roll(1, dims=-1)

    from lungssl_tasks.registration.common_grid import CommonGrid

    return TrainingPair(
        grid=CommonGrid(
            fixed_hu=hu,
            fixed_lung=lung,
            moving_hu=moved(hu),
            moving_lung=moved(lung),
            moving_seen=torch.ones_like(lung),
            spacing_mm=4.0,
        ),
        true_vox=None,
        fixed_labels=labels if labelled else None,
        moving_labels=moved(labels) if labelled else None,
    )


def task(architecture: Architecture, **more: Any) -> JointTask:
    config = JointModel.Config(architecture=architecture, register=REGISTER, segment=SEGMENT)
    return JointTask.Config(model=config, **more).build(resenc(), CLASSES)


@pytest.mark.parametrize("architecture", ["dense", "cross_stitch"])
def test_it_learns_both_from_pairs_of_which_some_are_labelled(architecture: Architecture) -> None:
    built = task(architecture, weighting="homoscedastic")
    pairs = [training_pair(labelled=True), training_pair(labelled=False)]
    adam = torch.optim.Adam(built.parameters(), lr=1e-2)
    figures = []
    for step in range(24):
        output = built(pairs if step == 0 else pairs[:1], step)
        adam.zero_grad()
        output.loss.backward()
        adam.step()
        figures.append({name: float(value) for name, value in output.metrics.items()})
    assert figures[-1]["dice"] > figures[0]["dice"] + 0.2 and figures[-1]["warped_dice"] > 0.65
    assert figures[-1]["lncc"] > figures[0]["lncc"] + 0.2 and figures[-1]["weight_labels"] != 1.0


def test_losses_are_those_of_the_twins_and_of_carried_labels() -> None:
    from lungssl_tasks.registration.field_loss import field_loss
    from lungssl_tasks.segmentation import dice_ce_loss

    pair = training_pair(labelled=True)
    assert pair.fixed_labels is not None and pair.moving_labels is not None
    built = task("sedd")
    found = built.one(pair)
    grid = pair.grid
    output = built.model(grid.fixed_hu, grid.fixed_lung, grid.moving_hu, grid.moving_lung)
    known = torch.ones(1, 16, 24, 16, dtype=torch.bool)
    halves = [
        dice_ce_loss(logits, labels, known)[0]
        for logits, labels in ((output.fixed_logits, pair.fixed_labels), (output.moving_logits, pair.moving_labels))
    ]
    torch.testing.assert_close(found["labels"], (halves[0] + halves[1]) / 2)
    torch.testing.assert_close(found["field"], field_loss(pair, output.there, output.back, built.config.field)["loss"])
    total = built([pair], 0).loss
    torch.testing.assert_close(total, found["field"] + found["labels"] + found["warped"])
    unguided = task("sedd", guided=False)([pair], 0)
    torch.testing.assert_close(unguided.loss, found["field"] + found["labels"])
    assert "warped_dice" in unguided.metrics and "weight_warped" not in unguided.metrics
    alone = built([training_pair(labelled=False)], 0)
    torch.testing.assert_close(alone.loss, found["field"])
    with pytest.raises(ValueError, match="label 9 in the batch, but the model has classes 1 to 3"):
        built.one(dataclasses.replace(pair, fixed_labels=pair.fixed_labels * 3))


def test_frozen_encoders_stay_as_they_are() -> None:
    built = task("cross_stitch", freeze_encoder=True).train()
    trained = [name for name, weight in built.named_parameters() if weight.requires_grad]
    assert trained and not any(".encoder." in name for name in trained)
    assert not any(encoder.training for encoder in built.model.encoders()) and len(built.model.encoders()) == 2


def scan_of(labels: np.ndarray, origin_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> PhaseScan:
    return PhaseScan(
        ct_hu=np.full(labels.shape, -800, np.int16),
        valid=np.ones(labels.shape, np.uint8),
        lung=(labels > 0).astype(np.uint8),
        lobes=labels,
        spacing_mm=(4.0, 4.0, 4.0),
        origin_mm=origin_mm,
    )


def test_labels_are_read_at_voxels_as_they_are_and_between_by_majority() -> None:
    labels = np.random.default_rng(0).integers(0, 4, (3, 4, 5)).astype(np.uint8)
    axes = [torch.linspace(-1, 1, n) for n in labels.shape]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    np.testing.assert_array_equal(labels_at(labels, torch.stack([x, y, z], -1)[None])[0].numpy(), labels)
    # Of the corners of a cell with four 2s, three 1s and a 3, its middle is 2.
    cell = np.array([2, 2, 1, 3, 1, 2, 1, 2], np.uint8).reshape(2, 2, 2)
    assert labels_at(cell, torch.zeros(1, 1, 1, 1, 3)).item() == 2


def test_lobes_come_onto_the_pairs_grid_and_over_by_a_field() -> None:
    labels = np.zeros((5, 6, 7), np.uint8)
    labels[1:4, 1:5, 1:4], labels[1:4, 1:5, 4:6] = 1, 2
    fixed, moving = scan_of(labels), scan_of(labels, origin_mm=(4.0, 0.0, -4.0))
    affine = np.eye(3, 4)
    grid = common_grid(fixed, moving, affine, multiple=8, device=torch.device("cpu"))
    here, there = pair_labels(fixed, moving, affine, grid)
    assert here is not None and there is not None and here.shape == there.shape == (1, 8, 8, 8)
    np.testing.assert_array_equal(here[0, :5, :6, :7], labels)
    assert (here[0, 5:] == IGNORE_LABEL).all()
    np.testing.assert_array_equal(there[0, :4, :6, 1:7], labels[1:, :, :6])
    assert (there[0, :, :, 0] == IGNORE_LABEL).all() and (there[0, 4:] == IGNORE_LABEL).all()
    bare = dataclasses.replace(moving, lobes=None)
    assert pair_labels(fixed, bare, affine, grid)[1] is None

    quiet = dict.fromkeys(
        ("overlap", "unseen_share", "similarity", "disagreement_mm", "folded_share", "jacobian_sd", "volume_ratio"), 0.0
    )
    v_mm = np.tile(np.array([4.0, 0.0, -4.0], np.float32).reshape(3, 1, 1, 1), (1, 5, 6, 7))
    found = Registration(affine=affine, v_mm=v_mm, grid=fixed.geometry(), trust=Trust(**quiet, doubts=()))
    np.testing.assert_array_equal(warped_labels(found, fixed, moving), labels)
    with pytest.raises(ValueError, match="no lobes to carry over"):
        warped_labels(found, fixed, bare)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_holds_the_whole_model(architecture: Architecture, tmp_path: Path) -> None:
    built = model(architecture, stitch_keep=0.8).eval()
    save_joint(tmp_path / "model", built, labels={1: "a", 2: "b", 3: "c"})
    again, labels = load_joint(tmp_path / "model")
    assert labels == {1: "a", 2: "b", 3: "c"} and again.config == built.config
    fixed = scan_of(np.random.default_rng(0).integers(0, 4, (13, 16, 9)).astype(np.uint8))
    answers = [predicted_labels(one, fixed, fixed, np.eye(3, 4)) for one in (built, again)]
    assert answers[0].shape == (13, 16, 9) and answers[0].any()
    np.testing.assert_array_equal(answers[0], answers[1])
    assert isinstance(load_displacements(tmp_path / "model"), JointModel)
    with pytest.raises(ModelFolderError, match="give a model that was fine-tuned for this"):
        load_registration(tmp_path / "model")
    with pytest.raises(ValueError, match=r"labels are \[1\], the model's classes are 1 to 3"):
        save_joint(tmp_path / "other", built, labels={1: "a"})
