"""A drawn chest whose lungs are known, on any grid; then real scans against other people's masks."""

from pathlib import Path

import numpy as np
import pytest
from lungssl_data.lung_mask import LungMaskError, lung_mask, plausibility
from lungssl_data.readers import read_labels, read_volume
from lungssl_data.volume import Geometry, Volume

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
LUNG_CENTRE, LUNG_AXES = np.array([72.0, 0.0, 0.0]), np.array([54.0, 78.0, 95.0])


def _grid(
    direction: np.ndarray | None = None,
    spacing_mm: tuple[float, float, float] = (3.0, 3.5, 4.0),
    half_mm: float = 180.0,
) -> Geometry:
    """A grid centred on the chest, 2 * half_mm wide, 300 mm deep and 270 mm high along its own axes."""
    direction = np.eye(3) if direction is None else direction
    x, y, z = (int(n) for n in np.ceil(np.array([2 * half_mm, 300.0, 270.0]) / spacing_mm))
    origin = -direction @ (np.array([x - 1, y - 1, z - 1]) * spacing_mm / 2)
    return Geometry(shape=(z, y, x), spacing_mm=spacing_mm, origin_mm=tuple(map(float, origin)), direction=direction)


def _places(geometry: Geometry) -> np.ndarray:
    z, y, x = np.indices(geometry.shape)
    affine = geometry.index_to_mm()
    return np.stack([x, y, z], -1) @ affine[:, :3].T + affine[:, 3]


def _near_segment(p: np.ndarray, a: tuple[float, ...], b: tuple[float, ...], radius_mm: float) -> np.ndarray:
    start, line = np.array(a), np.array(b) - np.array(a)
    t = np.clip((p - start) @ line / (line @ line), 0, 1)
    return np.linalg.norm(p - start - t[..., None] * line, axis=-1) < radius_mm


def _truth(geometry: Geometry) -> np.ndarray:
    p = _places(geometry)
    right = (((p - LUNG_CENTRE * [-1, 1, 1]) / LUNG_AXES) ** 2).sum(-1) < 1
    left = (((p - LUNG_CENTRE) / LUNG_AXES) ** 2).sum(-1) < 1
    return (right + 2 * left).astype(np.uint8)


def _chest(geometry: Geometry, *, spine: bool = True, lung_hu: float = -850.0) -> Volume:
    """Body, lungs with vessels, trachea and main bronchi that open into them, spine, bowel gas, table of foam."""
    p = _places(geometry)
    x, y = p[..., 0], p[..., 1]
    hu = np.full(geometry.shape, -1000.0)
    hu[(x / 155) ** 2 + (y / 105) ** 2 < 1] = 40
    hu[_truth(geometry) > 0] = lung_hu
    for side in (-1, 1):
        hu[_near_segment(p, (side * 30, 5, 0), (side * 90, 20, -40), 3.5)] = 40
        hu[_near_segment(p, (0, 15, 25), (side * 26, 15, 5), 6)] = -990
    hu[_near_segment(p, (0, 15, 25), (0, 15, 200), 9)] = -990
    if spine:
        hu[(x**2 + (y - 75) ** 2) < 18**2] = 300
    hu[((p - [70, -60, -112]) ** 2).sum(-1) < 22**2] = -1000
    hu[(y > 112) & (y < 140) & (np.abs(x) < 140)] = -920
    hu[((y > 110) & (y < 113) | (y > 140) & (y < 143)) & (np.abs(x) < 140)] = 60
    hu[x**2 + y**2 > 185**2] = -2048
    noise = np.random.default_rng(0).normal(0, 20, geometry.shape)
    return Volume(hu=np.where(hu > -2000, hu + noise, hu).astype(np.int16), geometry=geometry)


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def _assert_matches(mask: np.ndarray, truth: np.ndarray, at_least: float = 0.97) -> None:
    for side in (1, 2):
        assert _dice(mask == side, truth == side) >= at_least


@pytest.mark.parametrize("spacing_mm", [(3.0, 3.5, 4.0), (1.3, 2.4, 4.0)])
def test_both_lungs_are_found_apart_without_airway_bowel_and_table(spacing_mm: tuple[float, float, float]) -> None:
    geometry = _grid(spacing_mm=spacing_mm)
    mask = lung_mask(_chest(geometry))
    truth = _truth(geometry)
    _assert_matches(mask, truth, at_least=0.985)
    p = _places(geometry)
    trachea = _near_segment(p, (0, 15, 30), (0, 15, 200), 9) & (truth == 0)
    assert trachea.any() and np.count_nonzero(mask[trachea]) <= 0.02 * trachea.sum()
    vessel = _near_segment(p, (-40, 9, -7), (-80, 17, -33), 3)
    assert mask[vessel].all()


@pytest.mark.parametrize("lung_hu", [-960.0, -600.0])
def test_emphysema_and_dense_exhale_are_lung_alike(lung_hu: float) -> None:
    geometry = _grid()
    _assert_matches(lung_mask(_chest(geometry, lung_hu=lung_hu)), _truth(geometry))


@pytest.mark.parametrize("flips", [(1,), (0, 2)])
def test_flipped_axes_give_the_same_mask_in_the_patient(flips: tuple[int, ...]) -> None:
    volume = _chest(_grid(spacing_mm=(3.1, 1.3, 5.0), half_mm=165.0))
    signs = np.array([-1.0 if 2 - j in flips else 1.0 for j in range(3)])
    last = np.array([volume.geometry.shape[2 - j] - 1 if 2 - j in flips else 0 for j in range(3)])
    affine = volume.geometry.index_to_mm()
    flipped = Volume(
        hu=np.ascontiguousarray(np.flip(volume.hu, flips)),
        geometry=Geometry(
            shape=volume.geometry.shape,
            spacing_mm=volume.geometry.spacing_mm,
            origin_mm=tuple(map(float, affine[:, :3] @ last + affine[:, 3])),
            direction=volume.geometry.direction * signs,
        ),
    )
    np.testing.assert_array_equal(np.flip(lung_mask(flipped), flips), lung_mask(volume))


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (0, 2, 1)])
def test_sagittal_and_coronal_stacks_give_the_same_mask_in_the_patient(order: tuple[int, int, int]) -> None:
    volume = _chest(_grid())
    columns = [2 - order[2 - j] for j in range(3)]
    turned = Volume(
        hu=np.ascontiguousarray(volume.hu.transpose(order)),
        geometry=Geometry(
            shape=tuple(volume.geometry.shape[a] for a in order),
            spacing_mm=tuple(volume.geometry.spacing_mm[c] for c in columns),
            origin_mm=volume.geometry.origin_mm,
            direction=volume.geometry.direction[:, columns],
        ),
    )
    np.testing.assert_array_equal(lung_mask(turned), lung_mask(volume).transpose(order))


def test_an_oblique_grid_finds_the_same_lungs() -> None:
    a, b = np.radians([12.0, 9.0])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    geometry = _grid(about_z @ about_x)
    _assert_matches(lung_mask(_chest(geometry)), _truth(geometry))


def test_lungs_that_touch_in_front_are_parted_at_the_junction() -> None:
    geometry = _grid()
    volume = _chest(geometry)
    p = _places(geometry)
    junction = (np.abs(p[..., 0]) < 40) & (np.abs(p[..., 1] + 30) < 7) & (np.abs(p[..., 2]) < 30)
    volume.hu[junction] = -850
    mask, truth = lung_mask(volume), _truth(geometry)
    bridge = junction & (truth == 0)
    assert mask[bridge].all()
    truth[bridge] = np.where(p[..., 0][bridge] < 0, 1, 2)
    _assert_matches(mask, truth)


@pytest.mark.parametrize(("side", "keep"), [(1, slice(0, 62)), (2, slice(58, None))])
def test_a_crop_around_one_lung_is_told_right_or_left_by_the_spine(side: int, keep: slice) -> None:
    geometry = _grid()
    volume, truth = _chest(geometry), _truth(geometry)
    crop = np.s_[12:60, 24:60, keep]  # cuts the lung below, in front and towards the middle
    cropped = Volume(
        hu=np.ascontiguousarray(volume.hu[crop]),
        geometry=Geometry(
            shape=volume.hu[crop].shape,
            spacing_mm=geometry.spacing_mm,
            origin_mm=(0.0, 0.0, 0.0),
            direction=geometry.direction,
        ),
    )
    mask = lung_mask(cropped)
    assert _dice(mask == side, truth[crop] == side) >= 0.97
    assert not (mask == 3 - side).any()


@pytest.mark.parametrize("absent", [1, 2])
def test_a_lung_without_air_leaves_the_other_on_its_side(absent: int) -> None:
    geometry = _grid()
    volume, truth = _chest(geometry), _truth(geometry)
    volume.hu[truth == absent] = 30
    mask = lung_mask(volume)
    assert _dice(mask == 3 - absent, truth == 3 - absent) >= 0.97
    assert not (mask == absent).any()


def test_air_from_the_mouth_to_the_room_and_padding_slices_do_not_join_lung_and_room() -> None:
    geometry = _grid()
    volume, truth = _chest(geometry), _truth(geometry)
    p = _places(geometry)
    volume.hu[(np.abs(p[..., 0]) < 9) & (p[..., 1] < 20) & (np.abs(p[..., 2] - 118) < 9)] = -1000
    _assert_matches(lung_mask(volume), truth)
    volume = _chest(geometry)
    volume.hu[12:15], truth[:15] = -2048, 0
    volume.hu[:12] = -1000
    _assert_matches(lung_mask(volume), truth)


def test_a_single_lung_without_a_spine_and_a_volume_without_lungs_are_refused() -> None:
    geometry = _grid()
    volume = _chest(geometry, spine=False)
    volume.hu[_truth(geometry) == 2] = 30
    with pytest.raises(LungMaskError, match="no spine to tell its side by; use a scan"):
        lung_mask(volume)
    for hu in (40, -1000, -2048):
        with pytest.raises(LungMaskError, match="check that the scan is a chest CT"):
            lung_mask(Volume(hu=np.full(geometry.shape, hu, np.int16), geometry=geometry))


def test_absurd_masks_are_named_with_their_volume() -> None:
    geometry = _grid()
    mask = _truth(geometry)
    assert plausibility(mask, geometry) is None
    # two ellipsoids of 4/3 pi 54 * 78 * 95 mm3 are 3352 ml
    assert "the lung mask holds 335" in str(plausibility(mask, geometry, volume_ml=(300.0, 3000.0)))
    assert "is empty" in str(plausibility(np.zeros_like(mask), geometry))
    assert "believable are 300 to 12000 ml" in str(plausibility(np.ones_like(mask), geometry))


def _shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip("shared data are not here")
    return SHARED / name


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["3DCT_lung_baseline", "3DCT_lung_followup"])
def test_the_elastix_crops_hold_the_right_lung_and_no_left_one(name: str) -> None:
    volume = read_volume(_shared(f"elastix_lung/{name}.mha"))
    mask = lung_mask(volume)
    assert _dice(mask == 1, read_labels(SHARED / f"elastix_lung/{name}_mask.mha").labels > 0) >= 0.98
    assert not (mask == 2).any()
    assert plausibility(mask, volume.geometry) is None


@pytest.mark.realdata
def test_the_lidc_lungs_equal_the_union_of_their_lobes_on_each_side() -> None:
    mask = lung_mask(read_volume(_shared("lidc_idri_0001/ct.nii.gz")))
    structures = read_labels(SHARED / "lidc_idri_0001/mask_totalsegmentator.nii.gz").labels
    assert _dice(mask == 1, np.isin(structures, (12, 13, 14))) >= 0.98
    assert _dice(mask == 2, np.isin(structures, (10, 11))) >= 0.98
    assert np.count_nonzero(mask[structures == 16]) <= 0.01 * np.count_nonzero(structures == 16)  # trachea


@pytest.mark.realdata
def test_the_cip_scan_at_4_mm_matches_its_whole_lung() -> None:
    mask = lung_mask(read_volume(_shared("cip_ct64/ct-64.nrrd")))
    assert _dice(mask > 0, read_labels(SHARED / "cip_ct64/wholeLung-64.nrrd").labels > 0) >= 0.98


@pytest.mark.realdata
def test_the_scans_without_reference_masks_get_two_believable_lungs() -> None:
    for name in ("4dlung_113_phase40/ct.nii.gz", "dicom_tcga_34_2605"):
        volume = read_volume(_shared(name))
        mask = lung_mask(volume)
        assert plausibility(mask, volume.geometry) is None
        assert all(np.count_nonzero(mask == side) * volume.geometry.voxel_ml() > 500 for side in (1, 2))
