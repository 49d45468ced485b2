"""Copies of layouts in DICOM: a PACS export, and three collections of TCIA."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

from lungssl_data.layouts.copies.common import mark, numbered, phases_of
from lungssl_data.phantom import Phantom
from lungssl_data.volume import Volume

INTERCEPT = -1024


def write_pacs(root: Path, phantoms: Sequence[Phantom]) -> None:
    """In turn: a pair whose descriptions name the phases, one without a word, and a single scan."""
    for place, phantom in enumerate(phantoms):
        patient, folder = f"phantom {place}", root / f"PAT{place:03d}" / "STU0"
        for number, (phase, (scan, _)) in enumerate(phases_of(phantom).items()):
            if place % 3 == 2 and phase == "exhale":
                continue
            words = f"Chest {'exp' if phase == 'exhale' else 'insp'} 1.0 I70f" if place % 3 == 0 else "Chest 1.0"
            write_series(
                folder / f"SER{number}", scan.ct, patient=patient, study="1", series=f"{number}", description=words
            )
    mark(root, "dicom")


def write_ventilation(root: Path, phantoms: Sequence[Phantom]) -> None:
    """`CT-PET-VI-01/<study>/<series>/1-001.dcm`, breath-holds."""
    for number, phantom in numbered(phantoms, range(1, 21)):
        patient = f"CT-PET-VI-{number:02d}"
        for place, (phase, (scan, _)) in enumerate(phases_of(phantom).items()):
            words = f"Thorax {'Exp' if phase == 'exhale' else 'Insp'} 2.0 B70f"
            folder = root / patient / "01-01-2000-NA-CT PET-00001" / f"{place}.000000-{words}-00001"
            write_series(folder, scan.ct, patient=patient, study="1", series=f"{place}", description=words)
    mark(root, "tcia-ventilation")


def write_4dlung(root: Path, phantoms: Sequence[Phantom]) -> None:
    """`100_HM10395/<study>/<series>/1-001.dcm`: phases 0 % and 50 %, and inhale once more as 20 %."""
    for number, phantom in numbered(phantoms, range(100, 120)):
        patient = f"{number}_HM10395"
        scans = {50: phantom.exhale, 0: phantom.inhale, 20: phantom.inhale}
        for percent, scan in scans.items():
            words = f"P4^P{number}^S300^I{percent:05d}, Gated, {percent}.0%A"
            folder = (
                root / patient / "01-01-2000-NA-p4-00001" / f"1.000000-P4P{number} Gated {percent}.0A-{percent:05d}"
            )
            write_series(folder, scan.ct, patient=patient, study="1", series=f"{percent}", description=words)
    mark(root, "tcia-4dlung")


def write_nsclc(root: Path, phantoms: Sequence[Phantom]) -> None:
    """`LUNG1-001/<study>/<series>/1-001.dcm`, one scan each."""
    for number, phantom in numbered(phantoms, range(1, 14)):
        patient = f"LUNG1-{number:03d}"
        folder = root / patient / "01-01-2000-StudyID-00001" / "0.000000-NA-00001"
        write_series(folder, phantom.inhale.ct, patient=patient, study="1", series="0")
    mark(root, "nsclc-radiomics")


def write_series(folder: Path, volume: Volume, *, patient: str, study: str, series: str, description: str = "") -> None:
    """One plain CT series, `1-001.dcm` and on, from the head down; UIDs are hashes of the three names."""
    folder.mkdir(parents=True, exist_ok=True)
    grid = volume.geometry
    stored = (volume.hu - np.int16(INTERCEPT)).astype("<i2")
    slices = grid.shape[0]
    for place in range(slices):
        z = slices - 1 - place
        data = Dataset()
        data.SOPClassUID = CTImageStorage
        data.SOPInstanceUID = _uid(patient, study, series, str(z))
        data.StudyInstanceUID, data.SeriesInstanceUID = _uid(patient, study), _uid(patient, study, series)
        data.FrameOfReferenceUID = _uid(patient, study, "frame")
        data.PatientID, data.Modality, data.ImageType = patient, "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        if description:
            data.SeriesDescription = description
        data.InstanceNumber = place + 1
        data.Rows, data.Columns, data.SamplesPerPixel = grid.shape[1], grid.shape[2], 1
        data.PhotometricInterpretation, data.PixelRepresentation = "MONOCHROME2", 1
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.RescaleSlope, data.RescaleIntercept = 1, INTERCEPT
        data.PixelSpacing = [_decimal(grid.spacing_mm[1]), _decimal(grid.spacing_mm[0])]
        data.SliceThickness = _decimal(grid.spacing_mm[2])
        data.ImageOrientationPatient = [_decimal(v) for v in grid.direction[:, :2].T.ravel()]
        here = grid.origin_mm + grid.direction[:, 2] * (z * grid.spacing_mm[2])
        data.ImagePositionPatient = [_decimal(v) for v in here]
        data.PixelData = stored[z].tobytes()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        data.save_as(folder / f"1-{place + 1:03d}.dcm", enforce_file_format=True)


def _uid(*names: str) -> UID:
    return generate_uid(entropy_srcs=list(names))


def _decimal(value: float) -> str:
    """At most the 16 characters of a decimal string."""
    return f"{value:.10g}"
