"""Scores of fields whose scores are known."""

import numpy as np
import pytest
from lungssl_data.volume import Geometry
from lungssl_tasks.registration.scores import field_scores, jacobian, landmark_errors, snapped_mm


def linear(matrix: np.ndarray, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> np.ndarray:
    places = np.argwhere(np.ones(shape, bool))[:, ::-1] * spacing_mm
    return (places @ matrix.T).T.reshape(3, *shape)


def test_a_linear_field_changes_volume_by_its_determinant() -> None:
    matrix = np.array([[0.2, 0.1, 0.0], [0.0, -0.3, 0.4], [0.1, 0.0, 0.5]])
    found = jacobian(linear(matrix, (5, 6, 7), (1.0, 2.0, 3.0)), (1.0, 2.0, 3.0))
    np.testing.assert_allclose(found, np.linalg.det(np.eye(3) + matrix))


def test_roughness_is_that_of_the_logarithm() -> None:
    shape, spacing = (9, 10, 11), (1.0, 1.0, 1.0)
    u = np.zeros((3, *shape))
    u[0] = np.where(np.arange(11) < 5, 0.0, np.arange(11) - 5.0)  # J is 1, 1.5 at x = 5, then 2
    found = field_scores(u, np.ones(shape, bool), spacing)
    j = np.array([1.0] * 4 + [1.5] + [2.0] * 4)  # x from 1 to 9: the region's edge doesn't count
    assert found.sdlogj == pytest.approx(np.log(j).std()) and found.least_j == 1.0 and found.folded_share == 0.0
    assert found.sdlogj_l2r == pytest.approx(np.log(j[1:-1] + 3).std())


def test_folds_are_counted_in_the_region_alone() -> None:
    u = np.zeros((3, 8, 8, 8))
    u[2, 4:] = -3.0  # z jumps back: J is -0.5 at z 3 and 4
    whole, lower = np.ones((8, 8, 8), bool), np.zeros((8, 8, 8), bool)
    lower[:3] = True
    assert field_scores(u, whole, (1.0, 1.0, 1.0)).folded_share == pytest.approx(2 / 6)
    assert field_scores(u, lower, (1.0, 1.0, 1.0)).folded_share == 0.0
    with pytest.raises(ValueError, match="nothing is left of the region"):
        field_scores(u, np.zeros((8, 8, 8), bool), (1.0, 1.0, 1.0))


def test_landmark_errors_are_in_mm_and_say_what_was_before() -> None:
    fixed = np.zeros((10, 3))
    true = np.add(fixed, [3.0, 4.0, 0.0])
    predicted = true + np.arange(10)[:, None] * [1.0, 0.0, 0.0]
    found = landmark_errors(predicted, true, fixed)
    assert (found.mean_mm, found.median_mm, found.max_mm, found.identity_mm) == (4.5, 4.5, 9.0, 5.0)
    assert found.tre30_mm == 8.0 and found.p95_mm == pytest.approx(8.55) and found.points == 10
    with pytest.raises(ValueError, match="no landmarks"):
        landmark_errors(fixed[:0], fixed[:0], fixed[:0])


def test_snapping_goes_to_voxel_centres_of_an_oblique_grid() -> None:
    turned = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    grid = Geometry(shape=(4, 5, 6), spacing_mm=(1.0, 2.0, 3.0), origin_mm=(0.5, 0.0, 0.0), direction=turned)
    np.testing.assert_allclose(snapped_mm(np.array([[-1.4, 1.2, 4.4]]), grid), [[-1.5, 1.0, 3.0]])
