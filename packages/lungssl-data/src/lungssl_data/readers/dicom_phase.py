"""Which breathing phase a CT slice belongs to, and from which rule that is known.

Rules in the order in which they tell the phases of one series apart: temporal position identifier (0020,0100), temporal
position index (0020,9128), nominal percentage of respiratory phase (0020,9245), series description (0008,103E). Words
name a phase; a percentage does by convention only (0 % end inhale, 50 % end exhale, `domain.md` C7), so words win, and
either must be confirmed by lung volumes. A description's text stays here: what comes out is a rule's name.
"""

import re
from dataclasses import dataclass

from lungssl_data.pair import Phase

_PERCENT = re.compile(r"(?<![\d.])(\d{1,3}(?:\.\d+)?)\s*%")
_BLENDING = re.compile(r"(asir|ssr?|sar|blend|level)[\s_-]*v?[\s_:=-]*$", re.IGNORECASE)
"""What stands before the percentages that name a reconstruction: `ASiR-V 50%` is no phase."""
_INHALE = re.compile(r"(?<![a-z])(inhal(e|ation)|insp(ir(ation|atory|ium)?)?|ei|t00)(?![a-z0-9])", re.IGNORECASE)
_EXHALE = re.compile(r"(?<![a-z])(exhal(e|ation)|exs?p(ir(ation|atory|ium)?)?|ee|t50)(?![a-z0-9])", re.IGNORECASE)
RULES = (
    "temporal position identifier",
    "temporal position index",
    "nominal percentage of respiratory phase",
    "series description",
)


@dataclass(frozen=True, kw_only=True)
class PhaseMark:
    """What one slice says of its phase."""

    keys: tuple[float | str | None, float | str | None, float | str | None, float | str | None]
    """By rule of RULES: equal for slices of one phase, None where the slice says nothing."""
    phase: Phase | None
    percent: float | None
    """Of the breathing cycle."""
    evidence: str
    """The rule that gave `phase` or `percent`; empty without."""


def phase_mark(
    *, position_identifier: float | None, position_index: float | None, percentage: float | None, description: str
) -> PhaseMark:
    """The phase of a slice by its elements; `description` is parsed and forgotten."""
    word = _word(description)
    in_text = _percent(description)
    percent = percentage if percentage is not None else in_text
    if word is not None:
        phase, evidence = word, "word in the series description"
    elif percentage is not None:
        phase, evidence = _by_convention(percentage), "nominal percentage of respiratory phase"
    elif in_text is not None:
        phase, evidence = _by_convention(in_text), "percentage in the series description"
    else:
        phase, evidence = None, ""
    said = None if word is None and in_text is None else f"{word or ''} {'' if in_text is None else in_text}"
    return PhaseMark(
        keys=(position_identifier, position_index, percentage, said), phase=phase, percent=percent, evidence=evidence
    )


def splitting_rule(marks: list[PhaseMark]) -> int | None:
    """The first rule by which every one of these slices has a phase, and not all the same; None if there is none."""
    for rule in range(len(RULES)):
        keys = {mark.keys[rule] for mark in marks}
        if len(keys) > 1 and None not in keys:
            return rule
    return None


def _word(description: str) -> Phase | None:
    inhale, exhale = bool(_INHALE.search(description)), bool(_EXHALE.search(description))
    if inhale == exhale:
        return None
    return "inhale" if inhale else "exhale"


def _percent(description: str) -> float | None:
    found = {
        float(match[1])
        for match in _PERCENT.finditer(description)
        if not _BLENDING.search(description[: match.start()]) and float(match[1]) <= 100
    }
    return found.pop() if len(found) == 1 else None


def _by_convention(percent: float) -> Phase | None:
    if percent in (0, 100):
        return "inhale"
    return "exhale" if percent == 50 else None
