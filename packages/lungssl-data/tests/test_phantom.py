import hashlib
import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from jaxtyping import Bool, Float, Int
from lungssl_data.layouts import read_layout
from lungssl_data.phantom import Phantom, PhantomConfig, PhantomPhase, make_phantom, write_phantom
from lungssl_data.phantom.motion import ABDOMEN, MEDIASTINUM, SPINE, WALL, transport_table
from lungssl_data.phantom.render import TISSUE_HU, trace
from lungssl_data.readers import read_labels, read_volume
from numpy import ndarray
from scipy.ndimage import gaussian_filter, map_coordinates

# Numbers in brackets are those of the acceptance list of domain.md D6.
CASES = [("deep", 0), ("deep", 1), ("ards", 0), ("ards", 3)]
cases = pytest.mark.parametrize(("preset", "seed"), CASES)


@lru_cache
def phantom(preset: str, seed: int) -> Phantom:
    return make_phantom(PhantomConfig(preset=preset, seed=seed, spacing_mm=2.5))


def litres(phase: PhantomPhase) -> tuple[float, float]:
    """Volume and tissue of the lungs, by counting voxels."""
    lung = phase.lung > 0
    voxel_l = phase.ct.geometry.voxel_ml() / 1000
    tissue = (phase.clean_hu[lung].astype(float) + 1000) / (1000 + TISSUE_HU)
    return lung.sum() * voxel_l, tissue.sum() * voxel_l


def points_mm(phase: PhantomPhase, index: Int[ndarray, "n 3"]) -> Float[ndarray, "n 3"]:
    """Voxel index (z, y, x) to LPS mm."""
    geometry = phase.ct.geometry
    return np.asarray(geometry.origin_mm) + index[:, ::-1] * np.asarray(geometry.spacing_mm)


def some_voxels(where: Bool[ndarray, "z y x"], n: int = 4000) -> Int[ndarray, "m 3"]:
    index = np.argwhere(where)
    return index[np.random.default_rng(0).permutation(len(index))[:n]]


@cases
def test_round_trip_is_exact(preset: str, seed: int) -> None:  # (1)
    p = phantom(preset, seed)
    exhale = points_mm(p.exhale, some_voxels(p.exhale.lung > 0)) + 0.3
    inhale = p.to_inhale(exhale)
    inside = np.isfinite(inhale).all(1)
    assert inside.mean() > 0.9
    assert np.abs(p.to_exhale(inhale[inside]) - exhale[inside]).max() <= 1e-6


@cases
def test_jacobian_is_the_derivative_of_the_map(preset: str, seed: int) -> None:  # (2)
    p, step = phantom(preset, seed), 1e-3
    index = some_voxels(p.exhale.lung > 0, 2000)
    at = points_mm(p.exhale, index)
    columns = [(p.to_inhale(at + e) - p.to_inhale(at - e)) / (2 * step) for e in np.eye(3) * step]
    numeric = np.linalg.det(np.stack(columns, -1))
    inside = np.isfinite(numeric)
    assert inside.mean() > 0.99
    error = np.abs(p.jacobian[tuple(index.T)] / numeric - 1)[inside]
    assert np.median(error) <= 1e-3
    assert np.percentile(error, 99) <= 5e-3


@cases
def test_lungs_never_fold_and_expand_as_much_as_their_volume(preset: str, seed: int) -> None:  # (3)
    p = phantom(preset, seed)
    lung = p.exhale.lung > 0
    assert p.jacobian[lung].min() > 0.3
    assert not p.jacobian[~lung].any()
    assert p.jacobian[lung].mean() == pytest.approx(litres(p.inhale)[0] / litres(p.exhale)[0], rel=5e-3)


@cases
def test_mass_is_conserved(preset: str, seed: int) -> None:  # (4)
    p = phantom(preset, seed)
    (exhale_l, exhale_tissue), (inhale_l, inhale_tissue) = litres(p.exhale), litres(p.inhale)
    assert inhale_tissue == pytest.approx(exhale_tissue, rel=2e-3)
    gas_gain = (inhale_l - inhale_tissue) - (exhale_l - exhale_tissue)
    assert gas_gain == pytest.approx(inhale_l - exhale_l, rel=0.01)


@cases
def test_exported_fields_undo_each_other_inside_a_region(preset: str, seed: int) -> None:  # (5)
    p = phantom(preset, seed)
    for region in (1, 2, MEDIASTINUM, WALL, SPINE):
        index = some_voxels(p.exhale.region == region, 20_000)
        u = p.exhale_to_inhale_mm[:, *index.T].T
        geometry = p.inhale.ct.geometry
        at = ((points_mm(p.exhale, index) + u - geometry.origin_mm) / geometry.spacing_mm)[:, ::-1]
        # The eight voxels that are interpolated, and those next to them, must all belong to the region.
        corner = np.floor(at).astype(int)
        around = np.stack(np.meshgrid(*[np.arange(-1, 3)] * 3, indexing="ij"), -1).reshape(-1, 1, 3) + corner
        on_grid = ((around >= 0) & (around < geometry.shape)).all((0, 2))
        around, at, u = around[:, on_grid], at[on_grid], u[on_grid]
        inside = (p.inhale.region[tuple(np.moveaxis(around, -1, 0))] == region).all(0)
        assert inside.sum() > 1000
        back = np.stack([map_coordinates(c, at[inside].T, order=1) for c in p.inhale_to_exhale_mm], 1)
        assert np.linalg.norm(u[inside] + back, axis=1).max() <= 0.05


@cases
def test_volumes_and_density_are_physiological(preset: str, seed: int) -> None:  # (6)
    p = phantom(preset, seed)
    (exhale_l, exhale_tissue), (inhale_l, _) = litres(p.exhale), litres(p.inhale)
    exhale_hu, inhale_hu = (float(x.clean_hu[x.lung > 0].mean()) for x in (p.exhale, p.inhale))
    if preset == "deep":
        assert 1.8 <= exhale_l <= 3.5 <= inhale_l <= 6.5
        assert 1.2 <= inhale_l - exhale_l <= 3.5
        assert exhale_hu == pytest.approx(-700, abs=50)
        assert inhale_hu == pytest.approx(-820, abs=40)
    else:
        assert 0.5 <= exhale_l - exhale_tissue <= 2.2
        assert 0.3 <= inhale_l - exhale_l <= 0.6
        tissue = p.exhale.clean_hu + 1000.0
        lung = p.exhale.lung > 0
        # Non-aerated share of mass in ARDS: 36 +- 14 % (Chauvelot 2020), two standard deviations.
        assert 0.08 <= tissue[lung & (p.exhale.clean_hu >= -100)].sum() / tissue[lung].sum() <= 0.64
    parameters = p.parameters["subject"]
    assert exhale_l == pytest.approx(parameters["exhale_l"], rel=0.01)
    assert inhale_hu == pytest.approx(parameters["inhale_hu"], abs=10)


@cases
def test_landmarks_lie_deep_apart_and_on_the_field(preset: str, seed: int) -> None:
    p = phantom(preset, seed)
    exhale, inhale = p.landmarks_exhale_mm, p.landmarks_inhale_mm
    assert exhale.shape == inhale.shape == (300, 3)
    np.testing.assert_array_equal(p.to_inhale(exhale), inhale)
    gaps = np.linalg.norm(exhale[:, None] - exhale, axis=-1)[np.triu_indices(300, 1)]
    assert gaps.min() >= 8
    directions = np.random.default_rng(0).normal(size=(40, 3))
    for direction in 4.99 * directions / np.linalg.norm(directions, axis=1, keepdims=True):
        assert np.isfinite(p.to_inhale(exhale + direction)).all()
        assert np.isfinite(p.to_exhale(inhale + direction)).all()
    # The range of the DIR-Lab COPDgene and 4DCT means (domain.md C1, C2).
    low, high = (12, 31) if preset == "deep" else (3, 15)
    assert low <= np.linalg.norm(inhale - exhale, axis=1).mean() <= high
    index = ((exhale - p.exhale.ct.geometry.origin_mm) / 2.5)[:, ::-1].T
    u = np.stack([map_coordinates(c, index, order=1) for c in p.exhale_to_inhale_mm], 1)
    assert np.linalg.norm(exhale + u - inhale, axis=1).max() <= 0.1


@cases
def test_labels_are_a_lungs_and_keep_their_tissue(preset: str, seed: int) -> None:
    p = phantom(preset, seed)
    for phase in (p.exhale, p.inhale):
        np.testing.assert_array_equal(phase.lung, np.array([0, 1, 1, 1, 2, 2])[phase.lobes])
        np.testing.assert_array_equal(phase.body > 0, phase.region > 0)
        assert not (phase.body[:, [0, -1]].any() or phase.body[:, :, [0, -1]].any() or phase.lung[[0, -1]].any())
    fractions = np.bincount(p.exhale.lobes[p.exhale.lobes > 0], minlength=6)[1:] / (p.exhale.lobes > 0).sum()
    np.testing.assert_allclose(fractions, (0.19, 0.08, 0.26, 0.23, 0.24), atol=0.03)
    index = some_voxels(p.exhale.lung > 0)
    moved = points_mm(p.exhale, index) + p.exhale_to_inhale_mm[:, *index.T].T
    nearest = np.rint((moved - p.inhale.ct.geometry.origin_mm) / 2.5).astype(int)[:, ::-1]
    same = p.exhale.lobes[tuple(index.T)] == p.inhale.lobes[tuple(nearest.T)]
    assert same.mean() > 0.9  # the rest lies within half a voxel of a border


@cases
def test_axes_are_lps_and_the_patient_supine(preset: str, seed: int) -> None:
    p = phantom(preset, seed)
    right, left = (points_mm(p.exhale, np.argwhere(p.exhale.lung == side)).mean(0) for side in (1, 2))
    assert right[0] < -40 < 40 < left[0]
    upper, lower = (points_mm(p.exhale, np.argwhere(p.exhale.lobes == lobe)).mean(0) for lobe in (4, 5))
    assert upper[2] > lower[2] + 40
    assert upper[1] < lower[1] - 15
    lung = points_mm(p.exhale, np.argwhere(p.exhale.lung > 0))
    hu = p.exhale.clean_hu[p.exhale.lung > 0]
    front, back = np.percentile(lung[:, 1], (25, 75))
    assert hu[lung[:, 1] > back].mean() > hu[lung[:, 1] < front].mean() + 15
    spine = points_mm(p.exhale, np.argwhere(p.exhale.region == SPINE)).mean(0)
    assert abs(spine[0]) < 3
    assert spine[1] > back


@cases
def test_diaphragm_descends_while_heart_keeps_its_volume_and_spine_its_place(preset: str, seed: int) -> None:
    p = phantom(preset, seed)
    # The abdomen's top slice of voxels moves down, towards smaller z.
    abdomen = p.exhale.region == ABDOMEN
    top = abdomen & ~np.roll(abdomen, -1, 0)
    assert p.exhale_to_inhale_mm[2][top].mean() < (-20 if preset == "deep" else -5)
    assert np.abs(p.exhale_to_inhale_mm[:, p.exhale.region == SPINE]).max() < 3
    subject, blood_ml = p.subject, []
    for phase, here in ((p.exhale, subject.exhale), (p.inhale, subject.inhale)):
        index = np.argwhere((phase.region == MEDIASTINUM) & (phase.clean_hu == 42))
        _, material, _ = trace(subject.chest, subject.exhale, here, here, points_mm(phase, index))
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


def digest(p: Phantom) -> str:
    arrays = [p.exhale_to_inhale_mm, p.inhale_to_exhale_mm, p.jacobian, p.landmarks_exhale_mm, p.landmarks_inhale_mm]
    for phase in (p.exhale, p.inhale):
        arrays += [phase.ct.hu, phase.clean_hu, phase.lung, phase.lobes, phase.body, phase.region]
    text = json.dumps([p.parameters, p.exhale.ct.geometry.origin_mm, p.inhale.ct.geometry.origin_mm])
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays) + text.encode()).hexdigest()


def test_a_seed_gives_the_same_bytes_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PhantomConfig(preset="ards", seed=5, spacing_mm=5.0, texture_rho=0.5)
    first = digest(make_phantom(config))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert digest(make_phantom(config)) == first
    assert digest(make_phantom(PhantomConfig(preset="ards", seed=6, spacing_mm=5.0, texture_rho=0.5))) != first


def test_landmarks_belong_to_the_subject_not_to_the_grid() -> None:
    coarse = make_phantom(PhantomConfig(preset="ards", seed=0, spacing_mm=7.0))
    np.testing.assert_array_equal(coarse.landmarks_inhale_mm, phantom("ards", 0).landmarks_inhale_mm)


def test_noise_has_its_stated_size_and_is_drawn_apart_for_each_phase() -> None:
    noisy = make_phantom(PhantomConfig(seed=2, spacing_mm=4.0))
    still = make_phantom(PhantomConfig(seed=2, spacing_mm=4.0, noise_hu=0.0))
    np.testing.assert_array_equal(noisy.exhale.clean_hu, still.exhale.clean_hu)
    noise = []
    for name in ("exhale", "inhale"):
        with_noise, without = (getattr(p, name) for p in (noisy, still))
        chest = without.body > 0  # in air, HU are clipped at -1024
        noise.append((with_noise.ct.hu.astype(float) - without.ct.hu)[chest][:100_000])
        assert noise[-1].std() == pytest.approx(noisy.parameters[f"{name}_scan"]["noise_hu"], rel=0.02)
        assert abs(noise[-1].mean()) < 0.5
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.02
    assert noisy.parameters["exhale_scan"] != noisy.parameters["inhale_scan"]


@pytest.mark.parametrize(("rho", "low", "high"), [(1.0, 0.6, 1.0), (0.0, -0.1, 0.25)])
def test_texture_is_shared_between_phases_as_rho_says(rho: float, low: float, high: float) -> None:
    # Fissures are fine detail too, and in both phases at any rho.
    p = make_phantom(PhantomConfig(seed=4, spacing_mm=3.0, texture_rho=rho))
    index = some_voxels(gaussian_filter((p.exhale.lung > 0).astype(float), 4) > 0.99)
    moved = points_mm(p.exhale, index) + p.exhale_to_inhale_mm[:, *index.T].T
    at = ((moved - p.inhale.ct.geometry.origin_mm) / 3.0)[:, ::-1].T
    fine = [x.clean_hu - gaussian_filter(x.clean_hu, 3) for x in (p.exhale, p.inhale)]
    correlation = np.corrcoef(fine[0][tuple(index.T)], map_coordinates(fine[1], at, order=1))[0, 1]
    assert low <= correlation <= high


def test_written_folder_is_read_back_and_simpleitk_moves_its_landmarks(tmp_path: Path) -> None:
    p = make_phantom(PhantomConfig(preset="ards", seed=7, spacing_mm=4.0))
    write_phantom(p, tmp_path / "p007")
    folder = tmp_path / "p007"
    for name, phase in (("exhale", p.exhale), ("inhale", p.inhale)):
        volume = read_volume(folder / f"{name}.nii.gz")
        np.testing.assert_array_equal(volume.hu, phase.ct.hu)
        assert volume.geometry.same_grid(phase.ct.geometry)
        np.testing.assert_array_equal(read_labels(folder / f"{name}_lung.nii.gz").labels, phase.lung)
        np.testing.assert_array_equal(read_labels(folder / f"{name}_lobes.nii.gz").labels, phase.lobes)
    assert json.loads((folder / "phantom.json").read_text()) == p.parameters
    rows = np.loadtxt(folder / "landmarks.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(rows, np.hstack((p.landmarks_exhale_mm, p.landmarks_inhale_mm)), atol=1e-6)
    field = sitk.ReadImage(str(folder / "exhale_to_inhale.nrrd"), sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(field)
    moved = np.array([transform.TransformPoint(row[:3]) for row in rows])
    assert np.linalg.norm(moved - rows[:, 3:], axis=1).max() < 0.2  # trilinear on 4 mm
    assert len(read_layout("folder", tmp_path)) == 1


def test_wrong_configs_name_the_value() -> None:
    with pytest.raises(ValueError, match=r"texture_rho is a share of variance in \[0, 1\], got 1.5"):
        PhantomConfig(texture_rho=1.5)
    with pytest.raises(ValueError, match=r"spacing_mm must lie in \[0.5, 8\], got 0.1"):
        PhantomConfig(spacing_mm=0.1)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        PhantomConfig(seed=-1)
    with pytest.raises(ValueError, match="noise_hu is a standard deviation, got -3"):
        PhantomConfig(noise_hu=-3.0)


def test_the_config_imports_without_numba() -> None:
    code = "import sys; from lungssl_data.phantom import PhantomConfig; print('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
