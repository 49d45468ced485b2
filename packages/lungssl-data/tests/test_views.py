from dataclasses import replace

import numpy as np
import pytest
import torch
from lungssl_data.batch import HU_WINDOW, CropBatch, View
from lungssl_data.views import BREATH_AXES, ViewConfig, rotation, synthetic_breath
from torch import Tensor

QUIET = {"noise_hu": (0.0, 0.0), "shift_hu": 0.0, "gamma": (1.0, 1.0)}


def coordinate_crops(batch: int = 2, shape: tuple[int, int, int] = (26, 30, 34)) -> CropBatch:
    """Blocks whose HU is a linear function of the LPS position, with unequal spacings and origins."""
    affine = torch.zeros(batch, 2, 3, 4)
    for b in range(batch):
        for slot in range(2):
            affine[b, slot, :, :3] = torch.diag(torch.tensor([1.5, 2.0, 2.5]))
            affine[b, slot, :, 3] = torch.tensor([-20.0 + b, 7.0 - slot, 13.0 * slot])
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij")
    mm = torch.einsum("bsij,jzyx->bsizyx", affine[..., :3], torch.stack([x, y, z])) + affine[..., 3, None, None, None]
    return CropBatch(
        ct_hu=hu_at(mm.flatten(0, 1)).reshape(batch, 2, *shape).round().to(torch.int16),
        valid=torch.ones(batch, 2, *shape, dtype=torch.bool),
        lung=torch.ones(batch, 2, *shape, dtype=torch.uint8),
        voxel_to_mm=affine,
        slot_phase=torch.tensor([[0, 1]] * batch),
        patient=torch.arange(batch),
        exhale_to_inhale=torch.eye(3, 4).expand(batch, 3, 4),
    )


def hu_at(mm: torch.Tensor) -> torch.Tensor:
    """4 HU per mm in x, 5 in y, 6 in z: all within the window."""
    return -600 + 4 * mm[:, 0] + 5 * mm[:, 1] + 6 * mm[:, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"rotation_deg": 0.0, "elastic_mm": 0.0, "zoom": (1.0, 1.0)},
        {"rotation_deg": 0.0, "elastic_mm": 0.0, "zoom": (0.5, 0.9)},
        {"rotation_deg": 25.0, "elastic_mm": 0.0},
        {"rotation_deg": 0.0, "elastic_mm": 0.0, "flip_lr": 1.0},
        {"rotation_deg": 15.0, "elastic_mm": 3.0, "flip_lr": 0.5},
    ],
)
def test_every_voxel_holds_what_lies_at_its_coordinates(changes: dict) -> None:
    config = ViewConfig(global_vox=17, local_vox=9, locals_per_slot=1, **{**QUIET, **changes})
    crops = coordinate_crops()
    batch = config.build()(crops, torch.Generator().manual_seed(3))
    low, high = HU_WINDOW
    for view in batch.views:
        hu = view.image[:, 0] * (high - low) + low
        inside = view.valid
        assert inside.float().mean() > 0.5
        # 0.5 HU of int16 rounding over at least 4 HU per mm, plus float32: well under 0.001 voxel per HU of slope
        error = (hu - hu_at(view.coords_mm)).abs()[inside]
        assert error.max() <= 0.52


def test_the_validity_mask_is_exactly_the_inside_of_the_measured_block() -> None:
    config = ViewConfig(global_vox=21, locals_per_slot=0, rotation_deg=30.0, elastic_mm=4.0, zoom=(1.5, 1.5), **QUIET)
    crops = coordinate_crops()
    crops.valid[:, :, :, :, :5] = False  # padding at low x
    view = config.build()(crops, torch.Generator().manual_seed(1)).views[0]
    affine = crops.voxel_to_mm[:, 0]
    voxel = (view.coords_mm - affine[:, :, 3, None, None, None]) / torch.tensor([1.5, 2.0, 2.5]).view(1, 3, 1, 1, 1)
    last = torch.tensor([33.0, 29.0, 25.0]).view(1, 3, 1, 1, 1)
    low = torch.tensor([5.0, 0.0, 0.0]).view(1, 3, 1, 1, 1)
    clear_in = ((voxel > low + 0.01) & (voxel < last - 0.01)).all(1)
    clear_out = ((voxel < low - 0.01) | (voxel > last + 0.01)).any(1)
    assert view.valid[clear_in].all() and not view.valid[clear_out].any()
    assert clear_out.any() and clear_in.any()


def test_two_views_of_a_scan_agree_where_they_see_the_same_point() -> None:
    config = ViewConfig(global_vox=17, locals_per_slot=0, globals_per_slot=2, **QUIET)
    batch = config.build()(coordinate_crops(batch=1), torch.Generator().manual_seed(0))
    first, second = (view for view in batch.views if view.slot == 0)
    a, b = (view.coords_mm[0].flatten(1).T[view.valid[0].flatten()] for view in (first, second))
    values = [view.image[0, 0].flatten()[view.valid[0].flatten()] for view in (first, second)]
    distance, match = torch.cdist(a, b).min(1)
    near = distance < 0.3
    assert near.any()
    steepest = 4 * 0.3 + 5 * 0.3 + 6 * 0.3 + 1
    assert ((values[0][near] - values[1][match[near]]).abs() * 1400 < steepest).all()


def test_the_generator_alone_decides() -> None:
    sampler, crops = ViewConfig(global_vox=12, local_vox=8).build(), coordinate_crops()
    first, again, other = (sampler(crops, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    for a, b, c in zip(first.views, again.views, other.views, strict=True):
        assert torch.equal(a.image, b.image) and torch.equal(a.coords_mm, b.coords_mm)
        assert not torch.equal(a.image, c.image)


def test_views_come_globals_first_and_slots_alternate() -> None:
    config = ViewConfig(global_vox=12, local_vox=8, globals_per_slot=1, locals_per_slot=2)
    batch = config.build()(coordinate_crops(), torch.Generator())
    assert [(v.kind, v.slot) for v in batch.views] == [("global", 0), ("global", 1)] + [("local", 0), ("local", 1)] * 2
    assert [v.image.shape[-1] for v in batch.views] == [12, 12, 8, 8, 8, 8]
    assert batch.paired().all()


def test_labels_are_carried_without_mixing() -> None:
    crops = coordinate_crops()
    labels = torch.where(crops.ct_hu > -500, 5, 2).to(torch.uint8)
    batch = ViewConfig(global_vox=15, locals_per_slot=0, **QUIET).build()(
        replace(crops, labels=labels), torch.Generator()
    )
    view = batch.views[0]
    assert view.labels is not None
    assert set(view.labels[view.valid].unique().tolist()) == {2, 5}
    low, high = HU_WINDOW
    hu = view.image[:, 0] * (high - low) + low
    assert (view.labels[view.valid & (hu > -480)] == 5).all()


def test_mirroring_labelled_scans_is_refused() -> None:
    crops = coordinate_crops()
    crops = replace(crops, labels=crops.lung)
    with pytest.raises(ValueError, match=r"flip_lr=0\.5 with labels"):
        ViewConfig(flip_lr=0.5).build()(crops, torch.Generator())


def test_noise_has_the_standard_deviation_that_was_asked_for() -> None:
    config = ViewConfig(
        global_vox=24,
        locals_per_slot=0,
        rotation_deg=0.0,
        elastic_mm=0.0,
        noise_hu=(30.0, 30.0),
        shift_hu=0.0,
        gamma=(1.0, 1.0),
    )
    view = config.build()(coordinate_crops(), torch.Generator().manual_seed(0)).views[0]
    noise = view.image[:, 0] * 1400 - 1000 - hu_at(view.coords_mm)
    assert float(noise[view.valid].std()) == pytest.approx(30, rel=0.05)


def test_no_two_views_or_samples_share_their_noise() -> None:
    config = ViewConfig(
        global_vox=12,
        local_vox=12,
        rotation_deg=0.0,
        elastic_mm=0.0,
        noise_hu=(30.0, 30.0),
        shift_hu=0.0,
        gamma=(1.0, 1.0),
    )
    views = config.build()(coordinate_crops(), torch.Generator().manual_seed(0)).views
    noise = torch.cat([view.image[:, 0] * 1400 - 1000 - hu_at(view.coords_mm) for view in views]).flatten(1)
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    # 66 pairs of 1728 numbers each: a chance correlation has a standard deviation of 0.024.
    assert len(noise) == 12 and correlation.abs().max() < 0.12


def test_a_view_of_half_the_resolution_does_not_alias() -> None:
    # Slices of -900 and -100 HU in turn: read at every second one, they are one or the other.
    crops = coordinate_crops(batch=1, shape=(32, 32, 32))
    slices = torch.where(torch.arange(32) % 2 == 0, -900, -100).to(torch.int16).view(1, 1, 32, 1, 1)
    config = ViewConfig(global_vox=14, locals_per_slot=0, zoom=(2.0, 2.0), rotation_deg=0.0, elastic_mm=0.0, **QUIET)
    crops = replace(crops, ct_hu=slices.expand_as(crops.ct_hu).contiguous())
    for seed in range(3):
        view = config.build()(crops, torch.Generator().manual_seed(seed)).views[0]
        hu = view.image[:, 0][view.valid] * 1400 - 1000
        assert view.valid.float().mean() > 0.8
        torch.testing.assert_close(hu, torch.full_like(hu, -500), rtol=0, atol=0.1)


def test_the_plain_view_is_the_central_block_itself() -> None:
    crops = coordinate_crops(shape=(20, 24, 28))
    view = ViewConfig(global_vox=16).build().plain(crops).views[1]
    expected = crops.ct_hu[:, 1, 2:18, 4:20, 6:22].float()
    np.testing.assert_allclose(view.image[:, 0] * 1400 - 1000, expected, atol=0.05)


def test_rotations_are_rotations_about_the_named_axis() -> None:
    quarter = rotation(torch.tensor([[0.0, 0.0, torch.pi / 2]]))[0]
    np.testing.assert_allclose(quarter @ torch.tensor([1.0, 0, 0]), [0, 1, 0], atol=1e-6)
    turn = rotation(torch.tensor([[0.3, -0.2, 0.5]]))[0]
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-6)
    assert float(torch.det(turn)) == pytest.approx(1.0)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_synthetic_breath_keeps_the_lungs_mass(batch: int) -> None:
    """Tissue fraction over all voxels, times how much a voxel grew, is what it was; slot 0 and pairs don't change."""
    crops = coordinate_crops(batch)
    lung = (torch.arange(26) > 8)[None, None, :, None, None].expand(crops.lung.shape).to(torch.uint8)
    crops = replace(crops, lung=lung.contiguous(), slot_phase=torch.tensor([[1, 1]] * (batch - 1) + [[0, 1]]))
    ratio = torch.linspace(1.2, 1.6, batch)
    breathed, stretch = synthetic_breath(crops, ratio)
    torch.testing.assert_close(breathed.ct_hu[:, 0], crops.ct_hu[:, 0])
    torch.testing.assert_close(breathed.ct_hu[-1], crops.ct_hu[-1])
    assert stretch[-1].tolist() == [1.0, 1.0, 1.0]
    for row in range(batch - 1):
        inside = lung[row, 1] > 0
        assert stretch[row].prod().item() == pytest.approx(ratio[row].item(), rel=1e-5)
        assert stretch[row, 2] > stretch[row, 1] > stretch[row, 0] > 1  # most along z: the diaphragm
        before, after = (one.ct_hu[row, 1][inside].double() + 1000 for one in (crops, breathed))
        assert (after.sum() * ratio[row]).item() == pytest.approx(before.sum().item(), rel=1e-3)
        torch.testing.assert_close(breathed.ct_hu[row, 1][~inside], crops.ct_hu[row, 1][~inside])


def test_views_of_a_synthetic_breath_see_the_same_place_larger_and_thinner() -> None:
    crops = replace(coordinate_crops(2), slot_phase=torch.tensor([[0, 0], [0, 1]]))
    still = {**QUIET, "rotation_deg": 0.0, "elastic_mm": 0.0, "zoom": (1.0, 1.0), "locals_per_slot": 0}
    config = ViewConfig(global_vox=9, breath=(1.5, 1.5), **still)
    first, second = config.build()(crops, torch.Generator().manual_seed(0)).views
    step = [(view.coords_mm[:, :, 1, 1, 1] - view.coords_mm[:, :, 0, 0, 0]) for view in (first, second)]
    torch.testing.assert_close(step[0][0] / step[1][0], torch.tensor([1.5**share for share in BREATH_AXES]))
    torch.testing.assert_close(step[0][1], step[1][1])  # a pair breathes by itself
    low, high = HU_WINDOW
    tissue = (second.image[0, 0] * (high - low) + low + 1000) * 1.5
    torch.testing.assert_close(tissue, hu_at(second.coords_mm)[0] + 1000, atol=1.6, rtol=0)


@pytest.mark.parametrize("side", [9, 24])
def test_an_elastic_warp_never_folds_a_view(side: int) -> None:
    crops = coordinate_crops(batch=24, shape=(26, 26, 26))
    config = ViewConfig(global_vox=side, locals_per_slot=0, rotation_deg=0.0, elastic_mm=8.0, **QUIET)
    for view in config.build()(crops, torch.Generator().manual_seed(0)).views:
        columns = [view.coords_mm.diff(dim=axis)[:, :, : side - 1, : side - 1, : side - 1] for axis in (4, 3, 2)]
        jacobian = torch.linalg.det(torch.stack(columns, dim=-1).permute(0, 2, 3, 4, 1, 5))
        assert jacobian.min() > 0 and jacobian.std() > 0.1


def test_a_view_says_its_shift_and_gamma() -> None:
    crops = replace(coordinate_crops(), ct_hu=torch.full((2, 2, 26, 30, 34), -700, dtype=torch.int16))
    config = ViewConfig(global_vox=9, locals_per_slot=0, noise_hu=(0.0, 0.0), elastic_mm=0.0, zoom=(1.0, 1.0))
    low, high = HU_WINDOW
    for view in config.build()(crops, torch.Generator().manual_seed(1)).views:
        assert view.shift_hu is not None and view.gamma is not None
        expected = ((-700 + view.shift_hu - low) / (high - low)) ** view.gamma
        torch.testing.assert_close(view.image.mean(dim=(1, 2, 3, 4)), expected, atol=1e-4, rtol=0)
        assert view.shift_hu.abs().min() > 0.1 and (view.gamma - 1).abs().min() > 0.001
    assert config.build().plain(crops).views[0].gamma is None


def test_fields_that_are_made_later_are_made_once_and_in_float32() -> None:
    made: list[str] = []
    matrices, whole = torch.full((1, 3, 2, 2, 2), 1.001), torch.ones(1, 2, 2, 2, dtype=torch.bool)

    def coords_mm() -> Tensor:
        made.append("coords_mm")
        return matrices @ matrices  # autocast would round it

    def lung() -> Tensor:
        made.append("lung")
        return whole

    known = {"image": torch.zeros(1, 1, 2, 2, 2), "valid": whole, "slot": 1, "kind": "local"}
    view = View.later({"coords_mm": coords_mm, "lung": lung}, **known)
    assert made == [] and view.partner_mm is None and view.slot == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(view.coords_mm, view.coords_mm)
    assert torch.equal(view.coords_mm, matrices @ matrices) and made == ["coords_mm"]
    moved = replace(view, kind="global")
    assert moved.kind == "global" and moved.lung.all() and made == ["coords_mm", "lung"]
    with pytest.raises(AttributeError, match="a view has no colour"):
        _ = view.colour
    with pytest.raises(TypeError, match="a view needs coords_mm, lung"):
        View.later({}, **known)


def test_a_sampler_makes_no_positions_that_nobody_reads() -> None:
    batch = ViewConfig(global_vox=8, locals_per_slot=0).build()(coordinate_crops(), torch.Generator().manual_seed(0))
    for view in batch.views:
        assert {"coords_mm", "lung"}.isdisjoint(view.__dict__)
        assert view.coords_mm.shape == (len(view.image), 3, 8, 8, 8) and view.lung.dtype == torch.bool
