"""T14: correspondences of views against maps that are known in closed form."""

from collections.abc import Callable

import pytest
import torch
from lungssl_data.batch import CropBatch, PairBatch, View
from lungssl_data.views import ViewConfig
from lungssl_methods.correspondence import (
    check_correspondences,
    features_at,
    pairs_of_slots,
    places_in,
    sample_matches,
    token_centres_mm,
    token_matches,
)

SIDE = 40
MATRIX = torch.tensor([[1.05, 0.02, 0.0], [0.0, 0.95, 0.03], [0.01, 0.0, 1.1]])
SHIFT = torch.tensor([3.0, -2.0, 4.0])


def crops(*, known: bool = True) -> CropBatch:
    """Two samples of 2 mm voxels; slot 1 is slot 0 by an affine map."""
    torch.manual_seed(0)
    affine = torch.cat([torch.eye(3) * 2.0, torch.tensor([[-30.0], [10.0], [5.0]])], dim=1)
    nodes = torch.linspace(0, SIDE - 1, 6)
    z, y, x = torch.meshgrid(nodes, nodes, nodes, indexing="ij")
    mm = torch.stack([x, y, z], -1) @ affine[:, :3].T + affine[:, 3]
    partner = (mm @ MATRIX.T + SHIFT).permute(3, 0, 1, 2).expand(2, -1, -1, -1, -1).contiguous()
    return CropBatch(
        ct_hu=torch.randint(-1000, 0, (2, 2, SIDE, SIDE, SIDE), dtype=torch.int16),
        valid=torch.ones(2, 2, SIDE, SIDE, SIDE, dtype=torch.bool),
        lung=torch.ones(2, 2, SIDE, SIDE, SIDE, dtype=torch.uint8),
        voxel_to_mm=affine.expand(2, 2, 3, 4).contiguous(),
        slot_phase=torch.tensor([[0, 1], [0, 1]]),
        patient=torch.arange(2),
        exhale_to_inhale=torch.eye(3, 4).expand(2, 3, 4),
        partner_mm=partner if known else None,
    )


def views(seed: int = 0, *, known: bool = True, **changes: object) -> PairBatch:
    config = ViewConfig(**({"global_vox": 32, "globals_per_slot": 2, "locals_per_slot": 0} | changes))  # pyright: ignore
    return config.build()(crops(known=known), torch.Generator().manual_seed(seed))


def mapped(mm: torch.Tensor) -> torch.Tensor:
    return mm @ MATRIX.T + SHIFT


def test_views_of_one_scan_agree_to_a_thousandth_of_a_voxel() -> None:
    batch = views(flip_lr=1.0)
    first, second = (view for view in batch.views if view.slot == 1)
    matches = sample_matches(first, second, 300)
    assert matches.valid.float().mean() > 0.3
    there = features_at(second.coords_mm, matches.second_vox, 1)
    here = features_at(first.coords_mm, matches.first_vox, 1)
    assert (there - here)[matches.valid].norm(dim=-1).max() / 2.0 < 1e-3


def test_views_of_two_phases_agree_through_the_known_map() -> None:
    for first, second in pairs_of_slots(views(1)):
        matches = sample_matches(first, second, 300)
        assert matches.valid.any()
        here = features_at(first.coords_mm, matches.first_vox, 1)
        there = features_at(second.coords_mm, matches.second_vox, 1)
        torch.testing.assert_close(mapped(here), matches.second_mm, atol=1e-3, rtol=0)
        assert (there - mapped(here))[matches.valid].norm(dim=-1).max() / 2.0 < 0.1


def test_points_outside_the_second_view_or_unmeasured_there_are_never_valid() -> None:
    batch = views(2, zoom=(0.6, 0.6))
    first, second = pairs_of_slots(batch)[0]
    matches = sample_matches(first, second, 500)
    vox = matches.second_vox
    assert not matches.valid.all() and matches.valid.any()
    assert ((vox >= 0) & (vox <= 31)).all(-1)[matches.valid].all()
    second.valid[:, :, :16] = False
    hidden = sample_matches(first, second, 500)
    assert hidden.valid.any() and (hidden.second_vox[..., 1].round()[hidden.valid] >= 16).all()
    first.lung.zero_()
    assert not sample_matches(first, second, 50).valid.any()


def test_where_the_map_is_not_known_nothing_matches() -> None:
    batch = views(3)
    first, second = pairs_of_slots(batch)[0]
    assert first.partner_mm is not None
    first.partner_mm[0, :, :16] = torch.nan
    matches = sample_matches(first, second, 300)
    assert not matches.valid[0][matches.first_vox[0, :, 2] < 16].any()
    assert matches.valid[1].any()
    weight = token_matches(first, second, 8, sigma_mm=4.0)
    assert not weight[0, : 2 * 16].any() and torch.isfinite(weight).all()


def test_the_draw_repeats_with_its_generator_and_is_of_the_lung() -> None:
    first, second = pairs_of_slots(views(4))[0]
    first.lung[:, ::2] = False
    one, two = (sample_matches(first, second, 200, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one.first_vox, two.first_vox)
    assert (one.first_vox[..., 2] % 2 == 1).all()


def test_token_weights_lead_to_the_mapped_centre() -> None:
    for first, second in pairs_of_slots(views(5, elastic_mm=0.0, zoom=(1.0, 1.0), rotation_deg=0.0)):
        for a, b in ((first, second), (second, first), (first, first)):
            weight = token_matches(a, b, 4, sigma_mm=4.0)
            total = weight.sum(dim=2)
            assert set(total.round(decimals=5).unique().tolist()) <= {0.0, 1.0} and (total > 0.5).float().mean() > 0.3
            inner = _inner(a, b)
            expected = token_centres_mm(a, 4)
            if a.slot != b.slot:
                inverse = torch.linalg.inv(MATRIX)
                expected = mapped(expected) if a.slot == 0 else (expected - SHIFT) @ inverse.T
            error = (weight @ token_centres_mm(b, 4) - expected).norm(dim=-1)
            assert error[inner & (total > 0.5)].max() < 1.0  # tokens are 8 mm apart


def _inner(a: View, b: View) -> torch.Tensor:
    """Tokens whose place is at least two tokens inside of the other view: Gaussians aren't cut off there."""
    place = token_centres_mm(a, 4)
    if a.slot != b.slot:
        place = mapped(place) if a.slot == 0 else (place - SHIFT) @ torch.linalg.inv(MATRIX).T
    low, high = (f(b.coords_mm.flatten(2), 2) for f in (torch.amin, torch.amax))
    return ((place > low[:, None] + 18.0) & (place < high[:, None] - 18.0)).all(-1)


def test_a_view_of_slot_1_does_not_know_its_place_in_slot_0() -> None:
    batch = views()
    exhale, inhale = pairs_of_slots(batch)[0]
    assert torch.isfinite(places_in(exhale, inhale, 4)).float().mean() > 0.8  # the rest is outside of the crop
    with pytest.raises(
        ValueError, match="slot 1 doesn't say where its points are in the other slot; start from slot 0"
    ):
        places_in(inhale, exhale, 4)
    check_correspondences(batch, "croco")
    with pytest.raises(ValueError, match=r"croco needs to know .*set data.correspondences: true"):
        check_correspondences(views(known=False), "croco")


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_features_are_read_at_the_centres_of_their_cells(stride: int) -> None:
    place = torch.stack(torch.meshgrid(*(torch.arange(8.0) * stride for _ in range(3)), indexing="ij")[::-1])
    centres = place[None] + (stride - 1) / 2  # the voxel coordinate (x, y, z) of each cell's centre
    vox = torch.rand(1, 50, 3) * (8 * stride - stride) + (stride - 1) / 2
    torch.testing.assert_close(features_at(centres, vox, stride), vox, atol=1e-4, rtol=0)


def test_matches_of_batches_without_lungs_are_none(make_batch: Callable[..., PairBatch]) -> None:
    first, second = pairs_of_slots(views(6))[0]
    first.valid.zero_()
    assert not sample_matches(first, second, 10).valid.any()
    assert not token_matches(first, second, 8, sigma_mm=4.0).any()
