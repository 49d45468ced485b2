"""Where one patient's scans lie, before anything is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lungssl_data.pair import CacheError, LandmarkKind, Landmarks, Phase, Split, check_patient_id
from lungssl_data.readers import files_of, raw, read_slices, read_volume
from lungssl_data.readers.checks import Stored, hounsfield
from lungssl_data.readers.raw import RawFormat
from lungssl_data.volume import Volume

PHASE_ALIASES: dict[str, Phase] = {
    "exhale": "exhale",
    "ee": "exhale",
    "exp": "exhale",
    "t50": "exhale",
    "inhale": "inhale",
    "ei": "inhale",
    "insp": "inhale",
    "t00": "inhale",
}
"""Spellings that are read; only `exhale` and `inhale` are written (`architecture.md`)."""

LOBE_CODES: dict[str, dict[int, int]] = {
    "lungssl": {1: 1, 2: 2, 3: 3, 4: 4, 5: 5},
    "totalsegmentator": {12: 1, 13: 2, 14: 3, 10: 4, 11: 5},
    "ltrc": {3: 1, 4: 2, 5: 3, 1: 4, 2: 5},
    "lola11": {20: 1, 21: 2, 22: 3, 10: 4, 11: 5},
}
"""Other people's lobe labels to 1 RUL, 2 RML, 3 RLL, 4 LUL, 5 LLL (`domain.md` C10; TotalSegmentator's class table)."""


LUNG_CODES: dict[str, dict[int, int]] = {
    "lungssl": {1: 1, 2: 2},
    "both": {1: 3},
    "lungmask": {1: 1, 2: 2},
    "totalsegmentator": {10: 2, 11: 2, 12: 1, 13: 1, 14: 1},
    "luna16": {3: 2, 4: 1},
    "covid-19-ct-seg": {1: 2, 2: 1},
    "popi": {0: 3},
    "nonzero": dict.fromkeys(range(1, 256), 3),
}
"""Other people's lung labels to 1 right, 2 left, 3 lung whose side is to be found (`domain.md` C3, C8, C9, C10)."""

LESION_CODES: dict[str, dict[int, int]] = {
    "lungssl": {1: 1, 2: 2, 3: 3},
    "any": {1: 3},
    "medseg": {1: 1, 2: 2},
    "covid-19-ct-seg": {3: 3},
}
"""Other people's lesion labels to 1 ground glass, 2 consolidation, 3 lesion of unnamed type (`domain.md` C9)."""


@dataclass(frozen=True, kw_only=True)
class ScanSource:
    """Files of one phase."""

    image: Path
    """A volume file or a DICOM folder."""
    slices: tuple[Path, ...] = ()
    """For one DICOM series of several in a folder: its files, ascending along the normal; `image` is the folder."""
    raw: RawFormat | None = None
    """For files without a header: what their layout's documentation says they hold."""
    offset_hu: int = 0
    """Added to stored values to give HU."""
    lung: Path | None = None
    lung_codes: str = "lungssl"
    """A key of LUNG_CODES."""
    lobes: Path | None = None
    lobe_codes: str = "lungssl"
    """A key of LOBE_CODES."""
    lesion: Path | None = None
    lesion_codes: str = "lungssl"
    """A key of LESION_CODES."""
    evidence: str = ""
    """What the phase was read from, e.g. `file name` or `nominal percentage`; never a header's text."""

    def files(self) -> dict[str, list[Path]]:
        """All files of each role, those included that a header points at."""
        roles = {"lung": self.lung, "lobes": self.lobes, "lesion": self.lesion}
        files = {role: files_of(path) for role, path in roles.items() if path is not None}
        if self.slices:
            return {"image": list(self.slices)} | files
        return {"image": [self.image] if self.raw else files_of(self.image)} | files


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """Files of one patient."""

    patient: str
    scans: dict[Phase, ScanSource] = field(default_factory=dict)
    displacement: Path | None = None
    """Exhale-to-inhale vector field (.nrrd or .mha), LPS mm, on a grid in exhale space."""
    landmarks: Mapping[LandmarkKind, Landmarks] = field(default_factory=dict)
    dataset: str = ""
    """Collection it is from, e.g. `dirlab-copd`."""
    licence: str = ""
    """Under which the collection is given out, in a few words."""
    person: str = ""
    """Who was scanned, where two collections hold the same people: equal for equal people, and in the form that
    `splits.py` describes where the mapping from one to the other is not published. Empty: the patient."""
    dual_phase: bool = True
    """False where the collection's two scans are not exhale and inhale (NLST: two inspiratory scans)."""
    split: Split | None = None
    """None: decided when the cache is built."""

    def __post_init__(self) -> None:
        check_patient_id(self.patient)
        if not self.scans:
            raise CacheError(f"patient {self.patient}: no exhale and no inhale image; at least one is needed")


def parse_phase(text: str) -> Phase:
    """A phase from any spelling in PHASE_ALIASES."""
    phase = PHASE_ALIASES.get(text.strip().lower())
    if phase is None:
        raise CacheError(
            f"phase {text!r} is unknown; write exhale or inhale (read as well: {', '.join(PHASE_ALIASES)})"
        )
    return phase


def read_image(scan: ScanSource) -> Volume:
    """The scan in Hounsfield units, whatever its files are; VolumeError as the readers raise it."""
    if scan.raw is not None:
        stored, geometry = raw.read(scan.image, scan.raw)
        shifted = replace(stored, intercept=stored.intercept + scan.offset_hu)
        return Volume(hu=hounsfield(shifted, scan.image.name), geometry=geometry)
    volume = read_slices(scan.slices) if scan.slices else read_volume(scan.image)
    if scan.offset_hu == 0:
        return volume
    return replace(volume, hu=hounsfield(Stored(values=volume.hu, intercept=float(scan.offset_hu)), scan.image.name))
