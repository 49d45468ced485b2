import re
from pathlib import Path

import numpy as np
import pytest
from lungssl_data.layouts import LAYOUTS, dirlab_4dct, dirlab_copd, lung250m, read_layout, recognised
from lungssl_data.layouts.files import raw_to_mm
from lungssl_data.layouts.source import LOBE_CODES, parse_phase
from lungssl_data.pair import CacheError, Phase


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_says_what_it_expected_where_there_is_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(CacheError, match="expected"):
        read_layout(name, tmp_path / "nowhere")


def test_an_unknown_layout_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="layout 'bidz' is unknown; known are auto, folder, manifest"):
        read_layout("bidz", Path())


def test_a_folder_of_patients_is_read_with_aliases_and_masks(tmp_path: Path) -> None:
    touch(tmp_path, "p2/EE.nii.gz", "p2/EI.nii.gz", "p2/ee_lobes.nii.gz", "p1/inhale.mha", "p1/inhale_lung.nrrd")
    touch(tmp_path, "p3/exhale/1.dcm", "p3/exhale_to_inhale.nrrd", "p3/insp.nii", "notes.txt")
    first, second, third = read_layout("auto", tmp_path)
    assert (first.patient, second.patient, third.patient) == ("p1", "p2", "p3")
    assert first.scans["inhale"].lung == tmp_path / "p1/inhale_lung.nrrd"
    assert second.scans["exhale"].lobes == tmp_path / "p2/ee_lobes.nii.gz"
    assert second.scans["inhale"].lobes is None
    assert third.scans["exhale"].image == tmp_path / "p3/exhale"
    assert third.displacement == tmp_path / "p3/exhale_to_inhale.nrrd"


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (("EE.nii.gz", "exhale.nii.gz"), "two exhale volumes; keep one of them"),
        (("exhale.nii.gz", "exhale.mha"), "both exhale.mha and exhale.nii.gz; keep one of them"),
        (("ee.nii", "ei.nii", "landmarks.csv"), "landmarks.csv: its first line is not the header exhale_x_mm"),
        (("ee.nii", "ei.nii", "keypoints.csv/x"), "keypoints.csv: is a folder; expected a file of points"),
    ],
)
def test_a_patient_whose_files_cannot_be_used_is_listed_with_the_problem_beside_the_others(
    tmp_path: Path, files: tuple[str, ...], problem: str
) -> None:
    touch(
        tmp_path, *(f"p2/{name}" for name in files), "p1/exhale.nii", "p3/exhale.nii", "other/notes.txt", ".old/ee.nii"
    )
    other, first, second, third = read_layout("auto", tmp_path)
    assert other.problem.startswith("no exhale and no inhale volume in it (1 files)")
    assert (first.problem, third.problem) == ("", "") and first.scans and third.scans
    assert second.patient == "p2" and not second.scans and second.problem.startswith(problem)
    assert [source.place for source in (first, second, third)] == [f"folder {n} of 4 by name" for n in (2, 3, 4)]


def test_what_the_layout_leaves_out_of_a_patient_is_counted_without_names(tmp_path: Path) -> None:
    touch(tmp_path, "p1/exhale.nii.gz", "p1/exhale_lobe.nii.gz", "p1/old/exhale.nii", "p1/readme.txt", "p1/.x.nii")
    touch(tmp_path, "p1/landmarks.csv", "p2/exhale.nhdr", "p2/inhale.nrrd")
    first, second = read_layout("auto", tmp_path)
    assert first.scans["exhale"].image == tmp_path / "p1/exhale.nii.gz" and not first.problem
    left_out, landmarks = first.notes
    assert (
        left_out.startswith("2 of its volumes, folders or tables were left out") and "exhale_lobe.nii" not in left_out
    )
    assert landmarks == "its landmarks were left out, as they need both phases"
    assert second.scans.keys() == {"exhale", "inhale"} and second.notes == ()


def test_a_folder_that_gives_no_patient_is_told(tmp_path: Path) -> None:
    touch(tmp_path, "p1/exhale.nii", "p2/exhal.nii", "raw data (old)/scan/exhale.nii")
    (tmp_path / "p3").mkdir()
    sources = read_layout("auto", tmp_path)
    assert [source.patient for source in sources] == ["p1", "p2", "p3", "folder-4"]
    assert [bool(source.problem) for source in sources] == [False, True, True, True]
    assert "(0 files)" in sources[2].problem and "raw data" not in sources[3].problem


def test_masks_without_a_scan_are_their_subjects_problem(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01_acq-ee_ct.nii.gz", "sub-02_ses-1_acq-ei_desc-lung_dseg.nii.gz")
    first, second = read_layout("bids", tmp_path)
    assert (first.patient, first.problem, second.patient) == ("sub-01", "", "sub-02_ses-1")
    assert second.problem.startswith("masks without their scan")


def test_every_lobe_convention_reaches_all_five_lobes() -> None:
    for codes in LOBE_CODES.values():
        assert sorted(codes.values()) == [1, 2, 3, 4, 5]


def test_phases_are_read_in_any_usual_spelling() -> None:
    assert [parse_phase(text) for text in ("EE", "exp", "T50", " Exhale ")] == ["exhale"] * 4
    assert [parse_phase(text) for text in ("EI", "insp", "T00", "inhale")] == ["inhale"] * 4


def test_bids_sessions_are_one_person(tmp_path: Path) -> None:
    names = [f"sub-01/ses-{s}/ct/sub-01_ses-{s}_acq-{a}_ct.nii.gz" for s in (1, 2) for a in ("ee", "ei")]
    touch(tmp_path, *names, "sub-02/ct/sub-02_acq-EE_ct.nii.gz", "participants.tsv")
    sources = read_layout("auto", tmp_path)
    assert [(s.patient, s.person, tuple(s.scans)) for s in sources] == [
        ("sub-01_ses-1", "sub-01", ("exhale", "inhale")),
        ("sub-01_ses-2", "sub-01", ("exhale", "inhale")),
        ("sub-02", "", ("exhale",)),
    ]


def test_auto_says_what_it_could_not_recognise(tmp_path: Path) -> None:
    touch(tmp_path, "scan_one/ct.img")
    with pytest.raises(CacheError, match=r"no layout recognises it; expected one of folder, manifest, .*--layout"):
        recognised(tmp_path)


def test_a_collections_names_win_over_folders_and_dicom(tmp_path: Path) -> None:
    touch(tmp_path, "p1/exhale.nii", "p1/a.dcm")
    assert recognised(tmp_path) == "folder"
    touch(tmp_path, "LUNG1-001/s/1.dcm")
    assert recognised(tmp_path) == "nsclc-radiomics"
    touch(tmp_path, "manifest.csv")
    assert recognised(tmp_path) == "manifest"


# Bytes of an image are those of the files that the public loaders read: nx * ny * nz * 2 of domain.md C1 and C2.
def test_the_4dct_table_is_that_of_the_documentation() -> None:
    side_and_slices = [(256, 94), (256, 112), (256, 104), (256, 99), (256, 106)]
    side_and_slices += [(512, 128), (512, 136), (512, 128), (512, 128), (512, 120)]
    across_mm = [0.97, 1.16, 1.15, 1.13, 1.10, 0.97, 0.97, 0.97, 0.97, 0.97]
    identity_mm = [3.89, 4.34, 6.94, 9.83, 7.48, 10.89, 11.03, 14.99, 7.92, 7.30]
    assert list(dirlab_4dct.CASES) == list(range(1, 11))
    total = 0
    for case, ((side, slices), mm, tre_mm) in enumerate(zip(side_and_slices, across_mm, identity_mm, strict=True), 1):
        form = dirlab_4dct.table_format(case)
        assert form.shape == (slices, side, side) and form.spacing_mm == (mm, mm, 2.5)
        assert (form.dtype, form.flip_z, dirlab_4dct.CASES[case][3]) == ("<i2", True, tre_mm)
        total += 2 * int(np.prod(form.shape))
    assert total == 2 * (256**2 * 515 + 512**2 * 640)
    with pytest.raises(CacheError, match="case 11: DIR-Lab 4DCT has the cases 1 to 10"):
        dirlab_4dct.table_format(11)


def test_the_copd_table_is_that_of_the_documentation() -> None:
    slices = [121, 102, 126, 126, 131, 119, 112, 115, 116, 135]
    across_mm = [0.625, 0.645, 0.652, 0.590, 0.647, 0.633, 0.625, 0.586, 0.664, 0.742]
    for case, (nz, mm) in enumerate(zip(slices, across_mm, strict=True), 1):
        form = dirlab_copd.table_format(case)
        assert form.shape == (nz, 512, 512) and form.spacing_mm == (mm, mm, 2.5) and form.flip_z
    assert sum(2 * int(np.prod(dirlab_copd.table_format(case).shape)) for case in dirlab_copd.CASES) == 630718464
    with pytest.raises(CacheError, match="case 0: DIR-Lab COPDgene has the cases 1 to 10"):
        dirlab_copd.table_format(0)


@pytest.mark.parametrize(
    ("inhale_slice", "flip", "word"),
    [(60, True, "to the feet by l"), (40, False, "to the head by l"), (50, True, "conv")],
)
def test_4dct_slices_run_where_the_landmarks_sink(inhale_slice: int, flip: bool, word: str) -> None:
    points: dict[Phase, np.ndarray] = {
        "exhale": np.array([[100.0, 120.0, 50.0]]),
        "inhale": np.array([[100.0, 120.0, inhale_slice]]),
    }
    table = dirlab_4dct.table_format(1)
    forms, evidence = dirlab_4dct.with_slice_order({"exhale": table, "inhale": table}, points)
    assert forms["exhale"].flip_z is forms["inhale"].flip_z is flip
    assert word in evidence


def _write_points(path: Path, points: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, points, fmt="%.6f")


@pytest.mark.parametrize(("apart_mm", "fine"), [(3.89, True), (3.93, True), (4.34, False), (0.0, False)])
def test_4dct_landmarks_must_be_as_far_apart_as_documented(tmp_path: Path, apart_mm: float, fine: bool) -> None:
    touch(tmp_path, "Case1Pack/Images/case1_T00_s.img", "Case1Pack/Images/case1_T50_s.img")
    voxels = np.random.default_rng(0).uniform(20, 90, (300, 3))
    _write_points(tmp_path / "Case1Pack/ExtremePhases/Case1_300_T50_xyz.txt", voxels)
    _write_points(tmp_path / "Case1Pack/ExtremePhases/Case1_300_T00_xyz.txt", voxels + np.array([0, 0, apart_mm / 2.5]))
    if fine:
        (source,) = read_layout("auto", tmp_path)
        assert source.landmarks["expert"].identity_tre_mm().mean() == pytest.approx(apart_mm, abs=1e-3)
        return
    (source,) = read_layout("auto", tmp_path)
    assert re.match(rf"its landmarks are {apart_mm:.2f} mm apart .* documented are 3.84 to 3.94 mm", source.problem)


@pytest.mark.parametrize(("apart_mm", "fine"), [(25.9, True), (3.0, False), (60.0, False)])
def test_copd_landmarks_must_be_as_far_apart_as_documented(tmp_path: Path, apart_mm: float, fine: bool) -> None:
    touch(tmp_path, "copd1/copd1_eBHCT.img", "copd1/copd1_iBHCT.img")
    voxels = np.random.default_rng(0).uniform(20, 90, (300, 3))
    _write_points(tmp_path / "copd1/copd1_300_eBH_xyz_r1.txt", voxels)
    _write_points(tmp_path / "copd1/copd1_300_iBH_xyz_r1.txt", voxels + np.array([apart_mm / 0.625, 0, 0]))
    if fine:
        (source,) = read_layout("auto", tmp_path)
        assert source.landmarks["expert"].identity_tre_mm().mean() == pytest.approx(apart_mm, abs=1e-3)
        return
    (source,) = read_layout("auto", tmp_path)
    assert source.patient == "dirlab-copd-01" and "documented are 12.20 to 31.00 mm" in source.problem


def test_one_based_voxels_become_mm_from_the_lowest_slice() -> None:
    form = dirlab_copd.table_format(9)  # 116 slices, 0.664 mm
    first, last = raw_to_mm(np.array([[1.0, 1.0, 1.0], [512.0, 2.0, 116.0]]), form)
    np.testing.assert_allclose(first, [0, 0, 115 * 2.5])
    np.testing.assert_allclose(last, [511 * 0.664, 0.664, 0])


def test_lung250m_names_each_collections_people() -> None:
    people = [lung250m.person(case) for case in range(124)]
    assert people[:11] == [f"empire10-{n:02d}" for n in (1, 7, 8, 13, 14, 16, 17, 18, 20, 21, 23)]
    assert people[12:34] + people[114:] == [f"nlst:?lung250m/{n:03d}" for n in (*range(12, 34), *range(114, 124))]
    assert people[34:54] == [f"tcia-4dlung:?lung250m/{n:03d}" for n in range(34, 54)]
    assert people[84:104] == [f"tcia-ventilation:?lung250m/{n:03d}" for n in range(84, 104)]
    assert people[54:84] == [f"learn2reg-lungct-{n:04d}" for n in range(1, 31)]
    assert people[104:114] == [f"dirlab-copd-{n:02d}" for n in range(1, 11)]
