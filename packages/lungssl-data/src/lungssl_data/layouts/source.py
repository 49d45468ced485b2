"""Where one patient's scans lie, before anything is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lungssl_data.pair import CacheError, LandmarkKind, Landmarks, Phase, Split
from lungssl_data.readers import VolumeError, files_of, raw, read_slices, read_volume
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

VESSEL_CODES: dict[str, dict[int, int]] = {
    "lungssl": {1: 1, 2: 2, 3: 3, 4: 4},
    "airways": {1: 1},
    "vessels": {1: 4},
}
"""Other people's labels of airways and vessels to 1 airway, 2 artery, 3 vein, 4 vessel of unnamed kind."""


class NamedError(CacheError):
    """An error that has to name files, as `problem` can't: that is for reports and holds no name."""

    def __init__(self, problem: str, *, names: str) -> None:
        super().__init__(f"{names} {problem}")
        self.problem = problem


MASKS = ("lung", "lobes", "lesion", "vessels")
"""Roles of label maps, fields of `ScanSource`."""


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
    vessels: Path | None = None
    vessel_codes: str = "lungssl"
    """A key of VESSEL_CODES."""
    evidence: str = ""
    """What the phase was read from, e.g. `file name` or `nominal percentage`; never a header's text."""

    def files(self) -> dict[str, list[Path]]:
        """All files of each role, those included that a header points at."""
        roles = {role: getattr(self, role) for role in MASKS}
        files = {role: files_of(path) for role, path in roles.items() if path is not None}
        if self.slices:
            return {"image": list(self.slices)} | files
        return {"image": [self.image] if self.raw else files_of(self.image)} | files


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """Files of one patient; or a patient who can't be used, with the `problem` and no scans."""

    patient: str
    """Any text until `read_layout` has keyed and checked it, then the name of the file in the cache."""
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
    problem: str = ""
    """Why the patient can't be used, and what to do; without any name."""
    notes: tuple[str, ...] = ()
    """What the layout left out or took for granted, for the build's report: sentences without any name."""
    place: str = ""
    """Where the patient is in the layout, by number, e.g. `line 3`: for those whose id may not be said."""

    def __post_init__(self) -> None:
        if self.problem and self.scans:
            raise ValueError("a patient with a problem and with scans; give one of the two")
        if not self.problem and not self.scans:
            raise CacheError("a patient with no exhale and no inhale image; at least one is needed")

    def check_paths(self) -> None:
        """CacheError, with the role, for a path that is neither file nor folder: who opens a pipe waits for ever."""
        for phase, scan in self.scans.items():
            for role in ("image", *MASKS):
                check_path(getattr(scan, role), f"{phase} {role}")
        check_path(self.displacement, "displacement")


def check_path(path: Path | None, role: str) -> None:
    """CacheError, with the role, unless the path is None, a file or a folder."""
    if path is None or path.is_file() or path.is_dir():
        return
    if path.exists():
        raise CacheError(f"{role}: is neither a file nor a folder; put the scan's file or folder in its place")
    raise CacheError(f"{role}: no such file or folder; correct the path, or copy it again")


def attempt(patient: str, read: Callable[..., list[PairSource]], *arguments: Any, place: str = "") -> list[PairSource]:
    """What `read` makes of a patient's files; where they can't be used, the patient with the problem."""
    try:
        return read(*arguments)
    except (CacheError, VolumeError, OSError) as error:
        return [PairSource(patient=patient, problem=nameless(error), place=place)]


def nameless(error: Exception) -> str:
    """An error of a layout in words that name no file and no patient.

    CacheErrors of layouts name none but what the user typed; those that must are NamedErrors.
    """
    if isinstance(error, OSError):
        why = error.strerror or type(error).__name__
        return f"a file or folder can't be read ({why}); look at its path and permissions"
    if isinstance(error, (CacheError, VolumeError)):
        return getattr(error, "problem", str(error))
    return f"unexpected {type(error).__name__}; a file is damaged, or this is a bug"


def parse_phase(text: str) -> Phase:
    """A phase from any spelling in PHASE_ALIASES; CacheError, which doesn't repeat the text, for another."""
    phase = PHASE_ALIASES.get(text.strip().lower())
    if phase is None:
        raise CacheError(f"the phase is unknown; write exhale or inhale (read as well: {', '.join(PHASE_ALIASES)})")
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
