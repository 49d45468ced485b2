"""Aeration figures against the phantom's noise-free truth, and against hand calculation at the edges."""

import dataclasses

import numpy as np
import pytest
from lungssl_data.pair import PhaseScan
from lungssl_data.phantom import Phantom, PhantomConfig, make_phantom
from lungssl_data.phantom.parenchyma import TISSUE_HU as PHANTOM_TISSUE_HU
from lungssl_data.volume import Geometry, LabelMap, Volume
from lungssl_tasks.aeration import (
    COMPARTMENTS_HU,
    Matched,
    aeration,
    breath,
    change,
    match,
    non_aerated_mass_g,
    of_scan,
    of_volume,
)
from lungssl_tasks.aeration.change import TISSUE_HU, corrected_ventilation, intensity_ventilation
from lungssl_tasks.aeration.parts import parts
from lungssl_tasks.aeration.precision import below_detectable
from lungssl_tasks.aeration.strain import principal_stretches


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom(PhantomConfig(preset="ards", seed=3, spacing_mm=4.0, noise_hu=0.0))


@pytest.fixture(scope="module")
def scans(phantom: Phantom) -> tuple[PhaseScan, PhaseScan]:
    """Noise-free, without trees."""

    def scan(name: str) -> PhaseScan:
        phase = getattr(phantom, name)
        grid = phase.ct.geometry
        return PhaseScan(
            ct_hu=np.rint(phase.parenchyma_hu).astype(np.int16),
            valid=np.ones_like(phase.lung),
            lung=phase.lung,
            lobes=phase.lobes,
            spacing_mm=grid.spacing_mm,
            origin_mm=grid.origin_mm,
        )

    return scan("exhale"), scan("inhale")


def as_ours(phantom: Phantom) -> dict[str, float]:
    """The phantom's figures, its tissue of 45 HU led back to ours of 55 (`domain.md` A1)."""
    scale = (1000 + PHANTOM_TISSUE_HU) / (1000 + TISSUE_HU)
    return {
        name: value * scale if name.endswith("recruited_g") else value for name, value in phantom.truth.figures.items()
    }


def test_half_open_intervals_and_what_is_not_counted() -> None:
    edges = np.array([-1024, -1000, -901, -900, -501, -500, -101, -100, 0, 100, 101, 3000], np.int16)
    held = aeration(edges, 2.0)
    assert {name: ml / 2 for name, ml in held.compartment_ml.items()} == {"hyper": 3, "normal": 2, "poor": 2, "non": 3}
    assert held.excluded_ml == 4 and held.volume_ml == 20
    gas = [1, 1, 0.901, 0.9, 0.501, 0.5, 0.101, 0.1, 0, 0]
    assert held.gas_ml == pytest.approx(2 * sum(gas)) and held.mass_g == pytest.approx(2 * (10 - sum(gas)))
    assert sum(held.compartment_g.values()) == pytest.approx(held.mass_g)
    assert sum(held.mass_percent(name) for name in held.compartment_g) == pytest.approx(100)
    assert np.isnan(aeration(np.array([], np.int16), 1.0).mass_percent("non"))


def test_non_aerated_mass_counts_tissue_at_one_gram_a_millilitre() -> None:
    ct_hu = np.array([-101, -100, 0, 50, 100, 101], np.int16).reshape(1, 2, 3)
    assert non_aerated_mass_g(ct_hu, np.ones(ct_hu.shape, bool), (10.0, 10.0, 10.0)) == pytest.approx(3.9)


def test_a_phantoms_figures_from_either_scan_alone(phantom: Phantom, scans: tuple[PhaseScan, PhaseScan]) -> None:
    truth = phantom.truth.figures
    figures = breath(*map(of_scan, scans))["lungs"].figures()
    for ours, theirs in {
        "eelv_ml": "exhale_gas_ml",
        "eilv_ml": "inhale_gas_ml",
        "tidal_volume_ml": "tidal_volume_ml",
        "strain": "strain",
        "net_recruited_percent": "unmatched_recruited_percent",
    }.items():
        assert figures[ours] == pytest.approx(truth[theirs], rel=0.005, abs=0.5), ours
    assert truth["unmatched_recruited_percent"] > 1
    for name in ("exhale", "inhale"):
        phase = getattr(phantom, name)  # not rounded to whole HU, which shifts the intervals by half a unit
        held = aeration(phase.parenchyma_hu[phase.lung > 0], phase.ct.geometry.voxel_ml()).as_dict()
        compartments = [f"{part}_{of}_percent" for part in COMPARTMENTS_HU for of in ("mass", "volume")]
        for key in ("mass_g", "volume_ml", *compartments):
            assert held[key] == pytest.approx(truth[f"{name}_{key}"], rel=0.005), (name, key)


@pytest.mark.parametrize("preset", ["ards", "deep"])
def test_a_phantoms_figures_of_matched_tissue(preset: str) -> None:
    """The HU at inhale follow from J and the conserved tissue, so nothing is lost between voxels."""
    phantom = make_phantom(PhantomConfig(preset=preset, seed=3, spacing_mm=4.0, noise_hu=0.0))
    inside = phantom.exhale.lung > 0
    before, growth = (a[inside].astype(float) for a in (phantom.exhale.parenchyma_hu, phantom.jacobian))
    after = (before + 1000) / growth - 1000
    found = change(
        Matched(exhale_hu=before, inhale_hu=after, jacobian=growth, voxel_ml=phantom.exhale.ct.geometry.voxel_ml())
    )
    truth = as_ours(phantom)
    assert (truth["recruited_g"] if preset == "ards" else truth["hyperinflated_ml"]) > 10
    for name in ("recruited_g", "derecruited_g", "recruited_gas_ml", "hyperinflated_ml"):
        assert getattr(found, name) == pytest.approx(truth[name], rel=0.005, abs=0.1), name


def test_a_phantoms_tissue_looked_up_between_voxels(phantom: Phantom, scans: tuple[PhaseScan, PhaseScan]) -> None:
    exhale, inhale = scans
    truth = as_ours(phantom)
    found = change(match(exhale, inhale, phantom.exhale_to_inhale_mm, phantom.jacobian))
    assert truth["recruited_g"] > 10
    for name in ("recruited_g", "recruited_gas_ml"):
        assert getattr(found, name) == pytest.approx(truth[name], rel=0.1), name
    assert found.unmatched_percent < 0.05
    assert abs(found.tissue_gain_g) < 0.01 * truth["lung_g"]  # mass is conserved


def test_gross_recruitment_balances_the_non_aerated_mass_of_matched_tissue() -> None:
    """A3.3: sum of f (recruited - derecruited) is M_non(exhale) - M_non(inhale), where mass is conserved by place."""
    rng = np.random.default_rng(0)
    before = rng.uniform(-950, 40, 5000)
    tissue = (before + 1000) / 1055
    growth = np.maximum(rng.uniform(0.8, 2.5, 5000), tissue)
    after = tissue / growth * 1055 - 1000
    found = change(Matched(exhale_hu=before, inhale_hu=after, jacobian=growth, voxel_ml=0.5))
    non = [(tissue[hu >= -100]).sum() * 0.5 for hu in (before, after)]
    assert found.recruited_g - found.derecruited_g == pytest.approx(non[0] - non[1])
    assert found.tissue_gain_g == pytest.approx(0, abs=1e-6) and found.tissue_mismatch_ml2 == pytest.approx(0, abs=1e-9)
    assert found.recruited_g > 0 and found.derecruited_g > 0


def test_intensity_ventilation_is_the_corrected_jacobian_where_tissue_is_conserved() -> None:
    """A6: SAI = SACJ if J (1 - g_inhale) = 1 - g_exhale."""
    rng = np.random.default_rng(1)
    before = rng.uniform(-950, -20, 2000)
    growth = rng.uniform(1.0, 2.5, 2000)
    after = 1000 * ((1 + before / 1000) / growth - 1)
    matched = Matched(exhale_hu=before, inhale_hu=after, jacobian=growth, voxel_ml=1.0)
    sacj, sai = corrected_ventilation(matched), intensity_ventilation(matched)
    assert np.isnan(sacj).any() and np.array_equal(np.isnan(sacj), np.isnan(sai))
    np.testing.assert_allclose(sai[np.isfinite(sai)], sacj[np.isfinite(sacj)], rtol=1e-9)


def test_parts_add_up_and_gravity_follows_the_patient(scans: tuple[PhaseScan, PhaseScan]) -> None:
    whole = breath(*map(of_scan, scans))
    for names in (("right", "left"), ("RUL", "RML", "RLL", "LUL", "LLL"), [f"gravity_{k:02d}" for k in range(1, 11)]):
        assert sum(whole[name].exhale.mass_g for name in names) == pytest.approx(whole["lungs"].exhale.mass_g)
    dense = [whole[f"gravity_{k:02d}"].exhale.mass_percent("non") for k in (1, 10)]
    assert dense[0] < dense[1]  # supine: collapse lies in the back
    prone = parts(of_scan(scans[0]), down="front")
    supine = parts(of_scan(scans[0]))
    assert (prone["gravity_01"] & supine["gravity_10"]).sum() > 0.9 * supine["gravity_10"].sum()
    shares = [supine[f"gravity_{k:02d}"].mean() for k in range(1, 11)]
    assert max(shares) < 0.14 and min(shares) > 0.06


def test_a_mask_of_aerated_lung_tells_no_recruitment(scans: tuple[PhaseScan, PhaseScan]) -> None:
    figures = breath(*map(of_scan, scans))["lungs"].figures(non_aerated=False)
    assert figures["net_recruited_g"] is None and figures["net_recruited_percent"] is None
    assert figures["eelv_ml"] is not None


def test_tissue_beyond_the_inhale_scan_is_not_counted(phantom: Phantom, scans: tuple[PhaseScan, PhaseScan]) -> None:
    exhale, inhale = scans
    rows = np.flatnonzero((inhale.lung > 0).any(axis=(1, 2)))
    middle = int(rows.mean())
    cut = dataclasses.replace(
        inhale, **{name: getattr(inhale, name)[:middle] for name in ("ct_hu", "valid", "lung", "lobes")}
    )
    found = change(match(exhale, cut, phantom.exhale_to_inhale_mm, phantom.jacobian))
    assert 20 < found.unmatched_percent < 80 and np.isfinite(found.recruited_gas_ml)
    with pytest.raises(ValueError, match="u_mm is on a grid of"):
        match(exhale, inhale, phantom.exhale_to_inhale_mm[:, 1:], phantom.jacobian[1:])


def test_tissue_that_falls_on_padding_is_not_counted(phantom: Phantom, scans: tuple[PhaseScan, PhaseScan]) -> None:
    exhale, inhale = scans
    columns = np.flatnonzero((inhale.lung > 0).any(axis=(0, 1)))
    valid = inhale.valid.copy()
    valid[:, :, : columns[len(columns) // 6]] = 0
    air = dataclasses.replace(inhale, valid=valid, ct_hu=np.where(valid, inhale.ct_hu, np.int16(-1000)))
    whole, cut = (change(match(exhale, one, phantom.exhale_to_inhale_mm, phantom.jacobian)) for one in (inhale, air))
    assert cut.unmatched_percent > 1 and cut.hyperinflated_ml <= whole.hyperinflated_ml
    assert cut.recruited_gas_ml <= whole.recruited_gas_ml


def test_a_part_without_a_match_tells_nothing() -> None:
    hu = np.full(4, -500.0)
    found = change(Matched(exhale_hu=hu, inhale_hu=np.full(4, np.nan), jacobian=np.ones(4), voxel_ml=1.0))
    assert found.unmatched_percent == 100 and np.isnan(found.recruited_g)


def test_per_cent_of_hardly_any_breath_is_not_given(scans: tuple[PhaseScan, PhaseScan]) -> None:
    swapped = breath(of_scan(scans[1]), of_scan(scans[0]))["lungs"].figures()
    assert swapped["tidal_volume_ml"] is not None and swapped["tidal_volume_ml"] < 0
    assert swapped["tidal_hyperinflation_percent"] is None
    slab = breath(*map(of_scan, scans))["gravity_05"].figures()
    assert slab["net_recruited_g"] is None and slab["tidal_volume_ml"] is None and slab["eelv_ml"] is not None


def test_a_scans_own_voxels_on_an_oblique_grid() -> None:
    rng = np.random.default_rng(0)
    turn = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # index x runs to the back
    grid = Geometry(shape=(4, 5, 6), spacing_mm=(2.0, 3.0, 4.0), origin_mm=(1.0, 2.0, 3.0), direction=turn)
    hu = rng.integers(-900, 50, grid.shape).astype(np.int16)
    hu[0] = -3024
    lung = np.ones(grid.shape, np.uint8)
    held = of_volume(Volume(hu=hu, geometry=grid), LabelMap(labels=lung, geometry=grid))
    assert len(held.hu) == 3 * 5 * 6 and held.voxel_ml == pytest.approx(0.024)  # padding is left out
    np.testing.assert_allclose(held.y_mm, np.tile(2.0 + 2.0 * np.arange(6), 15))
    other = dataclasses.replace(grid, origin_mm=(0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="on another grid"):
        of_volume(Volume(hu=hu, geometry=grid), LabelMap(labels=lung, geometry=other))


def test_stretches_of_a_known_field() -> None:
    z, y, x = np.indices((6, 7, 8)).astype(float)
    u_mm = np.stack([0.2 * x * 2.0, -0.1 * y * 2.0, 0.5 * z * 3.0])
    stretches = principal_stretches(u_mm, (2.0, 2.0, 3.0))
    np.testing.assert_allclose(stretches, np.broadcast_to([1.5, 1.2, 0.9], stretches.shape), atol=1e-12)


def test_recruitment_below_what_can_be_told() -> None:
    assert below_detectable(5.0) and below_detectable(-5.8) and not below_detectable(6.0)
    assert not below_detectable(5.8, masks="two readers")
    with pytest.raises(ValueError, match="one reader, two readers"):
        below_detectable(1.0, masks="wish")
