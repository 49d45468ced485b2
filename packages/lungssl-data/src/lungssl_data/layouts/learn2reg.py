"""Learn2Reg LungCT and NLST: `imagesTr|Ts/{Task}_{id:04d}_{0000,0001}.nii.gz`, masks, keypoints, landmarks.

Source: https://learn2reg.grand-challenge.org, the `{Task}_dataset.json` files; `domain.md` C4. LungCT has 30 pairs,
0000 (fixed) exhale and 0001 (moving) inhale; exhale lungs are partly outside the field of view. NLST's two scans are
years apart, both at inspiration: two patients of the cache, one person, no pair. Points are 0-based voxels (x, y, z) of
the NIfTI array, fractions allowed, CSV without header; `landmarks*/` are experts', `keypoints*/` a program's.
"""

from pathlib import Path

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

FRAMES: dict[str, Phase] = {"0000": "exhale", "0001": "inhale"}
"""`img_shift` of LungCT_dataset.json: fixed is exhale, moving inhale."""
IMAGE = r"images(?:tr|ts)/(lungct|nlst)_(\d{4})_(000[01])\.nii\.gz"
MASK = r"masks(?:tr|ts)/(lungct|nlst)_(\d{4})_(000[01])\.nii\.gz"
POINTS: dict[LandmarkKind, str] = {
    "expert": r"landmarks(?:tr|ts)?/(lungct|nlst)_(\d{4})_(000[01])\.csv",
    "automatic": r"keypoints(?:tr|ts)?/(lungct|nlst)_(\d{4})_(000[01])\.csv",
}
"""Lung250M-4B holds 32 of the same patients, which ones is not published (C6)."""


def recognises(root: Path) -> bool:
    """Whether there is an image of LungCT or NLST."""
    return has_name(root, IMAGE)


def lungct_person(number: int) -> str:
    """Who is scanned in LungCT's pair `number`, 1 to 30; Lung250M-4B has them, too."""
    return f"learn2reg-lungct-{number:04d}"


def read(root: Path) -> list[PairSource]:
    """LungCT's pairs by number, then NLST's scans; with a problem where a pair's second image is missing."""
    images, masks = found(root, IMAGE), found(root, MASK)
    if not images:
        raise nothing_found(root, "imagesTr/LungCT_0001_0000.nii.gz, LungCT_0001_0001.nii.gz, ... of Learn2Reg")
    points: dict[LandmarkKind, dict[tuple[str, ...], Path]] = {k: found(root, pattern) for k, pattern in POINTS.items()}
    sources = []
    for task, number in sorted({key[:2] for key in images}):
        patient = lungct_person(int(number)) if task == "lungct" else f"learn2reg-nlst-{number}"
        sources += attempt(patient, _pair, root, patient, task, number, images, masks, points)
    return sources


def _pair(
    root: Path,
    patient: str,
    task: str,
    number: str,
    images: dict[tuple[str, ...], Path],
    masks: dict[tuple[str, ...], Path],
    points: dict[LandmarkKind, dict[tuple[str, ...], Path]],
) -> list[PairSource]:
    scans: dict[Phase, ScanSource] = {}
    for frame, phase in FRAMES.items():
        key = (task, number, frame)
        if key not in images:
            raise CacheError(f"no image {frame}; a pair has 0000 and 0001, copy it again")
        scans[phase] = ScanSource(
            image=images[key], lung=masks.get(key), lung_codes="nonzero", evidence="documentation of the collection"
        )
    if task == "nlst":
        return _single(patient, scans, root)
    landmarks: dict[LandmarkKind, Landmarks] = {}
    for kind, files in points.items():
        pair: dict[Phase, Path | None] = {phase: files.get((task, number, frame)) for frame, phase in FRAMES.items()}
        if any(pair.values()):
            landmarks[kind] = _landmarks(kind, pair, scans)
    return [
        PairSource(
            patient=patient,
            scans=scans,
            landmarks=landmarks,
            dataset=dataset_name(root, "learn2reg-lungct"),
            licence="terms of the Learn2Reg challenge",
            person=patient,
        )
    ]


def _landmarks(kind: LandmarkKind, files: dict[Phase, Path | None], scans: dict[Phase, ScanSource]) -> Landmarks:
    in_mm = {}
    for phase, path in files.items():
        if path is None:
            raise CacheError(f"no {phase} points ({kind}), only the other phase's; copy both files")
        in_mm[phase] = index_to_mm(
            read_points(path, f"{phase} points ({kind})"), grid_of(scans[phase].image, f"{phase} image")
        )
    return paired(in_mm["exhale"], in_mm["inhale"])


def _single(patient: str, scans: dict[Phase, ScanSource], root: Path) -> list[PairSource]:
    """Two inspiratory scans as two patients of one person; their points need a pair, and are left out."""
    return [
        PairSource(
            patient=f"{patient}-{place}",
            scans={"inhale": scan},
            dataset=dataset_name(root, "learn2reg-nlst"),
            licence="NLST data: CC BY 4.0",
            person=f"nlst:{patient}",
            dual_phase=False,
        )
        for place, scan in enumerate(scans.values(), start=1)
    ]
