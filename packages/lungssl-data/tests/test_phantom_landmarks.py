from collections.abc import Callable

import numpy as np
import pytest
from lungssl_data.phantom import Phantom, PhantomConfig, make_phantom
from lungssl_data.phantom.config import PresetName
from scipy.ndimage import map_coordinates

Phantoms = Callable[..., Phantom]
Voxels = Callable[..., tuple[np.ndarray, np.ndarray]]
CASES = [("healthy", 0), ("deep", 1), ("ards", 0), ("ards", 3), ("peep", 1)]
cases = pytest.mark.parametrize(("preset", "seed"), CASES)


@cases
def test_landmarks_lie_deep_apart_and_on_the_field(phantom: Phantoms, voxels: Voxels, preset: str, seed: int) -> None:
    p = phantom(preset, seed)
    exhale, inhale = p.landmarks_exhale_mm, p.landmarks_inhale_mm
    assert exhale.shape == inhale.shape == (300, 3)
    np.testing.assert_array_equal(p.to_inhale(exhale), inhale)
    gaps = np.linalg.norm(exhale[:, None] - exhale, axis=-1)[np.triu_indices(300, 1)]
    assert gaps.min() >= 8
    directions = np.random.default_rng(0).normal(size=(40, 3))
    for direction in 4.99 * directions / np.linalg.norm(directions, axis=1, keepdims=True):
        assert np.isfinite(p.to_inhale(exhale + direction)).all()
        assert np.isfinite(p.to_exhale(inhale + direction)).all()
    # The range of the DIR-Lab COPDgene and 4DCT means (domain.md C1, C2).
    low, high = {"deep": (12, 31), "healthy": (3, 20)}.get(preset, (3, 15))
    assert low <= np.linalg.norm(inhale - exhale, axis=1).mean() <= high
    index = ((exhale - p.exhale.ct.geometry.origin_mm) / 3.0)[:, ::-1].T
    u = np.stack([map_coordinates(c, index, order=1) for c in p.exhale_to_inhale_mm], 1)
    assert np.linalg.norm(exhale + u - inhale, axis=1).max() <= 0.1


def test_landmarks_belong_to_the_subject_not_to_the_grid(phantom: Phantoms) -> None:
    coarse = make_phantom(PhantomConfig(preset="ards", seed=0, spacing_mm=7.0))
    np.testing.assert_array_equal(coarse.landmarks_inhale_mm, phantom("ards", 0).landmarks_inhale_mm)


@pytest.mark.parametrize(("trees", "forks"), [(True, 300), (False, 0)])
def test_landmarks_are_forks_where_there_are_trees(trees: bool, forks: int) -> None:
    p = make_phantom(PhantomConfig(preset="deep", seed=3, spacing_mm=8.0, trees=trees))
    assert len(p.landmark_kind) == 300
    assert int(p.landmark_kind.sum()) == p.parameters["landmark_forks"] == forks


@pytest.mark.parametrize(
    ("preset", "low", "high"), [("ards", 3, 15), ("peep", 3, 15), ("healthy", 3, 20), ("deep", 12, 31)]
)
def test_motion_is_as_large_as_in_patients(preset: PresetName, low: float, high: float) -> None:  # (10)
    # The ranges of the DIR-Lab 4DCT (tidal) and COPDgene (deep) means (domain.md C1, C2).
    for seed in range(2):
        p = make_phantom(PhantomConfig(preset=preset, seed=seed, spacing_mm=8.0))
        assert low <= np.linalg.norm(p.landmarks_inhale_mm - p.landmarks_exhale_mm, axis=1).mean() <= high
