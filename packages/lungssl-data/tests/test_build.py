from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lungssl_data.build import build_cache
from lungssl_data.cache import PairCache
from lungssl_data.field import read_field, write_field
from lungssl_data.layouts import read_layout
from lungssl_data.pair import CacheError
from lungssl_data.prepare import PrepareConfig
from lungssl_data.readers import write_labels, write_volume
from lungssl_data.volume import Geometry, LabelMap, Volume

Thorax = Callable[..., Volume]
CONFIG = PrepareConfig(spacing_mm=6.0)


@pytest.fixture
def cohort(tmp_path: Path, thorax: Thorax) -> Path:
    root = tmp_path / "raw"
    for patient, inflation in (("p1", 0.8), ("p2", 0.9)):
        (root / patient).mkdir(parents=True)
        write_volume(root / patient / "exhale.nii.gz", thorax(inflation=inflation))
        write_volume(root / patient / "inhale.mha", thorax(inflation=1.1))
    lungs = thorax(inflation=0.8)
    lobes = LabelMap(labels=np.where(lungs.hu == -700, 11, 0).astype(np.uint8), geometry=lungs.geometry)
    write_labels(root / "p1" / "exhale_lobes.nrrd", replace(lobes, labels=(lobes.labels > 0).astype(np.uint8) * 4))
    return root


def outcomes(cohort: Path, cache: Path, **changes: object) -> dict[str, tuple[str, str]]:
    config = replace(CONFIG, **changes) if changes else CONFIG
    return {b.patient: (b.outcome, b.message) for b in build_cache(read_layout("folder", cohort), cache, config=config)}


def test_a_cohort_becomes_a_cache_that_verifies(cohort: Path, tmp_path: Path) -> None:
    built = outcomes(cohort, tmp_path / "cache")
    assert {outcome for outcome, _ in built.values()} == {"built"}
    cache = PairCache(tmp_path / "cache")
    assert cache.patients == ["p1", "p2"]
    assert all(not problems for _, problems in cache.verify())
    pair = cache["p1"]
    assert pair.scan("exhale").lobes is not None and pair.scan("inhale").lobes is None
    assert set(np.unique(pair.scan("exhale").lung)) == {0, 1, 2}
    litres = [cache.phase_record("p1", phase).lung_ml / 1000 for phase in ("exhale", "inhale")]
    ellipsoids = [2 * 4 / 3 * np.pi * 48 * 75 * 110 * f / 1e6 for f in (0.8, 1.1)]
    assert litres == pytest.approx(ellipsoids, rel=0.05)


def test_a_second_build_changes_nothing_and_a_changed_file_only_its_patient(
    cohort: Path, tmp_path: Path, thorax: Thorax
) -> None:
    outcomes(cohort, tmp_path / "cache")
    splits = {patient: record.split for patient, record in PairCache(tmp_path / "cache").records.items()}
    assert [outcome for outcome, _ in outcomes(cohort, tmp_path / "cache").values()] == ["unchanged", "unchanged"]
    write_volume(cohort / "p2" / "exhale.nii.gz", thorax(inflation=0.7))
    again = outcomes(cohort, tmp_path / "cache")
    assert [again[p][0] for p in ("p1", "p2")] == ["unchanged", "built"]
    assert {patient: record.split for patient, record in PairCache(tmp_path / "cache").records.items()} == splits
    assert {outcome for outcome, _ in outcomes(cohort, tmp_path / "cache", spacing_mm=7.0).values()} == {"built"}


def test_a_changed_data_file_behind_a_header_rebuilds_its_patient(tmp_path: Path, thorax: Thorax) -> None:
    folder = tmp_path / "raw" / "p1"
    folder.mkdir(parents=True)
    volume = thorax()
    x, y, z = volume.geometry.spacing_mm
    (folder / "inhale.mhd").write_text(
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nDimSize = 80 46 58\n"
        f"ElementSpacing = {x} {y} {z}\nElementType = MET_SHORT\nElementDataFile = inhale.raw\n"
    )
    (folder / "inhale.raw").write_bytes(volume.hu.tobytes())
    assert outcomes(tmp_path / "raw", tmp_path / "cache")["p1"][0] == "built"
    assert outcomes(tmp_path / "raw", tmp_path / "cache")["p1"][0] == "unchanged"
    (folder / "inhale.raw").write_bytes(thorax(inflation=0.9).hu.tobytes())
    assert outcomes(tmp_path / "raw", tmp_path / "cache")["p1"][0] == "built"


def test_a_mask_that_changes_its_role_rebuilds_its_patient(tmp_path: Path, thorax: Thorax) -> None:
    volume = thorax()
    write_volume(tmp_path / "ct.nii.gz", volume)
    x = np.indices(volume.hu.shape)[2]
    labels = np.where(volume.hu == -700, 1 + (x > 40), 0).astype(np.uint8)
    write_labels(tmp_path / "mask.nii.gz", LabelMap(labels=labels, geometry=volume.geometry))
    for column, outcome in (("lobes", "built"), ("lung", "built"), ("lung", "unchanged")):
        manifest = tmp_path / "cohort.csv"
        manifest.write_text(f"patient_id,phase,image,{column}\np1,inhale,ct.nii.gz,mask.nii.gz\n")
        built = list(build_cache(read_layout("manifest", manifest), tmp_path / "cache", config=CONFIG))
        assert built[0].outcome == outcome


def test_a_bad_file_fails_its_patient_in_one_line_and_no_other(cohort: Path, tmp_path: Path) -> None:
    path = cohort / "p1" / "exhale.nii.gz"
    path.write_bytes(path.read_bytes()[:1000])
    built = outcomes(cohort, tmp_path / "cache")
    assert built["p1"][0] == "failed" and built["p2"][0] == "built"
    assert "exhale.nii.gz" in built["p1"][1] and "\n" not in built["p1"][1]
    assert PairCache(tmp_path / "cache").patients == ["p2"]


def test_a_scan_without_lungs_is_refused(tmp_path: Path, thorax: Thorax) -> None:
    volume = thorax()
    (tmp_path / "raw" / "p1").mkdir(parents=True)
    solid = replace(volume, hu=np.where(volume.hu == -700, 40, volume.hu).astype(np.int16))
    write_volume(tmp_path / "raw" / "p1" / "inhale.nii.gz", solid)
    assert outcomes(tmp_path / "raw", tmp_path / "cache")["p1"][0] == "failed"


def test_lobes_in_the_wrong_codes_are_refused(cohort: Path, tmp_path: Path, thorax: Thorax) -> None:
    volume = thorax(inflation=0.8)
    labels = LabelMap(labels=np.where(volume.hu == -700, 77, 0).astype(np.uint8), geometry=volume.geometry)
    write_labels(cohort / "p1" / "exhale_lobes.nrrd", labels)
    outcome, message = outcomes(cohort, tmp_path / "cache")["p1"]
    assert outcome == "failed" and "none of its labels is a lobe in the codes 'lungssl'" in message


def test_a_known_displacement_is_kept(cohort: Path, tmp_path: Path) -> None:
    grid = Geometry(
        shape=(7, 8, 9), spacing_mm=(30.0, 25.0, 35.0), origin_mm=(-140.0, -100.0, -280.0), direction=np.eye(3)
    )
    u = np.random.default_rng(0).standard_normal((3, 7, 8, 9)).astype(np.float32)
    write_field(cohort / "p1" / "exhale_to_inhale.nrrd", u, grid)
    outcomes(cohort, tmp_path / "cache")
    field = PairCache(tmp_path / "cache").displacement("p1")
    assert field is not None and field.provenance == "exhale_to_inhale.nrrd"
    np.testing.assert_array_equal(field.u_mm, u)
    assert field.spacing_mm == grid.spacing_mm and field.origin_mm == grid.origin_mm


def test_repeated_patient_ids_are_refused(cohort: Path, tmp_path: Path) -> None:
    sources = read_layout("folder", cohort)
    with pytest.raises(CacheError, match=r"patient ids repeat: \['p1'\]"):
        list(build_cache([*sources, sources[0]], tmp_path / "cache", config=CONFIG))


def test_a_field_moves_points_as_simpleitk_moves_them(tmp_path: Path) -> None:
    import SimpleITK as sitk

    rng = np.random.default_rng(1)
    grid = Geometry(shape=(6, 7, 8), spacing_mm=(3.0, 4.0, 5.0), origin_mm=(-9.0, 4.0, 30.0), direction=np.eye(3))
    u = rng.standard_normal((3, 6, 7, 8)).astype(np.float32)
    write_field(tmp_path / "u.nrrd", u, grid)
    transform = sitk.DisplacementFieldTransform(
        sitk.Cast(sitk.ReadImage(str(tmp_path / "u.nrrd")), sitk.sitkVectorFloat64)
    )
    back, _ = read_field(tmp_path / "u.nrrd")
    for z, y, x in ((0, 0, 0), (3, 5, 2), (5, 6, 7)):
        point = np.array([x, y, z]) * grid.spacing_mm + grid.origin_mm
        np.testing.assert_allclose(transform.TransformPoint(point.tolist()), point + back[:, z, y, x], atol=1e-5)


def test_nifti_fields_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"u.nii.gz: displacement fields are read and written as .nrrd or .mha"):
        read_field(tmp_path / "u.nii.gz")
