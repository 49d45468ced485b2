"""TCIA 4D-Lung: 20 patients, several 4D-CTs each, a DICOM series per phase, `{patient}_HM10395/<study>/<series>/`.

Source: https://doi.org/10.7937/K9/TCIA.2016.ELN8YGLE; `domain.md` C7. The phase is the percentage of the series
description: 0 % is end inhale and 50 % about end exhale by convention only, which the build's check of gas confirms.
Each study with both is a pair. Lung250M-4B's "TCIA-NSCLC" pairs are of 20 patients and can only be these; who is who is
not published (`splits.py` keeps both in one split).
"""

from collections.abc import Sequence
from pathlib import Path

from lungssl_data.layouts import dicom
from lungssl_data.layouts.files import dataset_name, has_name, nothing_found
from lungssl_data.layouts.source import PairSource, attempt
from lungssl_data.readers.dicom_tree import CtSeries

NAMES = r"\d{3}_hm\d+/(?:[^/]+/)*[^/]+"


def recognises(root: Path) -> bool:
    """Whether there is a folder of one of its patients."""
    return has_name(root, NAMES)


def read(root: Path) -> list[PairSource]:
    """A pair for each study with 0 % and 50 %, `<keyed id>-1`, `-2`, ... in the order of the studies' keyed ids."""
    sources = []
    for patient, series in dicom.by_patient(dicom.listed(root)).items():
        place = 0
        for study in sorted({one.study for one in series}):
            extremes = [one for one in series if one.study == study and one.phase is not None]
            if {one.phase for one in extremes} == {"exhale", "inhale"}:
                place += 1
                sources += attempt(f"{patient}-{place}", _source, root, patient, place, extremes)
    if not sources:
        raise nothing_found(root, "DICOM series of one study described with 0.0% and 50.0%")
    return sources


def _source(root: Path, patient: str, place: int, series: Sequence[CtSeries]) -> list[PairSource]:
    dicom.check_person(series)
    return [
        PairSource(
            patient=f"{patient}-{place}",
            scans=dicom.chosen(series),
            dataset=dataset_name(root, "tcia-4dlung"),
            licence="CC BY 3.0",
            person=f"tcia-4dlung:{patient}",
        )
    ]
