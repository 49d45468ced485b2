from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lungssl.comparison.judging import Judge
from lungssl.comparison.landmarks import (
    GRID_MM,
    NEAR_MM,
    POINTS,
    PairPoints,
    find,
    lung_grid_mm,
    point_features,
    points_of,
    position_only,
    smoothed,
)
from lungssl.errors import DataError
from lungssl_backbones import create_backbone
from lungssl_data.cache import PairCache, write_pair
from lungssl_data.pair import PhasePair, PhaseScan
from torch.testing import assert_close


def scan(origin_mm: tuple[float, float, float] = (-20.0, 5.0, 11.0)) -> PhaseScan:
    shape = (19, 23, 27)
    lung = np.zeros(shape, np.uint8)
    lung[3:16, 4:20, 5:24] = 1
    return PhaseScan(
        ct_hu=np.random.default_rng(0).integers(-1000, 0, shape).astype(np.int16),
        valid=np.ones(shape, np.uint8),
        lung=lung,
        spacing_mm=(3.0, 3.0, 3.0),
        origin_mm=origin_mm,
    )


@pytest.fixture
def pair() -> PairPoints:
    """The truth is 6 mm of x away from where the affine, a shift by 10 mm of z, leads."""
    exhale, inhale = scan(), scan((-20.0, 5.0, 21.0))
    torch.manual_seed(0)
    query = torch.tensor([10.0, 35.0, 35.0]) + 30 * (torch.rand(40, 3) - 0.5)
    affine = torch.eye(3, 4)
    affine[2, 3] = 10.0
    truth = query + torch.tensor([6.0, 0.0, 10.0])
    return PairPoints(
        exhale=exhale,
        inhale=inhale,
        query_mm=query,
        truth_mm=truth,
        affine=affine,
        candidates_mm=lung_grid_mm(inhale),
    )


def test_candidates_are_the_lungs_points_on_the_grid() -> None:
    one = scan()
    points = lung_grid_mm(one).numpy()
    assert len(np.unique(points, axis=0)) == len(points)
    steps = (points - one.origin_mm) / GRID_MM
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
    x, y, z = np.rint((points - one.origin_mm) / 3).astype(int).T
    assert (one.lung[z, y, x] > 0).all()
    # by counting: of each axis, the multiples of 4 mm whose nearest voxel is in the box
    sides = [sum(low <= round(4 * i / 3) < high for i in range(60)) for low, high in ((5, 24), (4, 20), (3, 16))]
    assert len(points) == np.prod(sides)


def test_features_that_know_places_find_all_points_but_for_the_grid(pair: PairPoints) -> None:
    """Features that are places (their cosine the higher, the nearer) err by what the grid errs by, and no more."""

    def code(places_mm: torch.Tensor) -> torch.Tensor:
        return torch.cat([f(places_mm / 40) for f in (torch.sin, torch.cos)], dim=1)

    perfect = find(pair, code(pair.truth_mm), code(pair.candidates_mm))
    floor, affine = position_only(pair)
    assert perfect.mean_mm == pytest.approx(floor, rel=0.02) and perfect.far_share == 0
    assert perfect.near_mm == pytest.approx(floor, rel=0.02)
    assert 5 < affine < 8
    lost = find(pair, code(pair.truth_mm + 35), code(pair.candidates_mm))
    assert lost.mean_mm > NEAR_MM and lost.far_share > 0.9
    assert lost.near_mm < NEAR_MM + 6.1  # looked for around the affine's place only, which is 6 mm off


def test_a_field_of_matches_takes_each_point_from_its_neighbours(pair: PairPoints) -> None:
    assert_close(smoothed(pair, pair.truth_mm), pair.truth_mm, atol=1e-3, rtol=0)  # the departure is one and the same
    one_wrong = pair.truth_mm.clone()
    one_wrong[7] += 100.0
    assert_close(smoothed(pair, one_wrong)[7], pair.truth_mm[7], atol=1e-3, rtol=0)
    # in plain words, for another point
    departure = one_wrong - pair.affine_places()
    weights = [
        0.0 if j == 3 else float(torch.exp(-((pair.query_mm[j] - pair.query_mm[3]).square().sum()) / (2 * 15.0**2)))
        for j in range(len(departure))
    ]
    expected = sum(weight * row for weight, row in zip(weights, departure, strict=True)) / sum(weights)
    assert_close(smoothed(pair, one_wrong)[3], pair.affine_places()[3] + expected, atol=1e-3, rtol=0)


def test_a_point_has_the_features_of_its_place_wherever_the_scan_lies(pair: PairPoints) -> None:
    encoder = create_backbone("resenc_tiny")
    points = pair.query_mm
    here = point_features(encoder, pair.exhale, points, 16)
    moved = replace(pair.exhale, origin_mm=(80.0, -95.0, 111.0))
    there = point_features(encoder, moved, points + torch.tensor([100.0, -100.0, 100.0]), 16)
    assert_close(there, here, atol=1e-4, rtol=1e-3)
    assert here.shape == (40, sum(encoder.pyramid_channels))  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert float((here[0] - here[1]).abs().max()) > 1e-3


def test_pairs_without_a_displacement_and_patients_of_one_phase_judge_what_they_can(tmp_path: Path) -> None:
    exhale = scan()
    inhale = replace(scan((-20.0, 5.0, 21.0)), lobes=exhale.lung)
    affine = np.eye(3, 4)
    whole = PhasePair(patient="p0", exhale=exhale, inhale=inhale, exhale_to_inhale=affine, split="test")
    lone = PhasePair(patient="p1", exhale=exhale, split="test")
    for one in (whole, replace(whole, patient="p2"), replace(whole, patient="p3", split="train"), lone):
        write_pair(one, tmp_path)
    cache = PairCache(tmp_path)
    found = points_of(cache, "p0")
    assert found.truth_mm is None and len(found.query_mm) == min(POINTS, len(lung_grid_mm(exhale)))
    with pytest.raises(DataError, match="patient p1 has one phase"):
        points_of(cache, "p1")
    judged = Judge(cache, None).encoder(create_backbone("resenc_tiny"), 32)
    assert set(judged.values) == {"probe_dice", "retrieval", "phase_leak"}
    assert all(set(of_patient) == {"p0", "p2"} for of_patient in judged.values.values())
