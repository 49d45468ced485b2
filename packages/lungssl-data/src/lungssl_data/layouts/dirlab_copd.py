"""DIR-Lab COPDgene: ten breath-hold pairs `copd{i}/copd{i}_{i,e}BHCT.img`, landmarks `copd{i}_300_{i,e}BH_xyz_r1.txt`.

Source: https://med.emory.edu/departments/radiation-oncology/research-laboratories/deformable-image-registration,
Castillo et al. 2013, doi:10.1088/0031-9155/58/9/2861; the table is `domain.md` C2, where copd9 has 0.664 mm (a public
loader has 0.644). int16 little endian, x fastest, HU + 1024, -2000 outside the field of view; 1-based voxels as points.

Slices run from head to feet by the convention of the public loaders, which all turn them over; nothing in the files
says so, and the two scans' tables stand differently, so landmarks can't tell. Exhale has a quarter of the dose: the
phase shows in the noise.
"""

from collections.abc import Mapping
from pathlib import Path

from lungssl_data.layouts.files import (
    check_distance,
    dataset_name,
    found,
    has_name,
    is_phantom,
    nothing_found,
    paired,
    phantom_formats,
    raw_to_mm,
    read_points,
)
from lungssl_data.layouts.source import PairSource, ScanSource, attempt
from lungssl_data.pair import CacheError, LandmarkKind, Landmarks, Phase
from lungssl_data.readers.raw import RawFormat

SIDE = 512
SLICE_MM = 2.5
CASES: dict[int, tuple[int, float]] = {
    1: (121, 0.625),
    2: (102, 0.645),
    3: (126, 0.652),
    4: (126, 0.590),
    5: (131, 0.647),
    6: (119, 0.633),
    7: (112, 0.625),
    8: (115, 0.586),
    9: (116, 0.664),
    10: (135, 0.742),
}
"""Slices, the same at both phases, and mm along x and y (C2)."""
DISTANCE_MM = (12.2, 31.0)
"""The patients' mean landmark distances run from 12.3 to 30.9 mm (C2)."""
OFFSET_HU = -1024
LETTERS: dict[str, Phase] = {"e": "exhale", "i": "inhale"}
IMAGE = r"copd0*(\d+)_([ie])bhct\.img"
POINTS = r"copd0*(\d+)_300_([ie])bh_xyz(?:_r\d)?\.txt"


def recognises(root: Path) -> bool:
    """Whether there is an image of a case."""
    return has_name(root, IMAGE)


def read(root: Path) -> list[PairSource]:
    """Patients by number; with a problem where an image or a phase's landmarks are missing or wrong."""
    images, points = found(root, IMAGE), found(root, POINTS)
    if not images:
        raise nothing_found(root, "copd1/copd1_eBHCT.img, copd1_iBHCT.img, ... of DIR-Lab COPDgene")
    formats = phantom_formats(root)
    sources = []
    for case in sorted({int(number) for number, _ in images}):
        patient = f"dirlab-copd-{case:02d}"
        sources += attempt(patient, _source, root, patient, case, images, points, formats.get(str(case)))
    return sources


def table_format(case: int) -> RawFormat:
    """What the collection's documentation says of a case's files; CacheError for another number."""
    if case not in CASES:
        raise CacheError(f"case {case}: DIR-Lab COPDgene has the cases {min(CASES)} to {max(CASES)}; is it a copy?")
    slices, across_mm = CASES[case]
    return RawFormat(shape=(slices, SIDE, SIDE), spacing_mm=(across_mm, across_mm, SLICE_MM), flip_z=True)


def _source(
    root: Path,
    patient: str,
    case: int,
    images: dict[tuple[str, ...], Path],
    points: dict[tuple[str, ...], Path],
    forms: Mapping[Phase, RawFormat] | None,
) -> list[PairSource]:
    forms = forms or {phase: table_format(case) for phase in LETTERS.values()}
    scans: dict[Phase, ScanSource] = {}
    in_mm = {}
    for letter, phase in LETTERS.items():
        image, text = images.get((str(case), letter)), points.get((str(case), letter))
        if image is None:
            raise CacheError(f"no {phase} image; expected copd{case}_{letter}BHCT.img")
        scans[phase] = ScanSource(
            image=image,
            raw=forms[phase],
            offset_hu=OFFSET_HU,
            evidence="file name; slices run to the feet by convention",
        )
        if text is not None:
            in_mm[phase] = raw_to_mm(read_points(text, f"{phase} landmarks"), forms[phase])
    if len(in_mm) == 1:
        raise CacheError(f"landmarks of {next(iter(in_mm))} only; copy the other file, too")
    landmarks: dict[LandmarkKind, Landmarks] = {}
    if in_mm:
        landmarks["expert"] = paired(in_mm["exhale"], in_mm["inhale"])
        if not is_phantom(root):
            check_distance(landmarks["expert"], *DISTANCE_MM)
    return [
        PairSource(
            patient=patient,
            scans=scans,
            landmarks=landmarks,
            dataset=dataset_name(root, "dirlab-copd"),
            licence="DIR-Lab's terms: research, cite",
            person=patient,
        )
    ]
