"""What the difference between two arms is worth, with the patient as the unit (`domain.md` F).

Figures are arrays [patients, seeds, draws]: each test patient is judged by every pretraining seed and every draw of
labels, paired between arms. Intervals and tests are about patients, for the encoders and draws at hand. How much
another seed would give is shown apart: `seed_sd`, and `p_crossed` of a test that counts seeds as a sample, too.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray

DRAWS = 10_000
"""Bootstrap draws (`domain.md` F)."""
LEAST_PATIENTS = 5
"""With 5 the least two-sided p of the exact Wilcoxon test is 0.06; with fewer an interval says nothing either."""
_POWER_FACTOR = (1.959964 + 0.841621) ** 2
"""(z(0.975) + z(0.8))^2: two-sided 5 %, power 80 %, normal theory; reproduces the examples of `domain.md` F."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One arm's figure less another's, over test patients."""

    mean: float
    interval_95: tuple[float, float]
    interval_90: tuple[float, float]
    """For equivalence: inside the margin is what two one-sided tests at 5 % ask for (Schuirmann 1987)."""
    p: float
    """Wilcoxon signed-rank test, two-sided, exact without ties; not yet adjusted for other contrasts."""
    effect: float
    """Mean over standard deviation of the patients' differences, with Hedges' correction for few; 0 where all are 0."""
    patients: int
    seed_sd: float | None
    """Standard deviation over seeds of the mean difference; None for one seed."""
    p_crossed: float | None
    """Two-sided, of the mean with patients and seeds both drawn at random; None for one seed. A check beside `p`: with
    three seeds it finds only differences that all of them show alike."""
    crossed_90: tuple[float, float] | None
    """The 90 % interval of the mean with patients and seeds both drawn at random; None for one seed."""
    patient_sd: float
    """Standard deviation over patients of the differences that seeds and draws were averaged in."""

    def patients_needed(self, margin: float) -> int:
        """Patients with whom a difference of `margin` would be found in 80 % of experiments like this one."""
        if margin <= 0:
            raise ValueError(f"margin must be more than 0, got {margin}")
        return max(2, int(np.ceil(_POWER_FACTOR * (self.patient_sd / margin) ** 2)))

    def equivalent(self, margin: float) -> bool:
        """Whether the 90 % interval lies within plus and minus `margin`."""
        return _within(self.interval_90, margin)

    def equivalent_over_seeds(self, margin: float) -> bool:
        """Whether `crossed_90` does; False for one seed."""
        return self.crossed_90 is not None and _within(self.crossed_90, margin)


Name = TypeVar("Name", bound=Hashable)


def difference(
    first: Float[ndarray, "patients seeds draws"],
    second: Float[ndarray, "patients seeds draws"],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """`first` less `second`.

    Raises ValueError for other shapes, fewer than LEAST_PATIENTS patients, or values that are no numbers: a missing run
    must not drop out silently.
    """
    if first.shape != second.shape or first.ndim != 3 or len(first) < LEAST_PATIENTS:
        raise ValueError(
            f"a difference needs two arrays [patients, seeds, draws] of one shape, at least {LEAST_PATIENTS} patients; "
            f"got {first.shape} and {second.shape}"
        )
    values = np.asarray(first, float) - np.asarray(second, float)
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} differences are no finite numbers")
    from scipy.stats import wilcoxon

    of_patient, of_seed = values.mean(axis=(1, 2)), values.mean(axis=2)
    several = values.shape[1] > 1
    spread = float(of_patient.std(ddof=1))
    outer, inner = studentised_intervals(values, levels=(0.95, 0.90), draws=draws, seed=seed)
    n = len(of_patient)
    return Difference(
        mean=float(of_patient.mean()),
        interval_95=outer,
        interval_90=inner,
        p=1.0 if not of_patient.any() else float(wilcoxon(of_patient).pvalue),
        effect=0.0 if spread == 0 else float(of_patient.mean()) / spread * (1 - 3 / (4 * (n - 1) - 1)),
        patients=n,
        seed_sd=float(values.mean(axis=(0, 2)).std(ddof=1)) if several else None,
        p_crossed=crossed_p(of_seed) if several else None,
        crossed_90=crossed_interval(of_seed, level=0.90) if several else None,
        patient_sd=spread,
    )


def crossed_p(values: Float[ndarray, "patients seeds"]) -> float:
    """p of the mean of a two-way table whose rows and columns are both samples, against 0; two-sided.

    Student's t with `crossed_error`. Raises ValueError as that does.
    """
    from scipy.stats import t

    mean, (error, freedom) = float(values.mean()), crossed_error(values)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * t.sf(abs(mean) / error, freedom))


def crossed_interval(values: Float[ndarray, "patients seeds"], *, level: float) -> tuple[float, float]:
    """Two-sided interval of that mean, by the same t."""
    from scipy.stats import t

    mean, (error, freedom) = float(values.mean()), crossed_error(values)
    reach = error * float(t.ppf((1 + level) / 2, freedom)) if error else 0.0
    return mean - reach, mean + reach


def crossed_error(values: Float[ndarray, "patients seeds"]) -> tuple[float, float]:
    """Standard error of the mean of a two-way table whose rows and columns are both samples, and degrees of freedom.

    Random effects of patient and seed, crossed: the mean's variance is (M_p + M_s - M_e) / (patients x seeds), of the
    mean squares of rows, columns and what is left, and no less than that of rows or of columns alone; Satterthwaite's
    degrees of freedom (1946, doi:10.2307/3002019; the crossed design as in Clark 1973,
    doi:10.1016/S0022-5371(73)80014-3). Raises ValueError for fewer than two of either.
    """
    n, k = values.shape
    if min(n, k) < 2:
        raise ValueError(f"a test over patients and seeds needs two of each, got {n} and {k}")
    mean = values.mean()
    rows, columns = values.mean(axis=1), values.mean(axis=0)
    of_rows, of_columns = k * rows.var(ddof=1), n * columns.var(ddof=1)
    rest = (values - rows[:, None] - columns + mean) ** 2
    of_rest = rest.sum() / ((n - 1) * (k - 1))
    squares = {"both": of_rows + of_columns - of_rest, "rows": of_rows, "columns": of_columns}
    which = max(squares, key=lambda name: squares[name])
    if squares[which] <= 0:
        return 0.0, 1.0
    freedom = {
        "rows": n - 1,
        "columns": k - 1,
        "both": squares["both"] ** 2
        / (of_rows**2 / (n - 1) + of_columns**2 / (k - 1) + of_rest**2 / ((n - 1) * (k - 1))),
    }[which]
    return float(np.sqrt(squares[which] / (n * k))), float(freedom)


def studentised_intervals(
    values: Float[ndarray, "patients seeds draws"],
    *,
    levels: Sequence[float] = (0.95,),
    draws: int = DRAWS,
    seed: int = 0,
) -> list[tuple[float, float]]:
    """Two-sided intervals of the mean by the studentised hierarchical bootstrap: patients, then seeds, then draws.

    Each draw takes patients with replacement, within each of them seeds, within each of these draws; its mean is put in
    units of its own standard error over patients (Davison and Hinkley 1997, doi:10.1017/CBO9780511802843; levels as in
    Saravanan et al. 2020, https://arxiv.org/abs/2007.07797). Percentiles of the means themselves are too narrow for
    some ten patients: `tests/test_statistics.py` has the coverage of both. Constant values give no width.
    """
    rng = np.random.default_rng(seed)
    patients, seeds, labels = values.shape
    of_patient = values.mean(axis=(1, 2))
    mean, error = of_patient.mean(), of_patient.std(ddof=1) / np.sqrt(patients)
    if error == 0:
        return [(float(mean), float(mean))] * len(levels)
    drawn = np.empty((draws, patients))
    for part in np.array_split(np.arange(draws), max(1, draws * patients * seeds * labels // 2_000_000)):
        count = len(part)
        patient = rng.integers(patients, size=(count, patients, 1, 1))
        which = rng.integers(seeds, size=(count, patients, seeds, 1))
        label = rng.integers(labels, size=(count, patients, seeds, labels))
        drawn[part] = values[patient, which, label].mean(axis=(2, 3))
    errors = drawn.std(axis=1, ddof=1) / np.sqrt(patients)
    # A draw of one patient alone has no error of its own: it counts as far out, on its side.
    off = drawn.mean(axis=1) - mean
    scaled = np.where(off == 0, 0.0, np.copysign(np.inf, off))
    np.divide(off, errors, out=scaled, where=errors > 0)
    found = []
    for level in levels:
        low, high = np.quantile(scaled, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
        found.append((float(mean - high * error), float(mean - low * error)))
    return found


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Adjusted p of each test of a family (Holm 1979, doi:10.2307/4615733), in the same order."""
    ranked = sorted(p_values, key=lambda name: p_values[name])
    adjusted, least = {}, 0.0
    for rank, name in enumerate(ranked):
        least = max(least, min(1.0, (len(ranked) - rank) * p_values[name]))
        adjusted[name] = least
    return {name: adjusted[name] for name in p_values}


def _within(interval: tuple[float, float], margin: float) -> bool:
    return bool(-margin < interval[0] and interval[1] < margin)
