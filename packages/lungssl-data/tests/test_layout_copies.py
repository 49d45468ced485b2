"""Every layout's copy made of a phantom is read back equal: arrays, grids, masks, landmarks, names."""

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from lungssl_data.building.patient import pair_from_source
from lungssl_data.layouts import LAYOUTS, read_layout, recognised
from lungssl_data.layouts.copies import COPIES, write_copy
from lungssl_data.layouts.files import PHANTOM_FILE
from lungssl_data.layouts.source import LESION_CODES, LOBE_CODES, LUNG_CODES, PairSource, ScanSource, read_image
from lungssl_data.pair import CacheError, Phase
from lungssl_data.phantom import Phantom, PhantomConfig, PhantomPhase, make_phantom
from lungssl_data.prepare import PrepareConfig
from lungssl_data.readers import VolumeError, read_labels
from lungssl_data.splits import assign_splits
from lungssl_data.volume import Geometry

SPACING_MM = 8.0
PATIENTS = {"learn2reg": 5, "lung250m": 4}
"""Of a copy made of three phantoms; three for the others. NLST's pairs are two patients each."""
ROUNDED = ("dirlab-4dct", "dirlab-copd")
LANDMARKS = {
    "folder": {"expert": 300},
    "manifest": {"expert": 300},
    "dirlab-4dct": {"expert": 300},
    "dirlab-copd": {"expert": 300},
    "popi": {"expert": 40},
    "learn2reg": {"expert": 100, "automatic": 300},
    "lung250m": {"automatic": 300},
}
"""Of the first patient."""


@pytest.fixture(scope="module", autouse=True)
def key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("key") / "id.key"
    file.write_bytes(bytes(range(32)))
    file.chmod(0o600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUNGSSL_ID_KEY_FILE", str(file))
        yield


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom(PhantomConfig(preset="deep", seed=1, spacing_mm=SPACING_MM, pathology=("covid",)))


@pytest.fixture(scope="module")
def copies(phantom: Phantom, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A copy of three patients, all the same phantom, made when first asked for."""
    base = tmp_path_factory.mktemp("copies")

    def of(name: str) -> Path:
        if not (base / name).exists():
            write_copy(name, base / name, [phantom] * 3)
        return base / name

    return of


Sources = Callable[[str], list[PairSource]]


@pytest.fixture(scope="module")
def sources_of(copies: Callable[[str], Path]) -> Sources:
    """What a copy is read as; read once."""
    return cache(lambda name: read_layout(name, copies(name)))


@pytest.fixture
def damaged(copies: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the copy, to be spoilt."""
    return lambda name: Path(shutil.copytree(copies(name), tmp_path / name))


every_layout = pytest.mark.parametrize("name", LAYOUTS)


def truth(phantom: Phantom, phase: Phase) -> PhantomPhase:
    return getattr(phantom, phase)


def scans(sources: list[PairSource]) -> Iterator[tuple[Phase, ScanSource]]:
    for source in sources:
        yield from source.scans.items()


def upright(values: np.ndarray, grid: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Turned to axes that run along LPS; values and the place of the first voxel."""
    signs = np.diag(grid.direction)
    np.testing.assert_allclose(grid.direction, np.diag(signs), atol=1e-9)
    first = np.array(grid.origin_mm)
    for axis, sign in enumerate(signs):
        if sign < 0:
            values = np.flip(values, 2 - axis)
            first[axis] -= (grid.shape[2 - axis] - 1) * grid.spacing_mm[axis]
    return values, first


def test_every_layout_has_a_copy() -> None:
    assert COPIES.keys() == LAYOUTS.keys()


@every_layout
def test_scans_are_read_back_equal_and_in_place(name: str, sources_of: Sources, phantom: Phantom) -> None:
    sources = sources_of(name)
    assert len(sources) == PATIENTS.get(name, 3)
    assert len({source.patient for source in sources}) == len(sources)
    for phase, scan in scans(sources):
        ct = truth(phantom, phase).ct
        volume = read_image(scan)
        hu, first = upright(volume.hu, volume.geometry)
        valid, _ = upright(volume.valid(), volume.geometry)
        np.testing.assert_array_equal(hu[valid], ct.hu[valid])
        assert valid.mean() > 0.75 and (valid.all() or name == "dirlab-copd")
        np.testing.assert_allclose(first, ct.geometry.origin_mm, atol=1e-4)
        np.testing.assert_allclose(volume.geometry.spacing_mm, ct.geometry.spacing_mm, atol=1e-5)
        assert scan.evidence


@every_layout
def test_masks_arrive_in_our_codes(name: str, sources_of: Sources, phantom: Phantom) -> None:
    for phase, scan in scans(sources_of(name)):
        scanned = truth(phantom, phase)
        lung_codes, lesion_codes = LUNG_CODES[scan.lung_codes], LESION_CODES[scan.lesion_codes]
        lesion = np.where(scanned.lesion <= 2, scanned.lesion, 0)
        given = {
            "lung": (scan.lung, lung_codes, 3 * (scanned.lung > 0) if 3 in lung_codes.values() else scanned.lung),
            "lobes": (scan.lobes, LOBE_CODES[scan.lobe_codes], scanned.lobes),
            "lesion": (scan.lesion, lesion_codes, 3 * (lesion > 0) if scan.lesion_codes == "any" else lesion),
        }
        for path, codes, expected in given.values():
            if path is None:
                continue
            labels = read_labels(path)
            table = np.zeros(256, np.uint8)
            for theirs, ours in codes.items():
                table[theirs] = ours
            got, _ = upright(table[labels.labels], labels.geometry)
            assert expected.any()
            np.testing.assert_array_equal(got, expected)


ROLES = {
    "lung": ("folder", "manifest", "bids", "popi", "learn2reg", "lung250m", "empire10", "luna16"),
    "lobes": ("folder", "manifest", "bids"),
    "lesion": ("folder", "manifest", "mosmed", "covid-19-20"),
}


@pytest.mark.parametrize(("name", "role"), [(name, role) for role, names in ROLES.items() for name in names])
def test_masks_that_are_there_are_found(name: str, role: str, sources_of: Sources) -> None:
    first = sources_of(name)[0]
    assert all(getattr(scan, role) is not None for scan in first.scans.values())


@every_layout
def test_landmarks_are_those_of_the_phantom(name: str, sources_of: Sources, phantom: Phantom) -> None:
    sources = sources_of(name)
    counts = {kind: len(points.exhale_mm) for kind, points in sources[0].landmarks.items()}
    found = len(phantom.landmarks_exhale_mm)
    assert counts == {kind: min(count, found) for kind, count in LANDMARKS.get(name, {}).items()}
    for source in sources:
        for points in source.landmarks.values():
            n = len(points.exhale_mm)
            exact = np.linalg.norm(phantom.landmarks_inhale_mm[:n] - phantom.landmarks_exhale_mm[:n], axis=1)
            if name in ROUNDED:
                for got, true, scanned in (
                    (points.exhale_mm, phantom.landmarks_exhale_mm, phantom.exhale),
                    (points.inhale_mm, phantom.landmarks_inhale_mm, phantom.inhale),
                ):
                    origin = np.array(scanned.ct.geometry.origin_mm)
                    voxels = np.rint((true - origin) / SPACING_MM)
                    np.testing.assert_allclose(got, voxels * SPACING_MM + origin, atol=1e-9)
            else:
                np.testing.assert_allclose(points.exhale_mm, phantom.landmarks_exhale_mm[:n], atol=0.01)
                np.testing.assert_allclose(points.inhale_mm, phantom.landmarks_inhale_mm[:n], atol=0.01)
                np.testing.assert_allclose(points.identity_tre_mm(), exact, atol=0.01)


@every_layout
def test_auto_recognises_each(name: str, copies: Callable[[str], Path]) -> None:
    assert recognised(copies(name)) == name


@every_layout
def test_a_copy_says_that_it_is_made_of_phantoms(name: str, sources_of: Sources) -> None:
    names = {
        "manifest": ["phantoms"],  # its column `site`
        "learn2reg": ["learn2reg-lungct (phantom)", "learn2reg-nlst (phantom)"],
    }
    names |= {generic: ["(phantom)"] for generic in ("folder", "bids", "dicom")}
    assert sorted({source.dataset for source in sources_of(name)}) == names.get(name, [f"{name} (phantom)"])


@every_layout
def test_names_are_matched_in_any_case(name: str, damaged: Callable[[str], Path]) -> None:
    root = damaged(name)
    before = len(read_layout(name, root))
    for path in sorted(root.rglob("*"), reverse=True):
        if path.suffix != ".raw" and path.name not in (PHANTOM_FILE, "manifest.csv") and "files" not in path.parts:
            path.rename(path.with_name(path.name.upper()))
    if name == "folder":  # its landmarks.csv and suffixes
        assert recognised(root) == "folder"
    assert len(read_layout(name, root)) == before


def test_two_copies_in_one_place_are_an_error_that_names_both(damaged: Callable[[str], Path]) -> None:
    root = damaged("mosmed").parent
    damaged("dirlab-copd")
    with pytest.raises(CacheError, match=r"may be any of dirlab-copd, mosmed; name one with --layout"):
        recognised(root)


@pytest.mark.parametrize(
    ("name", "lost", "message"),
    [
        ("dirlab-copd", "copd2_eBHCT.img", "dirlab-copd-02: no exhale image; expected copd2_eBHCT.img"),
        ("dirlab-copd", "copd2_300_iBH_xyz_r1.txt", "dirlab-copd-02: landmarks of exhale only"),
        ("dirlab-4dct", "case6_T00.img", "dirlab-4dct-06: no inhale image; expected case6_T00_s.img"),
        ("dirlab-4dct", "case8_dirLab300_T50_xyz.txt", "dirlab-4dct-08: no exhale landmarks"),
        ("popi", "60-P.mhd", "popi-original: no exhale image; expected 60-P.mhd"),
        ("popi", "10-Landmarks.pts", "popi-original: landmarks of exhale only"),
        ("popi", "10.mhd", "popi-bl: phases 60 only; 60 and 00 are needed"),
        ("learn2reg", "LungCT_0002_0001.nii.gz", "learn2reg-lungct-0002: no image 0001"),
        ("learn2reg", "NLST_0001_0001.nii.gz", "learn2reg-nlst-0001: no image 0001"),
        ("lung250m", "case_104_2.nii.gz", "lung250m-104: no image 2"),
        ("empire10", "13_Moving.mhd", "empire10-13: no moving image"),
        ("empire10", "02_Fixed.mhd", "empire10-02: no fixed image"),
    ],
)
def test_a_missing_file_is_its_patients_problem_and_no_others(
    name: str, lost: str, message: str, damaged: Callable[[str], Path]
) -> None:
    root = damaged(name)
    for path in list(root.rglob(lost)):
        path.unlink()
    problems = _problems(read_layout(name, root))
    assert len(problems) == 1 and message in problems[0] and "\n" not in problems[0]


def _problems(sources: list[PairSource]) -> list[str]:
    """As the build's report has them; some of the patients must be fit to be built."""
    assert any(source.scans for source in sources)
    return [f"{source.patient}: {source.problem}" for source in sources if source.problem]


def test_a_file_of_the_wrong_size_is_refused_with_both_sizes(damaged: Callable[[str], Path]) -> None:
    root = damaged("dirlab-copd")
    image = root / "copd2/copd2_iBHCT.img"
    image.write_bytes(image.read_bytes()[:-2])
    first, second, _ = read_layout("dirlab-copd", root)
    read_image(first.scans["inhale"])
    with pytest.raises(VolumeError, match=r"copd2_iBHCT.img: \d+ bytes, expected \d+ \(\d+ x \d+ x \d+ voxels of 2"):
        read_image(second.scans["inhale"])
    with pytest.raises(CacheError, match=r"inhale image \(\.img\): \d+ bytes, expected \d+"):
        pair_from_source(second, config=PrepareConfig(spacing_mm=SPACING_MM), split="train")


def test_without_its_mark_a_copy_is_held_against_the_collections_table(damaged: Callable[[str], Path]) -> None:
    root = damaged("dirlab-4dct")
    (root / PHANTOM_FILE).unlink()
    first = read_layout("dirlab-4dct", root)[0]
    assert first.patient == "dirlab-4dct-01" and "documented are 3.84 to 3.94 mm" in first.problem
    for path in list(root.rglob("*.txt")):
        path.unlink()
    first = read_layout("dirlab-4dct", root)[0]
    assert first.dataset == "dirlab-4dct"
    with pytest.raises(VolumeError, match=r"expected 12320768 \(256 x 256 x 94 voxels of 2 bytes\)"):
        read_image(first.scans["exhale"])


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("dirlab-copd", "copd3/copd3_300_eBH_xyz_r1.txt"),
        ("dirlab-4dct", "Case6Pack/extremePhases/case6_dirLab300_T50_xyz.txt"),
        ("popi", "bl/pts/60.pts"),
        ("learn2reg", "keypointsTr/LungCT_0001_0000.csv"),
    ],
)
def test_points_that_do_not_correspond_are_counted(name: str, file: str, damaged: Callable[[str], Path]) -> None:
    root = damaged(name)
    lines = (root / file).read_text(encoding="utf-8").splitlines()
    (root / file).write_text("\n".join(lines[:-1]))
    (problem,) = _problems(read_layout(name, root))
    assert f"{len(lines) - 1} landmarks at exhale, {len(lines)} at inhale" in problem


@pytest.mark.parametrize("text", ["1 2\n", "1 2 three\n", "1 2 nan\n"])
def test_a_line_that_is_no_point_is_named(text: str, damaged: Callable[[str], Path]) -> None:
    root = damaged("dirlab-copd")
    (root / "copd2/copd2_300_iBH_xyz_r1.txt").write_text(f"1 2 3\n{text}")
    (problem,) = _problems(read_layout("dirlab-copd", root))
    assert problem.startswith("dirlab-copd-02: inhale landmarks line 2: expected 3 numbers")


def test_unnamed_scans_of_a_study_are_told_apart_by_their_lungs(sources_of: Sources) -> None:
    sources = sources_of("dicom")
    evidence = sorted(tuple(scan.evidence for scan in source.scans.values()) for source in sources)
    assert evidence == [
        ("routine protocol: chest CT is taken at inspiration",),
        ("volume of the lungs", "volume of the lungs"),
        ("word in the series description", "word in the series description"),
    ]


def test_series_that_cannot_be_told_apart_are_their_patients_problem(
    damaged: Callable[[str], Path], phantom: Phantom
) -> None:
    from lungssl_data.layouts.copies.dicom import write_series

    root = damaged("dicom")
    folder = root / "PAT000" / "STU0" / "SER2"
    write_series(folder, phantom.inhale.ct, patient="phantom 0", study="1", series="2", description="insp")
    (problem,) = _problems(read_layout("dicom", root))
    assert "CT series that can't be told apart: 2 series of one phase" in problem


def test_nsclc_radiomics_leaves_out_the_listed_cases(damaged: Callable[[str], Path]) -> None:
    root = damaged("nsclc-radiomics")
    (root / "LUNG1-002").rename(root / "LUNG1-014")
    (root / "LUNG1-003").rename(root / "LUNG1-128")
    patients = [source.patient for source in read_layout("nsclc-radiomics", root)]
    assert patients == ["nsclc-radiomics-001", "nsclc-radiomics-128"]


def test_empire_scans_stored_with_an_offset_are_brought_back(sources_of: Sources) -> None:
    offsets = {s.patient: {scan.offset_hu for scan in s.scans.values()} for s in sources_of("empire10")}
    assert offsets == {"empire10-01": {0}, "empire10-13": {0}, "empire10-02": {-24}}
    evidence = {s.patient: s.scans["inhale"].evidence for s in sources_of("empire10")}
    assert evidence["empire10-02"] == "volume of the lung masks"
    assert evidence["empire10-13"] == "order published with Lung250M-4B"


def test_equal_people_are_one_person_in_all_layouts(sources_of: Sources) -> None:
    def persons(name: str) -> dict[str, str]:
        return {source.patient: source.person for source in sources_of(name)}

    lung250m = persons("lung250m")
    assert lung250m["lung250m-104"] == persons("dirlab-copd")["dirlab-copd-01"]
    assert lung250m["lung250m-012-1"] == lung250m["lung250m-012-2"] == "nlst:?lung250m/012"
    nlst = {patient: person for patient, person in persons("learn2reg").items() if "nlst" in patient}
    assert nlst["learn2reg-nlst-0001-1"] == nlst["learn2reg-nlst-0001-2"] == "nlst:learn2reg-nlst-0001"
    together = assign_splits([*lung250m, *nlst], {}, lung250m | nlst)
    assert len({together[patient] for patient in (*nlst, "lung250m-012-1", "lung250m-012-2")}) == 1
    assert set(persons("popi").values()) == {"popi-bl", "popi-dx"}


@pytest.mark.parametrize("name", ["popi", "dirlab-copd"])
def test_a_copy_can_be_prepared(name: str, sources_of: Sources, phantom: Phantom) -> None:
    source = sources_of(name)[0]
    pair = pair_from_source(source, config=PrepareConfig(spacing_mm=SPACING_MM), split="train")
    ml = {}
    for phase in pair.phases():
        scan = pair.scan(phase)
        ml[phase] = np.count_nonzero(scan.lung) * scan.geometry().voxel_ml()
        expected = np.count_nonzero(truth(phantom, phase).lung) * SPACING_MM**3 / 1000
        assert ml[phase] == pytest.approx(expected, rel=0.02 if name == "popi" else 0.2)
    assert ml["inhale"] > ml["exhale"]
    assert len(pair.landmarks["expert"].exhale_mm) == len(source.landmarks["expert"].exhale_mm)
