"""A PACS export: many patients, series and phases in any folders, and nothing of a name in what comes out."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from lungssl_data.layouts import read_layout
from lungssl_data.readers import VolumeError, read_slices
from lungssl_data.readers.dicom_phase import PhaseMark, phase_mark
from lungssl_data.readers.dicom_tree import find_series
from pydicom.uid import generate_uid

KEY = bytes(range(32))
Write = Callable[..., np.ndarray]


def _person(name: str, description: str, study: str) -> Callable[[int, pydicom.Dataset], None]:
    def edit(_i: int, data: pydicom.Dataset) -> None:
        data.PatientID, data.SeriesDescription, data.StudyInstanceUID = name, description, study

    return edit


def test_series_are_found_by_patient_and_phase_in_any_folders(tmp_path: Path, write_series: Write) -> None:
    root, study = tmp_path / "export", generate_uid()
    one = write_series(root / "a", _person("Canary^One", "Thorax Exp 2.0 B70f Canary", study))
    write_series(root / "a", _person("Canary^One", "Thorax Insp 2.0 B70f Canary", study), prefix="i")
    write_series(root / "b" / "c", _person("Canary^Two", "Canary", generate_uid()))
    shutil.move(root / "a" / "slice2.dcm", root / "b" / "elsewhere")  # no suffix, another folder
    (root / "b" / "report.pdf").write_bytes(b"%PDF" + bytes(500))
    found = find_series(root, key=KEY)
    assert [entry.problem for entry in found] == [None] * 3
    assert len({entry.patient for entry in found}) == 2 and len({entry.study for entry in found}) == 2
    phases = {entry.phase: entry for entry in found}
    assert set(phases) == {"exhale", "inhale", None}
    exhale = phases["exhale"]
    assert (exhale.patient, exhale.study) == (phases["inhale"].patient, phases["inhale"].study)
    assert (exhale.evidence, exhale.slices, exhale.spacing_mm) == (
        "word in the series description",
        6,
        pytest.approx((0.7, 0.9, 2.5)),
    )
    np.testing.assert_array_equal(read_slices(exhale.files).hu, one - 1024)
    assert phases[None].evidence == ""
    texts = [str(getattr(entry, name)) for entry in found for name in vars(entry) if name != "files"]
    assert not any("Canary" in text or "1.2.826" in text for text in texts)
    assert {entry.patient for entry in find_series(root, key=KEY[::-1])}.isdisjoint(entry.patient for entry in found)


def test_a_4d_series_comes_apart_into_its_phases(tmp_path: Path, write_series: Write) -> None:
    stored = np.random.default_rng(0).integers(0, 2500, (30, 5, 7)).astype(np.int16)

    def edit(i: int, data: pydicom.Dataset) -> None:
        data.SeriesDescription = f"P4^Canary^S300, Gated, {25 * (i % 3)}.0%AR"
        data.ImagePositionPatient = [-20.0, 10.0, 2.5 * (i // 3)]

    write_series(tmp_path / "ct", edit, stored=stored)
    found = sorted(find_series(tmp_path, key=KEY), key=lambda entry: entry.phase_percent or 0)
    assert [(entry.phase, entry.phase_percent, entry.slices) for entry in found] == [
        ("inhale", 0.0, 10),
        (None, 25.0, 10),
        ("exhale", 50.0, 10),
    ]
    assert {entry.evidence for entry in found} == {"percentage in the series description"}
    for i, entry in enumerate(found):
        np.testing.assert_array_equal(read_slices(entry.files).hu, stored[i::3] - 1024)


def test_one_bad_series_spoils_no_other(tmp_path: Path, write_series: Write) -> None:
    write_series(tmp_path / "good")
    write_series(tmp_path / "gap")
    (tmp_path / "gap" / "slice1.dcm").unlink()
    write_series(tmp_path / "burned", lambda i, data: setattr(data, "BurnedInAnnotation", "YES") if i == 2 else None)
    write_series(tmp_path / "frames", lambda _i, data: setattr(data, "NumberOfFrames", 5))
    write_series(tmp_path / "unplaced", lambda _i, data: delattr(data, "ImagePositionPatient"))
    write_series(tmp_path / "cut", stored=np.zeros((4, 5, 7), np.int16))
    cut = tmp_path / "cut" / "slice0.dcm"
    cut.write_bytes(cut.read_bytes()[:-9])
    (tmp_path / "empty.dcm").write_bytes(b"")
    problems = sorted((entry.files[0].parent.name, entry.problem or "") for entry in find_series(tmp_path, key=KEY))
    by_folder = dict(problems)
    assert by_folder["good"] == "" and "1 slice is missing at 5.00 mm" in by_folder["gap"]
    assert "1 of 6 slices: has text burned into" in by_folder["burned"] and "multi-frame" in by_folder["frames"]
    assert "lacks ImagePositionPatient" in by_folder["unplaced"]
    assert any("a file is a damaged DICOM file" in problem for folder, problem in problems if folder == "cut")
    assert any("a file is a damaged DICOM file" in problem for folder, problem in problems if folder == tmp_path.name)
    assert not any("\n" in problem or "Canary" in problem or str(tmp_path) in problem for _, problem in problems)


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_links_out_of_the_tree_are_not_followed(tmp_path: Path, write_series: Write) -> None:
    write_series(tmp_path / "outside")
    (tmp_path / "root" / "in").mkdir(parents=True)
    (tmp_path / "root" / "folder").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root")
    for file in (tmp_path / "outside").iterdir():
        (tmp_path / "root" / "in" / file.name).symlink_to(file)
    os.mkfifo(tmp_path / "root" / "pipe.dcm")
    assert find_series(tmp_path / "root", key=KEY) == []
    with pytest.raises(VolumeError, match="gone: no such folder"):
        find_series(tmp_path / "gone", key=KEY)


def test_files_without_a_patient_id_are_not_one_patient(tmp_path: Path, write_series: Write) -> None:
    for name in ("a", "b"):
        write_series(tmp_path / name, lambda _i, data: setattr(data, "PatientID", ""))
    assert len({entry.patient for entry in find_series(tmp_path, key=KEY)}) == 2


def _of(description: str, **values: float) -> PhaseMark:
    elements: dict[str, float | None] = {"position_identifier": None, "position_index": None, "percentage": None}
    return phase_mark(**(elements | values), description=description)


@pytest.mark.parametrize(
    ("description", "phase", "percent"),
    [
        ("P4^P113^S100^I00003, Gated, 0.0%", "inhale", 0.0),
        ("Gated, 50.0%A", "exhale", 50.0),
        ("Gated, 40.0%", None, 40.0),
        ("T=70%", None, 70.0),
        ("Thorax Insp 2.0 B70f", "inhale", None),
        ("Thorax Exp 2.0 B70f", "exhale", None),
        ("END-EXPIRATION 1mm", "exhale", None),
        ("lung_EI_1.0", "inhale", None),
        ("4DCT T50", "exhale", None),
        ("EE 0%", "exhale", 0.0),  # a word wins over the convention
        ("CHEST ASiR-V 50%", None, None),
        ("CHEST SS50 ASIR 40%", None, None),
        ("INSP EXP COMPARE", None, None),
        ("0% 50%", None, None),
        ("exposure 100 contrast", None, None),
        ("expert review", None, None),
        ("T10 vertebra", None, None),
        ("500 %", None, None),
        ("", None, None),
    ],
)
def test_descriptions_tell_a_phase_or_none(description: str, phase: str | None, percent: float | None) -> None:
    mark = _of(description)
    assert (mark.phase, mark.percent) == (phase, percent)
    assert bool(mark.evidence) == (phase is not None or percent is not None)


def test_the_nominal_percentage_comes_before_one_in_the_description() -> None:
    mark = _of("Gated 30%", percentage=50.0)
    assert (mark.phase, mark.percent, mark.evidence) == ("exhale", 50.0, "nominal percentage of respiratory phase")


def _identity(**changes: str) -> Callable[[int, pydicom.Dataset], None]:
    def edit(_i: int, data: pydicom.Dataset) -> None:
        data.update(changes)

    return edit


def test_people_who_share_a_patient_id_are_nobodys_pair(tmp_path: Path, write_series: Write) -> None:
    study = generate_uid()
    common = {"PatientID": "ANON", "StudyInstanceUID": study}
    write_series(tmp_path / "a", _identity(PatientName="DOE^JANE", SeriesDescription="Exp", **common))
    write_series(tmp_path / "b", _identity(PatientName="Doe^Jane^^", SeriesDescription="Insp", **common))
    (source,) = read_layout("dicom", tmp_path)
    assert set(source.scans) == {"exhale", "inhale"} and source.notes == ()
    write_series(tmp_path / "b", _identity(PatientName="ROE^RICHARD", SeriesDescription="Insp", **common))
    (source,) = read_layout("dicom", tmp_path)
    assert "its 2 CT series have one PatientID and 2 names" in source.problem
    write_series(tmp_path / "b", _identity(PatientBirthDate="19500101", SeriesDescription="Insp", **common))
    write_series(tmp_path / "a", _identity(PatientBirthDate="19600101", SeriesDescription="Exp", **common))
    (source,) = read_layout("dicom", tmp_path)
    assert "2 birth dates" in source.problem and "ANON" not in source.problem


def test_files_without_a_patient_id_go_by_name_and_birth_date_or_by_study(tmp_path: Path, write_series: Write) -> None:
    named = {"PatientID": "", "PatientName": "DOE^JANE", "PatientBirthDate": "19500101"}
    for name in ("a", "b"):
        write_series(tmp_path / name, _identity(**named))
    assert [entry.told_by for entry in find_series(tmp_path, key=KEY)] == ["name"] * 2
    assert len({entry.patient for entry in find_series(tmp_path, key=KEY)}) == 1
    write_series(tmp_path / "c", _identity(PatientID="", PatientName=""))
    notes = [note for source in read_layout("dicom", tmp_path) for note in source.notes]
    assert any("the files name no patient, so this study counts as one" in note for note in notes)


def test_series_that_the_pair_leaves_out_are_told(tmp_path: Path, write_series: Write) -> None:
    study = {"PatientID": "one", "StudyInstanceUID": generate_uid()}
    write_series(tmp_path / "a", _identity(SeriesDescription="Exp", **study))
    write_series(tmp_path / "b", _identity(SeriesDescription="Insp", **study))
    for percent in (10, 20):
        write_series(tmp_path / f"gated{percent}", _identity(SeriesDescription=f"Gated, {percent}.0%", **study))
    write_series(tmp_path / "c", _identity(PatientID="one", SeriesDescription="contrast"))
    write_series(tmp_path / "d", _identity(SeriesDescription="other", **study))
    next((tmp_path / "d").iterdir()).unlink()
    (source,) = read_layout("dicom", tmp_path)
    assert set(source.scans) == {"exhale", "inhale"}
    (note,) = source.notes
    assert note.startswith("2 more CT series of this patient left out, 1 of other studies")
