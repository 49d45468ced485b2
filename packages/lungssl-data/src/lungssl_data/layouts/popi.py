"""POPI: the original POPI-model (10 phases of one patient), and the six patients of Vandemeulebroucke et al. 2011.

Source: https://github.com/open-vv/popi-model, doi:10.1118/1.3523619; `domain.md` C3.

- Original: `{00..90}-P.mhd`, 10 end inhale, 60 end exhale; `{p}-Landmarks.pts` in mm from the first voxel, 41 points of
  which the last is an artefact; `{p}-air-lungs-body.mhd` with air 1, lungs 0, body 2. The fields `VF1X.vf` map inhale
  to the other phases, the direction that the cache doesn't hold, so they are not read.
- Six patients `bl ng dx gt mm2 bh`, each with `mhd/`, `dcm/` and `pts/`; inhale 00, exhale 50. `bl`, of the original's
  hospital and grid, has exhale 60: taken to be the original's person, with inhale 10 where that is there. Points are in
  the coordinates of the MHD files; for DICOM they are shifted along y.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lungssl_data.layouts.files import (
    check_distance,
    dataset_name,
    found,
    grid_of,
    has_name,
    index_to_mm,
    is_phantom,
    names_under,
    nothing_found,
    paired,
    read_points,
)
from lungssl_data.layouts.source import PairSource, ScanSource, attempt
from lungssl_data.pair import CacheError, LandmarkKind, Landmarks, Phase

ORIGINAL: dict[str, Phase] = {"60": "exhale", "10": "inhale"}
ORIGINAL_POINTS = 41
"""Of which the last is an image artefact."""
DISTANCE_MM = (6.0, 6.2)
"""Mean landmark distance from 10 to 60: 6.1 (popi-model.md of the source, row VF16)."""
DICOM_SHIFT_MM = {
    "bl": 85.9375,
    "ng": 54.6875,
    "dx": 54.4921875,
    "gt": 55.46875,
    "mm2": 55.078125,
    "bh": 55.078125,
}
"""Added to y of a point for the DICOM files (dir_validation_data.md of the source)."""
EXHALE = {"bl": "60"}
"""Reference phase; 50 for the others."""
INHALE = {"bl": ("10", "00")}
"""The first that is there; 00 for the others."""
IMAGE = r"(\d0)-p\.mhd"
MASK = r"(\d0)-air-lungs-body\.mhd"
POINTS = r"(\d0)-landmarks\.pts"
SIX = rf"({'|'.join(DICOM_SHIFT_MM)})"
SIX_IMAGE = rf"{SIX}/mhd/(?:[^/]+/)*?(\d0)[^/\d]*\.mhd"
SIX_POINTS = rf"{SIX}/pts/(?:[^/]+/)*?(\d0)[^/\d]*\.pts"
SIX_DICOM = rf"{SIX}/dcm/(?:[^/]+/)*?(\d0)(?:[^/\d][^/]*)?(?:/[^/]+)?"
LICENCE = "free for research, cite the institution and the article"
PERSON = "popi-bl"


def recognises(root: Path) -> bool:
    """Whether there is an image of the original, or one of the six patients' points."""
    return has_name(root, IMAGE) or has_name(root, SIX_POINTS)


def read(root: Path) -> list[PairSource]:
    """The original, then the six patients as far as they are there; with a problem where files are missing or wrong."""
    sources = [*attempt("popi-original", _original, root), *_six(root)]
    if not sources:
        raise nothing_found(root, "10-P.mhd and 60-P.mhd of the POPI-model, or bl/mhd/10.mhd and bl/pts/10.pts")
    return sources


def _original(root: Path) -> list[PairSource]:
    images, masks, points = (found(root, pattern) for pattern in (IMAGE, MASK, POINTS))
    if not images:
        return []
    scans: dict[Phase, ScanSource] = {}
    in_mm = {}
    for percent, phase in ORIGINAL.items():
        image = images.get((percent,))
        if image is None:
            raise CacheError(f"no {phase} image; expected {percent}-P.mhd")
        scans[phase] = ScanSource(
            image=image, lung=masks.get((percent,)), lung_codes="popi", evidence="reference phase in the documentation"
        )
        if (percent,) in points:
            from_first = read_points(points[percent,], f"{phase} landmarks")
            if len(from_first) == ORIGINAL_POINTS:
                from_first = from_first[:-1]
            grid = grid_of(image, f"{phase} image")
            in_mm[phase] = index_to_mm(from_first / np.asarray(grid.spacing_mm), grid)
    landmarks = _landmarks(in_mm)
    if landmarks and not is_phantom(root):
        check_distance(landmarks["expert"], *DISTANCE_MM)
    return [
        PairSource(
            patient="popi-original",
            scans=scans,
            landmarks=landmarks,
            dataset=dataset_name(root, "popi"),
            licence=LICENCE,
            person=PERSON,
        )
    ]


def _six(root: Path) -> list[PairSource]:
    images, points, series = found(root, SIX_IMAGE), found(root, SIX_POINTS), _dicom(root)
    there = {name for name, _ in (*images, *series)}
    named = [name for name in DICOM_SHIFT_MM if name in there]
    return [one for name in named for one in attempt(f"popi-{name}", _one_of_six, root, name, images, points, series)]


def _one_of_six(
    root: Path,
    name: str,
    images: dict[tuple[str, ...], Path],
    points: dict[tuple[str, ...], Path],
    series: dict[tuple[str, str], tuple[Path, ...]],
) -> list[PairSource]:
    there = {phase for own, phase in (*images, *series) if own == name}
    inhale = next((phase for phase in INHALE.get(name, ("00",)) if phase in there), None)
    exhale = EXHALE.get(name, "50")
    if inhale is None or exhale not in there:
        raise CacheError(f"phases {', '.join(sorted(there))} only; {exhale} and 00 are needed, copy them")
    scans: dict[Phase, ScanSource] = {}
    in_mm = {}
    percents: dict[Phase, str] = {"exhale": exhale, "inhale": inhale}
    for phase, percent in percents.items():
        image, slices = images.get((name, percent)), series.get((name, percent), ())
        evidence = "reference phase in the documentation" if phase == "exhale" else "file name"
        if image is not None:
            scans[phase] = ScanSource(image=image, evidence=evidence)
        else:
            scans[phase] = ScanSource(image=slices[0].parent, slices=slices, evidence=evidence)
        if (name, percent) in points:
            moved = [0.0, 0.0 if image is not None else DICOM_SHIFT_MM[name], 0.0]
            in_mm[phase] = read_points(points[name, percent], f"{phase} landmarks") + moved
    patient = f"popi-{name}"
    return [
        PairSource(
            patient=patient,
            scans=scans,
            landmarks=_landmarks(in_mm),
            dataset=dataset_name(root, "popi"),
            licence=LICENCE,
            person=patient,
        )
    ]


def _landmarks(in_mm: Mapping[Phase, np.ndarray]) -> dict[LandmarkKind, Landmarks]:
    if len(in_mm) == 1:
        raise CacheError(f"landmarks of {next(iter(in_mm))} only; copy the other file, too")
    return {"expert": paired(in_mm["exhale"], in_mm["inhale"])} if in_mm else {}


def _dicom(root: Path) -> dict[tuple[str, str], tuple[Path, ...]]:
    """Files of a phase by patient and phase: of a folder `dcm/50*`, or `dcm/50-*.dcm`."""
    pattern = re.compile(rf"(?:^|/){SIX_DICOM}$", re.IGNORECASE)
    series: dict[tuple[str, str], tuple[Path, ...]] = {}
    for name in names_under(root):
        match = pattern.search(name)
        if match:
            key = (match[1].lower(), match[2])
            series[key] = (*series.get(key, ()), root / name)
    return series
