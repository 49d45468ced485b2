"""Estimated displacements against a phantom's own."""

import dataclasses

import numpy as np
import pytest
from lungssl_data.pair import PhasePair, PhaseScan
from lungssl_data.phantom import PhantomConfig, make_phantom
from lungssl_data.prepare import coarse_affine
from lungssl_tasks.registration import EstimateConfig, estimate_displacement


@pytest.fixture(scope="module")
def phantom_pair() -> tuple[PhasePair, np.ndarray]:
    phantom = make_phantom(PhantomConfig(preset="deep", seed=1, spacing_mm=7.0, texture_rho=1.0))
    scans = {
        name: PhaseScan(
            ct_hu=source.ct.hu,
            valid=np.ones(source.ct.hu.shape, np.uint8),
            lung=source.lung,
            spacing_mm=source.ct.geometry.spacing_mm,
            origin_mm=source.ct.geometry.origin_mm,
        )
        for name, source in (("exhale", phantom.exhale), ("inhale", phantom.inhale))
    }
    affine = coarse_affine(scans["exhale"], scans["inhale"])
    return PhasePair(patient="p", **scans, exhale_to_inhale=affine), phantom.exhale_to_inhale_mm


def affine_field_mm(pair: PhasePair) -> np.ndarray:
    scan = pair.scan("exhale")
    points = np.argwhere(np.ones(scan.ct_hu.shape, bool))[:, ::-1] * scan.spacing_mm + scan.origin_mm
    assert pair.exhale_to_inhale is not None
    moved = points @ pair.exhale_to_inhale[:, :3].T + pair.exhale_to_inhale[:, 3]
    return (moved - points).T.reshape(3, *scan.ct_hu.shape)


def test_the_estimate_is_nearer_to_the_truth_than_its_start(phantom_pair: tuple[PhasePair, np.ndarray]) -> None:
    pair, truth_mm = phantom_pair
    found = estimate_displacement(pair)
    lung = pair.scan("exhale").lung > 0
    error = np.linalg.norm(found.u_mm - truth_mm, axis=0)[lung]
    before = np.linalg.norm(affine_field_mm(pair) - truth_mm, axis=0)[lung]
    assert np.isfinite(error).all() and np.isnan(found.u_mm[:, 0, 0, 0]).all()
    assert error.mean() < 0.9 * before.mean()  # 4.4 of 5.3 mm; voxels of 7 mm hold little texture
    assert "MIND-SSC" in found.provenance and found.spacing_mm == pair.scan("exhale").spacing_mm


def test_without_search_and_descent_the_estimate_is_the_affine(phantom_pair: tuple[PhasePair, np.ndarray]) -> None:
    pair, _ = phantom_pair
    found = estimate_displacement(pair, EstimateConfig(reach_mm=0.0, iterations=0))
    lung = pair.scan("exhale").lung > 0
    np.testing.assert_allclose(found.u_mm[:, lung], affine_field_mm(pair)[:, lung], atol=1e-3)


def test_a_pair_that_cant_be_registered_is_told(phantom_pair: tuple[PhasePair, np.ndarray]) -> None:
    pair, _ = phantom_pair
    with pytest.raises(ValueError, match="patient p has no coarse affine"):
        estimate_displacement(dataclasses.replace(pair, exhale_to_inhale=None))
    flat = dataclasses.replace(pair.scan("exhale"), spacing_mm=(1.0, 1.0, 3.0))
    with pytest.raises(ValueError, match=r"voxels of \(1\.0, 1\.0, 3\.0\) mm"):
        estimate_displacement(dataclasses.replace(pair, exhale=flat))
    with pytest.raises(ValueError, match="no inhale scan"):
        estimate_displacement(dataclasses.replace(pair, inhale=None))
