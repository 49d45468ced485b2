"""One folder per patient: `root/<patient>/exhale.nii.gz`, `inhale.nii.gz`, masks `exhale_{lung,lobes,lesion,vessels}`.

Any volume format; a phase may also be a folder of DICOM slices. `exhale_to_inhale.nrrd` is a known displacement,
`landmarks.csv` (experts', or exact) and `keypoints.csv` (a program's) have the columns `exhale_x_mm`, ...,
`inhale_z_mm` in LPS mm. Names follow PHASE_ALIASES without regard to case. Volumes, folders and tables with other names
are left out, which the build says; folders that give no patient are told as such.
`lungssl phantom` writes this layout.
"""

import os
from pathlib import Path

from lungssl_data.layouts.files import dataset_name, read_landmarks
from lungssl_data.layouts.source import MASKS, PHASE_ALIASES, PairSource, ScanSource, attempt
from lungssl_data.pair import PATIENT_PATTERN, CacheError, LandmarkKind, Landmarks, Phase

SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr")
FIELD = "exhale_to_inhale"
PHANTOM_TRUTH = "phantom.json"
STEMS = {FIELD, *PHASE_ALIASES, *(f"{alias}_{mask}" for alias in PHASE_ALIASES for mask in MASKS)}
POINTS: dict[LandmarkKind, str] = {"expert": "landmarks.csv", "automatic": "keypoints.csv"}


def recognises(root: Path) -> bool:
    """Whether a sub-folder has a volume or a folder by the name of a phase."""
    if not root.is_dir():
        return False
    folders = [folder for folder in root.iterdir() if folder.is_dir()]
    return any(_stem(path) in PHASE_ALIASES for folder in folders for path in folder.iterdir())


def read(root: Path) -> list[PairSource]:
    """Patients in the order of their folders' names, with a problem where files are missing, too many or damaged.

    CacheError where there is no patient. Hidden folders are passed over.
    """
    if not root.is_dir():
        raise CacheError(f"{root}: no such folder; expected one sub-folder per patient with exhale.* and inhale.*")
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    sources = []
    for number, folder in enumerate(folders, start=1):
        place = f"folder {number} of {len(folders)} by name"
        # A folder that is no patient need not be named like one.
        patient = folder.name if _has_scan(folder) or PATIENT_PATTERN.fullmatch(folder.name) else f"folder-{number}"
        sources += attempt(patient, _patient, folder, place, place=place)
    if not any(_has_scan(folder) for folder in folders):
        raise CacheError(
            f"{root}: no sub-folder has an exhale or inhale volume; see the layouts in `lungssl list layouts`"
        )
    return sources


def _patient(folder: Path, place: str) -> list[PairSource]:
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        stem = _stem(path)
        if stem in STEMS and (path.is_dir() or path.name.lower().endswith(SUFFIXES)):
            if stem in files:
                raise CacheError(f"both {files[stem].name} and {path.name}; keep one of them")
            files[stem] = path
    scans: dict[Phase, ScanSource] = {}
    for alias, phase in PHASE_ALIASES.items():
        if alias in files:
            if phase in scans:
                raise CacheError(f"two {phase} volumes; keep one of them")
            scans[phase] = ScanSource(
                image=files[alias],
                lung=files.get(f"{alias}_lung"),
                lobes=files.get(f"{alias}_lobes"),
                lesion=files.get(f"{alias}_lesion"),
                vessels=files.get(f"{alias}_vessels"),
                evidence="file name",
            )
    if not scans:
        raise CacheError(
            f"no exhale and no inhale volume in it ({sum(1 for _ in folder.iterdir())} files); name them as "
            f"`lungssl list layouts` says, or move the folder out of the cohort"
        )
    landmarks: dict[LandmarkKind, Landmarks] = {}
    if len(scans) == 2:
        there: dict[LandmarkKind, str] = {kind: name for kind, name in POINTS.items() if os.path.lexists(folder / name)}
        landmarks = {kind: read_landmarks(folder / name, name) for kind, name in there.items()}
    return [
        PairSource(
            patient=folder.name,
            scans=scans,
            displacement=files.get(FIELD),
            landmarks=landmarks,
            dataset=dataset_name(folder.parent, ""),
            notes=_left_out(folder, set(files.values()), paired=len(scans) == 2),
            place=place,
        )
    ]


def _has_scan(folder: Path) -> bool:
    return any(_stem(path) in PHASE_ALIASES for path in folder.iterdir())


def _left_out(folder: Path, used: set[Path], *, paired: bool) -> tuple[str, ...]:
    """What the layout doesn't read of a patient's volumes, folders and tables, without their names."""
    points = set(POINTS.values())
    if (folder / PHANTOM_TRUTH).exists():
        return ()  # its other label maps are known: a phantom's truth, for tests
    rest = [path for path in folder.iterdir() if path not in used and not path.name.startswith(".")]
    unknown = [p for p in rest if p.name not in points and (p.is_dir() or p.name.lower().endswith((*SUFFIXES, ".csv")))]
    notes = []
    if unknown:
        masks = " or ".join(f"_{mask}" for mask in MASKS)
        notes.append(
            f"{len(unknown)} of its volumes, folders or tables were left out, their names are not the layout's: "
            f"exhale, inhale, each with {masks}, {FIELD}, {', '.join(sorted(points))}"
        )
    if not paired and any(path.name in points for path in rest):
        notes.append("its landmarks were left out, as they need both phases")
    return tuple(notes)


def _stem(path: Path) -> str:
    name = path.name.lower()
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)
