"""Whether a pretraining run learned anything, judged from its held-out evaluations alone."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one pass over the held-out batches gave, in `eval()`."""

    step: int
    """Optimizer steps taken before it."""
    loss: float
    teacher_entropy_lnk: float | None = None
    """The teacher's entropy in units of ln k; None for methods without a teacher."""
    teacher_kl_lnk: float | None = None
    """KL(teacher, student) in units of ln k: the loss less the teacher's entropy, what the student has yet to learn."""
    landmark_mm: float | None = None
    """Median error of landmarks looked up by the features (`ProbeSet.figures`); None where nothing corresponds."""
    landmark_floor_mm: float | None = None
    """The least that this error can be."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer, and why, in a plain sentence with the numbers."""

    learned: bool
    sentence: str


@dataclass(frozen=True, kw_only=True)
class LearningCheck:
    """Learned means, in a run without an alarm: the held-out loss fell and, where there is a teacher, the student came
    closer to it; or landmarks are found better than at the start. And a teacher is neither uniform nor certain.

    A teacher that sharpens moves away from its student, so that loss and KL can rise while features gain: landmarks, of
    features that nothing but training changes, are evidence of their own. A run that collapses can gain there, too (a
    teacher at momentum 0 did, by 4 to 11 %), and where features are one, predicting them is easy (a `jepa` fell to a
    hundredth of its loss as its spread fell to a seventh), hence the alarms.

    The loss at the end is the mean of the last `window` evaluations. It is compared with the highest mean of `window`
    consecutive evaluations, or single first one, up to the middle of the run, not with the first: a DINO starts with
    student equal to teacher and no centre, so that its loss rises to about ln k in the first steps, learning or not. A
    run with learning rate 0 stays there.
    """

    margin: float = 0.03
    """Least fall of the loss, as a share of where it fell from. At learning rate 0 `mae` falls by exactly 0; `dino` by
    up to 0.031, as its averages settle: there, `kl_margin` is what tells."""
    kl_margin: float = 0.15
    """Least fall of KL(teacher, student), likewise. A loss can fall by the teacher's entropy alone. Measured over 200
    steps of `dino_vit_nano` on a 5 mm cache of four real scans, another patient held out, two versions of the recipe,
    seeds 0 to 2 (docs/log.md): 0.34 to 0.65 at the recipe's rate, where the loss fell by 0.04 to 0.20; at rate 0 -0.02
    to 0.05."""
    landmark_margin: float = 0.03
    """Least fall of the landmark error, as a share of its start. `benchmarks/bench_collapse.py`: 0.046 to 0.088 in
    sound runs of `dino_vit_nano` (three seeds) and `phase_dino_vit_nano`, at most 0.004 in three neither centred nor
    sharpened; at rate 0 nothing moves. A rise by as much is said, too. Not as a share of what it exceeds its floor by:
    on a grid of 22 mm half a millimetre was a third of that."""
    window: int = 2
    """Evaluations averaged at the end and at the peak."""
    entropy_lnk: tuple[float, float] = (0.2, 0.95)
    """Open bounds of the teacher's entropy: above, all crops look alike to it (`ssl.md` B.0); below, it has collapsed
    onto few prototypes."""
    warmup: float = 0.5
    """Share of the run after which the entropy must keep to its bounds: centre and temperature have settled."""

    def judge(self, history: Sequence[Evaluation], *, alarms: Sequence[str] = ()) -> Verdict:
        """Judge evaluations in the order of their steps; `alarms` are those of the collapse monitor.

        Raises ValueError for fewer than `window` + 1 evaluations, or steps that don't rise.
        """
        steps = [evaluation.step for evaluation in history]
        if len(history) <= self.window or steps != sorted(set(steps)):
            raise ValueError(
                f"LearningCheck needs at least {self.window + 1} evaluations at rising steps, got steps {steps}; "
                f"evaluate more often"
            )
        settled = [e for e in history if e.step >= self.warmup * steps[-1]]
        entropies = {e.step: e.teacher_entropy_lnk for e in settled if e.teacher_entropy_lnk is not None}
        low, high = self.entropy_lnk
        for step, entropy in entropies.items():
            if not low < entropy < high:
                kind = "collapsed onto few prototypes" if entropy <= low else "uniform: all crops look alike to it"
                return Verdict(
                    learned=False,
                    sentence=f"Not learning: the teacher is {kind}; its entropy is {entropy:.3f} ln k at step {step}, "
                    f"outside ({low}, {high}).",
                )
        fell, sentence = self._loss_fell(history, steps)
        gain, landmarks = self._landmark_gain(history)
        if entropies and fell:
            sentence += (
                f", teacher entropy stayed within {min(entropies.values()):.3f} and {max(entropies.values()):.3f} ln k"
            )
        sentence += landmarks
        if fell and not alarms:
            worse = "; its features find landmarks worse than at the start" if gain <= -self.landmark_margin else ""
            return Verdict(learned=True, sentence=f"Learning: {sentence}{worse}.")
        if gain >= self.landmark_margin and not alarms:
            return Verdict(learned=True, sentence=f"Learning, by its landmarks: {sentence}.")
        heard = "; alarms were raised" if alarms else ""
        return Verdict(learned=False, sentence=f"Not learning: {sentence}{heard}.")

    def _loss_fell(self, history: Sequence[Evaluation], steps: Sequence[int]) -> tuple[bool, str]:
        """Whether the loss, and KL(teacher, student) where there is one, fell by their margins; in words."""
        start, end = self._start_and_end([evaluation.loss for evaluation in history], steps)
        fall = (start - end) / abs(start) if start else 0.0  # a contrast without a stranger has a loss of 0
        sentence = f"held-out loss went from {start:.4f} to {end:.4f} ({-fall:+.1%})"
        # Written so that NaN fails.
        if not fall >= self.margin:
            return False, f"{sentence}, needed is {-self.margin:+.1%} or less"
        divergences = [e.teacher_kl_lnk for e in history if e.teacher_kl_lnk is not None]
        if divergences:
            start, end = self._start_and_end(divergences, steps)
            fall = (start - end) / start if start else 0.0  # a student that equals its teacher has nothing to learn
            sentence += f", KL(teacher, student) from {start:.3f} to {end:.3f} ln k ({-fall:+.0%})"
            if not fall >= self.kl_margin:
                return False, f"{sentence}, needed is {-self.kl_margin:+.0%} or less"
        return True, sentence

    def _landmark_gain(self, history: Sequence[Evaluation]) -> tuple[float, str]:
        """Share by which the landmark error fell from the first evaluation on; in words."""
        known = [e for e in history if e.landmark_mm is not None and e.landmark_floor_mm is not None]
        if not known:
            return 0.0, ""
        errors = [e.landmark_mm for e in known if e.landmark_mm is not None]
        floor = known[0].landmark_floor_mm or 0.0
        end = sum(errors[-self.window :]) / len(errors[-self.window :])
        gain = (errors[0] - end) / errors[0] if errors[0] else 0.0
        return gain, f"; landmarks from {errors[0]:.1f} to {end:.1f} mm, of which the grid alone has {floor:.1f}"

    def _start_and_end(self, values: Sequence[float], steps: Sequence[int]) -> tuple[float, float]:
        """The peak of the first half (mean of a window, or the first value) and the mean of the last window."""
        means = [sum(values[i : i + self.window]) / self.window for i in range(len(values) - self.window + 1)]
        first_half = [m for m, step in zip(means, steps[self.window - 1 :], strict=True) if 2 * step <= steps[-1]]
        return max([values[0], *first_half]), means[-1]
