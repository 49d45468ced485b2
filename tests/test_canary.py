"""No text of a header leaves for the cache, its report, the screen or an error: planted canaries are looked for."""

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from lungssl_data.layouts.copies import write_copy
from lungssl_data.phantom import PhantomConfig, make_phantom

Run = Callable[..., tuple[int, str, str]]
CANARY = "KanaryZw4"
TEXT_KINDS = ("LO", "LT", "PN", "SH", "ST", "UC", "UT")
KEPT = (0x00080060, 0x00281054)  # Modality and RescaleType are checked, so a canary there is another test's


@pytest.fixture(autouse=True)
def _key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "id.key"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    monkeypatch.setenv("LUNGSSL_ID_KEY_FILE", str(key))


def _leaks(folder: Path) -> list[str]:
    """Files whose name, raw bytes or HDF5 contents hold the canary."""
    found = []
    for path in folder.rglob("*"):
        text = str(path.relative_to(folder)).encode()
        if path.is_file():
            text += path.read_bytes()
        if path.suffix == ".h5":
            with h5py.File(path) as file:
                parts = [str(dict(file.attrs))]
                file.visititems(lambda name, item, parts=parts: parts.append(f"{name} {dict(item.attrs)}"))
                text += " ".join(parts).encode()
        if CANARY.encode() in text:
            found.append(str(path))
    return found


def _plant_in_dicom(path: Path) -> None:
    data = pydicom.dcmread(path)
    for tag in pydicom.datadict.DicomDictionary:
        kind = pydicom.datadict.dictionary_VR(tag)
        if kind in TEXT_KINDS and tag >> 16 in (0x8, 0x10, 0x18, 0x20, 0x32, 0x38, 0x40, 0x4008) and tag not in KEPT:
            data.add_new(tag, kind, CANARY)
    # Says the phase, which is read, and the canary, which is not.
    data.SeriesDescription = f"{data.get('ProtocolName', '')} {'exp' if 'SER0' in str(path) else 'insp'} {CANARY}"
    data.private_block(0x0009, CANARY, create=True).add_new(1, "LO", CANARY)
    data.save_as(path)


def test_dicom_tags_leave_no_trace(tmp_path: Path, lungssl: Run) -> None:
    phantom = make_phantom(PhantomConfig(preset="deep", seed=0, spacing_mm=8.0))
    write_copy("dicom", tmp_path / "pacs", [phantom])
    for path in (tmp_path / "pacs").rglob("*.dcm"):
        _plant_in_dicom(path)
    (tmp_path / "pacs").rename(tmp_path / f"pacs {CANARY}")
    arguments = ("--layout", "dicom", "--out", tmp_path / "cache", "--spacing-mm", "8")
    code, out, err = lungssl("cache", "build", tmp_path / f"pacs {CANARY}", *arguments)
    assert code == 0, err
    assert not _leaks(tmp_path / "cache")
    assert CANARY not in (out + err).replace(f"pacs {CANARY}", "")
    code, out, _ = lungssl("cache", "info", tmp_path / "cache")
    assert code == 0 and "exhale" in out and "inhale" in out and CANARY not in out


def test_texts_of_other_formats_and_of_damaged_files_leave_no_trace(tmp_path: Path, lungssl: Run) -> None:
    phantom = make_phantom(PhantomConfig(preset="deep", seed=1, spacing_mm=8.0))
    raw = tmp_path / "raw"
    for patient, suffix in (("a", ".nii.gz"), ("b", ".mha"), ("c", ".nrrd"), ("bad", ".nrrd")):
        folder = raw / f"{patient}{CANARY}"
        folder.mkdir(parents=True)
        for phase in ("exhale", "inhale"):
            _write_with_canaries(folder / f"{phase}{suffix}", getattr(phantom, phase).ct)
        if patient == "bad":
            text = (folder / "inhale.nrrd").read_bytes()
            (folder / "inhale.nrrd").write_bytes(text[: len(text) // 2])
    code, out, err = lungssl("cache", "build", raw, "--keyed-ids", "--out", tmp_path / "cache", "--spacing-mm", "8")
    assert code == 3 and "1 of 4 patients failed" in err
    assert len(list((tmp_path / "cache").glob("*.h5"))) == 3
    assert not _leaks(tmp_path / "cache")
    assert CANARY not in out + err


def _write_with_canaries(path: Path, volume: object) -> None:
    hu, grid = volume.hu, volume.geometry  # type: ignore[attr-defined]
    if path.name.endswith(".nii.gz"):
        affine = np.vstack([np.diag([-1, -1, 1]) @ grid.index_to_mm(), [0, 0, 0, 1]])  # LPS to RAS
        image = nibabel.Nifti1Image(hu.T, affine)
        for field in ("descrip", "aux_file", "intent_name", "db_name"):
            image.header[field] = CANARY.encode()
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, CANARY.encode()))
        nibabel.save(image, path)
        return
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing(grid.spacing_mm)
    image.SetOrigin(grid.origin_mm)
    for field in ("Comment", "PatientName", f"key{CANARY}"):
        image.SetMetaData(field, CANARY)
    sitk.WriteImage(image, str(path))
