import math

import numpy as np
import pytest
from lungssl_tasks.metrics import assd_mm, dice, hd95_mm, nsd, segmentation_scores, volume_error_ml

SPACING_MM = (0.5, 1.0, 3.0)


def _cube(z: int = 4, y: int = 5, x: int = 6, size: int = 8) -> np.ndarray:
    mask = np.zeros((20, 22, 24), bool)
    mask[z : z + size, y : y + size, x : x + size] = True
    return mask


def _ball(radius_mm: float) -> np.ndarray:
    z, y, x = np.mgrid[:30, :60, :70].astype(float)
    return (2 * (z - 14)) ** 2 + (y - 30) ** 2 + (0.8 * (x - 35)) ** 2 < radius_mm**2


@pytest.mark.parametrize(("shift", "distance_mm"), [((2, 0, 0), 6.0), ((0, 2, 0), 2.0), ((0, 0, 3), 1.5)])
def test_hd95_of_a_shifted_cube_is_the_shift_in_mm_along_each_axis(
    shift: tuple[int, int, int], distance_mm: float
) -> None:
    moved = _cube(4 + shift[0], 5 + shift[1], 6 + shift[2])
    assert hd95_mm(moved, _cube(), spacing_mm=SPACING_MM) == pytest.approx(distance_mm)


def test_spheres_one_inside_the_other_have_the_gap_as_distance_and_the_analytic_dice() -> None:
    small, large, spacing_mm = _ball(16.0), _ball(20.0), (0.8, 1.0, 2.0)
    assert hd95_mm(small, large, spacing_mm=spacing_mm) == pytest.approx(4.0, abs=0.8)
    # Surface elements are voxels thick, so a mean distance is short by part of one (here 2 mm in z).
    assert assd_mm(small, large, spacing_mm=spacing_mm) == pytest.approx(4.0, abs=0.8)
    assert dice(small, large) == pytest.approx(2 * 16**3 / (16**3 + 20**3), rel=0.01)
    assert volume_error_ml(small, large, spacing_mm=spacing_mm) == pytest.approx(
        4 / 3 * math.pi * (1.6**3 - 2.0**3), rel=0.01
    )
    assert nsd(small, large, spacing_mm=spacing_mm, tolerance_mm=2.0) == pytest.approx(0, abs=0.01)
    assert nsd(small, large, spacing_mm=spacing_mm, tolerance_mm=5.5) == 1


def test_surface_figures_equal_deepminds_package() -> None:
    surface_distance = pytest.importorskip("surface_distance")
    rng = np.random.default_rng(0)
    ripple = rng.normal(0, 60, (30, 60, 70))
    first, second = _ball(18.0) & (ripple < 80), np.roll(_ball(17.0), (1, -2, 3), (0, 1, 2)) & (ripple > -90)
    with pytest.warns(DeprecationWarning):  # its 0.1 calls scipy.ndimage.filters
        theirs = surface_distance.compute_surface_distances(second, first, (2.0, 1.0, 0.8))
    spacing_mm = (0.8, 1.0, 2.0)
    assert hd95_mm(first, second, spacing_mm=spacing_mm) == pytest.approx(
        surface_distance.compute_robust_hausdorff(theirs, 95), abs=1e-3
    )
    for tolerance_mm in (0.9, 1.7, 3.0):
        assert nsd(first, second, spacing_mm=spacing_mm, tolerance_mm=tolerance_mm) == pytest.approx(
            surface_distance.compute_surface_dice_at_tolerance(theirs, tolerance_mm)
        )
    towards_pred, towards_truth = surface_distance.compute_average_surface_distance(theirs)
    assert (
        min(towards_pred, towards_truth)
        <= assd_mm(first, second, spacing_mm=spacing_mm)
        <= max(towards_pred, towards_truth)
    )


def test_dice_of_a_cube_moved_by_a_quarter_of_its_side_is_three_quarters() -> None:
    assert dice(_cube(x=8), _cube(x=6)) == 0.75


def test_empty_masks_are_flagged_and_never_dropped() -> None:
    truth = np.zeros((20, 22, 24), np.uint8)
    pred = truth.copy()
    truth[_cube()] = 1
    pred[_cube()] = 2
    rows = segmentation_scores(pred, truth, spacing_mm=SPACING_MM, labels={1: "RUL", 2: "RML", 3: "RLL"})
    diagonal_mm = math.hypot(20 * 3.0, 22 * 1.0, 24 * 0.5)
    assert [(row.name, row.empty, row.dice, row.nsd, row.hd95_mm, row.assd_mm) for row in rows] == [
        ("RUL", "prediction", 0, 0, pytest.approx(diagonal_mm), pytest.approx(diagonal_mm)),
        ("RML", "truth", 0, 0, pytest.approx(diagonal_mm), pytest.approx(diagonal_mm)),
        ("RLL", "both", 1, 1, 0, 0),
    ]
    assert [row.volume_error_ml for row in rows] == pytest.approx([-0.768, 0.768, 0])  # 512 voxels of 1.5 mm³


def test_rows_agree_with_the_single_figures() -> None:
    pred, truth = 3 * _cube(z=5).astype(np.uint8), 3 * _cube().astype(np.uint8)
    (row,) = segmentation_scores(pred, truth, spacing_mm=SPACING_MM, labels={3: "RLL"}, tolerance_mm=1.0)
    assert (row.label, row.empty, row.tolerance_mm) == (3, "neither", 1.0)
    assert row.dice == dice(pred == 3, truth == 3)
    assert row.nsd == nsd(pred == 3, truth == 3, spacing_mm=SPACING_MM, tolerance_mm=1.0) < 1
    assert row.hd95_mm == 3.0
    assert row.assd_mm == assd_mm(pred == 3, truth == 3, spacing_mm=SPACING_MM)
    assert row.truth_ml == pytest.approx(0.768)


def test_different_grids_are_rejected_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) and truth \(2, 3, 5\)"):
        segmentation_scores(
            np.zeros((2, 3, 4), np.uint8), np.zeros((2, 3, 5), np.uint8), spacing_mm=SPACING_MM, labels={1: "lung"}
        )
