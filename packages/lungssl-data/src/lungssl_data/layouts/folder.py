"""One folder per patient: `root/<patient>/exhale.nii.gz`, `inhale.nii.gz`, masks `exhale_lung...`, `exhale_lobes...`.

Any volume format; a phase may also be a folder of DICOM slices. `exhale_to_inhale.nrrd` is a known displacement.
Names follow PHASE_ALIASES without regard to case. `lungssl phantom` writes this layout.
"""

from pathlib import Path

from lungssl_data.layouts.source import PHASE_ALIASES, PairSource, ScanSource
from lungssl_data.pair import CacheError, Phase

SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")


def read(root: Path) -> list[PairSource]:
    """Patients in the order of their names; CacheError where there is none."""
    if not root.is_dir():
        raise CacheError(f"{root}: no such folder; expected one sub-folder per patient with exhale.* and inhale.*")
    sources = [source for folder in sorted(root.iterdir()) if folder.is_dir() and (source := _patient(folder))]
    if not sources:
        raise CacheError(
            f"{root}: no sub-folder has an exhale or inhale volume; see the layouts in `lungssl list layouts`"
        )
    return sources


def _patient(folder: Path) -> PairSource | None:
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.name.lower().endswith(SUFFIXES):
            stem = _stem(path)
            if stem in files:
                raise CacheError(f"patient {folder.name}: both {files[stem].name} and {path.name}; keep one of them")
            files[stem] = path
    scans: dict[Phase, ScanSource] = {}
    for alias, phase in PHASE_ALIASES.items():
        if alias in files:
            if phase in scans:
                raise CacheError(f"patient {folder.name}: two {phase} volumes; keep one of them")
            scans[phase] = ScanSource(
                image=files[alias], lung=files.get(f"{alias}_lung"), lobes=files.get(f"{alias}_lobes")
            )
    if not scans:
        return None
    return PairSource(patient=folder.name, scans=scans, displacement=files.get("exhale_to_inhale"))


def _stem(path: Path) -> str:
    name = path.name.lower()
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)
