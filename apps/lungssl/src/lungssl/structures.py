"""What segmentation can learn: the label sets of a cache, what their codes are called, how they are judged."""

from collections.abc import Mapping
from dataclasses import dataclass

from lungssl_tasks.aeration.parts import LOBE_NAMES
from lungssl_tasks.metrics import LESION_TOLERANCE_MM, LOBE_TOLERANCE_MM, LUNG_TOLERANCE_MM, VESSEL_TOLERANCE_MM

from lungssl.errors import ConfigError, did_you_mean

LUNG_NAMES = {1: "right lung", 2: "left lung"}
LESION_NAMES = {1: "ground glass", 2: "consolidation", 3: "lesion"}
"""3 is of unnamed type (`domain.md` C9)."""
VESSEL_NAMES = {1: "airway", 2: "artery", 3: "vein", 4: "vessel"}
"""4 is of unnamed kind."""


@dataclass(frozen=True, kw_only=True)
class Structures:
    """A label set of the cache."""

    names: Mapping[int, str]
    """By code."""
    tolerance_mm: float
    """Of the normalised surface distance."""
    by_place: bool
    """Told apart by their place, so that a view must span the lungs; and one piece each, so that islands are wrong."""


STRUCTURES: Mapping[str, Structures] = {
    "lobes": Structures(names=LOBE_NAMES, tolerance_mm=LOBE_TOLERANCE_MM, by_place=True),
    "lung": Structures(names=LUNG_NAMES, tolerance_mm=LUNG_TOLERANCE_MM, by_place=True),
    "vessels": Structures(names=VESSEL_NAMES, tolerance_mm=VESSEL_TOLERANCE_MM, by_place=False),
    "lesion": Structures(names=LESION_NAMES, tolerance_mm=LESION_TOLERANCE_MM, by_place=False),
}
"""By `data.labels`, a data set of the cache."""


def structures(labels: str) -> Structures:
    """A label set; ConfigError for one that nothing can be learned from."""
    if labels not in STRUCTURES:
        known = ", ".join(STRUCTURES)
        raise ConfigError(f"data.labels: {labels!r} is not one of {known}{did_you_mean(labels, STRUCTURES)}")
    return STRUCTURES[labels]


def in_one_piece(names: Mapping[int, str]) -> bool:
    """Whether a model's names are of structures that are one piece each."""
    return any(known.by_place and dict(known.names) == dict(names) for known in STRUCTURES.values())


def labels_named(names: Mapping[int, str]) -> str:
    """The label set that a model's names belong to; ConfigError for names of none."""
    for labels, known in STRUCTURES.items():
        if dict(known.names) == dict(names):
            return labels
    raise ConfigError(f"the model labels {', '.join(names.values())}, which no cache holds; it can't be scored")
