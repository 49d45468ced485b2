"""TCIA CT-vs-PET-Ventilation-Imaging: 20 breath-hold pairs in DICOM, `CT-PET-VI-XX/.../*.dcm`.

Source: https://doi.org/10.7937/3ppx-7s22; `domain.md` C7. The series descriptions say it: "Thorax Insp 2.0 B70f" and
"Thorax Exp 2.0 B70f"; some pairs move little, or differ in slices. Lung250M-4B has the same people, who is who is not
published (`splits.py` keeps both in one split).
"""

from collections.abc import Sequence
from pathlib import Path

from lungssl_data.layouts import dicom
from lungssl_data.layouts.files import dataset_name, has_name, nothing_found
from lungssl_data.layouts.source import PairSource, attempt
from lungssl_data.readers.dicom_tree import CtSeries

NAMES = r"ct-pet-vi-\d+/(?:[^/]+/)*[^/]+"


def recognises(root: Path) -> bool:
    """Whether there is a folder of one of its patients."""
    return has_name(root, NAMES)


def read(root: Path) -> list[PairSource]:
    """Pairs by the patients' keyed ids; patients without a breath-hold pair, which have other scans, are left out."""
    sources = []
    for patient, series in dicom.by_patient(dicom.listed(root)).items():
        named = [one for one in series if one.evidence == dicom.WORD]
        if {one.phase for one in named} == {"exhale", "inhale"}:
            sources += attempt(patient, _source, root, patient, named)
    if not sources:
        raise nothing_found(root, 'DICOM series described as "Thorax Insp ..." and "Thorax Exp ..." of one patient')
    return sources


def _source(root: Path, patient: str, series: Sequence[CtSeries]) -> list[PairSource]:
    dicom.check_person(series)
    return [
        PairSource(
            patient=patient,
            scans=dicom.chosen(series),
            dataset=dataset_name(root, "tcia-ventilation"),
            licence="CC BY 4.0",
            person=f"tcia-ventilation:{patient}",
        )
    ]
