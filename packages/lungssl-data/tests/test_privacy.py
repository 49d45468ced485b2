"""Canaries in every text that a file can carry: none comes out of reading, writing, listing or an error."""

import copy
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from lungssl_data.readers import VolumeError, read_labels, read_volume, write_labels, write_volume
from lungssl_data.readers.dicom_tree import find_series
from lungssl_data.volume import LabelMap
from pydicom.datadict import dictionary_VR
from pydicom.uid import generate_uid

CANARY = "KanaryXq7"
TEXT_KINDS = ("LO", "LT", "PN", "SH", "ST", "UC", "UT")
WRITABLE = ("out.nii", "out.nii.gz", "out.mha", "out.nrrd")
Write = Callable[..., np.ndarray]


def _texts() -> list[int]:
    """Every element of the dictionary's patient, study, visit and equipment groups that holds free text."""
    groups = (0x0008, 0x0010, 0x0018, 0x0020, 0x0028, 0x0032, 0x0038, 0x0040, 0x4008)
    tags = [tag for tag in pydicom.datadict.DicomDictionary if tag >> 16 in groups]
    return [tag for tag in tags if dictionary_VR(tag) in TEXT_KINDS and tag != 0x00281054]


def _plant(_i: int, data: pydicom.Dataset) -> None:
    uid = {name: data[name].value for name in ("SOPInstanceUID", "SeriesInstanceUID")}
    for tag in _texts():
        data.add_new(tag, dictionary_VR(tag), CANARY)
    item = pydicom.Dataset()
    item.CodeMeaning = CANARY
    data.RequestAttributesSequence = [item]
    data.private_block(0x0009, CANARY, create=True).add_new(1, "LO", CANARY)
    data.SOPInstanceUID, data.SeriesInstanceUID = uid["SOPInstanceUID"], uid["SeriesInstanceUID"]


def _files(folder: Path, write_series: Write) -> list[Path]:
    """A scan in every format, with a canary wherever a text can be."""
    hu = np.random.default_rng(0).integers(0, 200, (4, 6, 5)).astype(np.int16)
    write_series(folder / "ct", _plant, stored=hu)
    for name, kind in (("a.nii.gz", nibabel.Nifti1Image), ("b.nii", nibabel.Nifti2Image)):
        image = kind(hu.T, np.diag([1.0, 2.0, 3.0, 1.0]))
        for field in ("descrip", "aux_file", "intent_name"):
            image.header[field] = CANARY.encode()
        if kind is nibabel.Nifti1Image:
            image.header["db_name"] = CANARY.encode()
        for code in (2, 4, 6):  # DICOM, AFNI, comment
            image.header.extensions.append(nibabel.nifti1.Nifti1Extension(code, CANARY.encode()))
        nibabel.save(image, folder / name)
    image = sitk.GetImageFromArray(hu)
    for field in ("Comment", "PatientName", "content", f"key{CANARY}"):
        image.SetMetaData(field, CANARY)
    for name in ("c.mha", "d.nrrd"):
        sitk.WriteImage(image, str(folder / name))
    text = (folder / "d.nrrd").read_bytes()
    assert CANARY.encode() in text and CANARY.encode() in (folder / "c.mha").read_bytes()
    (folder / "d.nrrd").write_bytes(text.replace(b"\n", f"\n# {CANARY}\ncontent: {CANARY}\n".encode(), 1))
    return [folder / name for name in ("ct", "a.nii.gz", "b.nii", "c.mha", "d.nrrd")]


def test_no_text_of_a_header_is_in_a_volume_a_mask_or_a_written_file(
    tmp_path: Path, write_series: Write, capfd: pytest.CaptureFixture
) -> None:
    for path in _files(tmp_path, write_series):
        volume = read_volume(path)
        assert CANARY not in repr(vars(volume.geometry)) and set(vars(volume)) == {"hu", "geometry"}
        for name in WRITABLE:
            write_volume(tmp_path / name, volume)
            written = (tmp_path / name).read_bytes()
            assert CANARY.encode() not in (
                nibabel.load(tmp_path / name).header.binaryblock if ".nii" in name else written
            )
            write_labels(tmp_path / name, LabelMap(labels=(volume.hu % 2).astype(np.uint8), geometry=volume.geometry))
            assert read_labels(tmp_path / name).labels.shape == volume.hu.shape
    out, err = capfd.readouterr()
    assert CANARY not in out + err


def test_no_text_of_a_header_is_in_an_error(
    tmp_path: Path, write_series: Write, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(1)
    messages = []
    for path in _files(tmp_path, write_series):
        file = path / "slice3.dcm" if path.is_dir() else path
        whole = file.read_bytes()
        for _ in range(25):
            damaged = bytearray(copy.copy(whole))
            for place in rng.integers(0, min(len(whole), 3000), 4):
                damaged[place] = rng.integers(0, 256)
            file.write_bytes(damaged[: rng.integers(len(damaged) // 2, len(damaged) + 1)])
            try:
                read_volume(path)
            except VolumeError as error:
                messages += [str(error), error.problem]
        file.write_bytes(whole)
    out, err = capfd.readouterr()
    assert len(messages) > 50 and not any(CANARY in text for text in [*messages, out, err, caplog.text])


def test_a_listing_of_an_export_holds_keyed_ids_only(tmp_path: Path, write_series: Write) -> None:
    study = generate_uid()

    def edit(i: int, data: pydicom.Dataset) -> None:
        _plant(i, data)
        data.StudyInstanceUID = study

    write_series(tmp_path / "ct", edit)
    write_series(tmp_path / "bad", _plant)
    (tmp_path / "bad" / "slice1.dcm").unlink()
    found = find_series(tmp_path, key=bytes(32))
    assert [entry.problem is None for entry in found].count(True) == 1
    for entry in found:
        listed = {name: value for name, value in vars(entry).items() if name != "files"}
        assert CANARY not in repr(listed) and study not in repr(listed) and "1.2.826" not in repr(listed)
