from collections.abc import Callable

import numpy as np
import pytest
from lungssl_data.phantom import Phantom, PhantomConfig, PhantomPhase, make_phantom, pathology
from lungssl_data.phantom.config import Pathology, PresetName
from lungssl_data.phantom.motion import EFFUSION
from lungssl_data.phantom.parenchyma import TISSUE_HU
from lungssl_data.phantom.pathology import COLLAPSE, CONSOLIDATION, EMPHYSEMA, GROUND_GLASS
from lungssl_data.phantom.truth import compartments
from scipy.ndimage import map_coordinates

Phantoms = Callable[..., Phantom]
NORMAL_PERCENT = {"non": (7, 4), "poor": (18, 3), "normal": (65, 8), "hyper": (11, 7)}
"""Of lung mass, mean and standard deviation: Cressoni 2013, supine at inspiration (domain.md A2)."""


def non_aerated_g(phase: PhantomPhase) -> float:
    hu = phase.parenchyma_hu[phase.lung > 0].astype(float)
    return ((hu[hu >= -100] + 1000) / (1000 + TISSUE_HU)).sum() * phase.ct.geometry.voxel_ml()


@pytest.mark.parametrize(("preset", "seed"), [("ards", 0), ("ards", 1), ("peep", 0), ("peep", 1)])
def test_gross_recruitment_less_derecruitment_is_the_net(preset: PresetName, seed: int) -> None:  # A3.3
    p = make_phantom(PhantomConfig(preset=preset, seed=seed, spacing_mm=3.0, pathology=("ground_glass",)))
    figures = p.truth.figures
    net = non_aerated_g(p.exhale) - non_aerated_g(p.inhale)
    assert figures["recruited_g"] - figures["derecruited_g"] == pytest.approx(net, abs=0.005 * figures["lung_g"])
    assert figures["net_recruited_percent"] > 1.0
    tissue = (p.exhale.parenchyma_hu.astype(float) + 1000) / (1000 + TISSUE_HU) * p.exhale.ct.geometry.voxel_ml()
    assert tissue[p.truth.recruited > 0].sum() == pytest.approx(figures["recruited_g"])
    assert p.exhale.parenchyma_hu[p.truth.recruited > 0].min() >= -100


def test_maps_agree_with_the_inhale_scan_read_through_the_displacement(phantom: Phantoms) -> None:
    p = phantom("ards", 0)
    index = np.argwhere(p.exhale.lung > 0)[::7]
    moved = index[:, ::-1] * 3.0 + p.exhale.ct.geometry.origin_mm + p.exhale_to_inhale_mm[:, *index.T].T
    at = ((moved - p.inhale.ct.geometry.origin_mm) / 3.0)[:, ::-1].T
    inhale_hu = map_coordinates(p.inhale.parenchyma_hu, at, order=1)
    exhale_hu = p.exhale.parenchyma_hu[tuple(index.T)]
    recruited = (exhale_hu >= -100) & (inhale_hu < -100)
    truth = p.truth.recruited[tuple(index.T)] > 0
    assert 2 * (recruited & truth).sum() / (recruited.sum() + truth.sum()) > 0.85  # interpolation blurs the rest


def test_deep_breath_hyperinflates_emphysema() -> None:
    p = make_phantom(PhantomConfig(preset="deep", seed=1, spacing_mm=4.0, pathology=("emphysema",)))
    plain = make_phantom(PhantomConfig(preset="deep", seed=1, spacing_mm=4.0, pathology=()))
    sick = p.exhale.lesion == EMPHYSEMA
    assert sick.sum() > 50
    assert p.exhale.parenchyma_hu[sick].mean() < plain.exhale.parenchyma_hu[sick].mean() - 50
    figures = p.truth.figures
    assert figures["exhale_hyper_volume_percent"] > plain.truth.figures["exhale_hyper_volume_percent"]
    assert plain.truth.figures["hyperinflated_ml"] > 0
    gross = p.exhale.parenchyma_hu[p.truth.hyperinflated > 0]
    assert gross.min() >= -900
    assert figures["unmatched_hyperinflated_ml"] == pytest.approx(figures["hyperinflated_ml"], rel=0.15)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 5])
def test_healthy_lungs_have_healthy_compartments(phantom: Phantoms, seed: int) -> None:  # (7)
    # With their vessels and airways, as in the patients.
    p = phantom("healthy", seed)
    shares = compartments(p.inhale.clean_hu[p.inhale.lung > 0], p.inhale.ct.geometry.voxel_ml())
    for name, (mean, sd) in NORMAL_PERCENT.items():
        assert mean - 2 * sd <= shares[f"{name}_mass_percent"] <= mean + 2 * sd, name


def test_compartments_are_half_open_and_white_voxels_are_left_out() -> None:
    hu = np.array([-1100, -900, -500.001, -500, -100, 100, 100.5], np.float32)
    shares = compartments(hu, 1.0)
    volumes = [shares[f"{name}_volume_percent"] for name in ("hyper", "normal", "poor", "non")]
    np.testing.assert_allclose(volumes, np.array([1, 2, 1, 2]) / 6 * 100)
    assert shares["mass_g"] == pytest.approx(0 + 0.1 + 0.5 + 0.5 + 0.9 + 1.0, abs=1e-3)


@pytest.mark.parametrize("kind", ["ground_glass", "consolidation", "covid"])
def test_lesions_are_denser_and_the_same_tissue_in_both_phases(kind: Pathology) -> None:
    p = make_phantom(PhantomConfig(preset="deep", seed=2, spacing_mm=4.0, pathology=(kind,)))
    plain = make_phantom(PhantomConfig(preset="deep", seed=2, spacing_mm=4.0, pathology=()))
    codes = {"ground_glass": {GROUND_GLASS}, "consolidation": {CONSOLIDATION}}.get(kind, {GROUND_GLASS, CONSOLIDATION})
    assert set(np.unique(p.exhale.lesion)) - {0} <= codes
    for phase, other in ((p.exhale, plain.exhale), (p.inhale, plain.inhale)):
        where = phase.lesion > 0
        assert (phase.lung[where] > 0).all()
        assert (phase.parenchyma_hu[where] - other.parenchyma_hu[where]).mean() > 80
        solid = phase.lesion == CONSOLIDATION
        if solid.any():
            assert phase.parenchyma_hu[solid].mean() > -250  # the labels' edge is half consolidated
    grown = p.jacobian[p.exhale.lesion > 0].sum()
    assert (p.inhale.lesion > 0).sum() == pytest.approx(grown, rel=0.1)
    assert p.parameters["pathology"][kind]["blobs"] >= 1


def test_crazy_paving_adds_the_same_septa_to_ground_glass_in_both_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PhantomConfig(preset="deep", seed=2, spacing_mm=3.0, pathology=("ground_glass",))
    phantoms = []
    for chance in (0.0, 1.0):
        monkeypatch.setattr(pathology, "PAVED_CHANCE", chance)
        phantoms.append(make_phantom(config))
    plain, paved = phantoms
    masses = []
    for phase, other in ((paved.exhale, plain.exhale), (paved.inhale, plain.inhale)):
        added = phase.parenchyma_hu - other.parenchyma_hu
        inside = phase.lesion == GROUND_GLASS
        assert np.array_equal(phase.lesion, other.lesion)
        assert (added[inside] > 100).mean() > 0.05 and (added[inside] < 20).mean() > 0.2  # lines, with lobules between
        masses.append(added[phase.lung > 0].sum())
    assert masses[0] == pytest.approx(masses[1], rel=0.1)


def test_septa_lie_half_way_between_lobules_and_are_as_thick_as_said() -> None:
    x = np.arange(0.0, 300.0, 0.25)
    shares = np.array([[pathology.septum_share(v, y, 40.0, 0.6) for v in x] for y in (10.0, 55.0, 103.0)])
    # A line crosses a sheet of thickness d at an angle: d / cos, so 2 d on average, about every 10 mm.
    assert 0.5 <= shares.mean() * 10.0 / (2 * pathology.SEPTUM_MM) <= 1.5
    assert shares.max() > 0.8 and np.median(shares) < 0.05


def test_collapse_is_labelled_where_it_lies() -> None:
    p = make_phantom(PhantomConfig(preset="ards", seed=0, spacing_mm=4.0, pathology=()))
    collapse = p.exhale.lesion == COLLAPSE
    dense = (p.exhale.lung > 0) & (p.exhale.parenchyma_hu >= -100)
    assert not (collapse & ~dense).any()
    assert (dense & ~collapse).sum() < 0.002 * dense.sum()  # chance clumps of texture
    rows = np.argwhere(p.exhale.lung > 0)[:, 1]
    assert np.argwhere(collapse)[:, 1].mean() > rows.mean() + 0.2 * np.ptp(rows)


def test_effusion_is_fluid_at_the_back_and_no_lung() -> None:
    p = make_phantom(PhantomConfig(preset="ards", seed=4, spacing_mm=4.0, pathology=("effusion",)))
    wanted = p.parameters["pathology"]["effusion"]["volume_ml"]
    volumes = []
    for phase in (p.exhale, p.inhale):
        fluid = phase.region == EFFUSION
        assert not phase.lung[fluid].any()
        assert (phase.parenchyma_hu[fluid] == 10).all()
        volumes.append(fluid.sum() * phase.ct.geometry.voxel_ml())
        assert np.argwhere(fluid)[:, 1].min() > np.argwhere(phase.lung > 0)[:, 1].mean()
    assert volumes[0] == pytest.approx(wanted, rel=0.1)
    # The fluid's outline is material: its volume follows the lung's lowest layer, which hardly opens.
    assert volumes[1] == pytest.approx(volumes[0], rel=0.15)
    assert np.isfinite(p.to_inhale(p.landmarks_exhale_mm)).all()
