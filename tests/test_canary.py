"""No text of a header leaves for the cache, its report, the screen or an error: planted canaries are looked for."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from lungssl import registering
from lungssl_data.layouts.copies import write_copy
from lungssl_data.phantom import PhantomConfig, make_phantom
from lungssl_tasks.registration import RegistrationConfig
from lungssl_tasks.registration.descent import DescentConfig

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


def test_an_analysis_of_dicom_names_nobody(tmp_path: Path, lungssl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = RegistrationConfig(spacing_mm=8.0, descent=DescentConfig(levels=()))
    monkeypatch.setitem(registering.PRESETS, "fast", coarse)
    write_copy("dicom", tmp_path / "pacs", [make_phantom(PhantomConfig(preset="deep", seed=0, spacing_mm=8.0))])
    for path in (tmp_path / "pacs").rglob("*.dcm"):
        _plant_in_dicom(path)
    raw = (tmp_path / "pacs").rename(tmp_path / f"pacs {CANARY}")
    series = {"exhale" if "SER0" in str(path) else "inhale": path.parent for path in sorted(raw.rglob("*.dcm"))}
    files = [word for phase, folder in series.items() for word in (f"--{phase}", folder)]
    maps, page = tmp_path / "out" / "maps", tmp_path / "out" / "page.html"
    page.parent.mkdir()
    code, out, err = lungssl("analyze", *files, "-o", page, "--maps", maps, "--preset", "fast")
    assert code == 0, err
    assert len(list(maps.iterdir())) == 6 and not _leaks(tmp_path / "out") and CANARY not in out + err
    for path in maps.iterdir():  # compressed
        assert CANARY.encode() not in gzip.decompress(path.read_bytes())
    code, out, err = lungssl("analyze", "--exhale", raw, "--inhale", raw / "gone", "-o", tmp_path / "out" / "2.html")
    assert code == 3 and CANARY not in (out + err).replace(raw.name, "")


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


POINTS = ",".join(f"{phase}_{axis}_mm" for phase in ("exhale", "inhale") for axis in "xyz")


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """One small scan that can be built."""
    phantom = make_phantom(PhantomConfig(preset="deep", seed=2, spacing_mm=8.0))
    _write_with_canaries(tmp_path / "scan.mha", phantom.inhale.ct)
    return tmp_path / "scan.mha"


def test_folder_names_and_layout_errors_leave_no_trace(tmp_path: Path, scan: Path, lungssl: Run) -> None:
    raw = tmp_path / "raw"
    for name, files in (
        (f"{CANARY}, Hans", ("inhale.mha",)),
        (f"M\u00fcller {CANARY}", ("inhale.mha",)),
        (f"two {CANARY}", ("inhale.mha", "ei.mha")),
        (f"points {CANARY}", ("inhale.mha", "exhale.mha", "landmarks.csv")),
        (f"pipe {CANARY}", ("inhale.nii.gz",)),
    ):
        (raw / name).mkdir(parents=True)
        for file in files:
            if file.endswith(".mha"):
                (raw / name / file).symlink_to(scan)
            elif file.endswith(".csv"):
                (raw / name / file).write_text(f"{POINTS}\n1,2,3,4,5,{CANARY}\n")
            else:
                os.mkfifo(raw / name / file)
    out, err = _build_with_problems(raw, tmp_path / "cache", lungssl, built=2, problems=3)
    # Sorted by name: the two that are fit, then pipe, points and two.
    assert "folder 3 of 5 by name: inhale image: is neither a file nor a folder" in err
    assert "folder 4 of 5 by name: landmarks.csv line 2: expected 6 numbers" in err
    assert "folder 5 of 5 by name: two inhale volumes" in err
    assert "(folder 1 of 5 by name): inhale by file name: image (.mha)" in out


def test_cells_of_a_manifest_leave_no_trace(tmp_path: Path, scan: Path, lungssl: Run) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / f"{CANARY}.mha").symlink_to(scan)
    (raw / f"{CANARY}.csv").write_text(f"{CANARY}\n")
    lines = (
        f'"{CANARY}, Hans",inhale,{CANARY}.mha,,{CANARY}',
        f"unknown phase {CANARY},{CANARY},{CANARY}.mha,,",
        f"missing {CANARY},inhale,gone{CANARY}.mha,,",
        f"twice {CANARY},inhale,{CANARY}.mha,,",
        f"twice {CANARY},EI,{CANARY}.mha,,",
        f"points {CANARY},inhale,{CANARY}.mha,{CANARY}.csv,",
        f"persons {CANARY},inhale,{CANARY}.mha,,{CANARY} 1",
        f"persons {CANARY},exhale,{CANARY}.mha,,{CANARY} 2",
    )
    (raw / "manifest.csv").write_text("\n".join(("patient_id,phase,image,landmarks,person", *lines)) + "\n")
    _, err = _build_with_problems(raw, tmp_path / "cache", lungssl, built=1, problems=5)
    assert "line 3: the phase is unknown" in err and "line 4: image: no such file or folder" in err
    assert "line 6: a second inhale scan" in err and "line 9: a second value of person" in err
    assert "line 7: landmarks: its first line is not the header" in err


@pytest.mark.parametrize(
    "text",
    [
        f"{CANARY},exhale,{CANARY}.mha\n",
        f"patient_id,phase,image\n{CANARY}, Hans,inhale,scan.mha\n",
        f"patient_id,phase,image\n{CANARY}\u00fc,inhale,scan.mha\n",
        f"patient_id,phase,image\n,inhale,{CANARY}.mha\n",
        f"patient_id,phase,image\n{CANARY},inhale,scan.mha\0\n",
    ],
)
def test_a_manifest_that_cannot_be_read_leaves_no_trace(tmp_path: Path, text: str, lungssl: Run) -> None:
    (tmp_path / "manifest.csv").write_bytes(text.encode("latin-1"))
    code, out, err = lungssl("cache", "build", tmp_path, "--keyed-ids", "--out", tmp_path / "cache", "--debug")
    assert code == 3 and "error: manifest.csv" in err
    assert CANARY not in out + err and not (tmp_path / "cache").exists()


def test_two_files_of_one_name_leave_no_trace(tmp_path: Path, lungssl: Run) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / f"sub-{CANARY}_acq-ee_ct.nii.gz").write_bytes(b"")
    arguments = ("cache", "build", tmp_path, "--layout", "bids", "--out", tmp_path / "cache", "--debug")
    code, out, err = lungssl(*arguments, "--keyed-ids")
    assert code == 3 and "are the same scan by their names" in err and CANARY not in out + err
    code, out, err = lungssl(*arguments)
    assert code == 3 and f"a/sub-{CANARY}_acq-ee_ct.nii.gz and b/sub-{CANARY}" in err


def _build_with_problems(raw: Path, cache: Path, lungssl: Run, *, built: int, problems: int) -> tuple[str, str]:
    """A dry run and a build with keyed ids; both end with bad data and say nothing. The dry run's list, the errors."""
    arguments = ("cache", "build", raw, "--keyed-ids", "--out", cache, "--spacing-mm", "8", "--debug")
    code, listed, dry_err = lungssl(*arguments, "--dry-run")
    assert code == 3 and f"{problems} of {built + problems} patients can't be used" in dry_err
    assert listed.count("can't be used: ") == problems and not cache.exists()
    code, out, err = lungssl(*arguments)
    assert code == 3 and f"{problems} of {built + problems} patients failed" in err
    assert len(list(cache.glob("*.h5"))) == built
    assert (cache / "build.jsonl").read_text(encoding="utf-8").count('"failed"') == problems
    assert not _leaks(cache) and CANARY not in listed + dry_err + out + err
    return listed, err


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
