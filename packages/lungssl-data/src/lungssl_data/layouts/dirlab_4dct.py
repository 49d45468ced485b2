"""DIR-Lab 4DCT: ten patients, `Case{i}Pack/Images/case{i}_T{00..90}_s.img` and 300 landmarks of T00 and T50.

Source: https://med.emory.edu/departments/radiation-oncology/research-laboratories/deformable-image-registration,
Castillo et al. 2009, doi:10.1088/0031-9155/54/7/001; the table is `domain.md` C1. Names vary: `-ssm` or nothing for
`_s`, `case{i}_dirLab300_` for `Case{i}_300_`, `Case8Deploy`. T00 is end inhale, T50 end exhale. Files are int16 little
endian, x fastest, HU + 1024; points are 1-based voxels. Where a case lacks the 300, the 75 of `Sampled4D` serve.

Slices run from head to feet by the convention of the public loaders that turn them over. Where there are landmarks
they decide: both phases are on one table, and tissue sinks when it is breathed in.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from jaxtyping import Float64
from numpy import ndarray

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

CASES: dict[int, tuple[int, int, float, float]] = {
    1: (256, 94, 0.97, 3.89),
    2: (256, 112, 1.16, 4.34),
    3: (256, 104, 1.15, 6.94),
    4: (256, 99, 1.13, 9.83),
    5: (256, 106, 1.10, 7.48),
    6: (512, 128, 0.97, 10.89),
    7: (512, 136, 0.97, 11.03),
    8: (512, 128, 0.97, 14.99),
    9: (512, 128, 0.97, 7.92),
    10: (512, 120, 0.97, 7.30),
}
"""Voxels along x and y, slices, mm along x and y, mean landmark distance between T00 and T50 in mm (C1)."""
SLICE_MM = 2.5
OFFSET_HU = -1024
PHASES: dict[str, Phase] = {"00": "inhale", "50": "exhale"}
TOLERANCE_MM = 0.05
"""Of the mean landmark distance to the table's, which tests the whole chain of coordinates (C1)."""
LEAST_MM = 0.5
"""Mean motion of the landmarks along z that tells up from down; the ten patients' is 2 to 13 mm."""
BY_CONVENTION = "file name; slices run to the feet by convention"
IMAGE = r"case0*(\d+)_t(00|50)(?:_s|-ssm)?\.img"
POINTS = r"case0*(\d+)_(?:dirlab)?300_t(00|50)_xyz(?:_r\d)?\.txt"
SAMPLED = r"case0*(\d+)_4d-75_t(00|50)\.txt"


def recognises(root: Path) -> bool:
    """Whether there is an image of a case."""
    return has_name(root, IMAGE)


def read(root: Path) -> list[PairSource]:
    """Patients by number; with a problem where an image or a phase's landmarks are missing or wrong."""
    images, points, sampled = (found(root, pattern) for pattern in (IMAGE, POINTS, SAMPLED))
    if not images:
        raise nothing_found(root, "Case1Pack/Images/case1_T00_s.img, case1_T50_s.img, ... of DIR-Lab 4DCT")
    formats = phantom_formats(root)
    sources = []
    for case in sorted({int(number) for number, _ in images}):
        own: dict[Phase, Path | None] = {phase: images.get((str(case), percent)) for percent, phase in PHASES.items()}
        texts: dict[Phase, Path | None] = {phase: points.get((str(case), percent)) for percent, phase in PHASES.items()}
        all_300 = any(texts.values())
        if not all_300:
            texts = {phase: sampled.get((str(case), percent)) for percent, phase in PHASES.items()}
        patient, check = f"dirlab-4dct-{case:02d}", all_300 and not is_phantom(root)
        sources += attempt(patient, _source, root, patient, case, own, texts, formats.get(str(case)), check)
    return sources


def table_format(case: int) -> RawFormat:
    """What the collection's documentation says of a case's files; CacheError for another number."""
    if case not in CASES:
        raise CacheError(f"case {case}: DIR-Lab 4DCT has the cases {min(CASES)} to {max(CASES)}; is it a copy?")
    side, slices, across_mm, _ = CASES[case]
    return RawFormat(shape=(slices, side, side), spacing_mm=(across_mm, across_mm, SLICE_MM), flip_z=True)


def with_slice_order(
    forms: dict[Phase, RawFormat], points: dict[Phase, Float64[ndarray, "_n 3"]]
) -> tuple[dict[Phase, RawFormat], str]:
    """The formats, turned over where that makes the landmarks (1-based voxels) sink at inhale; and what decided."""
    rise_mm = {phase: float(raw_to_mm(points[phase], form)[:, 2].mean()) for phase, form in forms.items()}
    rise = rise_mm["inhale"] - rise_mm["exhale"]
    if abs(rise) < LEAST_MM:
        return forms, BY_CONVENTION
    turned: dict[Phase, RawFormat] = {
        phase: replace(form, flip_z=form.flip_z != (rise > 0)) for phase, form in forms.items()
    }
    return turned, f"file name; slices run {'to the feet' if turned['exhale'].flip_z else 'to the head'} by landmarks"


def _source(
    root: Path,
    patient: str,
    case: int,
    images: dict[Phase, Path | None],
    texts: dict[Phase, Path | None],
    given: Mapping[Phase, RawFormat] | None,
    check: bool,
) -> list[PairSource]:
    forms: dict[Phase, RawFormat] = dict(given) if given else {phase: table_format(case) for phase in images}
    evidence = BY_CONVENTION
    landmarks: dict[LandmarkKind, Landmarks] = {}
    if any(texts.values()):
        points = {}
        for phase, path in texts.items():
            if path is None:
                raise CacheError(f"no {phase} landmarks, only the other phase's; copy both files")
            points[phase] = read_points(path, f"{phase} landmarks")
        paired(points["exhale"], points["inhale"])
        forms, evidence = with_slice_order(forms, points)
        in_mm = {phase: raw_to_mm(points[phase], form) for phase, form in forms.items()}
        landmarks = {"expert": paired(in_mm["exhale"], in_mm["inhale"])}
        if check:
            middle = CASES[case][3]
            check_distance(landmarks["expert"], middle - TOLERANCE_MM, middle + TOLERANCE_MM)
    scans: dict[Phase, ScanSource] = {}
    for phase, path in images.items():
        if path is None:
            percent = next(percent for percent, which in PHASES.items() if which == phase)
            raise CacheError(f"no {phase} image; expected case{case}_T{percent}_s.img")
        scans[phase] = ScanSource(image=path, raw=forms[phase], offset_hu=OFFSET_HU, evidence=evidence)
    return [
        PairSource(
            patient=patient,
            scans=scans,
            landmarks=landmarks,
            dataset=dataset_name(root, "dirlab-4dct"),
            licence="DIR-Lab's terms: research, cite",
        )
    ]
