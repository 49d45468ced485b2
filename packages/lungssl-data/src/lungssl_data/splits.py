"""Which patients are for training, which for choosing, which for the last word.

The split is a property of the person, decided once when the cache is built and stored in the patient's file, so that
both phases, every method and every later cohort agree on it. Collections that hold the same people under other names
never leak: all patients of one person are in one split.

Some collections hold people of another one without saying who is who. A person written `nlst:0101` is one of the
collection `nlst`; `nlst:?lung250m/012` is somebody of it, told apart only within `lung250m`. Where both kinds, or two
that ask, meet in one cache, everybody of `nlst` may be anybody, and all of it goes together; otherwise each is apart.
"""

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from lungssl_data.ids import keyed_id
from lungssl_data.pair import CacheError, Split

FRACTIONS: dict[Split, float] = {"train": 0.60, "val": 0.15, "test": 0.25}
"""`domain.md` F."""
SHARED_COLLECTIONS = ("nlst", "tcia-4dlung", "tcia-ventilation")
"""Whose people others hold without saying who is who; `keyed_person` leaves these names readable."""


def assign_splits(
    patients: Iterable[str], fixed: Mapping[str, Split], persons: Mapping[str, str] | None = None
) -> dict[str, Split]:
    """A split for each patient: `fixed` ones keep theirs, the others fill up whichever is least filled.

    `persons` says who a patient is, where that is not the patient's own id; patients of one person go together, to the
    split that one of them is fixed to. CacheError, naming two, where they are fixed to different ones. Large groups
    are placed first, then in the order of the SHA-256 of the person's id, so the answer doesn't depend on the order
    they come in, and the first three of an empty cohort cover train, test and val.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    names = sorted(set(patients))
    who = _told_apart({patient: same_spelling((persons or {}).get(patient) or patient) for patient in names})
    for patient in names:
        groups[who[patient]].append(patient)
    result: dict[str, Split] = {}
    for members in groups.values():
        decided: dict[Split, str] = {fixed[patient]: patient for patient in reversed(members) if patient in fixed}
        if len(decided) > 1:
            (first, one), (second, other) = sorted(decided.items())[:2]
            raise CacheError(
                f"patients {one} ({first}) and {other} ({second}) are or may be one person and in two splits; give "
                f"both the same split in the manifest, or build one of their collections into another cache"
            )
        for split in decided:
            result.update((patient, split) for patient in members)
    new = {person: members for person, members in groups.items() if members[0] not in result}
    counts = Counter(result.values())
    for person in sorted(new, key=lambda p: (-len(new[p]), hashlib.sha256(p.encode()).hexdigest())):
        split = min(FRACTIONS, key=lambda split: (counts[split] / FRACTIONS[split], -FRACTIONS[split]))
        result.update((patient, split) for patient in new[person])
        counts[split] += len(new[person])
    return result


def same_spelling(person: str) -> str:
    """A person's id without case and with accents composed: lists typed by hand, and file systems, differ in both."""
    return unicodedata.normalize("NFC", person).casefold().strip()


def keyed_person(person: str, key: bytes) -> str:
    """A person's id as a keyed hash that `assign_splits` parts and joins as it did the id itself."""
    person = same_spelling(person)
    collection, colon, number = person.partition(":")
    if not colon or collection not in SHARED_COLLECTIONS:
        return keyed_id(person, key)
    teller, slash, case = number.partition("/")
    if number.startswith("?") and slash:
        return f"{collection}:{teller}/{keyed_id(case, key)}"
    return f"{collection}:{keyed_id(number, key)}"


def _told_apart(persons: Mapping[str, str]) -> dict[str, str]:
    """Each patient's person, or the collection whose people can't be told apart among these patients."""
    tellers: dict[str, set[str]] = defaultdict(set)
    for person in persons.values():
        collection, colon, number = person.partition(":")
        if colon and collection in SHARED_COLLECTIONS:
            tellers[collection].add(number.partition("/")[0] if number.startswith("?") else "")

    def merged(person: str) -> str:
        collection, colon, _ = person.partition(":")
        return collection if colon and len(tellers.get(collection, ())) > 1 else person

    return {patient: merged(person) for patient, person in persons.items()}
