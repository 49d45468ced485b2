"""`lungssl segment --dicom-seg` and `--report`: read back by highdicom on the source's slices; who is named."""

import json
from collections.abc import Callable
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from lungssl_data.layouts.copies import write_copy
from lungssl_data.phantom import PhantomConfig, make_phantom
from lungssl_data.readers import read_labels

Run = Callable[..., tuple[int, str, str]]
NAME = "KanaryZw4"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pacs")
    write_copy("dicom", folder, [make_phantom(PhantomConfig(preset="deep", seed=0, spacing_mm=8.0, trees=False))])
    return min(path.parent for path in folder.rglob("*.dcm"))


@pytest.fixture
def series(written: Path, tmp_path: Path) -> Path:
    """A folder of CT slices whose patient has a name."""
    folder = tmp_path / "series"
    folder.mkdir()
    for path in written.iterdir():
        data = pydicom.dcmread(path)
        data.PatientName = data.PatientID = NAME
        data.save_as(folder / path.name)
    return folder


def test_each_lung_is_a_segment_on_the_slices_it_was_found_in(series: Path, tmp_path: Path, lungssl: Run) -> None:
    mask, seg, report = tmp_path / "lungs.nii.gz", tmp_path / "lungs.dcm", tmp_path / "lungs.json"
    code, out, err = lungssl("segment", series, "-o", mask, "--dicom-seg", seg, "--report", report)
    assert code == 0, err
    assert "repeats the patient's and the study's identity" in out and NAME not in out + err
    read = highdicom.seg.segread(seg)
    described = [read.get_segment_description(number) for number in (1, 2)]
    assert [one.segmented_property_type.value for one in described] == ["3341006", "44029006"]
    assert [one.segment_label for one in described] == ["Right lung", "Left lung"]
    slices = [pydicom.dcmread(path) for path in series.iterdir()]
    slices.sort(key=lambda one: float(one.ImagePositionPatient[2]))
    found = read.get_pixels_by_source_instance([s.SOPInstanceUID for s in slices], combine_segments=True)
    assert np.array_equal(found, read_labels(mask).labels) and set(np.unique(found)) == {0, 1, 2}
    assert read.PatientName == NAME and read.StudyInstanceUID == slices[0].StudyInstanceUID
    held = json.loads(report.read_text())
    assert held["volumes_ml"]["right lung"] > 500 and "no training" in held["made_by"]["method"]
    assert NAME not in report.read_text() and str(tmp_path) not in report.read_text()


def test_what_cannot_be_a_dicom_segmentation_is_said_before_any_work(
    series: Path, phantoms: Path, tmp_path: Path, lungssl: Run
) -> None:
    image = next(phantoms.glob("*/exhale.nii.gz"))
    for arguments, said in (
        ((image, "--dicom-seg", tmp_path / "a.dcm"), "--dicom-seg needs a DICOM series, a folder or a .dcm file"),
        ((series, "--dicom-seg", tmp_path / "a.nii.gz"), "expected a name that ends with .dcm"),
        ((series, "--dicom-seg", series / "a.dcm"), "would be in the image's place"),
    ):
        code, _, err = lungssl("segment", *arguments, "-o", tmp_path / "mask.nii.gz")
        assert code == 2 and said in err, err
    assert not (tmp_path / "mask.nii.gz").exists()


def test_a_series_without_what_a_ct_must_have_is_refused_without_its_texts(
    series: Path, tmp_path: Path, lungssl: Run
) -> None:
    for path in series.iterdir():
        data = pydicom.dcmread(path)
        del data.FrameOfReferenceUID
        data.save_as(path)
    code, out, err = lungssl("segment", series, "-o", tmp_path / "mask.nii.gz", "--dicom-seg", tmp_path / "seg.dcm")
    assert code == 3 and "highdicom refuses this series" in err and NAME not in out + err
    assert not (tmp_path / "seg.dcm").exists()
