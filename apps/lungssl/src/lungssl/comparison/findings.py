"""What a finished comparison says: contrasts with their intervals, and plain sentences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lungssl.comparison.plan import AFFINE, ENDPOINTS, Plan, Regime
from lungssl.comparison.runs import Outcome, array_of
from lungssl.comparison.statistics import LEAST_PATIENTS, Difference, difference, holm


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Two arms by one endpoint."""

    first: str
    second: str
    endpoint: str
    regime: Regime | None
    primary: bool
    difference: Difference | None
    """First less second; None where a run is missing or failed, or there are too few patients."""
    p_holm: float | None = None
    """Adjusted over all primary contrasts; None for the others."""

    @property
    def key(self) -> tuple[str, str, str]:
        """Unique in a comparison."""
        return self.first, self.second, self.endpoint_title()

    @property
    def name(self) -> str:
        """For a person."""
        return f"{self.first} - {self.second}, {self.endpoint_title()}"

    def endpoint_title(self) -> str:
        """With the regime."""
        return ENDPOINTS[self.endpoint].title + (f", {self.regime}" if self.regime is not None else "")

    def over_seeds(self) -> bool:
        """Whether other seeds would say it, too, as far as these few tell.

        Of a difference `p_crossed` below 0.05, of an equivalence `crossed_90` within the margin.
        """
        found, margin = self.difference, ENDPOINTS[self.endpoint].margin
        if found is None:
            return False
        if self.verdict() == "equivalent":
            assert margin is not None
            return found.equivalent_over_seeds(margin)
        return found.p_crossed is not None and found.p_crossed < 0.05

    def verdict(self) -> str:
        """`equivalent`, `better`, `worse`, `not shown` or `missing`, for the first arm.

        A difference that is surely within the margin is none, however sure. Else it is shown by its 95 % interval and a
        p below 0.05, for a primary contrast the adjusted one. It's of the encoders at hand: see `over_seeds`.
        """
        found, endpoint = self.difference, ENDPOINTS[self.endpoint]
        if found is None:
            return "missing"
        if endpoint.margin is not None and found.equivalent(endpoint.margin):
            return "equivalent"
        low, high = found.interval_95
        finite = math.isfinite(low) and math.isfinite(high)
        if finite and (low > 0 or high < 0) and (found.p if self.p_holm is None else self.p_holm) < 0.05:
            return "better" if (low > 0) == endpoint.higher_is_better else "worse"
        return "not shown"


def contrasts(outcome: Outcome) -> list[Contrast]:
    """Every contrast of the plan by every endpoint, the primary ones adjusted together."""
    plan = outcome.plan
    found = [
        Contrast(
            first=first,
            second=second,
            endpoint=name,
            regime=regime,
            primary=plan.is_primary((first, second), name, regime),
            difference=_difference(outcome, first, second, name, regime),
        )
        for name in shown_endpoints(plan)
        for regime in regimes(plan, name)
        for first, second in plan.contrasts
        if second != AFFINE or ENDPOINTS[name].of_places
    ]
    # A primary test without an answer stays in the family: the others don't become easier by a run that failed.
    adjusted = holm({one.key: 1.0 if one.difference is None else one.difference.p for one in found if one.primary})
    return [replace(one, p_holm=None if one.difference is None else adjusted.get(one.key)) for one in found]


def shown_endpoints(plan: Plan) -> list[str]:
    """Those that the plan has figures of, the primary ones first."""
    primary = [entry.partition("@")[0] for entry in plan.primary]
    names = [name for name in ENDPOINTS if plan.shift is not None or not name.startswith("shift_")]
    return sorted(names, key=lambda name: name not in primary)


def regimes(plan: Plan, endpoint: str) -> Sequence[Regime | None]:
    """Those in which an endpoint exists; (None,) for those of the encoder."""
    if not ENDPOINTS[endpoint].of_labels:
        return (None,)
    return plan.labels.regimes() if plan.labels is not None else ()


def sentences(outcome: Outcome, found: Sequence[Contrast]) -> list[str]:
    """One plain sentence for each primary contrast, whichever way it fell, and for what needs no encoder at all."""
    return [_sentence(one) for one in found if one.primary] + _floors(outcome, found)


def _floors(outcome: Outcome, found: Sequence[Contrast]) -> list[str]:
    """Which arms are better than the coarse affine alone, by each primary endpoint of places that the plan compares."""
    said = []
    for name in dict.fromkeys(entry.partition("@")[0] for entry in outcome.plan.primary):
        against = [one for one in found if one.second == AFFINE and one.endpoint == name and not one.primary]
        figure = arm_figures(outcome, AFFINE, name, None)
        if not against or figure is None:
            continue
        endpoint = ENDPOINTS[name]
        better = [one.first for one in against if one.verdict() == "better"]
        said.append(
            f"{endpoint.title}: the coarse affine alone, without any encoder, has {figure[0]:.{endpoint.digits}f} "
            f"{endpoint.unit}. Shown to be better than it (exploratory): {', '.join(better) or 'none'} of "
            f"{', '.join(one.first for one in against)}."
        )
    return said


def power_note(found: Sequence[Contrast]) -> str | None:
    """What no experiment of this size can show; None where it can show something.

    The exact Wilcoxon test of n patients has no two-sided p below 2 / 2^n; Holm multiplies it by the number of tests.
    """
    sizes = [one.difference.patients for one in found if one.primary and one.difference is not None]
    if not sizes:
        return None
    tests = sum(one.primary for one in found)
    least = tests * 2.0 ** (1 - max(sizes))
    if least < 0.05:
        return None
    return (
        f"With {max(sizes)} patients and {tests} primary tests no p after Holm can be below "
        f"{min(1.0, least):.3f}: nothing can be shown to be better or worse. Take more test patients, or fewer primary "
        f"contrasts."
    )


def _sentence(one: Contrast) -> str:
    endpoint, found = ENDPOINTS[one.endpoint], one.difference
    about = f"{one.first} against {one.second}, {one.endpoint_title()}"
    if found is None:
        return f"{about}: no answer, as runs are missing or failed, or there are fewer than {LEAST_PATIENTS} patients."
    unit, digits = f" {endpoint.unit}".rstrip(), endpoint.digits
    low, high = found.interval_95
    p = "" if one.p_holm is None else f", p {shown_p(one.p_holm)} after Holm"
    seeds = "" if found.seed_sd is None else f", SD over seeds {found.seed_sd:.{digits}f}"
    interval = f"95 % interval {shown_interval(found, digits)}{p}, {found.patients} patients{seeds}"
    lead = f"{about}: {found.mean:+.{digits}f}{unit} ({interval})"
    match one.verdict():
        case "better" | "worse" as verdict:
            if one.over_seeds():
                return f"{lead}. {one.first} is {verdict}."
            seeds = f"p {shown_p(found.p_crossed)}" if found.p_crossed is not None else "there is one"
            return f"{lead}. {one.first} is {verdict} with these encoders; for other seeds it isn't shown ({seeds})."
        case "equivalent":
            said = f"{lead}. They are equivalent, within ±{endpoint.margin:g}{unit}"
            return f"{said}." if one.over_seeds() else f"{said}, with these encoders; for other seeds it isn't shown."
        case _:
            if math.isfinite(low) and math.isfinite(high) and (low > 0 or high < 0):
                return f"{lead}. The interval leaves 0 out, but not the p of all primary tests together: not shown."
            return f"{lead}. No difference is shown; those in the interval remain possible.{_needed(one, found)}"


def shown_interval(found: Difference, digits: int) -> str:
    """The 95 % interval, or why there is none."""
    low, high = found.interval_95
    if not math.isfinite(low) or not math.isfinite(high):
        return "none, too many ties"
    return f"{low:+.{digits}f} to {high:+.{digits}f}"


def shown_p(p: float) -> str:
    """To three digits."""
    return f"{p:.3f}" if p >= 0.001 else "≤0.001"


def _needed(one: Contrast, found: Difference) -> str:
    """How many patients would tell a difference of the margin, where that is more than there are."""
    endpoint = ENDPOINTS[one.endpoint]
    if endpoint.margin is None or found.patients_needed(endpoint.margin) <= found.patients:
        return ""
    return (
        f" To see ±{endpoint.margin:g}{f' {endpoint.unit}' if endpoint.unit else ''} in four experiments of five would "
        f"take {found.patients_needed(endpoint.margin):,} patients, by a single test."
    )


def _difference(outcome: Outcome, first: str, second: str, endpoint: str, regime: Regime | None) -> Difference | None:
    one, other = (array_of(outcome, arm, endpoint, regime) for arm in (first, second))
    if one is None or other is None or one[0] != other[0] or len(one[0]) < LEAST_PATIENTS:
        return None
    if not (np.isfinite(one[1]).all() and np.isfinite(other[1]).all()):
        return None
    found = difference(one[1], other[1])
    most = ENDPOINTS[endpoint].most
    outer, inner = (_possible(interval, most) for interval in (found.interval_95, found.interval_90))
    return replace(found, interval_95=outer, interval_90=inner)


def _possible(interval: tuple[float, float], most: float) -> tuple[float, float]:
    """An interval without differences that there can't be; one without an end stays so."""
    low, high = interval
    return (max(-most, low) if math.isfinite(low) else low, min(most, high) if math.isfinite(high) else high)


def arm_figures(outcome: Outcome, arm: str, endpoint: str, regime: Regime | None) -> tuple[float, float, float] | None:
    """Mean, standard deviation over patients, and over seeds (NaN for one); None where runs are missing."""
    found = array_of(outcome, arm, endpoint, regime)
    if found is None or not len(found[0]):
        return None
    of_patient, of_seed = found[1].mean(axis=(1, 2)), found[1].mean(axis=(0, 2))
    spread = float(of_patient.std(ddof=1)) if len(of_patient) > 1 else float("nan")
    return float(of_patient.mean()), spread, float(of_seed.std(ddof=1)) if len(of_seed) > 1 else float("nan")
