"""TCIA NSCLC-Radiomics: 422 patients, one planning CT each in DICOM, `LUNG1-XXX/<study>/<series>/*.dcm`.

Source: https://doi.org/10.7937/K9/TCIA.2015.PF0M9REI; `domain.md` C7. The scans are taken while breathing freely: of no
one phase, and read as inhale. Segmentations (RTSTRUCT, SEG) are not read, so that LUNG1-128 and -412, which lack them,
are in; five patients whose images and segmentations disagree in shape are left out.
"""

import re
from pathlib import Path

from lungssl_data.ids import load_key
from lungssl_data.layouts import dicom
from lungssl_data.layouts.files import dataset_name, has_name, names_under, nothing_found
from lungssl_data.layouts.source import PairSource, attempt
from lungssl_data.pair import CacheError
from lungssl_data.readers.dicom_tree import find_series

NAMES = r"(lung1-(\d{3}))/(?:[^/]+/)*[^/]+"
LEFT_OUT = (14, 21, 85, 95, 194)
"""Image and segmentation differ in shape (C7)."""
FREE_BREATHING = "none: taken while breathing freely, read as inhale"


def recognises(root: Path) -> bool:
    """Whether there is a folder of one of its patients."""
    return has_name(root, NAMES)


def read(root: Path) -> list[PairSource]:
    """Patients by number but for LEFT_OUT; with a problem where one has several CT series of equal length, or none."""
    pattern = re.compile(r"^((?:.*/)?lung1-(\d{3}))/(?:[^/]+/)*[^/]+$", re.IGNORECASE)
    folders: dict[int, Path] = {}
    for name in names_under(root):
        match = pattern.match(name)
        if match:
            folders[int(match[2])] = root / match[1]
    if not folders:
        raise nothing_found(root, "LUNG1-001/<study>/<series>/*.dcm, ... of NSCLC-Radiomics")
    key, sources = load_key(), []
    for number, folder in sorted(folders.items()):
        if number not in LEFT_OUT:
            patient = f"nsclc-radiomics-{number:03d}"
            sources += attempt(patient, _source, root, patient, folder, key)
    if not sources:
        raise CacheError(f"{root}: of NSCLC-Radiomics only patients that are left out {LEFT_OUT}; copy the others")
    return sources


def _source(root: Path, patient: str, folder: Path, key: bytes) -> list[PairSource]:
    series = find_series(folder, key=key)
    if not series:
        raise CacheError("no CT series in its folder; copy it again")
    scan = dicom.source(dicom.best(series), FREE_BREATHING)
    return [
        PairSource(
            patient=patient,
            scans={"inhale": scan},
            dataset=dataset_name(root, "nsclc-radiomics"),
            licence="CC BY-NC 3.0",
        )
    ]
