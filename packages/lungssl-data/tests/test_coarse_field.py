from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lungssl_data.cache import PairCache, write_pair
from lungssl_data.coarse_field import LATTICE_MM, CoarseField
from lungssl_data.crops import CropConfig, PairCrops
from lungssl_data.pair import Displacement, PhasePair
from lungssl_data.views import ViewConfig

MAP = np.array([[1.05, 0.02, -0.03, 4.0], [0.01, 0.97, 0.04, -6.0], [-0.02, 0.05, 1.1, 11.0]])
"""An affine displacement: linear interpolation of it is exact."""


def displacement(pair: PhasePair, spacing_mm: tuple[float, float, float] = (2.5, 2.0, 1.5)) -> Displacement:
    assert pair.exhale is not None
    grid = pair.exhale
    extent = (np.array(grid.ct_hu.shape[::-1]) - 1) * grid.spacing_mm
    x, y, z = (np.arange(0, e + 1e-6, mm) + o for e, mm, o in zip(extent, spacing_mm, grid.origin_mm, strict=True))
    points = np.stack(np.meshgrid(z, y, x, indexing="ij")[::-1])
    u = np.einsum("ij,jzyx->izyx", MAP[:, :3], points) + MAP[:, 3, None, None, None] - points
    return Displacement(u_mm=u.astype(np.float32), spacing_mm=spacing_mm, origin_mm=grid.origin_mm, provenance="test")


@pytest.fixture
def cache(tmp_path: Path, make_pair: Callable[..., PhasePair]) -> PairCache:
    pair = make_pair("a")
    write_pair(replace(pair, displacement=displacement(pair)), tmp_path)
    write_pair(make_pair("b"), tmp_path)
    write_pair(make_pair("c", phases=("inhale",)), tmp_path)
    return PairCache(tmp_path)


def test_a_coarse_field_is_the_field_between_its_nodes_and_unknown_outside(
    make_pair: Callable[..., PhasePair],
) -> None:
    pair = make_pair("a")
    field = CoarseField.of(displacement(pair))
    assert max(field.spacing_mm) <= LATTICE_MM and field.u_mm.size < displacement(pair).u_mm.size
    last = np.array(field.u_mm.shape[:0:-1]) - 1
    points = np.random.default_rng(0).uniform(0, 1, (50, 3)) * last * field.spacing_mm + field.origin_mm
    np.testing.assert_allclose(field.inhale_mm(points), points @ MAP[:, :3].T + MAP[:, 3], atol=1e-4)
    beyond = points + last * field.spacing_mm
    assert np.isnan(field.inhale_mm(beyond)).all()


def test_views_know_where_their_points_are_in_the_other_phase(cache: PairCache) -> None:
    crops = PairCrops(cache, CropConfig(crop_vox=(12, 14, 16), correspondences=True), patients=["a"])
    batch = ViewConfig(global_vox=10, local_vox=6, locals_per_slot=1).build()(
        crops.batch(0, 4), torch.Generator().manual_seed(0)
    )
    for view in batch.views:
        if view.slot == 1:
            assert view.partner_mm is None
            continue
        assert view.partner_mm is not None
        expected = torch.einsum("ij,bjzyx->bizyx", torch.tensor(MAP[:, :3], dtype=torch.float32), view.coords_mm)
        expected += torch.tensor(MAP[:, 3], dtype=torch.float32)[:, None, None, None]
        known = view.partner_mm.isfinite().all(dim=1)
        assert known.float().mean() > 0.3
        assert not (known & ~_inside(view.coords_mm, cache)).any()
        torch.testing.assert_close(
            view.partner_mm.movedim(1, -1)[known], expected.movedim(1, -1)[known], atol=2e-3, rtol=0
        )


def _inside(coords_mm: torch.Tensor, cache: PairCache) -> torch.Tensor:
    """Within the exhale scan of patient a, rounding aside."""
    grid = cache.phase_record("a", "exhale")
    low = torch.tensor(grid.origin_mm) - 0.1
    high = low + 0.2 + (torch.tensor(grid.shape[::-1]) - 1) * torch.tensor(grid.spacing_mm)
    at = coords_mm.movedim(1, -1)
    return ((at >= low) & (at <= high)).all(dim=-1)


def test_two_crops_of_one_scan_correspond_by_their_own_positions(cache: PairCache) -> None:
    crops = PairCrops(cache, CropConfig(crop_vox=(12, 14, 16), correspondences=True), patients=["c"])
    view = ViewConfig(global_vox=10, locals_per_slot=0).build()(crops[0], torch.Generator().manual_seed(0)).views[0]
    assert view.partner_mm is not None
    known = view.partner_mm.isfinite()
    assert known.float().mean() > 0.3
    torch.testing.assert_close(view.partner_mm[known], view.coords_mm[known], atol=2e-3, rtol=0)


def test_a_pair_without_a_field_corresponds_nowhere_and_nothing_is_read_unasked(cache: PairCache) -> None:
    asked = PairCrops(cache, CropConfig(crop_vox=(12, 14, 16), correspondences=True), patients=["b"])
    partner_mm = asked[0].partner_mm
    assert partner_mm is not None and partner_mm.isnan().all()
    assert PairCrops(cache, CropConfig(crop_vox=(12, 14, 16)), patients=["b"])[0].partner_mm is None
