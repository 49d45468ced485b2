"""Lung250M-4B: 124 pairs of seven collections, `imagesTr|Ts/case_{000..123}_{1,2}.nii.gz`, `masks*/`, `corrfieldTr/`.

Source: https://github.com/multimodallearning/Lung250M-4B, README and data_curation; `domain.md` C6. 1 is inspiration, 2
expiration. `corrfieldTr/case_XXX.csv` has a program's points, six columns: inspiration x, y, z and expiration x, y, z
as 0-based voxels of the NIfTI arrays. Its COPDgene cases were made as stored - 1000 (process_copd.py), where DIR-Lab
stores HU + 1024: they read 24 HU too high, which is taken back here.

The same people are in other layouts. Their `person` is the same there, so that no split parts them; where nobody says
who is who, it says of which collection they are (`splits.py`).
"""

from pathlib import Path

from lungssl_data.layouts import learn2reg
from lungssl_data.layouts.files import (
    dataset_name,
    found,
    grid_of,
    has_name,
    index_to_mm,
    nothing_found,
    paired,
    read_points,
)
from lungssl_data.layouts.source import PairSource, ScanSource, attempt
from lungssl_data.pair import CacheError, LandmarkKind, Landmarks, Phase

FRAMES: dict[str, Phase] = {"1": "inhale", "2": "exhale"}
IMAGE = r"images(?:tr|ts)/(?:case_)?(\d{3})_([12])\.nii\.gz"
MASK = r"masks(?:tr|ts)/(?:case_)?(\d{3})_([12])\.nii\.gz"
POINTS = r"corrfield(?:tr|ts)?/(?:case_)?(\d{3})\.csv"
LAST_CASE = 123
COPD_CASES = range(104, 114)
COPD_OFFSET_HU = -24
EMPIRE_SCANS = (1, 7, 8, 13, 14, 16, 17, 18, 20, 21, 23, 28)
"""EMPIRE10's scan number of the cases 0, 1, ... (`idx_select` of data_curation/process_empire.py)."""
NLST_CASES = (*range(12, 34), *range(114, 124))


def recognises(root: Path) -> bool:
    """Whether there is an image of a case."""
    return has_name(root, IMAGE)


def person(case: int) -> str:
    """Who is scanned in a case, as the collection it was taken from names them."""
    if case < len(EMPIRE_SCANS):
        return f"empire10-{EMPIRE_SCANS[case]:02d}"
    if case in NLST_CASES:
        return f"nlst:?lung250m/{case:03d}"
    if case < 54:  # 34-53 "TCIA-NSCLC": pairs of 20 patients, as many as 4D-Lung has; who is who is not published
        return f"tcia-4dlung:?lung250m/{case:03d}"
    if case < 84:
        return learn2reg.lungct_person(case - 53)
    if case < 104:
        return f"tcia-ventilation:?lung250m/{case:03d}"
    return f"dirlab-copd-{case - 103:02d}"


def read(root: Path) -> list[PairSource]:
    """Pairs by number, NLST's (two inspirations, years apart) as two patients; CacheError for an unknown number.

    A pair without its second image has that problem.
    """
    images, masks, points = found(root, IMAGE), found(root, MASK), found(root, POINTS)
    if not images:
        raise nothing_found(root, "imagesTr/case_001_1.nii.gz, case_001_2.nii.gz, ... of Lung250M-4B")
    sources = []
    for number in sorted({number for number, _ in images}):
        if int(number) > LAST_CASE:
            raise CacheError(f"case_{number}: Lung250M-4B has the cases 0 to {LAST_CASE}; is it another collection?")
        sources += attempt(f"lung250m-{number}", _pair, root, number, images, masks, points.get((number,)))
    return sources


def _pair(
    root: Path,
    number: str,
    images: dict[tuple[str, ...], Path],
    masks: dict[tuple[str, ...], Path],
    table: Path | None,
) -> list[PairSource]:
    case = int(number)
    scans: dict[Phase, ScanSource] = {}
    for frame, phase in FRAMES.items():
        if (number, frame) not in images:
            raise CacheError(f"no image {frame}; a pair has 1 and 2, copy it again")
        scans[phase] = ScanSource(
            image=images[number, frame],
            offset_hu=COPD_OFFSET_HU if case in COPD_CASES else 0,
            lung=masks.get((number, frame)),
            lung_codes="nonzero",
            evidence="documentation of the collection",
        )
    name, dual = f"lung250m-{number}", case not in NLST_CASES
    landmarks: dict[LandmarkKind, Landmarks] = {}
    if table is not None and dual:
        both = read_points(table, "points", columns=6)
        inhale = index_to_mm(both[:, :3], grid_of(scans["inhale"].image, "inhale image"))
        exhale = index_to_mm(both[:, 3:], grid_of(scans["exhale"].image, "exhale image"))
        landmarks["automatic"] = paired(exhale, inhale)
    parts: list[tuple[str, dict[Phase, ScanSource]]] = [(name, scans)]
    if not dual:
        parts = [(f"{name}-{frame}", {"inhale": scans[phase]}) for frame, phase in FRAMES.items()]
    return [
        PairSource(
            patient=patient,
            scans=part,
            landmarks=landmarks,
            dataset=dataset_name(root, "lung250m"),
            licence="terms of the collection each case is from",
            person=person(case),
            dual_phase=dual,
        )
        for patient, part in parts
    ]
