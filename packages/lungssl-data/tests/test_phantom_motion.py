from collections.abc import Callable

import numpy as np
import pytest
from lungssl_data.phantom import Phantom
from lungssl_data.phantom.motion import ABDOMEN, MEDIASTINUM, SPINE, WALL, transport_table
from lungssl_data.phantom.points import place_lung, trace
from scipy.ndimage import map_coordinates

Phantoms = Callable[..., Phantom]
Voxels = Callable[..., tuple[np.ndarray, np.ndarray]]

# Numbers in brackets are those of the acceptance list of domain.md D6.
CASES = [("healthy", 0, "charts"), ("deep", 1, "charts"), ("ards", 0, "charts"), ("deep", 1, "ffd")]
cases = pytest.mark.parametrize(("preset", "seed", "motion"), CASES)


@cases
def test_round_trip_is_exact(phantom: Phantoms, voxels: Voxels, preset: str, seed: int, motion: str) -> None:  # (1)
    p = phantom(preset, seed, motion)
    exhale = voxels(p.exhale, p.exhale.lung > 0)[1] + 0.3
    inhale = p.to_inhale(exhale)
    inside = np.isfinite(inhale).all(1)
    assert inside.mean() > 0.9
    assert np.abs(p.to_exhale(inhale[inside]) - exhale[inside]).max() <= 1e-6


@cases
def test_jacobian_is_the_derivative_of_the_map(
    phantom: Phantoms, voxels: Voxels, preset: str, seed: int, motion: str
) -> None:  # (2)
    p, step = phantom(preset, seed, motion), 1e-3
    index, at = voxels(p.exhale, p.exhale.lung > 0, 2000)
    columns = [(p.to_inhale(at + e) - p.to_inhale(at - e)) / (2 * step) for e in np.eye(3) * step]
    numeric = np.linalg.det(np.stack(columns, -1))
    inside = np.isfinite(numeric)
    assert inside.mean() > 0.99
    error = np.abs(p.jacobian[tuple(index.T)] / numeric - 1)[inside]
    assert np.median(error) <= 1e-3
    assert np.percentile(error, 99) <= 5e-3


@cases
def test_lungs_never_fold_and_expand_as_much_as_their_volume(
    phantom: Phantoms, voxels: Voxels, preset: str, seed: int, motion: str
) -> None:  # (3)
    p = phantom(preset, seed, motion)
    lung = p.exhale.lung > 0
    assert p.jacobian[lung].min() > (0.3 if motion == "charts" else 0.1)
    assert not p.jacobian[~lung].any()
    growth = (p.inhale.lung > 0).sum() / lung.sum()  # voxels are equal in both phases
    assert p.jacobian[lung].mean() == pytest.approx(growth, rel=5e-3)


@cases
def test_exported_fields_undo_each_other_inside_a_region(
    phantom: Phantoms, voxels: Voxels, preset: str, seed: int, motion: str
) -> None:  # (5)
    p = phantom(preset, seed, motion)
    for region in (1, 2, MEDIASTINUM, WALL, SPINE):
        index, start = voxels(p.exhale, p.exhale.region == region, 20_000)
        u = p.exhale_to_inhale_mm[:, *index.T].T
        geometry = p.inhale.ct.geometry
        at = ((start + u - geometry.origin_mm) / geometry.spacing_mm)[:, ::-1]
        # The eight voxels that are interpolated, and those next to them, must all belong to the region.
        corner = np.floor(at).astype(int)
        around = np.stack(np.meshgrid(*[np.arange(-1, 3)] * 3, indexing="ij"), -1).reshape(-1, 1, 3) + corner
        on_grid = ((around >= 0) & (around < geometry.shape)).all((0, 2))
        around, at, u = around[:, on_grid], at[on_grid], u[on_grid]
        inside = (p.inhale.region[tuple(np.moveaxis(around, -1, 0))] == region).all(0)
        assert inside.sum() > 1000
        back = np.stack([map_coordinates(c, at[inside].T, order=1) for c in p.inhale_to_exhale_mm], 1)
        # Trilinear interpolation errs with the square of the 3 mm; the warp bends more than the charts.
        assert np.linalg.norm(u[inside] + back, axis=1).max() <= (0.05 if motion == "charts" else 0.15)


@cases
def test_diaphragm_descends_while_heart_keeps_its_volume_and_spine_its_place(
    phantom: Phantoms, voxels: Voxels, preset: str, seed: int, motion: str
) -> None:
    p = phantom(preset, seed, motion)
    # The abdomen's top slice of voxels moves down, towards smaller z.
    abdomen = p.exhale.region == ABDOMEN
    top = abdomen & ~np.roll(abdomen, -1, 0)
    assert p.exhale_to_inhale_mm[2][top].mean() < {"deep": -20, "healthy": -8, "ards": -5}[preset]
    assert np.abs(p.exhale_to_inhale_mm[:, p.exhale.region == SPINE]).max() < 3
    subject, blood_ml = p.subject, []
    for phase, here in ((p.exhale, subject.exhale), (p.inhale, subject.inhale)):
        _, at = voxels(phase, (phase.region == MEDIASTINUM) & (phase.parenchyma_hu == 42), 10**9)
        _, material, _ = trace(subject.chest, subject.exhale, here, here, at)
        # In front of the great vessels at the spine: heart, ascending aorta, caval vein.
        blood_ml.append((material[:, 1] < 0.3).sum() * phase.ct.geometry.voxel_ml())
    assert 350 < blood_ml[0] < 900
    assert blood_ml[1] == pytest.approx(blood_ml[0], rel=0.03)


def test_transport_moves_the_cumulative_tissue() -> None:
    # Inhale tissue 2 + Y: F_I(Y) = (Y^2 / 2 + 2 Y + 3 / 2) / 4, so g solves F_I(g(Y)) = (1 + Y) / 2.
    even = np.linspace(-1, 1, 2049)
    g, slope = transport_table(np.ones(2049), 2 + even)
    np.testing.assert_allclose((g**2 / 2 + 2 * g + 1.5) / 4, (1 + even) / 2, atol=1e-6)
    np.testing.assert_allclose(slope, 2 / (2 + g), rtol=1e-6)


@pytest.mark.parametrize(
    ("preset", "seed", "motion"), [("deep", 1, "charts"), ("deep", 1, "ffd"), ("peep", 1, "charts")]
)
def test_pleura_slides_without_gap_or_overlap(phantom: Phantoms, preset: str, seed: int, motion: str) -> None:  # (8)
    subject = phantom(preset, seed, motion).subject
    chest, exhale, inhale = subject.chest, subject.exhale, subject.inhale
    rng = np.random.default_rng(0)
    n = 2000
    # The costal surface, s = 1: the lung's side of it, and the wall's side a nanometre further out.
    material = np.stack([2.0 * rng.choice([-1, 1], n), rng.uniform(-0.8, 0.5, n), rng.uniform(0.1, 0.8, n)], 1)
    at, _ = place_lung(chest, exhale, exhale, material)
    lung, _ = place_lung(chest, exhale, inhale, material)
    region, _, wall = trace(chest, exhale, exhale, inhale, at + np.sign(material[:, :1]) * [1e-6, 0.0, 0.0])
    assert (region == WALL).all()
    jump = np.linalg.norm(wall - lung, axis=1)
    assert 2.0 <= np.median(jump) <= 30.0
    # Normal to the surface, neither side leaves it: a step of 0.1 mm inwards is lung, outwards is wall.
    for moved in (lung, wall):
        inwards = np.sign(moved[:, :1]) * [-0.1, 0.0, 0.0]
        inside, _, _ = trace(chest, exhale, inhale, exhale, moved + inwards)
        outside, _, _ = trace(chest, exhale, inhale, exhale, moved - inwards)
        assert (outside == WALL).all()
        assert (inside != WALL).all()


def test_the_second_family_differs_from_the_first_inside_the_lung_only(phantom: Phantoms) -> None:
    charts, ffd = phantom("deep", 1), phantom("deep", 1, "ffd")
    assert ffd.subject.inhale.warp.shape[0] == 2
    assert ffd.subject.inhale.kappa == 0.0
    np.testing.assert_array_equal(charts.exhale.lung, ffd.exhale.lung)
    np.testing.assert_array_equal(charts.inhale.region, ffd.inhale.region)
    apart = np.abs(charts.exhale_to_inhale_mm - ffd.exhale_to_inhale_mm).max(0)
    assert np.percentile(apart[ffd.exhale.lung > 0], 90) > 2.0
    assert not apart[ffd.exhale.lung == 0].any()
