from pathlib import Path

import numpy as np
import pytest
from lungssl_data.layouts import read_layout
from lungssl_data.layouts.manifest import COLUMNS
from lungssl_data.pair import CacheError

HEADER = "patient_id,phase,image\n"
POINTS = ",".join(f"{phase}_{axis}_mm" for phase in ("exhale", "inhale") for axis in "xyz")


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


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


def test_manifests_carry_masks_landmarks_and_people(tmp_path: Path) -> None:
    touch(tmp_path, "ee.nii", "ei.nii", "lung.nii", "lesion.nii")
    columns = ",".join(f"{phase}_{axis}_mm" for phase in ("exhale", "inhale") for axis in "xyz")
    (tmp_path / "points.csv").write_text(f"{columns}\n1,2,3,4,5,6.25\n-1,-2,-3,-4,-5,-6\n")
    (tmp_path / "manifest.csv").write_text(
        "patient_id,phase,image,lung,lung_codes,lesion,lesion_codes,landmarks,person,site,licence\n"
        "a,EE,ee.nii,lung.nii,popi,lesion.nii,any,points.csv,someone,here,ours\n"
        "a,EI,ei.nii,,,,,points.csv,,,\n"
    )
    (a,) = read_layout("auto", tmp_path)
    exhale = a.scans["exhale"]
    assert (exhale.lung_codes, exhale.lesion_codes, exhale.lobe_codes) == ("popi", "any", "lungssl")
    assert (exhale.lung, exhale.lesion) == (tmp_path / "lung.nii", tmp_path / "lesion.nii")
    assert (a.person, a.dataset, a.licence) == ("someone", "here", "ours")
    np.testing.assert_array_equal(a.landmarks["expert"].inhale_mm, [[4, 5, 6.25], [-4, -5, -6]])


def _refused(content: bytes | str, root: Path) -> str:
    """The error of a manifest, in one line."""
    touch(root, "x.nii")
    (root / "cohort.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CacheError) as caught:
        read_layout("manifest", root / "cohort.csv")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient,phase,image\n", "columns [1] are unknown, ['patient_id'] are missing; the first line names"),
        ("patient_id;phase;image\n", "columns [1] are unknown, ['patient_id', 'phase', 'image'] are missing"),
        ("", "columns [] are unknown, ['patient_id', 'phase', 'image'] are missing"),
        ("patient_id,phase,image,image\n", "cohort.csv: the header has the columns ['image'] twice"),
        (HEADER, "no lines below the header"),
        (HEADER + ",,\n", "no lines below the header"),
        (HEADER + "a,EE,x.nii\n,EI,x.nii\n", "cohort.csv line 3: the patient_id is empty"),
        (HEADER + "a,EE,x.nii\nDoe, Jane,EI,x.nii\n", "line 3: more cells than the header has columns; put cells that"),
        (HEADER + "Jane Doe,exhale,x.nii\n", "1 of 1 patient ids can't be used, first 'Jane Doe' (line 2): they are"),
        (HEADER + "P1,EE,x.nii\nb,EE,x.nii\np1,EI,x.nii\n", "differ in case only: 'P1' (line 2), 'p1' (line 4)"),
        (HEADER + f"a,EE,{'x' * 200_000}\n", "line 2: is no CSV; save the table as CSV again"),
        (HEADER + "a,EE,x\0.nii\n", "cohort.csv line 2: a NUL byte, so this is no text in UTF-8; save it as"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_with_line_and_reason(tmp_path: Path, text: str, message: str) -> None:
    assert message in _refused(text, tmp_path)


@pytest.mark.parametrize(("encoding", "line"), [("latin-1", 3), ("utf-16", 1)])
def test_a_manifest_in_another_encoding_is_refused_with_how_to_save_it(
    tmp_path: Path, encoding: str, line: int
) -> None:
    message = _refused((HEADER + "a,EE,x.nii\nM\u00fcller,EE,x.nii\n").encode(encoding), tmp_path)
    assert f'cohort.csv line {line}: is not in UTF-8; save it as "CSV UTF-8"' in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (HEADER + "a,midway,x.nii\n", "line 2: the phase is unknown; write exhale or inhale"),
        (HEADER + "a,exhale,gone.nii\n", "line 2: image: no such file or folder"),
        (HEADER + "a,exhale,x.nii\na,EE,x.nii\n", "line 3: a second exhale scan; a patient has one of each"),
        (HEADER + f"a,exhale,{'x' * 5000}\n", "line 2: a file or folder can't be read (File name too long)"),
        (HEADER + "a,exhale,\n", "line 2: the image column is empty"),
        (HEADER + "a,exhale\n", "line 2: the image column is empty"),
        ("patient_id,phase,image,split\na,EE,x.nii,dev\n", "line 2: the split is unknown; known are train, val"),
        ("patient_id,phase,image,split\na,EE,x.nii,val\na,EI,x.nii,test\n", "line 3: in both val and test"),
        ("patient_id,phase,image,lobe_codes\na,exhale,x.nii,mine\n", "line 2: lobe_codes is unknown; known are lun"),
        ("patient_id,phase,image,person\na,EE,x.nii,one\na,EI,x.nii,two\n", "line 3: a second value of person;"),
        ("patient_id,phase,image,displacement\na,EE,x.nii,gone\n", "line 2: displacement: no such file or folder"),
    ],
)
def test_a_faulty_line_is_its_patients_problem_and_no_others(tmp_path: Path, text: str, problem: str) -> None:
    touch(tmp_path, "x.nii")
    (tmp_path / "cohort.csv").write_text(text + "b,inhale,x.nii\n")
    a, b = read_layout("manifest", tmp_path / "cohort.csv")
    assert a.patient == "a" and not a.scans and a.problem.startswith(problem) and ".nii" not in a.problem
    assert b.patient == "b" and not b.problem and b.scans["inhale"].image == tmp_path / "x.nii"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x_mm\n1\n", "its first line is not the header exhale_x_mm,"),
        (f"{POINTS}\n", "no points in it"),
        (f"{POINTS}\n1,2,3,4,5\n", "expected 6 numbers"),
        (f"{POINTS}\n1,2,3,4,5,6\n1,2\n", "expected 6 numbers"),
        (f"{POINTS}\n1,2,3,4,5,nan\n", "expected 6 numbers"),
    ],
)
def test_faulty_tables_of_landmarks_are_their_patients_problem(tmp_path: Path, text: str, problem: str) -> None:
    touch(tmp_path, "a/ee.nii", "a/ei.nii")
    (tmp_path / "points.csv").write_text(text)
    (tmp_path / "m.csv").write_text(
        "patient_id,phase,image,landmarks\na,EE,a/ee.nii,points.csv\na,EI,a/ei.nii,points.csv\n"
    )
    (a,) = read_layout("manifest", tmp_path / "m.csv")
    number = f" line {len(text.splitlines())}" if "numbers" in problem else ""
    assert a.problem.startswith(f"line 2: landmarks{number}: {problem}")


@pytest.mark.parametrize("column", COLUMNS)
def test_no_cell_of_a_manifest_is_in_a_keyed_problem(tmp_path: Path, column: str) -> None:
    cells = {"patient_id": "a", "phase": "EE", "image": "gone"} | {column: "Zzyzx"}
    (tmp_path / "m.csv").write_text(f"{','.join(cells)}\n{','.join(cells.values())}\n")
    (source,) = read_layout("manifest", tmp_path / "m.csv", key=bytes(range(32)))
    assert source.problem.startswith("line 2: ") and "Zzyzx" not in repr(source)
