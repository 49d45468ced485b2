"""Registration of phantoms of 7 mm, of the same with one thing wrong, and of fields made by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from lungssl_data.pair import PhaseScan
from lungssl_data.phantom import PhantomConfig, make_phantom
from lungssl_data.volume import Geometry
from lungssl_ops.warp import jacobian_determinant
from lungssl_tasks.registration import PRESETS, Registration, RegistrationConfig, register, trust
from lungssl_tasks.registration.alignment import align
from lungssl_tasks.registration.common_grid import CommonGrid, common_grid
from lungssl_tasks.registration.descent import DescentConfig, Level, descend, unfolded
from lungssl_tasks.registration.register import filled
from lungssl_tasks.registration.search import SearchConfig, principal, search
from lungssl_tasks.registration.trust import Trust
from scipy import ndimage, spatial

COARSE = RegistrationConfig(
    spacing_mm=7.0,
    search=SearchConfig(grid_mm=14.0, reach_mm=28.0),
    descent=DescentConfig(levels=(Level(spacing_mm=7.0, iterations=30, window=5, rim=1),)),
)
NO_TRUST = Trust(
    overlap=1.0,
    unseen_share=0.0,
    similarity=1.0,
    disagreement_mm=0.0,
    folded_share=0.0,
    jacobian_sd=0.0,
    volume_ratio=1.0,
    doubts=(),
)
Pair = tuple[PhaseScan, PhaseScan, np.ndarray]


def made(seed: int) -> Pair:
    phantom = make_phantom(PhantomConfig(preset="deep", seed=seed, spacing_mm=7.0, texture_rho=1.0))
    exhale, inhale = (
        PhaseScan(
            ct_hu=source.ct.hu,
            valid=np.ones(source.ct.hu.shape, np.uint8),
            lung=source.lung,
            spacing_mm=source.ct.geometry.spacing_mm,
            origin_mm=source.ct.geometry.origin_mm,
        )
        for source in (phantom.exhale, phantom.inhale)
    )
    return exhale, inhale, phantom.exhale_to_inhale_mm


@pytest.fixture(scope="module")
def pair() -> Pair:
    return made(1)


@pytest.fixture(scope="module")
def found(pair: Pair) -> Registration:
    return register(pair[0], pair[1], COARSE)


def lung_points_mm(scan: PhaseScan) -> np.ndarray:
    return np.argwhere(scan.lung > 0)[:, ::-1] * scan.spacing_mm + scan.origin_mm


def test_lungs_are_found_nearer_than_by_the_affine(pair: Pair, found: Registration) -> None:
    exhale, _, truth_mm = pair
    points, truth = lung_points_mm(exhale), truth_mm[:, exhale.lung > 0].T
    affine = points @ found.affine[:, :3].T + found.affine[:, 3] - points
    before, after = (np.linalg.norm(u - truth, axis=1).mean() for u in (affine, found.at(points)))
    nothing = np.linalg.norm(truth, axis=1).mean()
    assert before < 0.5 * nothing and after < 0.9 * before  # voxels of 7 mm hold little texture
    assert found.trust.doubts == () and found.trust.folded_share == 0


def test_a_scan_and_itself_have_no_motion(pair: Pair) -> None:
    exhale = pair[0]
    still = register(exhale, exhale, COARSE)
    assert np.abs(still.at(lung_points_mm(exhale))).mean() < 0.07  # a hundredth of a voxel
    assert still.trust.doubts == () and still.trust.overlap > 0.99


def test_the_scans_own_origins_dont_matter(pair: Pair, found: Registration) -> None:
    exhale, inhale, _ = pair
    shift = np.array([1000.0, -500.0, 3000.0])
    x, y, z = (np.asarray(inhale.origin_mm) + shift).tolist()
    points, moved = lung_points_mm(exhale), dataclasses.replace(inhale, origin_mm=(x, y, z))
    far = align(exhale, moved, COARSE.alignment, device=torch.device("cpu"))
    gap = (far - found.affine) @ np.concatenate([points, np.ones((len(points), 1))], axis=1).T - shift[:, None]
    assert np.abs(gap).max() < 0.1


def test_a_scan_turned_by_45_degrees_is_turned_back(pair: Pair) -> None:
    exhale, inhale, _ = pair
    hu = ndimage.rotate(inhale.ct_hu.astype(np.float32), 45, axes=(0, 1), order=1, cval=-1000).astype(np.int16)
    lung = ndimage.rotate(inhale.lung, 45, axes=(0, 1), order=0)
    turned = dataclasses.replace(inhale, ct_hu=hu, lung=lung, valid=np.ones(hu.shape, np.uint8))
    assert register(exhale, turned, COARSE).trust.doubts == ()


def test_what_speaks_against_a_registration_is_said(pair: Pair) -> None:
    exhale, inhale, _ = pair
    swapped = register(inhale, exhale, COARSE).trust.doubts
    assert len(swapped) == 1 and "are they swapped?" in swapped[0]
    right_only = dataclasses.replace(inhale, lung=inhale.lung * (inhale.lung == 1))
    assert "only the fixed scan shows a left lung" in register(exhale, right_only, COARSE).trust.doubts[0]
    cut = inhale.ct_hu.shape[0] // 3
    short = dataclasses.replace(
        inhale, ct_hu=inhale.ct_hu[cut:], lung=inhale.lung[cut:], valid=np.ones(inhale.ct_hu[cut:].shape, np.uint8)
    )
    assert "of the fixed lung lies beyond the moving scan" in register(exhale, short, COARSE).trust.doubts[0]
    base = dataclasses.replace(
        exhale, ct_hu=exhale.ct_hu[cut:], lung=exhale.lung[cut:], valid=np.ones(exhale.ct_hu[cut:].shape, np.uint8)
    )
    assert "the fixed scan cuts the lungs" in register(base, inhale, COARSE).trust.doubts[0]
    stranger = register(exhale, made(4)[1], COARSE).trust
    assert "look whether both scans are of one patient" in " ".join(stranger.doubts)


def test_a_search_alone_is_not_asked_for_the_similarity_of_descent(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    exhale, inhale, _ = pair
    monkeypatch.setattr(trust, "LEAST_SIMILARITY", 0.9)  # more than either has
    alone = register(exhale, inhale, dataclasses.replace(COARSE, descent=DescentConfig(levels=()))).trust
    assert not any("one patient" in doubt for doubt in alone.doubts)
    assert any("one patient" in doubt for doubt in register(exhale, inhale, COARSE).trust.doubts)


def test_a_lung_without_depth_is_refused(pair: Pair) -> None:
    exhale, inhale, _ = pair
    flat = np.zeros_like(exhale.lung)
    flat[10] = exhale.lung[10]
    with pytest.raises(ValueError, match="one voxel thin"):
        register(dataclasses.replace(exhale, lung=flat), inhale, COARSE)


def test_given_features_lead_the_search(pair: Pair, found: Registration) -> None:
    """Features that are the true place in exhale, at both scans: the search finds it, whatever MIND-SSC says."""
    exhale, inhale, truth_mm = pair
    lung = exhale.lung > 0
    places = lung_points_mm(exhale)
    tree = spatial.KDTree(places + truth_mm[:, lung].T)

    def told(role: str, points_mm: np.ndarray) -> torch.Tensor:
        if role == "fixed":
            return torch.from_numpy(points_mm)
        return torch.from_numpy(places[tree.query(points_mm)[1]])

    fine = SearchConfig(grid_mm=7.0, reach_mm=21.0)
    searched = dataclasses.replace(COARSE, search=fine, descent=DescentConfig(levels=()))

    def noise(role: str, points_mm: np.ndarray) -> torch.Tensor:
        return torch.randn(len(points_mm), 5, generator=torch.Generator().manual_seed(len(points_mm)))

    plain, led, misled = (
        register(exhale, inhale, searched, affine=found.affine, features=one) for one in (None, told, noise)
    )
    truth = truth_mm[:, lung].T
    errors = [np.linalg.norm(one.at(places) - truth, axis=1).mean() for one in (plain, led, misled)]
    assert errors[1] < 0.85 * errors[0]  # labels are 7 mm apart: 3.4 mm are left of the best of them
    assert errors[2] > errors[0]
    with pytest.raises(ValueError, match=r"given features have shape \(1, 2, 1, 1, 1\), expected \[1, c, "):
        grid = common_grid(exhale, inhale, found.affine, multiple=2, device=torch.device("cpu"))
        search(grid, COARSE.search, (torch.zeros(1, 2, 1, 1, 1), torch.zeros(1, 2, 1, 1, 1)))


def test_principal_components_keep_distances() -> None:
    torch.manual_seed(0)
    mixing = torch.randn(4, 40, dtype=torch.float64)
    volumes = [torch.einsum("bkzyx,kc->bczyx", torch.randn(1, 4, 3, 5, 4).double(), mixing) + 7 for _ in range(2)]
    inside = torch.rand(3, 5, 4) > 0.3
    few = principal((volumes[0], volumes[1]), (inside, inside), 4)
    assert few[0].shape == (1, 4, 3, 5, 4)
    apart = [float((a[0, :, 0, 0, 0] - b[0, :, 2, 4, 3]).norm()) for a, b in (volumes, few)]
    assert apart[1] == pytest.approx(apart[0])
    assert principal((volumes[0], volumes[1]), (inside, inside), 40)[0] is volumes[0]
    lost = principal((volumes[0], volumes[1]), (inside, inside), 2)
    assert 0 < lost[0].var() * 2 < few[0].var() * 4  # variance goes, the largest last


def test_scans_that_cant_be_registered_are_refused(pair: Pair) -> None:
    exhale, inhale, _ = pair
    none = dataclasses.replace(inhale, lung=np.zeros_like(inhale.lung))
    with pytest.raises(ValueError, match="the moving scan has an empty lung mask"):
        register(exhale, none, COARSE)
    flat = dataclasses.replace(exhale, spacing_mm=(1.0, 1.0, 3.0))
    with pytest.raises(ValueError, match=r"the fixed scan has voxels of \(1\.0, 1\.0, 3\.0\) mm"):
        register(flat, inhale, COARSE)
    right, left = (dataclasses.replace(exhale, lung=exhale.lung * (exhale.lung == side)) for side in (1, 2))
    with pytest.raises(ValueError, match="no lung of the same side"):
        register(right, left, COARSE)


def test_the_way_back_undoes_the_way_there(pair: Pair, found: Registration) -> None:
    points = lung_points_mm(pair[0])
    there = points + found.at(points)
    np.testing.assert_allclose(there + found.back(there), points, atol=0.02)


def by_hand(v_mm: np.ndarray) -> Registration:
    """A field on voxels of 2, 3 and 4 mm under an affine that stretches and shifts."""
    affine = np.array([[1.2, 0.0, 0.0, 10.0], [0.0, 1.1, 0.1, -5.0], [0.0, 0.0, 1.3, 2.0]])
    grid = Geometry(shape=(5, 6, 7), spacing_mm=(2.0, 3.0, 4.0), origin_mm=(-3.0, 4.0, 5.0), direction=np.eye(3))
    return Registration(affine=affine, v_mm=v_mm, grid=grid, trust=NO_TRUST)


def test_a_field_is_the_affine_of_the_moved_point() -> None:
    v_mm = np.zeros((3, 5, 6, 7))
    v_mm[0, 2, 3, 4] = 1.0  # x by 1 mm at voxel x 4, y 3, z 2: the point (5, 13, 13)
    found = by_hand(v_mm)
    there = found.at(np.array([[5.0, 13.0, 13.0], [6.0, 13.0, 13.0], [400.0, 13.0, 13.0]]))
    np.testing.assert_allclose(there[0], [1.2 * 6 + 10 - 5, 1.1 * 13 + 0.1 * 13 - 5 - 13, 1.3 * 13 + 2 - 13], atol=1e-4)
    np.testing.assert_allclose(there[1, 0], 1.2 * 6.5 + 10 - 6, atol=1e-4)  # half a voxel on, half of it
    np.testing.assert_allclose(there[2, 0], 1.2 * 400 + 10 - 400, atol=1e-3)


def test_an_oblique_grid_gets_the_field_at_its_own_points() -> None:
    found = by_hand(np.random.default_rng(0).normal(0, 1, (3, 5, 6, 7)))
    c, s = np.cos(0.3), np.sin(0.3)
    turned = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    grid = Geometry(shape=(3, 4, 5), spacing_mm=(1.5, 2.5, 3.5), origin_mm=(0.0, 6.0, 7.0), direction=turned)
    field = found.on_grid(grid)
    point = grid.index_to_mm() @ [3, 2, 1, 1]
    np.testing.assert_allclose(field[:, 1, 2, 3], found.at(point[None])[0], atol=1e-4)


def test_a_way_back_that_isnt_found_is_not_a_number() -> None:
    v_mm = np.zeros((3, 5, 6, 7))
    v_mm[0] = np.arange(7)
    there = np.array([[15.0, 12.0, 20.0]])
    found = by_hand(v_mm)
    assert np.isnan(found.back(there, most=2)).all()
    here = there + found.back(there)
    np.testing.assert_allclose(here + found.at(here), there, atol=0.02)


def test_folds_are_smoothed_away_and_the_rest_stays() -> None:
    v = torch.zeros(1, 3, 20, 21, 22)
    v[0, 0, 9:11, 9:11, 10] = 4.0
    lung = torch.ones(1, 1, 20, 21, 22, dtype=torch.bool)
    assert (jacobian_determinant(v) <= 0).any()
    smooth = unfolded(v, lung)
    assert (jacobian_determinant(smooth) > 0).all()
    assert (smooth[..., :4] == v[..., :4]).all()
    assert (unfolded(v, ~lung) == v).all()  # folds outside of the lung are nobody's business


def test_a_diffeomorphism_can_be_undone_and_finds_as_well(pair: Pair, found: Registration) -> None:
    exhale, inhale, truth_mm = pair
    config = dataclasses.replace(COARSE, descent=dataclasses.replace(COARSE.descent, diffeomorphic=True))
    smooth = register(exhale, inhale, config, affine=found.affine)
    points, truth = lung_points_mm(exhale), truth_mm[:, exhale.lung > 0].T
    errors = [np.linalg.norm(one.at(points) - truth, axis=1).mean() for one in (smooth, found)]
    assert errors[0] < 1.15 * errors[1]
    assert np.linalg.norm(smooth.at(points) - found.at(points), axis=1).mean() > 0.1  # another field

    # Told to make a mess, it doesn't fold.
    wild = DescentConfig(
        levels=(Level(spacing_mm=7.0, iterations=30, rate=2.0),), diffusion=0.0, bending=0.0, folding=0.0
    )
    grid = common_grid(exhale, inhale, found.affine, multiple=wild.multiple(7.0), device=torch.device("cpu"))
    start = torch.zeros(1, 3, *grid.fixed_hu.shape[2:])
    least = [
        float(jacobian_determinant(descend_without_mending(grid, start, one)).min())
        for one in (wild, dataclasses.replace(wild, diffeomorphic=True))
    ]
    assert least[0] < 0 < least[1]


def descend_without_mending(grid: CommonGrid, start: torch.Tensor, config: DescentConfig) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lungssl_tasks.registration.descent.unfolded", lambda v_vox, lung: v_vox)
        return descend(grid, start, config)


def test_around_the_lung_a_field_goes_on_smoothly() -> None:
    v = torch.zeros(1, 3, 9, 17, 12)
    known = torch.zeros(1, 1, 9, 17, 12, dtype=torch.bool)
    known[..., 3:6, 4:8, 4:8] = True
    v[:, 0, 3:6, 4:8, 4:8] = 2.0
    v[:, 1] = torch.where(known[:, 0], 0.0, 99.0)
    full = filled(v, known)
    torch.testing.assert_close(full[:, 0], torch.full_like(full[:, 0], 2.0))
    assert (full[:, 1] == 0).all()


def test_presets_are_for_voxels_that_their_levels_can_have() -> None:
    for name, preset in PRESETS.items():
        for level in preset.descent.levels:
            assert (level.spacing_mm / preset.spacing_mm) % 1 == 0, name
    assert DescentConfig().multiple(2.0) == 4
