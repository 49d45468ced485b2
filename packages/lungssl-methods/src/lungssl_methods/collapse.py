"""Alarms while a run trains: what says that features are collapsing, before the held-out loss does.

The bounds were chosen after looking at small runs, not tested on others: `dino` with 64 prototypes on batches of 8
smooth random volumes, 200 steps at learning rate 1.8e-4, a linear encoder, two seeds ("healthy"), and the same with one
thing broken. On runs that they were not chosen on, see `benchmarks/bench_collapse.py`.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["nan", "certain", "uniform", "constant", "rank", "spread", "loss"]


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One thing that is wrong, in a plain sentence with the numbers."""

    kind: Kind
    sentence: str
    step: int


class CollapseMonitor:
    """Looks at each step's metrics and, seldom, at figures of a probe set; knows neither model nor files."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        grace: int = 50
        """First steps in which only NaN counts: centre and moments settle. A healthy entropy began at 0.07 ln k."""
        window: int = 20
        """Steps averaged before a bound is looked at; single batches differ too much."""
        entropy_lnk: tuple[float, float] = (0.02, 0.995)
        """Bounds of the teacher's entropy: 0.001 was reached sharpened and never centred; 0.994 is what a run at
        learning rate 0 kept (tests of `monitor`)."""
        least_kl_lnk: float = 0.005
        """Least KL(teacher, student): below, the target is one for all crops. Healthy, from step 50 on: 0.48
        and more; 0.0005 neither centred nor sharpened, where the entropy stays at an innocent 0.64."""
        rank_share: float = 0.3
        """Least `effective_rank` as a share of the first. Runs that found landmarks better than at their start came
        down to 0.34 (`jepa`, 0.45 in another run), 0.47 (`dino`) and 0.496 (`mae`); vit3d_nano at learning rate 0.1 had
        0.23 to 0.29 after 75 steps and 0.10 to 0.15 after 200. 0 for methods that can't collapse."""
        spread_share: float = 0.3
        """Least `embedding_std` of the probe set, likewise. Healthy: 0.97; at 100 times the rate: 0.15. A share, as
        untrained encoders already have cosines of 0.99 between crops; 1 - cosine goes as the square of this spread.
        0 for methods that can't collapse (`Method.may_collapse`): sound runs of `mae` came down to 0.19."""
        most_loss_lnk: float = 1.5
        """Most loss in ln k; 1 is a student that knows nothing. Healthy: 1.24."""
        loss_rise: float = 1.5
        """For methods without `loss_lnk`: most loss as a multiple of the first window's mean. Not measured."""

        def __post_init__(self) -> None:
            """Raises ValueError for counts below 1."""
            if self.window < 1 or self.grace < 0:
                raise ValueError(
                    f"CollapseMonitor needs window >= 1 and grace >= 0, got window {self.window}, grace {self.grace}"
                )

        def build(self) -> "CollapseMonitor":
            """A monitor without history."""
            return CollapseMonitor(self)

    def __init__(self, config: Config) -> None:
        self.config = config
        self.alarms: list[Alarm] = []
        """The first of each kind, in order."""
        self._recent: dict[str, _Recent] = {}
        self._first: dict[str, float] = {}

    def step(self, step: int, metrics: Mapping[str, float]) -> Alarm | None:
        """The first thing wrong with a step's metrics, None where nothing is. NaN or inf in any of them counts."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                return self._raise("nan", f"{name} is {value}", step)
        means = {}
        for name in ("loss", "loss_lnk", "teacher_entropy_lnk", "teacher_kl_lnk"):
            if name in metrics:
                recent = self._recent.setdefault(name, _Recent(deque(maxlen=self.config.window)))
                recent.values.append(metrics[name])
                if len(recent.values) == self.config.window:
                    means[name] = sum(recent.values) / self.config.window
                    self._first.setdefault(name, means[name])
        if step < self.config.grace:
            return None
        low, high = self.config.entropy_lnk
        entropy, kl = means.get("teacher_entropy_lnk"), means.get("teacher_kl_lnk")
        if entropy is not None and entropy < low:
            return self._raise(
                "certain", f"the teacher's entropy is {entropy:.4f} ln k, below {low}: one prototype takes all", step
            )
        if entropy is not None and entropy > high:
            return self._raise(
                "uniform", f"the teacher's entropy is {entropy:.4f} ln k, above {high}: it says nothing of crops", step
            )
        if kl is not None and kl < self.config.least_kl_lnk:
            return self._raise(
                "constant",
                f"KL(teacher, student) is {kl:.5f} ln k, below {self.config.least_kl_lnk}: one target for all crops",
                step,
            )
        name = "loss_lnk" if "loss_lnk" in means else "loss"
        if name in means:
            bound = self.config.most_loss_lnk if name == "loss_lnk" else self._rise(self._first[name])
            if means[name] > bound:
                return self._raise("loss", f"{name} is {means[name]:.4f}, above {bound:.4f}", step)
        return None

    def probe(self, step: int, figures: Mapping[str, float]) -> Alarm | None:
        """The same for figures of held-out features: `effective_rank` and `embedding_std`, each against its first."""
        for name, value in figures.items():
            if not math.isfinite(value):
                return self._raise("nan", f"{name} of the probe set is {value}", step)
        bounds: tuple[tuple[str, Kind, float], ...] = (
            ("effective_rank", "rank", self.config.rank_share),
            ("embedding_std", "spread", self.config.spread_share),
        )
        for name, kind, share in bounds:
            if name not in figures:
                continue
            first = self._first.setdefault(f"probe/{name}", figures[name])
            if figures[name] < share * first:
                return self._raise(
                    kind, f"{name} fell from {first:.4g} to {figures[name]:.4g}, below {share} of its start", step
                )
        return None

    def _rise(self, first: float) -> float:
        """For losses that may be negative, too."""
        return first + (self.config.loss_rise - 1) * abs(first)

    def _raise(self, kind: Kind, sentence: str, step: int) -> Alarm:
        alarm = Alarm(kind=kind, sentence=f"{sentence} (step {step})", step=step)
        if kind not in {known.kind for known in self.alarms}:
            self.alarms.append(alarm)
        return alarm

    def state(self) -> dict[str, Any]:
        """All that decides what comes next, as plain values: `load` of it continues as if nothing had been."""
        return {
            "recent": {name: list(recent.values) for name, recent in self._recent.items()},
            "first": dict(self._first),
            "alarms": [asdict(alarm) for alarm in self.alarms],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave."""
        window = self.config.window
        self._recent = {name: _Recent(deque(values, maxlen=window)) for name, values in state["recent"].items()}
        self._first = dict(state["first"])
        self.alarms = [Alarm(**alarm) for alarm in state["alarms"]]


@dataclass
class _Recent:
    values: deque[float] = field(default_factory=deque)
