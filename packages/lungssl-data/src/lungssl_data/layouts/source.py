"""Where one patient's scans lie, before anything is read."""

from dataclasses import dataclass, field
from pathlib import Path

from lungssl_data.pair import CacheError, Phase, Split, check_patient_id
from lungssl_data.readers import files_of

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


@dataclass(frozen=True, kw_only=True)
class ScanSource:
    """Files of one phase."""

    image: Path
    """A volume file or a DICOM folder."""
    lung: Path | None = None
    """Labels 1 right, 2 left."""
    lobes: Path | None = None
    lobe_codes: str = "lungssl"
    """A key of LOBE_CODES."""

    def files(self) -> dict[str, list[Path]]:
        """All files of each role, those included that a header points at."""
        roles = {"image": self.image, "lung": self.lung, "lobes": self.lobes}
        return {role: files_of(path) for role, path in roles.items() if path is not None}


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """Files of one patient."""

    patient: str
    scans: dict[Phase, ScanSource] = field(default_factory=dict)
    displacement: Path | None = None
    """Exhale-to-inhale vector field (.nrrd or .mha), LPS mm, on a grid in exhale space."""
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
