"""How small a change of aeration figures can be told from nothing, as published (`domain.md` A7)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SmallestRealDifference:
    """1.96 sqrt(2) standard errors of measurement, with its 95 % interval, in the unit of what it is of."""

    value: float
    low: float
    high: float


RECRUITMENT = {
    "one reader": SmallestRealDifference(value=3.5, low=2.4, high=5.2),
    "two readers": SmallestRealDifference(value=5.7, low=4.0, high=8.0),
    "machine": SmallestRealDifference(value=5.9, low=4.3, high=7.8),
}
"""Of `net_recruited_percent`, % of lung mass, by who drew the masks: one reader twice, two readers, a reader and a
machine (CREATIS 2023, 13 patients, most with severe ARDS). Recruitment from PEEP 5 to 15 is typically 6 % (Richard et
al. 2022), no more than that."""


def below_detectable(recruited_percent: float, *, masks: str = "machine") -> bool:
    """Whether recruitment, in per cent of lung mass, can't be told from none. ValueError for other `masks`."""
    if masks not in RECRUITMENT:
        raise ValueError(f"masks must be one of {', '.join(RECRUITMENT)}, got {masks!r}")
    return abs(recruited_percent) < RECRUITMENT[masks].value
