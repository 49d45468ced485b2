"""What segmentation can learn: the label sets of a cache, and what their codes are called."""

from collections.abc import Mapping

from lungssl_tasks.aeration.parts import LOBE_NAMES

from lungssl.errors import ConfigError, did_you_mean

LUNG_NAMES = {1: "right lung", 2: "left lung"}
LESION_NAMES = {1: "ground glass", 2: "consolidation", 3: "lesion"}
"""3 is of unnamed type (`domain.md` C9)."""
STRUCTURES: Mapping[str, Mapping[int, str]] = {"lobes": LOBE_NAMES, "lung": LUNG_NAMES, "lesion": LESION_NAMES}
"""By `data.labels`, a data set of the cache: names by code."""
SPANNING = ("lobes", "lung")
"""Told apart by their place, so that a view must span the lungs."""


def names_of(labels: str) -> Mapping[int, str]:
    """Names by code of a label set; ConfigError for one that nothing can be learned from."""
    if labels not in STRUCTURES:
        known = ", ".join(STRUCTURES)
        raise ConfigError(f"data.labels: {labels!r} is not one of {known}{did_you_mean(labels, STRUCTURES)}")
    return STRUCTURES[labels]


def labels_named(names: Mapping[int, str]) -> str:
    """The label set that a model's names belong to; ConfigError for names of none."""
    for labels, known in STRUCTURES.items():
        if dict(known) == dict(names):
            return labels
    raise ConfigError(f"the model labels {', '.join(names.values())}, which no cache holds; it can't be scored")
