import itertools
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from lungssl_data.resample import resample_hu, resample_hu_reference, resample_labels
from lungssl_data.volume import Geometry, LabelMap, Volume

EYE = np.eye(3)


def odd_volume(seed: int = 0, *, padding: float = 0.0) -> Volume:
    rng = np.random.default_rng(seed)
    grid = Geometry(shape=(13, 17, 23), spacing_mm=(0.7, 0.9, 1.3), origin_mm=(-7.3, 11.1, 40.2), direction=EYE)
    hu = rng.integers(-1000, 1500, grid.shape).astype(np.int16)
    hu[rng.random(grid.shape) < padding] = -2048
    return Volume(hu=hu, geometry=grid)


def turned(volume: Volume, order: tuple[int, int, int], flips: tuple[int, ...]) -> Volume:
    """The same voxels in space, stored along other array axes (`order`), those in `flips` backwards."""
    affine = volume.geometry.index_to_mm()
    origin = affine[:, 3].copy()
    columns = affine[:, :3].copy()
    hu = volume.hu
    for axis in flips:
        hu = np.flip(hu, axis)
        origin += columns[:, 2 - axis] * (hu.shape[axis] - 1)
        columns[:, 2 - axis] *= -1
    hu = np.ascontiguousarray(hu.transpose(order))
    columns = columns[:, [2 - axis for axis in order[::-1]]]
    spacing = np.linalg.norm(columns, axis=0)
    x, y, z = (float(s) for s in spacing)
    ox, oy, oz = (float(o) for o in origin)
    geometry = Geometry(shape=hu.shape, spacing_mm=(x, y, z), origin_mm=(ox, oy, oz), direction=columns / spacing)
    return Volume(hu=hu, geometry=geometry)


TARGETS = [
    Geometry(shape=(11, 9, 12), spacing_mm=(1.5, 1.5, 1.5), origin_mm=(-7.9, 10.6, 39.0), direction=EYE),
    Geometry(shape=(15, 9, 20), spacing_mm=(0.5, 0.9, 0.6), origin_mm=(-5.0, 12.0, 44.4), direction=EYE),
    Geometry(shape=(4, 5, 6), spacing_mm=(2.6, 3.1, 4.0), origin_mm=(-7.3, 11.1, 40.2), direction=EYE),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("padding", [0.0, 0.4])
def test_the_kernel_equals_the_definition(target: Geometry, smooth: bool, padding: float) -> None:
    volume = odd_volume(padding=padding)
    hu, measured = resample_hu(volume, target, smooth=smooth, threads=2)
    hu_slow, measured_slow = resample_hu_reference(volume, target, smooth=smooth)
    assert np.abs(hu.astype(int) - hu_slow).max() <= 1
    assert (hu == hu_slow).mean() > 0.99
    np.testing.assert_array_equal(measured, measured_slow)


def test_plain_linear_equals_simpleitk_to_rounding() -> None:
    volume, target = odd_volume(), TARGETS[1]
    image = sitk.GetImageFromArray(volume.hu.astype(np.float32))
    image.SetSpacing(volume.geometry.spacing_mm)
    image.SetOrigin(volume.geometry.origin_mm)
    frame = sitk.Image(target.shape[::-1], sitk.sitkFloat32)
    frame.SetSpacing(target.spacing_mm)
    frame.SetOrigin(target.origin_mm)
    theirs = sitk.GetArrayFromImage(sitk.Resample(image, frame, sitk.Transform(), sitk.sitkLinear, -5000.0))
    hu, measured = resample_hu(volume, target, smooth=False)
    inside = theirs > -5000
    np.testing.assert_array_equal(measured.astype(bool), inside)
    assert np.abs(hu[inside] - theirs[inside]).max() <= 0.502


def test_smoothing_equals_simpleitks_gaussian_within_its_recursive_error() -> None:
    rng = np.random.default_rng(2)
    grid = Geometry(shape=(40, 50, 60), spacing_mm=(0.7, 0.8, 1.0), origin_mm=(0.0, 0.0, 0.0), direction=EYE)
    coarse = sitk.GetImageFromArray(rng.normal(-500, 400, (10, 12, 15)).astype(np.float32))
    smooth = sitk.GetArrayFromImage(sitk.Expand(coarse, [4, 4, 4], sitk.sitkLinear))
    hu = np.clip(np.pad(smooth, [(0, 0), (0, 2), (0, 0)], mode="edge"), -1000, 1500).astype(np.int16)
    volume = Volume(hu=hu, geometry=grid)
    target = Geometry(shape=(20, 20, 20), spacing_mm=(1.5, 1.5, 1.5), origin_mm=(4.0, 4.0, 4.0), direction=EYE)
    image = sitk.GetImageFromArray(volume.hu.astype(np.float32))
    image.SetSpacing(grid.spacing_mm)
    for axis, mm in enumerate(grid.spacing_mm):
        image = sitk.RecursiveGaussian(image, sigma=float(np.sqrt(1.5**2 - mm**2)) / 2.355, direction=axis)
    frame = sitk.Image(target.shape[::-1], sitk.sitkFloat32)
    frame.SetSpacing(target.spacing_mm)
    frame.SetOrigin(target.origin_mm)
    theirs = sitk.GetArrayFromImage(sitk.Resample(image, frame))
    hu, _ = resample_hu(volume, target)
    assert np.abs(hu - theirs).mean() < 3  # of a spread of 400 HU; a cut Gaussian and a recursive one differ by that
    assert np.abs(hu - theirs).max() < 25


def test_stored_order_and_direction_do_not_change_the_voxels() -> None:
    volume, target = odd_volume(padding=0.1), TARGETS[0]
    plain_hu, plain_measured = resample_hu(volume, target)
    labels = LabelMap(labels=(volume.hu > 0).astype(np.uint8), geometry=volume.geometry)
    plain_labels = resample_labels(labels, target)
    for order in itertools.permutations(range(3)):
        for flips in ((), (1,), (0, 2)):
            other = turned(volume, order, flips)
            hu, measured = resample_hu(other, target)
            assert np.abs(hu.astype(int) - plain_hu).max() <= 1
            np.testing.assert_array_equal(measured, plain_measured)
            mask = LabelMap(labels=(other.hu > 0).astype(np.uint8), geometry=other.geometry)
            np.testing.assert_array_equal(resample_labels(mask, target), plain_labels)


def test_labels_equal_simpleitks_nearest_neighbour() -> None:
    rng = np.random.default_rng(3)
    volume, target = odd_volume(), TARGETS[0]
    labels = LabelMap(labels=rng.integers(0, 6, volume.hu.shape).astype(np.uint8), geometry=volume.geometry)
    image = sitk.GetImageFromArray(labels.labels)
    image.SetSpacing(volume.geometry.spacing_mm)
    image.SetOrigin(volume.geometry.origin_mm)
    frame = sitk.Image(target.shape[::-1], sitk.sitkUInt8)
    frame.SetSpacing(target.spacing_mm)
    frame.SetOrigin(target.origin_mm)
    theirs = sitk.GetArrayFromImage(sitk.Resample(image, frame, sitk.Transform(), sitk.sitkNearestNeighbor, 0.0))
    np.testing.assert_array_equal(resample_labels(labels, target), theirs)


@pytest.mark.parametrize("degrees", [0.0, 20.0])
def test_padding_is_never_mixed_into_tissue(degrees: float) -> None:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    grid = Geometry(
        shape=(20, 24, 28),
        spacing_mm=(1.0, 1.1, 1.2),
        origin_mm=(0.0, 0.0, 0.0),
        direction=np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]]),
    )
    hu = np.full(grid.shape, 40, np.int16)
    hu[:, :, :9] = -2048
    target = Geometry(shape=(9, 10, 11), spacing_mm=(2.0, 2.0, 2.0), origin_mm=(2.0, 2.0, 2.0), direction=EYE)
    result, measured = resample_hu(Volume(hu=hu, geometry=grid), target)
    assert 0 < measured.sum() < measured.size
    assert (result[measured == 1] == 40).all()
    assert set(np.unique(result)) <= {40, -1000}  # seen from padding: the measured neighbour, or nothing


def test_beyond_the_edge_the_value_is_repeated_and_marked() -> None:
    volume = odd_volume()
    target = replace(volume.geometry, shape=(13, 17, 40), origin_mm=(-7.3 - 0.7 * 10, 11.1, 40.2))
    hu, measured = resample_hu(volume, target)
    np.testing.assert_array_equal(hu[:, :, 10:33], volume.hu)
    np.testing.assert_array_equal(hu[:, :, 0], volume.hu[:, :, 0])
    np.testing.assert_array_equal(measured[0, 0], [0] * 10 + [1] * 23 + [0] * 7)


def test_nearly_parallel_axes_are_not_taken_for_oblique_ones() -> None:
    volume, target = odd_volume(), TARGETS[0]
    tilt = np.eye(3)
    tilt[0, 1], tilt[1, 0] = 1e-3, -1e-3
    near, _ = resample_hu(replace(volume, geometry=replace(volume.geometry, direction=tilt)), target)
    plain, _ = resample_hu(volume, target)
    assert (near != plain).mean() > 0  # 0.001 rad over 15 mm: the origin's part of the turn is kept
    assert np.abs(near.astype(int) - plain).mean() < 60


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_does_not_change_the_voxels(threads: int) -> None:
    volume = odd_volume(padding=0.2)
    np.testing.assert_array_equal(
        resample_hu(volume, TARGETS[0], threads=threads)[0], resample_hu(volume, TARGETS[0])[0]
    )
