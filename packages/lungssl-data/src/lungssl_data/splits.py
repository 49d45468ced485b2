"""Which patients are for training, which for choosing, which for the last word.

The split is a property of the patient, decided once when the cache is built and stored in the patient's file, so that
both phases, every method and every later cohort agree on it.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

from lungssl_data.pair import Split

FRACTIONS: dict[Split, float] = {"train": 0.60, "val": 0.15, "test": 0.25}
"""`domain.md` F."""


def assign_splits(patients: Iterable[str], fixed: Mapping[str, Split]) -> dict[str, Split]:
    """A split for each patient: `fixed` ones keep theirs, the others fill up whichever is least filled.

    New patients are taken in the order of the SHA-256 of their id, so the answer doesn't depend on the order they come
    in, and the first three of an empty cohort cover train, test and val.
    """
    patients = set(patients)
    result: dict[str, Split] = {patient: split for patient, split in fixed.items() if patient in patients}
    new = sorted(patients - set(result), key=lambda p: hashlib.sha256(p.encode()).hexdigest())
    for patient in new:
        counts = Counter(result.values())
        result[patient] = min(FRACTIONS, key=lambda split: (counts[split] / FRACTIONS[split], -FRACTIONS[split]))
    return result
