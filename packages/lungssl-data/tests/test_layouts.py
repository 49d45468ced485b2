from pathlib import Path

import pytest
from lungssl_data.layouts import LAYOUTS, read_layout
from lungssl_data.layouts.source import LOBE_CODES, parse_phase
from lungssl_data.pair import CacheError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_says_what_it_expected_where_there_is_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(CacheError, match="expected"):
        read_layout(name, tmp_path / "nowhere")


def test_an_unknown_layout_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="layout 'bids' is unknown; known are auto, folder, manifest"):
        read_layout("bids", Path())


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


def test_two_volumes_of_one_phase_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "p1/EE.nii.gz", "p1/exhale.nii.gz")
    with pytest.raises(CacheError, match="two exhale volumes"):
        read_layout("folder", tmp_path)


def test_one_volume_in_two_formats_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "p1/exhale.nii.gz", "p1/exhale.mha")
    with pytest.raises(CacheError, match=r"both exhale\.mha and exhale\.nii\.gz; keep one"):
        read_layout("folder", tmp_path)


def test_a_manifest_is_read(tmp_path: Path) -> None:
    touch(tmp_path, "a/ee.mha", "a/ei.mha", "b.nii", "b_lobes.nii")
    manifest = tmp_path / "cohort.csv"
    manifest.write_text(
        "patient_id,phase,image,lobes,lobe_codes,split\n"
        "a,T50,a/ee.mha,,,val\n"
        "a,T00,a/ei.mha,,,\n"
        "b,inhale,b.nii,b_lobes.nii,totalsegmentator,train\n"
    )
    a, b = read_layout("auto", manifest)
    assert set(a.scans) == {"exhale", "inhale"} and a.split == "val"
    assert b.scans["inhale"].lobe_codes == "totalsegmentator"
    assert b.split == "train"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient,phase,image\n", r"unknown columns \['patient'\], missing columns \['patient_id'\]"),
        ("patient_id,phase,image\n", "no lines below the header"),
        ("patient_id,phase,image\na,midway,x.nii\n", r"line 2: phase 'midway' is unknown"),
        ("patient_id,phase,image\na,exhale,gone.nii\n", r"line 2: gone.nii: no such file"),
        ("patient_id,phase,image\na,exhale,x.nii\na,EE,x.nii\n", r"line 3: patient a: a second exhale scan"),
        ("patient_id,phase,image,split\na,exhale,x.nii,dev\n", "split 'dev' is unknown"),
        ("patient_id,phase,image,split\na,exhale,x.nii,val\na,inhale,x.nii,test\n", "in both val and test"),
        ("patient_id,phase,image,lobe_codes\na,exhale,x.nii,mine\n", "lobe_codes 'mine' is unknown"),
        ("patient_id,phase,image\nJane Doe,exhale,x.nii\n", "de-identified"),
        ("patient_id,phase,image\na,exhale,\n", "the image column is empty"),
    ],
)
def test_a_faulty_manifest_is_refused_with_line_and_reason(tmp_path: Path, text: str, message: str) -> None:
    touch(tmp_path, "x.nii")
    manifest = tmp_path / "cohort.csv"
    manifest.write_text(text)
    with pytest.raises(CacheError, match=message):
        read_layout("manifest", manifest)


def test_every_lobe_convention_reaches_all_five_lobes() -> None:
    for codes in LOBE_CODES.values():
        assert sorted(codes.values()) == [1, 2, 3, 4, 5]


def test_phases_are_read_in_any_usual_spelling() -> None:
    assert [parse_phase(text) for text in ("EE", "exp", "T50", " Exhale ")] == ["exhale"] * 4
    assert [parse_phase(text) for text in ("EI", "insp", "T00", "inhale")] == ["inhale"] * 4
