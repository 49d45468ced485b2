import os
import signal
import socket
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from lungssl_data.building.patient import pair_from_source
from lungssl_data.ids import keyed_id
from lungssl_data.layouts import read_layout
from lungssl_data.layouts.patients import check_ids
from lungssl_data.layouts.source import PairSource, ScanSource
from lungssl_data.pair import CacheError, check_patient_id
from lungssl_data.prepare import PrepareConfig
from lungssl_data.splits import same_spelling

KEY = bytes(range(32))
NAMES = ("M\u00fcller, Hans", "\u738b \u5c0f\u660e", "O'Brien; rm -rf", "a" * 200, "p1", "-x")


@pytest.fixture(autouse=True)
def waiting_fails() -> Iterator[None]:
    """A test that opens a pipe would wait for ever."""

    def fail(*_: object) -> None:
        raise AssertionError("waited for 60 s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def pipe(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def sources_of(*patients: str) -> list[PairSource]:
    scans = {"inhale": ScanSource(image=Path("unread.nii.gz"))}
    return [PairSource(patient=patient, scans=scans) for patient in patients]  # pyright: ignore


def test_any_folder_name_is_a_patient_where_ids_are_keyed(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/exhale.nii" for name in NAMES))
    sources = read_layout("folder", tmp_path, key=KEY)
    assert sorted(source.patient for source in sources) == sorted(keyed_id(same_spelling(name), KEY) for name in NAMES)
    assert all(check_patient_id(source.patient) and not source.problem for source in sources)


def test_a_folder_name_that_is_no_text_can_be_keyed(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/M\xfcller"
    os.mkdir(folder)
    (Path(os.fsdecode(folder)) / "exhale.nii").write_bytes(b"x")
    (source,) = read_layout("folder", tmp_path, key=KEY)
    assert check_patient_id(source.patient)


def test_an_accent_apart_from_its_letter_makes_no_other_patient(tmp_path: Path) -> None:
    ids = []
    for form in ("NFC", "NFD"):
        root = tmp_path / form
        touch(root, f"{unicodedata.normalize(form, NAMES[0])}/exhale.nii")  # pyright: ignore
        ids += [source.patient for source in read_layout("folder", root, key=KEY)]
    assert ids[0] == ids[1]


def test_without_a_key_such_a_name_is_refused_with_its_place_and_the_ways_out(tmp_path: Path) -> None:
    touch(tmp_path, "p1/exhale.nii", "q 1/exhale.nii", "q 2/exhale.nii")
    with pytest.raises(CacheError, match=r"2 of 3 .* first 'q 1' \(folder 2 of 3 by name\).*rename.*--keyed-ids"):
        read_layout("folder", tmp_path)


def test_persons_are_keyed_as_patients_are(tmp_path: Path) -> None:
    touch(tmp_path, "x.nii")
    (tmp_path / "m.csv").write_text("patient_id,phase,image,person\na,EE,x.nii,\nb,EE,x.nii,a\nc,EE,x.nii,Doe\n")
    a, b, c = read_layout("manifest", tmp_path / "m.csv", key=KEY)
    assert a.person == "" and b.person == a.patient == keyed_id("a", KEY) and c.person == keyed_id("doe", KEY)


def test_keyed_problems_say_the_number_of_the_patient(tmp_path: Path) -> None:
    touch(tmp_path, "a/exhale.nii", "Doe, Jane/exhale.nii", "Doe, Jane/exhale.mha", "copd1/copd1_eBHCT.img")
    bad, good, *_ = read_layout("folder", tmp_path, key=KEY)
    assert good.problem == ""
    assert bad.problem == "folder 1 of 3 by name: both exhale.mha and exhale.nii; keep one of them"
    assert "Jane" not in repr(bad)
    (collection,) = read_layout("dirlab-copd", tmp_path, key=KEY)
    assert collection.problem.startswith("patient 1 of 1: no inhale image; expected copd1_iBHCT.img")


def test_errors_about_the_whole_name_files_only_where_ids_are_not_keyed(tmp_path: Path) -> None:
    touch(tmp_path, "Doe/sub-1_acq-ee_ct.nii", "Jane/sub-1_acq-ee_ct.nii")
    expected = "are the same scan by their names; keep one of them"
    with pytest.raises(CacheError, match=f"^Doe/sub-1_acq-ee_ct.nii and Jane/sub-1_acq-ee_ct.nii {expected}"):
        read_layout("bids", tmp_path)
    with pytest.raises(CacheError, match=rf"^{expected} \(ids are keyed, so no name is said") as caught:
        read_layout("bids", tmp_path, key=KEY)
    assert caught.value.__suppress_context__


def test_ids_that_are_one_file_where_case_is_ignored_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "P01/exhale.nii", "P02/exhale.nii", "p01/exhale.nii")
    with pytest.raises(CacheError, match=r"in case only: 'P01' \(folder 1 of 3 by name\), 'p01' \(folder 3 of 3 by"):
        read_layout("folder", tmp_path)
    with pytest.raises(
        CacheError, match=r"ids repeat: 'p\w+' \(folder 1 of 3 by name\), 'p\w+' \(folder 3 .*neither case"
    ):
        read_layout("folder", tmp_path, key=KEY)
    with pytest.raises(CacheError, match="patient ids repeat: 'a', 'a'; give each patient its own, neither case"):
        check_ids(sources_of("a", "b", "a"))
    check_ids(sources_of("a", "b"))


@pytest.mark.parametrize("name", ["exhale.nii.gz", "exhale_lung.nii.gz", "exhale_to_inhale.nrrd", "landmarks.csv"])
def test_a_pipe_is_its_patients_problem_and_nothing_waits_for_it(tmp_path: Path, name: str) -> None:
    if name != "exhale.nii.gz":
        touch(tmp_path, "p1/exhale.nii.gz")
    touch(tmp_path, "p1/inhale.nii.gz", "p2/inhale.nii.gz")
    pipe(tmp_path / "p1" / name)
    first, second = read_layout("auto", tmp_path)
    assert "is neither a file nor a folder" in first.problem and not second.problem


def test_a_socket_and_a_link_to_nowhere_are_told_apart_in_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "gone.nii").symlink_to(tmp_path / "nowhere")
    (tmp_path / "m.csv").write_text("patient_id,phase,image\na,EE,s.nii\nb,EE,gone.nii\nc,EE,/dev/null\n")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.nii"))
        problems = [source.problem for source in read_layout("manifest", tmp_path / "m.csv")]
    assert problems[0].startswith("line 2: image: is neither a file nor a folder")
    assert problems[1].startswith("line 3: image: no such file or folder")
    assert problems[2].startswith("line 4: image: is neither a file nor a folder")


@pytest.mark.parametrize("layout", ["learn2reg", "lung250m", "popi", "empire10", "dirlab-copd"])
def test_layouts_that_look_into_files_wait_for_no_pipe(tmp_path: Path, layout: str) -> None:
    images = {
        "learn2reg": ("imagesTr/LungCT_0001_0000.nii.gz", "imagesTr/LungCT_0001_0001.nii.gz"),
        "lung250m": ("imagesTr/case_054_1.nii.gz", "imagesTr/case_054_2.nii.gz"),
        "popi": ("10-P.mhd", "60-P.mhd"),
        "empire10": ("scans/01_Fixed.mhd", "scans/01_Moving.mhd"),
        "dirlab-copd": ("copd1/copd1_eBHCT.img", "copd1/copd1_iBHCT.img"),
    }[layout]
    points = {
        "learn2reg": ("keypointsTr/LungCT_0001_0000.csv", "keypointsTr/LungCT_0001_0001.csv"),
        "lung250m": ("corrfieldTr/case_054.csv",),
        "popi": ("10-Landmarks.pts", "60-Landmarks.pts"),
    }.get(layout, ())
    for name in images:
        pipe(tmp_path / name)
    for name in points:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1 2 3 4 5 6\n" if layout == "lung250m" else "1 2 3\n")
    (source,) = read_layout(layout, tmp_path)
    assert "is neither a file nor a folder" in source.problem
    for name in points:
        (tmp_path / name).unlink()
        pipe(tmp_path / name)
    (source,) = read_layout(layout, tmp_path)
    assert "is neither a file nor a folder" in source.problem


def test_a_source_has_scans_or_a_problem() -> None:
    with pytest.raises(CacheError, match="no exhale and no inhale image"):
        PairSource(patient="a")
    (source,) = sources_of("a")
    with pytest.raises(ValueError, match="with a problem and with scans"):
        PairSource(patient="a", scans=source.scans, problem="damaged")
    with pytest.raises(CacheError, match="damaged"):
        pair_from_source(PairSource(patient="a", problem="damaged"), config=PrepareConfig(), split="train")
