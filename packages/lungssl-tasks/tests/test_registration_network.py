"""The registration network: features on any encoder, known shifts, learning, folders, its place in `register`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_data.cache import PairCache, write_pair
from lungssl_data.pair import Displacement, PhasePair, PhaseScan
from lungssl_data.phantom import PhantomConfig, make_phantom
from lungssl_ops.warp import warp
from lungssl_tasks.model_folder import (
    ModelFolderError,
    load_model,
    load_registration,
    model_format,
    save_registration,
)
from lungssl_tasks.registration import RegistrationConfig, register
from lungssl_tasks.registration.alignment import AlignmentConfig, align
from lungssl_tasks.registration.descent import DescentConfig
from lungssl_tasks.registration.network import RegistrationModel, RegistrationTask, correlations, predict
from lungssl_tasks.registration.training_pairs import AffineJitter, TrainingPair, TrainingPairs, residual_vox

SMALL = RegistrationModel.Config(width=8, groups=2)


def made(seed: int) -> PhasePair:
    phantom = make_phantom(PhantomConfig(preset="deep", seed=seed, spacing_mm=8.0, texture_rho=1.0))
    scans = [
        PhaseScan(
            ct_hu=source.ct.hu,
            valid=np.ones(source.ct.hu.shape, np.uint8),
            lung=source.lung,
            spacing_mm=source.ct.geometry.spacing_mm,
            origin_mm=source.ct.geometry.origin_mm,
        )
        for source in (phantom.exhale, phantom.inhale)
    ]
    grid = phantom.exhale.ct.geometry
    return PhasePair(
        patient=f"p{seed}",
        exhale=scans[0],
        inhale=scans[1],
        displacement=Displacement(
            u_mm=phantom.exhale_to_inhale_mm.astype(np.float32),
            spacing_mm=grid.spacing_mm,
            origin_mm=grid.origin_mm,
            provenance="phantom",
        ),
        exhale_to_inhale=np.eye(3, 4),
        affine_provenance="none",
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> PairCache:
    folder = tmp_path_factory.mktemp("pairs") / "cache"
    folder.mkdir()
    for seed in (1, 2):
        write_pair(made(seed), folder)
    return PairCache(folder)


@pytest.mark.parametrize("strides", [(1, 2, 4, 8), (8,), (2, 4), (4, 16), (2,)])
def test_any_encoder_gives_features_at_every_level(strides: tuple[int, ...], tiny_encoder: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = SMALL.build(tiny_encoder(strides)).eval()
    side = model.multiple
    assert side % max(8, strides[-1]) == 0
    scans = [torch.rand(1, 1, side, 2 * side, side) * 1000 - 1000, torch.ones(1, 1, side, 2 * side, side)]
    found = model.features(*scans)
    assert {stride: tuple(maps.shape[1:]) for stride, maps in found.items() if stride in (8, 4, 2)} == {
        stride: (8, side // stride, 2 * side // stride, side // stride) for stride in (8, 4, 2)
    }
    there, back = model(*scans, *scans)
    assert there.shape == (1, 3, side, 2 * side, side)
    torch.testing.assert_close(there, back)  # the same scan twice


def test_correlations_are_inner_products_with_neighbours() -> None:
    torch.manual_seed(0)
    fixed, moving = torch.randn(2, 3, 4, 5, 3), torch.randn(2, 3, 4, 5, 3)
    found = correlations(fixed, moving, 1)
    assert found.shape == (2, 27, 4, 5, 3)
    for label, (dx, dy, dz) in {0: (-1, -1, -1), 5: (1, 0, -1), 13: (0, 0, 0), 26: (1, 1, 1)}.items():
        z, y, x = 2, 3, 1
        expected = (fixed[1, :, z, y, x] * moving[1, :, z + dz, y + dy, x + dx]).sum()
        torch.testing.assert_close(found[1, label, z, y, x], expected)
    assert (found[:, 0, 0] == 0).all()  # beyond the border


def test_with_features_that_match_a_known_shift_is_found(tiny_encoder: Callable[..., Any]) -> None:
    """Untrained, the correction is 0: what is left is the expected place of the correlations."""
    torch.manual_seed(0)

    model = SMALL.build(tiny_encoder((2,)))
    volume = torch.nn.functional.interpolate(torch.randn(1, 8, 12, 12, 12), scale_factor=2, mode="trilinear")
    shift = torch.tensor([1.0, 0.0, -1.0]).reshape(1, 3, 1, 1, 1)
    fixed = warp(volume, shift.expand(1, 3, *volume.shape[2:]).contiguous())
    match = model.match["2"]
    with torch.no_grad():
        match.sharpness.fill_(200.0)
        found = match(fixed, volume, torch.zeros(1, 3, *volume.shape[2:]))
    inner = found[:, :, 4:-4, 4:-4, 4:-4]
    torch.testing.assert_close(inner, shift.expand_as(inner), atol=0.4, rtol=0)


def test_truth_is_what_the_affine_leaves(cache: PairCache) -> None:
    pairs = TrainingPairs(cache, cache.patients, multiple=8, seed=0, jitter=AffineJitter(), with_truth=True)
    pair, again, other = pairs.pair(0), pairs.pair(0), pairs.pair(2)
    assert torch.equal(pair.grid.moving_hu, again.grid.moving_hu)  # a sample is a function of its index
    assert not torch.equal(pair.grid.moving_hu, other.grid.moving_hu)
    assert pair.true_vox is not None and pair.true_vox.shape[2:] == pair.grid.fixed_hu.shape[2:]
    known = pair.true_vox.isfinite().all(dim=1, keepdim=True) & (pair.grid.fixed_lung > 0)
    assert known.float().mean() > 0.05
    moved = warp(pair.grid.moving_hu, torch.nan_to_num(pair.true_vox))[known]
    alike = [
        float(torch.corrcoef(torch.stack([pair.grid.fixed_hu[known], hu]))[0, 1])
        for hu in (moved, pair.grid.moving_hu[known])
    ]
    assert alike[0] > alike[1] + 0.05


def test_residual_of_an_affine_motion_is_zero() -> None:
    affine = np.array([[1.1, 0.05, 0.0, 3.0], [0.0, 0.9, 0.1, -2.0], [0.0, 0.0, 1.2, 5.0]])
    exhale = made(1).scan("exhale")
    grid = exhale.geometry()
    index = np.indices(grid.shape).reshape(3, -1).T[:, ::-1]
    points = index * np.asarray(grid.spacing_mm) + grid.origin_mm
    u_mm = (points @ affine[:, :3].T + affine[:, 3] - points).T.reshape(3, *grid.shape).astype(np.float32)
    field = Displacement(u_mm=u_mm, spacing_mm=grid.spacing_mm, origin_mm=grid.origin_mm, provenance="made")
    wider = dataclasses.replace(grid, shape=(grid.shape[0] + 1, *grid.shape[1:]))
    found = residual_vox(field, affine, wider)
    assert found[:, :, :-1].abs().max() < 1e-4 and found[:, :, -1].isnan().all()


def trained(cache: PairCache, steps: int = 24) -> tuple[RegistrationTask, list[float], list[float]]:
    torch.manual_seed(0)
    task = RegistrationTask.Config(model=SMALL, truth=0.0).build(
        create_backbone("resenc_tiny", widths=(8, 16, 16), depths=(1, 1, 1), spacing_mm=8.0)
    )
    pairs = TrainingPairs(cache, cache.patients, multiple=task.model.multiple, seed=0, with_truth=True)
    adam = torch.optim.Adam(task.parameters(), lr=3e-3)
    losses, errors = [], []
    for step in range(steps):
        output = task(pairs.batch(step, 1), step)
        adam.zero_grad()
        output.loss.backward()
        adam.step()
        losses.append(float(output.metrics["lncc"]))
        errors.append(float(output.metrics["error_mm"]))
    return task, losses, errors


def test_it_learns_from_pairs_alone_and_takes_the_place_of_the_search(cache: PairCache, tmp_path: Path) -> None:
    task, similarity, errors = trained(cache)
    assert sum(similarity[-2:]) > sum(similarity[:2]) + 0.1 and sum(errors[-2:]) < 0.8 * sum(errors[:2])

    save_registration(tmp_path / "model", task.model, extra={"run": "a"})
    assert model_format(tmp_path / "model") == "lungssl-registration-1"
    model = load_registration(tmp_path / "model")
    pair = cache[cache.patients[0]]
    fixed, moving = pair.scan("exhale"), pair.scan("inhale")
    affine = align(fixed, moving, AlignmentConfig(), device=torch.device("cpu"))
    answers = [predict(one, fixed, moving, affine) for one in (task.model, model)]
    np.testing.assert_array_equal(answers[0].v_mm, answers[1].v_mm)
    assert answers[0].grid.same_grid(fixed.geometry()) and 0 < answers[0].disagreement_mm < 16

    alone = RegistrationConfig(spacing_mm=8.0, descent=DescentConfig(levels=()))
    found = register(fixed, moving, alone, affine=affine, start=lambda _: answers[0])
    lung = np.argwhere(fixed.lung > 0)[::20, ::-1] * fixed.spacing_mm + fixed.origin_mm
    inner = np.linalg.norm(found.at(lung) - (lung @ affine[:, :3].T + affine[:, 3] - lung), axis=1)
    assert inner.mean() > 0.3 and found.trust.disagreement_mm == answers[0].disagreement_mm
    with pytest.raises(ModelFolderError, match="give a model that was fine-tuned for this"):
        load_model(tmp_path / "model")
    with pytest.raises(ValueError, match="the network's are 8"):
        predict(model, dataclasses.replace(fixed, spacing_mm=(4.0, 4.0, 4.0)), moving, affine)


def test_truth_teaches_where_it_is_asked_for(cache: PairCache) -> None:
    pairs = TrainingPairs(cache, cache.patients, multiple=8, seed=0, with_truth=True)
    torch.manual_seed(0)
    with_truth = RegistrationTask.Config(model=SMALL, truth=1.0).build(
        create_backbone("resenc_tiny", widths=(8, 16, 16), depths=(1, 1, 1), spacing_mm=8.0)
    )
    pair = pairs.pair(0)
    figures = with_truth.one(pair)
    without = with_truth.one(TrainingPair(grid=pair.grid, true_vox=None))
    torch.testing.assert_close(figures["loss"], without["loss"] + figures["error_mm"])
    assert "error_mm" not in without


def test_a_frozen_encoder_stays_as_it_is(cache: PairCache) -> None:
    encoder = create_backbone("resenc_tiny", widths=(8, 16, 16), depths=(1, 1, 1), spacing_mm=8.0)
    task = RegistrationTask.Config(model=SMALL, freeze_encoder=True).build(encoder).train()
    trained = {name for name, weight in task.named_parameters() if weight.requires_grad}
    assert trained and not any(name.startswith("model.encoder.") for name in trained)
    assert not task.model.get_submodule("encoder").training and task.export_encoder() is encoder


def test_what_does_not_fit_is_said(cache: PairCache, tiny_encoder: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="width 9 must be a multiple of groups, 2"):
        RegistrationModel.Config(width=9, groups=2).build(tiny_encoder((2,)))
    with pytest.raises(ValueError, match="powers of two"):
        SMALL.build(tiny_encoder((3,)))
    with pytest.raises(ValueError, match="no patient has both phases"):
        TrainingPairs(cache, [], multiple=8, seed=0)
    with pytest.raises(ValueError, match=r"labelled_share 0\.5 of 0 labelled patients, expected 0 to 1"):
        TrainingPairs(cache, ["p1"], multiple=8, seed=0, labelled_share=0.5)


def test_a_share_of_the_samples_is_of_labelled_patients_and_all_have_their_turn(cache: PairCache) -> None:
    names = [f"p{k}" for k in range(5)]
    labelled = ["p3", "p4"]
    some = TrainingPairs(cache, names, multiple=8, seed=1, labelled=labelled, labelled_share=0.5)
    drawn = [some.patient(index) for index in range(20)]
    assert drawn == [some.patient(index) for index in range(20)]
    special, ordinary = drawn[1::2], drawn[::2]
    assert all(set(special[k : k + 2]) == set(labelled) for k in range(0, 10, 2))
    assert sorted(ordinary[:5]) == sorted(ordinary[5:]) == names
    none = TrainingPairs(cache, names, multiple=8, seed=1, labelled=labelled)
    assert [none.patient(index) for index in range(10)] == ordinary  # as if nobody were labelled
