"""What the views are: values from outside, symmetries, borders, masks, coordinates, errors."""

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lungssl_ops.ct_views import (
    ViewTable,
    _views,
    ct_views,
    mask_views,
    view_affine,
    view_coords_mm,
    view_points_mm,
)
from lungssl_ops.dispatch import Backend
from torch import Tensor

GPU = "cuda" if torch.cuda.is_available() else "cpu"
AVAILABLE = {b for device in ("cpu", GPU) for b in _views.available(torch.zeros(1, dtype=torch.int16, device=device))}
BACKENDS = [backend for backend in get_args(Backend) if backend in AVAILABLE]
IDENTITY = torch.eye(3, 4)[None]


def _place(backend: Backend) -> str:
    """Where a backend is tested; Triton's interpreter runs on the CPU."""
    return GPU if backend == "triton" else "cpu"


def _view(volume: Tensor, table: ViewTable, size: tuple[int, int, int], *, backend: Backend, **options: Any) -> Tensor:
    return ct_views(volume.to(_place(backend)), table, size, backend=backend, **options).cpu()


def _mask(mask: Tensor, table: ViewTable, size: tuple[int, int, int], *, backend: Backend, **options: Any) -> Tensor:
    return mask_views(mask.to(_place(backend)), table, size, backend=backend, **options).cpu()


def _one(affine: Tensor = IDENTITY, **columns: Tensor) -> ViewTable:
    """One view of volume 0 whose output is HU / 1000 from 0 to 1000."""
    window = torch.tensor([[0.0, 1000.0]])
    return ViewTable(volume=torch.tensor([0]), affine=affine, **{"window_hu": window, **columns})


def _shifted(x: float, y: float, z: float) -> Tensor:
    affine = IDENTITY.clone()
    affine[0, :, 3] = torch.tensor([x, y, z])
    return affine


def _random_volume(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1000, size, generator=generator, dtype=torch.int16)


def _turned(seed: int = 0, zoom: float = 1.0) -> Tensor:
    """Matrices of a general rotation, unequal along the axes."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.linalg.qr(torch.randn(1, 3, 3, generator=generator))[0]
    return matrix * torch.tensor([0.9, 1.1, 1.0]) * zoom


@settings(max_examples=10, deadline=None)
@given(corner=st.tuples(*[st.integers(0, n) for n in (4, 3, 2)]), seed=st.integers(0, 99))
def test_without_any_change_a_view_is_a_crop(corner: tuple[int, int, int], seed: int) -> None:
    volume = _random_volume(1, 5, 7, 9, seed=seed)
    x, y, z = corner
    for backend in BACKENDS:
        view = _view(volume, _one(_shifted(x, y, z)), (3, 4, 5), backend=backend)
        crop = volume[0, z : z + 3, y : y + 4, x : x + 5].float() / 1000
        torch.testing.assert_close(view[0, 0], crop, rtol=0, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_between_eight_voxels_lies_their_mean(backend: Backend) -> None:
    volume = _random_volume(1, 2, 2, 2)
    view = _view(volume, _one(_shifted(0.5, 0.5, 0.5)), (1, 1, 1), backend=backend)
    assert view.item() == pytest.approx(volume.double().mean().item() / 1000, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hu_are_interpolated_before_the_window_and_raised_to_gamma_after_it(backend: Backend) -> None:
    # Halfway between -600 and 800 lies 100; clipped to 0 .. 1000 first, it would be 400.
    volume = torch.tensor([-600, 800], dtype=torch.int16).reshape(1, 1, 1, 2)
    table = _one(_shifted(0.5, 0, 0), shift_hu=torch.tensor([60.0]), gamma=torch.tensor([0.5]))
    view = _view(volume, table, (1, 1, 1), fill_hu=None, backend=backend)
    assert view.item() == pytest.approx(math.sqrt((100 + 60) / 1000), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_beyond_the_window_lie_exactly_0_and_1(backend: Backend) -> None:
    volume = torch.tensor([-1024, 0, 1000, 3000], dtype=torch.int16).reshape(1, 1, 1, 4)
    for gamma in (1.0, 0.7, 1.3):
        view = _view(volume, _one(gamma=torch.tensor([gamma])), (1, 1, 4), backend=backend)
        assert view.flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_voxel_holds_what_lies_at_its_coordinates(backend: Backend) -> None:
    # HU linear in mm is reproduced exactly by linear interpolation, wherever it is read.
    voxel_to_mm = torch.tensor([[[1.5, 0, 0, -20], [0, 2.0, 0, 7], [0, 0, 2.5, 13]]])
    z, y, x = torch.meshgrid(*(torch.arange(n) for n in (12, 13, 14)), indexing="ij")
    volume = (500 + 8 * x - 6 * y + 4 * z).to(torch.int16)[None]
    size = (4, 5, 6)
    generator = torch.Generator().manual_seed(0)
    table = _one(
        view_affine(size, torch.tensor([[6.5, 6.0, 5.5]]), _turned()),
        lattice=0.5 * torch.randn(1, 3, 4, 4, 4, generator=generator),
    )
    view = _view(volume, table, size, backend=backend)[0, 0]
    mm = view_coords_mm(table, size, voxel_to_mm)[0]
    expected = 500 + 8 * (mm[0] + 20) / 1.5 - 6 * (mm[1] - 7) / 2 + 4 * (mm[2] - 13) / 2.5
    torch.testing.assert_close(1000 * view, expected, rtol=0, atol=2e-3)
    assert view.std() > 0.005


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_negative_column_mirrors(backend: Backend) -> None:
    volume, size, centre = _random_volume(1, 6, 7, 8), (3, 4, 5), torch.tensor([[3.3, 2.9, 2.6]])
    straight = view_affine(size, centre, torch.eye(3)[None])
    for axis in range(3):
        mirror = torch.eye(3)[None].clone()
        mirror[0, axis, axis] = -1
        mirrored = _view(volume, _one(view_affine(size, centre, mirror)), size, backend=backend)
        view = _view(volume, _one(straight), size, backend=backend)
        torch.testing.assert_close(mirrored, view.flip(4 - axis), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_outside_lies_the_fill_or_the_outermost_voxel(backend: Backend) -> None:
    volume = torch.full((1, 2, 2, 2), 800, dtype=torch.int16)
    for axis in range(3):
        shift = [0.0, 0.0, 0.0]
        for offset, inside in ((-0.25, 0.75), (-1.0, 0.0), (-40.0, 0.0), (1.25, 0.75), (2.0, 0.0), (1e9, 0.0)):
            shift[axis] = offset
            table = _one(_shifted(*shift))
            view = _view(volume, table, (1, 1, 1), fill_hu=100.0, backend=backend)
            assert view.item() == pytest.approx(0.8 * inside + 0.1 * (1 - inside), abs=1e-6)
            held = _view(volume, table, (1, 1, 1), fill_hu=None, backend=backend)
            assert held.item() == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_position_that_is_not_a_number_lies_outside(backend: Backend) -> None:
    volume = torch.full((1, 3, 3, 3), 800, dtype=torch.int16)
    table = _one(lattice=torch.full((1, 3, 2, 2, 2), torch.nan))
    assert (_view(volume, table, (2, 2, 9), fill_hu=100.0, backend=backend) == 0.1).all()
    for rule in ("nearest", "wholly"):
        assert (_mask(volume.ne(0).byte(), table, (2, 2, 9), rule=rule, backend=backend) == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_shrinking_does_not_alias(backend: Backend) -> None:
    # A wave of k voxels, read at every k-th, is a constant that isn't there; its mean over k voxels is 500.
    size = (2, 3, 4)
    for axis in range(3):
        for period in (2, 3):
            n = period * size[2 - axis] + 2
            wave = (500 + 400 * torch.cos(2 * math.pi * torch.arange(n) / period)).round().to(torch.int16)
            shape = [6, 7, 8]
            shape[2 - axis] = n
            volume = wave.reshape([n if d == 2 - axis else 1 for d in range(3)]).expand(shape)[None]
            zoom = torch.eye(3)[None].clone()
            zoom[0, axis, axis] = period
            affine = torch.cat([zoom, torch.full((1, 3, 1), 1.0 if period == 3 else 0.5)], -1)
            table = _one(affine)
            smooth = _view(volume, table, size, fill_hu=None, backend=backend)
            torch.testing.assert_close(smooth, torch.full_like(smooth, 0.5), rtol=0, atol=1.1e-3)
            skipping = _view(volume, _one(affine.floor()), size, fill_hu=None, antialias=False, backend=backend)
            assert (skipping - 0.5).abs().min() > 0.15


@pytest.mark.parametrize("backend", BACKENDS)
def test_up_to_a_step_of_a_voxel_and_a_half_nothing_is_averaged(backend: Backend) -> None:
    volume, size = _random_volume(1, 9, 9, 9), (3, 4, 5)
    for zoom, alike in ((0.5, True), (1.0, True), (1.5, True), (1.6, False)):
        matrix = torch.linalg.qr(torch.randn(1, 3, 3))[0] * zoom
        table = _one(view_affine(size, torch.full((1, 3), 4.0), matrix))
        with_it, without = (_view(volume, table, size, antialias=a, backend=backend) for a in (True, False))
        assert torch.equal(with_it, without) == alike


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_nearest_label_is_the_one_within_half_a_voxel(backend: Backend) -> None:
    labels = torch.arange(2 * 4 * 4 * 4, dtype=torch.uint8).reshape(2, 4, 4, 4)
    size = (3, 4, 5)
    generator = torch.Generator().manual_seed(0)
    table = ViewTable(
        volume=torch.tensor([1, 0]),
        affine=view_affine(size, torch.full((2, 3), 1.5), _turned().expand(2, 3, 3)),
        lattice=torch.randn(2, 3, 3, 3, 3, generator=generator),
    )
    found = _mask(labels, table, size, backend=backend)
    places = view_coords_mm(table, size, IDENTITY.expand(2, 3, 4)).flatten(2)
    outside = 0
    for view, volume in enumerate((1, 0)):
        for voxel, (x, y, z) in zip(found[view].flatten().tolist(), places[view].T.round().int().tolist(), strict=True):
            inside = all(0 <= i < 4 for i in (x, y, z))
            outside += not inside
            assert voxel == (labels[volume, z, y, x].item() if inside else 0)
    assert 5 < outside < 115


@pytest.mark.parametrize("backend", BACKENDS)
def test_wholly_marks_the_voxels_that_read_nothing_but_the_mask(backend: Backend) -> None:
    mask = torch.zeros(1, 5, 5, 5, dtype=torch.uint8)
    mask[0, 1:4, 1:4, 1:4] = 7
    for offset, expected in ((0.0, 1), (1.0, 1), (-0.01, 0), (1.01, 0)):
        for axis in range(3):
            shift = [1.0, 1.0, 1.0]
            shift[axis] += offset
            found = _mask(mask, _one(_shifted(*shift)), (2, 2, 2), rule="wholly", backend=backend)
            # Voxels 1 + offset and 2 + offset; the mask is 1 .. 3.
            first, second = found[0].movedim(2 - axis, 0)
            assert (first == (offset >= 0)).all() and (second == (offset <= 1)).all()
            assert found.min() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_wholly_asks_for_all_samples_of_a_voxel_that_shrinks(backend: Backend) -> None:
    mask = torch.ones(1, 4, 4, 12, dtype=torch.uint8)
    mask[..., 6:] = 0
    affine = torch.tensor([[[3.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]])
    # Voxels of the view at 1, 4, 7, 10, samples one voxel to either side; the mask ends at 5.
    assert _mask(mask, _one(affine), (1, 1, 4), rule="wholly", backend=backend).flatten().tolist() == [1, 1, 0, 0]
    affine[0, 0, 3] = 2
    assert _mask(mask, _one(affine), (1, 1, 4), rule="wholly", backend=backend).flatten().tolist() == [1, 0, 0, 0]


def test_the_lattice_moves_its_nodes_by_its_values() -> None:
    generator = torch.Generator().manual_seed(0)
    lattice, size = torch.randn(1, 3, 4, 4, 4, generator=generator), (7, 10, 4)
    table = _one(lattice=lattice)
    moved = view_coords_mm(table, size, IDENTITY)[0] - view_coords_mm(_one(), size, IDENTITY)[0]
    torch.testing.assert_close(moved[:, ::2, ::3], lattice[0], rtol=0, atol=2e-6)
    between = (lattice[0, :, 0] + lattice[0, :, 1]) / 2
    torch.testing.assert_close(moved[:, 1, ::3], between, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(3, 4, 5), (1, 1, 1), (2, 1, 131)])
def test_coordinates_of_some_voxels_are_those_of_all(size: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    voxel_to_mm = torch.randn(2, 3, 4, generator=generator)
    table = ViewTable(
        volume=torch.tensor([0, 0]),
        affine=torch.randn(2, 3, 4, generator=generator),
        lattice=torch.randn(2, 3, 5, 5, 5, generator=generator),
    )
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    voxels = torch.stack([x, y, z], -1).reshape(1, -1, 3).expand(2, -1, 3)
    expected = view_points_mm(table, size, voxel_to_mm, voxels).transpose(1, 2).reshape(2, 3, *size)
    for backend in BACKENDS:
        found = view_coords_mm(table, size, voxel_to_mm.to(_place(backend)), backend=backend).cpu()
        assert (found - expected).norm() < 1e-6 * expected.norm()


def test_the_centre_of_a_view_lies_where_it_was_put() -> None:
    centre, size = torch.tensor([[3.25, -1.5, 8.0]]), (4, 5, 6)
    table = _one(view_affine(size, centre, _turned()))
    middle = torch.tensor([[[2.5, 2.0, 1.5]]])
    torch.testing.assert_close(view_points_mm(table, size, IDENTITY, middle)[0], centre)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_of_no_views_gives_none(backend: Backend) -> None:
    none = ViewTable(volume=torch.zeros(0, dtype=torch.int64), affine=torch.zeros(0, 3, 4))
    volume = _random_volume(1, 3, 4, 5)
    assert _view(volume, none, (2, 2, 4), backend=backend).shape == (0, 1, 2, 2, 4)
    assert _view(volume, none, (2, 2, 4), patch_vox=(1, 2, 2), backend=backend).shape == (0, 4, 4)
    assert _mask(volume.byte(), none, (2, 2, 4), backend=backend).shape == (0, 2, 2, 4)
    no_maps = torch.zeros(0, 3, 4, device=_place(backend))
    assert view_coords_mm(none, (2, 2, 4), no_maps, backend=backend).shape == (0, 3, 2, 2, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"volume": torch.tensor([1])}, r"view 0 is of volume 1; there are 1, counted from 0"),
        ({"volume": torch.tensor([-1])}, r"view 0 is of volume -1"),
        ({"affine": torch.full((1, 3, 4), torch.inf)}, r"has a number that isn't finite: \[inf"),
        ({"window_hu": torch.tensor([[400.0, -1000.0]])}, r"high end isn't above its low end: \[400.0, -1000.0\]"),
        ({"gamma": torch.tensor([0.0])}, r"gamma that isn't positive: 0.0"),
        ({"noise_hu": torch.tensor([-1.0])}, r"negative noise_hu: -1.0"),
        ({"affine": 9 * IDENTITY}, r"steps of \[9.0, 9.0, 9.0\] voxels .* above 8.5 shrink the volume first"),
    ],
)
def test_tables_whose_numbers_make_no_sense_are_refused(
    backend: Backend, changes: dict[str, Tensor], message: str
) -> None:
    volume, table = _random_volume(1, 3, 4, 5), replace(_one(), **changes)
    with pytest.raises(ValueError, match=message):
        _view(volume, table, (2, 2, 2), backend=backend)
    if not {"window_hu", "gamma", "noise_hu"} & set(changes):
        with pytest.raises(ValueError, match=message):
            _mask(volume.byte(), table, (2, 2, 2), backend=backend)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_go_together_is_refused_with_what_was_expected() -> None:
    volume, table = _random_volume(1, 3, 4, 6), _one()
    with pytest.raises(ValueError, match=r"multiples of the patch \(2, 2, 4\)"):
        ct_views(volume, table, (2, 2, 6), patch_vox=(2, 2, 4))
    with pytest.raises(ValueError, match=r"sizes must be positive, got size_vox \(0, 2, 2\)"):
        ct_views(volume, table, (0, 2, 2))
    with pytest.raises(ValueError, match=r"has 1099511627776 voxels; expected < 2\^30"):
        mask_views(volume.byte(), table, (2**20, 2**20, 1))
    with pytest.raises(ValueError, match=r"can't give torch\.int16"):
        ct_views(volume, table, (2, 2, 2), dtype=torch.int16)
    with pytest.raises(ValueError, match="fill_hu is nan"):
        ct_views(volume, table, (2, 2, 2), fill_hu=torch.nan)
    with pytest.raises(ValueError, match=r"volume of torch.float32, shape \(3, 4, 6\), on cpu; expected torch.int16"):
        ct_views(volume.float(), table, (2, 2, 2))
    with pytest.raises(ValueError, match=r"expected \[b, z, y, x\] or a list"):
        ct_views(volume[0], table, (2, 2, 2))
    with pytest.raises(ValueError, match="got no volumes"):
        ct_views([], table, (2, 2, 2))
    with pytest.raises(ValueError, match="no rule 'linear'"):
        mask_views(volume.byte(), table, (2, 2, 2), rule="linear")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"voxel_to_mm has shape \(2, 3, 4\); expected \[1, 3, 4\]"):
        view_coords_mm(table, (2, 2, 2), IDENTITY.expand(2, 3, 4))


@pytest.mark.usefixtures("unchecked")
def test_tables_of_other_shapes_are_refused_when_they_are_made() -> None:
    with pytest.raises(ValueError, match=r"ViewTable.affine is torch.float32 of shape \(2, 3, 4\) on cpu; expected"):
        _one(IDENTITY.expand(2, 3, 4))
    with pytest.raises(ValueError, match=r"ViewTable.gamma is torch.float64"):
        _one(gamma=torch.ones(1, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"lattice has shape \(1, 3, 1, 1, 1\); expected \[1, 3, n, n, n\] with 2 <= n"
    ):
        _one(lattice=torch.zeros(1, 3, 1, 1, 1))
    with pytest.raises(ValueError, match=r"ViewTable.shift_hu .* on meta; expected .* on cpu"):
        _one(shift_hu=torch.zeros(1, device="meta"))


def test_float64_is_computed_by_the_definition_and_by_nothing_else() -> None:
    with pytest.raises(RuntimeError, match="ct_views_float64 has no backend 'cpp'"):
        ct_views(_random_volume(1, 3, 4, 5), _one(), (2, 2, 2), dtype=torch.float64, backend="cpp")
