import numpy as np
import pytest
from lungssl.comparison.statistics import (
    Difference,
    crossed_error,
    crossed_interval,
    crossed_p,
    difference,
    holm,
    studentised_intervals,
)
from scipy import stats


def experiment(
    rng: np.random.Generator, effect: float, *, patients: int = 13, seeds: int = 2, draws: int = 2
) -> np.ndarray:
    """Differences of the model that the interval assumes: noise of patients, of seeds in them, of draws in these."""
    return (
        effect
        + rng.normal(0, 1.0, (patients, 1, 1))
        + rng.normal(0, 0.7, (patients, seeds, 1))
        + rng.normal(0, 0.5, (patients, seeds, draws))
    )


def compared(values: np.ndarray, **options: int) -> Difference:
    return difference(values, np.zeros_like(values), **options)


@pytest.mark.parametrize("patients", [6, 13])
def test_95_of_100_intervals_hold_the_truth(patients: int) -> None:
    """Percentiles of bootstrap means, the usual interval, hold it in 85 and 91 (below)."""
    rng, held, percentile = np.random.default_rng(1), 0, 0
    for run in range(2000):
        values = experiment(rng, 0.3, patients=patients)
        ((low, high),) = studentised_intervals(values, draws=1000, seed=run)
        held += low <= 0.3 <= high
        means = rng.choice(values.mean(axis=(1, 2)), (500, patients)).mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        percentile += low <= 0.3 <= high
    assert 0.94 <= held / 2000 <= 0.96
    assert percentile / 2000 < 0.93


def test_with_many_patients_the_interval_is_students() -> None:
    values = experiment(np.random.default_rng(3), 0.3, patients=200, seeds=3, draws=1)
    of_patient = values.mean(axis=(1, 2))
    wide = stats.t.interval(0.95, 199, of_patient.mean(), stats.sem(of_patient))
    narrow = stats.t.interval(0.90, 199, of_patient.mean(), stats.sem(of_patient))
    found = compared(values)
    assert found.interval_95 == pytest.approx(wide, abs=0.01)
    assert found.interval_90 == pytest.approx(narrow, abs=0.01)


def test_planted_effects_are_found_and_a_twin_is_not() -> None:
    """Thirteen patients with Dice about 0.8: one arm better by 0.02, an identical twin, one worse by 0.02."""
    rng = np.random.default_rng(0)
    patient = rng.normal(0.8, 0.05, (13, 1, 1))

    def arm(effect: float) -> np.ndarray:
        return patient + effect + rng.normal(0, 0.01, (13, 3, 2))

    base = arm(0.0)
    better, twin, same, worse = difference(arm(0.02), base), difference(base, base), compared(base - base), arm(-0.02)
    assert better.interval_95[0] > 0 and better.p < 0.01 and better.effect > 1 and not better.equivalent(0.01)
    assert twin == same and twin.interval_95 == (0.0, 0.0) and twin.p == 1.0 and twin.effect == 0 and twin.seed_sd == 0
    assert twin.equivalent(0.01)
    another = difference(arm(0.0), base)  # no twin, but another encoder as good
    assert another.interval_95[0] < 0 < another.interval_95[1] and another.p > 0.05 and another.equivalent(0.01)
    below = difference(worse, base)
    assert below.interval_95[1] < 0 and below.p < 0.01 and below.effect < -1


def test_where_nothing_differs_one_test_in_twenty_says_so() -> None:
    rng = np.random.default_rng(5)
    p_values = [compared(experiment(rng, 0.0), draws=20).p for _ in range(600)]
    assert 0.03 < np.mean(np.array(p_values) < 0.05) < 0.07


def test_where_encoders_differ_by_their_seeds_alone_few_say_so() -> None:
    """Seeds crossed with patients, as spread as they, and no effect: the patients' own p finds one in most, p_crossed
    in one of twenty at most (less: three seeds)."""
    rng = np.random.default_rng(6)
    found = []
    for _ in range(400):
        values = rng.normal(0, 1, (13, 1, 1)) + rng.normal(0, 1, (1, 3, 1)) + rng.normal(0, 0.5, (13, 3, 1))
        one = compared(values, draws=20)
        assert one.p_crossed is not None
        found.append((one.p < 0.05, one.p_crossed < 0.05))
    of_patients, of_both = np.mean(found, axis=0)
    assert of_patients > 0.3 and of_both < 0.07


def test_a_test_over_patients_and_seeds_in_closed_form() -> None:
    """Rows 1 and 3, columns 0 and +-0.5, nothing left: mean 2, variance (4 + 0.5) / 4 with 1.24 degrees of freedom."""
    values = np.array([[0.75, 1.25], [2.75, 3.25]])
    freedom = 4.25**2 / (4.0**2 + 0.25**2)
    assert crossed_p(values) == pytest.approx(2 * stats.t.sf(2 / np.sqrt(4.25 / 4), freedom))
    rows = np.repeat(np.arange(1.0, 6.0)[:, None], 3, axis=1)  # seeds agree: Student's test of the patients
    assert crossed_p(rows) == pytest.approx(stats.ttest_1samp(rows[:, 0], 0).pvalue)
    assert crossed_p(rows.T) == pytest.approx(crossed_p(rows))
    assert crossed_p(np.zeros((5, 3))) == 1.0 and crossed_p(np.ones((5, 3))) == 0.0
    assert compared(np.arange(5.0)[:, None, None]).p_crossed is None
    with pytest.raises(ValueError, match="two of each, got 5 and 1"):
        crossed_p(np.zeros((5, 1)))
    low, high = crossed_interval(values, level=0.90)
    error, freedom_of_both = crossed_error(values)
    assert freedom_of_both == pytest.approx(freedom)
    assert [low, high] == pytest.approx(2 + np.array([-1, 1]) * stats.t.ppf(0.95, freedom) * error)


def test_arms_are_equivalent_over_seeds_only_where_seeds_agree() -> None:
    patients = np.random.default_rng(0).normal(0, 0.005, (13, 1, 1))
    agree = compared(patients + np.array([-0.001, 0.0, 0.001])[:, None])
    differ = compared(patients + np.array([-0.02, 0.0, 0.02])[:, None])
    assert agree.equivalent(0.01) and agree.equivalent_over_seeds(0.01)
    assert differ.equivalent(0.01) and not differ.equivalent_over_seeds(0.01)
    assert not compared(patients).equivalent_over_seeds(0.01)  # of one seed nothing is known


def test_a_difference_in_closed_form() -> None:
    """Patients' differences 1 to 5: mean 3, standard deviation 1.581; all positive: p = 2 / 2^5."""
    values = np.arange(1.0, 6.0)[:, None, None] + np.array([-0.5, 0.5])[None, :, None]
    found = compared(values)
    assert (found.mean, found.patients) == (3.0, 5)
    assert found.p == pytest.approx(2 / 2**5)
    assert found.patient_sd == pytest.approx(np.sqrt(2.5))
    assert found.effect == pytest.approx(3 / np.sqrt(2.5) * (1 - 3 / 15))
    assert found.seed_sd == pytest.approx(np.sqrt(0.5))
    assert compared(values[:, :1]).seed_sd is None
    assert (compared(values, seed=1).interval_95 == compared(values, seed=1).interval_95) is True


def test_patients_needed_are_those_of_the_protocol() -> None:
    """`domain.md` F: 0.01 of Dice at a standard deviation of 0.03 takes 71 patients, 0.3 mm at 0.5 mm 22."""
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(40, 1, 1))
    unit = (raw - raw.mean()) / raw.std(ddof=1)
    assert compared(0.03 * unit).patients_needed(0.01) == 71
    assert compared(0.5 * unit).patients_needed(0.3) == 22
    with pytest.raises(ValueError, match="margin must be more than 0, got 0"):
        compared(unit).patients_needed(0)


def test_holm_of_the_textbook() -> None:
    adjusted = holm({"c": 0.04, "a": 0.01, "d": 0.9, "b": 0.03})
    assert list(adjusted) == ["c", "a", "d", "b"]
    assert adjusted == pytest.approx({"a": 0.04, "b": 0.09, "c": 0.09, "d": 0.9})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_missing_runs_and_few_patients_are_refused() -> None:
    values = np.zeros((6, 2, 1))
    values[2, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 12 differences are no finite numbers"):
        compared(values)
    with pytest.raises(ValueError, match=r"at least 5 patients; got \(4, 1, 1\) and \(4, 1, 1\)"):
        compared(np.zeros((4, 1, 1)))
    with pytest.raises(ValueError, match=r"got \(6, 2, 1\) and \(6, 1, 1\)"):
        difference(values, np.zeros((6, 1, 1)))
