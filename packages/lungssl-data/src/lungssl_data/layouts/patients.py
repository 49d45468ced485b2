"""What holds for the patients of every layout: ids that can be files' names, or say nothing, and paths to files."""

from collections.abc import Sequence
from dataclasses import replace

from lungssl_data.ids import keyed_id
from lungssl_data.layouts.source import PairSource, attempt
from lungssl_data.pair import PATIENT_PATTERN, CacheError
from lungssl_data.splits import keyed_person, same_spelling


def with_places(sources: Sequence[PairSource]) -> list[PairSource]:
    """The sources, each with a place: `patient 3 of 12` where the layout gives none."""
    numbered = enumerate(sources, start=1)
    return [
        source if source.place else replace(source, place=f"patient {n} of {len(sources)}") for n, source in numbered
    ]


def with_paths_checked(sources: Sequence[PairSource]) -> list[PairSource]:
    """The sources; those with a path that is neither file nor folder as patients with that problem."""

    def checked(source: PairSource) -> list[PairSource]:
        source.check_paths()
        return [source]

    return [one for source in sources for one in attempt(source.patient, checked, source, place=source.place)]


def with_keyed_ids(sources: Sequence[PairSource], key: bytes) -> list[PairSource]:
    """The sources with keyed patient and person ids; equal ids stay equal, however they are spelt.

    A problem gets the patient's place before it, as the id tells nobody any more whose it is.
    """
    return [
        replace(
            source,
            patient=keyed_id(same_spelling(source.patient), key),
            person=keyed_person(source.person, key) if source.person else "",
            problem=_placed(source),
        )
        for source in sources
    ]


def check_ids(sources: Sequence[PairSource]) -> None:
    """CacheError unless each patient's id can be a file's name, and no two are one file's, be case ignored."""
    unusable = [source for source in sources if not PATIENT_PATTERN.fullmatch(source.patient)]
    if unusable:
        raise CacheError(
            f"{len(unusable)} of {len(sources)} patient ids can't be used, first {_told(unusable[0])}: they are file "
            f"names of 1-64 letters, digits, '-' and '_', and start with a letter or digit; rename them to "
            f"de-identified ids, or use --keyed-ids, which takes any text and keeps none"
        )
    first: dict[str, PairSource] = {}
    for source in sources:
        folded = source.patient.lower()
        if folded not in first:
            first[folded] = source
            continue
        other = first[folded]
        if other.patient == source.patient:
            raise CacheError(
                f"patient ids repeat: {_told(other)}, {_told(source)}; give each patient its own, neither case nor "
                f"accents written apart make one"
            )
        raise CacheError(
            f"patient ids differ in case only: {_told(other)}, {_told(source)}; they would be one file on disks that "
            f"ignore case: write them alike where they are one patient, else rename one"
        )


def _told(source: PairSource) -> str:
    return f"{source.patient!r}" + (f" ({source.place})" if source.place else "")


def _placed(source: PairSource) -> str:
    if not source.problem or source.problem.startswith(f"{source.place}: "):
        return source.problem
    return f"{source.place}: {source.problem}"
