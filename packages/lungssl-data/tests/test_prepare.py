from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from lungssl_data.aeration_checks import gas_ml, scan_warnings
from lungssl_data.lung_mask import LungMaskError
from lungssl_data.prepare import PrepareConfig, coarse_affine, lung_box_mm, prepare_scan
from lungssl_data.resample import resample_hu
from lungssl_data.volume import Geometry, LabelMap, Volume

Thorax = Callable[..., Volume]


def lungs(volume: Volume) -> LabelMap:
    x = np.indices(volume.hu.shape)[2]
    air = (volume.hu == -700).astype(np.uint8)
    return LabelMap(labels=air * (1 + (x > volume.hu.shape[2] // 2)).astype(np.uint8), geometry=volume.geometry)


def test_linear_resampling_keeps_a_ramp_exactly_where_it_is_in_space() -> None:
    source = Geometry(shape=(20, 24, 28), spacing_mm=(2.0, 3.0, 2.5), origin_mm=(-7.0, 11.0, 40.0), direction=np.eye(3))
    z, y, x = np.indices(source.shape)
    ramp = Volume(hu=(10 * (x * 2.0 - 7) + 4 * (y * 3.0 + 11) - 8 * (z * 2.5 + 40)).astype(np.int16), geometry=source)
    target = Geometry(shape=(15, 17, 19), spacing_mm=(1.5, 2.0, 2.0), origin_mm=(3.0, 20.0, 50.0), direction=np.eye(3))
    z, y, x = np.indices(target.shape)
    expected = 10 * (x * 1.5 + 3) + 4 * (y * 2.0 + 20) - 8 * (z * 2.0 + 50)
    np.testing.assert_allclose(resample_hu(ramp, target)[0], expected, atol=1.0)


def test_beyond_the_last_slice_comes_its_value_not_padding() -> None:
    grid = Geometry(shape=(6, 6, 6), spacing_mm=(2.0, 2.0, 2.0), origin_mm=(0.0, 0.0, 0.0), direction=np.eye(3))
    volume = Volume(hu=np.full((6, 6, 6), 55, np.int16), geometry=grid)
    target = replace(grid, shape=(8, 6, 6), origin_mm=(0.0, 0.0, -1.5))
    assert (resample_hu(volume, target)[0] == 55).all()


def test_coarser_grids_are_smoothed_first() -> None:
    rng = np.random.default_rng(0)
    grid = Geometry(shape=(60, 60, 60), spacing_mm=(1.0, 1.0, 1.0), origin_mm=(0.0, 0.0, 0.0), direction=np.eye(3))
    noise = Volume(hu=(100 * rng.standard_normal(grid.shape)).astype(np.int16), geometry=grid)
    coarse, _ = resample_hu(noise, replace(grid, shape=(15, 15, 15), spacing_mm=(4.0, 4.0, 4.0)))
    assert coarse.std() < 15  # sampling without smoothing keeps 100


def test_flipped_and_permuted_axes_give_the_same_scan(thorax: Thorax) -> None:
    volume = thorax()
    config = PrepareConfig(
        spacing_mm=4.3, margin_mm=11.0
    )  # no sample halfway between two voxels, where nearest is a toss
    plain = prepare_scan(volume, config=config, lung=lungs(volume))
    # The same voxels stored with axes (y, z, x) and x reversed.
    columns = volume.hu.shape[2]
    dx, dy, dz = volume.geometry.spacing_mm
    stored = np.ascontiguousarray(volume.hu[:, :, ::-1].transpose(2, 0, 1))  # array axes (x reversed, z, y)
    direction = np.array([[0, 0, -1], [1, 0, 0], [0, 1, 0]], float)
    origin = np.add(volume.geometry.origin_mm, [dx * (columns - 1), 0, 0])
    turned = Volume(
        hu=stored,
        geometry=Geometry(
            shape=stored.shape, spacing_mm=(dy, dz, dx), origin_mm=tuple(map(float, origin)), direction=direction
        ),
    )
    labels = lungs(volume).labels[:, :, ::-1].transpose(2, 0, 1)
    other = prepare_scan(
        turned, config=config, lung=LabelMap(labels=np.ascontiguousarray(labels), geometry=turned.geometry)
    )
    assert other.origin_mm == pytest.approx(plain.origin_mm)
    np.testing.assert_array_equal(other.lung, plain.lung)
    assert np.abs(other.ct_hu.astype(int) - plain.ct_hu).max() <= 1


def test_padding_becomes_air_and_is_marked(thorax: Thorax) -> None:
    volume = thorax()
    hu = volume.hu.copy()
    hu[:, :, :12] = -2048
    scan = prepare_scan(replace(volume, hu=hu), config=PrepareConfig(spacing_mm=5.0), lung=lungs(volume))
    assert scan.ct_hu.min() >= -1000
    x_mm = np.arange(scan.ct_hu.shape[2]) * 5.0 + scan.origin_mm[0]
    edge_mm = volume.geometry.origin_mm[0] + 12 * 4.0
    assert (scan.valid[:, :, x_mm < edge_mm - 4] == 0).all()
    assert (scan.valid[:, :, x_mm > edge_mm] == 1).all()


def test_the_field_of_view_is_the_lungs_and_a_margin(thorax: Thorax) -> None:
    volume = thorax()
    scan = prepare_scan(volume, config=PrepareConfig(spacing_mm=4.0, margin_mm=10.0), lung=lungs(volume))
    box = lung_box_mm(lungs(volume))
    low = np.asarray(scan.origin_mm)
    high = low + (np.asarray(scan.ct_hu.shape[::-1]) - 1) * 4.0
    np.testing.assert_allclose(low, box[0] - 10)
    assert (np.abs(high - (box[1] + 10)) < 4.0).all()


def test_the_coarse_affine_recovers_a_known_stretch_and_shift(thorax: Thorax) -> None:
    config = PrepareConfig(spacing_mm=4.0)
    exhale, inhale = (
        thorax(inflation=f, origin_mm=o) for f, o in ((0.8, (-150.0, -110.0, -300.0)), (1.1, (-130.0, -115.0, 20.0)))
    )
    scans = [prepare_scan(volume, config=config, lung=lungs(volume)) for volume in (exhale, inhale)]
    affine = coarse_affine(scans[0], scans[1])
    np.testing.assert_allclose(np.diag(affine[:, :3]), [1, 1, 1.1 / 0.8], rtol=0.02)
    centre_ex, centre_in = ([o[0] + 160, o[1] + 115, o[2] + 145] for o in ((-150, -110, -300), (-130, -115, 20)))
    np.testing.assert_allclose(affine[:, :3] @ centre_ex + affine[:, 3], centre_in, atol=1.5)


def test_phases_without_a_common_side_are_refused(thorax: Thorax) -> None:
    volume = thorax()
    right, left = (
        LabelMap(labels=np.where(lungs(volume).labels == side, side, 0).astype(np.uint8), geometry=volume.geometry)
        for side in (1, 2)
    )
    scans = [prepare_scan(volume, config=PrepareConfig(spacing_mm=6.0), lung=side) for side in (right, left)]
    with pytest.raises(ValueError, match="no lung of the same side"):
        coarse_affine(scans[0], scans[1])


def turned(volume: Volume, degrees: float) -> Volume:
    """The same voxels on axes turned about z."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    direction = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
    return replace(volume, geometry=replace(volume.geometry, direction=direction))


def test_outside_of_an_oblique_scan_is_air_and_marked() -> None:
    grid = Geometry(shape=(30, 40, 50), spacing_mm=(4.0, 4.0, 4.0), origin_mm=(0.0, 0.0, 0.0), direction=np.eye(3))
    volume = turned(Volume(hu=np.full(grid.shape, 40, np.int16), geometry=grid), 20)
    labels = np.zeros(grid.shape, np.uint8)
    labels[2:-2, 2:-2, 2:-2] = 1
    scan = prepare_scan(
        volume, config=PrepareConfig(spacing_mm=4.0), lung=LabelMap(labels=labels, geometry=volume.geometry)
    )
    assert 0.05 < (scan.valid == 0).mean() < 0.9
    assert (scan.ct_hu[scan.valid == 0] == -1000).all() and (scan.ct_hu[scan.valid == 1] == 40).all()


def test_turning_the_axes_adds_no_blur_of_its_own() -> None:
    rng = np.random.default_rng(0)
    grid = Geometry(shape=(40, 40, 40), spacing_mm=(2.0, 2.0, 2.0), origin_mm=(0.0, 0.0, 0.0), direction=np.eye(3))
    noise = turned(Volume(hu=(100 * rng.standard_normal(grid.shape)).astype(np.int16), geometry=grid), 30)
    # The same axes and spacing, moved by whole voxels: plain copying, whatever the angle.
    moved = noise.geometry.index_to_mm() @ [5.0, 6.0, 7.0, 1.0]
    target = replace(noise.geometry, shape=(20, 20, 20), origin_mm=tuple(map(float, moved)))
    np.testing.assert_array_equal(resample_hu(noise, target)[0], noise.hu[7:27, 6:26, 5:25])


def test_a_given_lung_mask_in_other_codes_is_refused(thorax: Thorax) -> None:
    volume = thorax()
    labels = LabelMap(labels=lungs(volume).labels * np.uint8(77), geometry=volume.geometry)
    with pytest.raises(LungMaskError, match=r"has codes \[0, 77, 154\], expected 0, 1 \(right\) and 2 \(left\)"):
        prepare_scan(volume, config=PrepareConfig(), lung=labels)


def test_a_given_mask_of_the_whole_body_is_refused(thorax: Thorax) -> None:
    volume = thorax()
    body = LabelMap(labels=(volume.hu > -900).astype(np.uint8), geometry=volume.geometry)
    with pytest.raises(LungMaskError, match="believable are 0 to 12000 ml"):
        prepare_scan(volume, config=PrepareConfig(), lung=body)


def test_sides_of_a_mask_without_any_are_found_on_any_axes(thorax: Thorax) -> None:
    volume = thorax()
    labels = lungs(volume)
    both = replace(labels, labels=np.where(labels.labels > 0, 3, 0).astype(np.uint8))
    config = PrepareConfig(spacing_mm=4.3, margin_mm=11.0)  # no sample halfway between two voxels
    expected = prepare_scan(volume, config=config, lung=labels)
    np.testing.assert_array_equal(prepare_scan(volume, config=config, lung=both).lung, expected.lung)
    flip = np.diag([-1.0, 1.0, 1.0])
    origin = (volume.geometry.origin_mm[0] + 4.0 * 79, *volume.geometry.origin_mm[1:])
    mirrored = replace(volume.geometry, direction=flip, origin_mm=origin)
    turned_volume = Volume(hu=np.ascontiguousarray(volume.hu[:, :, ::-1]), geometry=mirrored)
    turned_labels = LabelMap(labels=np.ascontiguousarray(both.labels[:, :, ::-1]), geometry=mirrored)
    np.testing.assert_array_equal(prepare_scan(turned_volume, config=config, lung=turned_labels).lung, expected.lung)


def test_white_and_missing_lungs_are_warned_of(thorax: Thorax) -> None:
    volume = thorax()
    config = PrepareConfig(spacing_mm=5.0)
    healthy = prepare_scan(volume, config=config, lung=lungs(volume))
    assert scan_warnings(healthy) == ()
    assert gas_ml(healthy) == pytest.approx(0.7 * 2 * 4 / 3 * np.pi * 48 * 75 * 110 / 1000, rel=0.03)
    inside = lungs(volume)
    left = inside.labels == 2
    flooded = replace(volume, hu=np.where(left, 20, volume.hu).astype(np.int16))
    drowned = scan_warnings(prepare_scan(flooded, config=config, lung=inside))
    assert [w.split(" only")[0] for w in drowned[:2]] == ["the lungs hold", "the left lung holds"]
    assert drowned[2] == "50 % of the lung mask holds no air"
    white = replace(volume, hu=np.where(inside.labels > 0, -200, volume.hu).astype(np.int16))
    assert scan_warnings(prepare_scan(white, config=config, lung=inside))[0].startswith("the lungs hold only 0.6")
    unmasked = LabelMap(labels=np.where(left, 0, inside.labels).astype(np.uint8), geometry=volume.geometry)
    assert any(
        "left lung holds only 0 %" in w for w in scan_warnings(prepare_scan(volume, config=config, lung=unmasked))
    )


def test_the_box_of_a_mask_is_that_of_its_voxels_on_any_axes() -> None:
    rng = np.random.default_rng(4)
    for degrees in (0.0, 25.0):
        grid = Geometry(shape=(9, 11, 13), spacing_mm=(1.0, 2.0, 3.0), origin_mm=(5.0, -4.0, 3.0), direction=np.eye(3))
        volume = turned(Volume(hu=np.zeros(grid.shape, np.int16), geometry=grid), degrees)
        labels = (rng.random(grid.shape) < 0.03).astype(np.uint8)
        affine = volume.geometry.index_to_mm()
        points = np.argwhere(labels)[:, ::-1] @ affine[:, :3].T + affine[:, 3]
        box = lung_box_mm(LabelMap(labels=labels, geometry=volume.geometry))
        np.testing.assert_allclose(box, [points.min(0), points.max(0)])
