import math
from dataclasses import replace

import pytest
from lungssl_methods.monitor import Evaluation, LearningCheck, Verdict


def _history(losses: list[float], entropies: list[float] | None = None) -> list[Evaluation]:
    pairs = zip(losses, entropies or [None] * len(losses), strict=True)
    return [Evaluation(step=20 * i, loss=loss, teacher_entropy_lnk=entropy) for i, (loss, entropy) in enumerate(pairs)]


# Held-out losses and entropies of 70 steps of `dino` at learning rate 0 on real scans (vit3d_nano, 4 samples a step),
# before embeddings were standardised (decision 0004).
ZERO_RATE_LOSSES = [7.8951, 8.2613, 8.3915, 8.4438, 8.4529, 8.4690, 8.4628, 8.4622]
ZERO_RATE_ENTROPIES = [0.9358, 0.9867, 0.9931, 0.9941, 0.9941, 0.9940, 0.9942, 0.9940]


def test_a_zero_learning_rate_dino_fails_by_loss_and_by_entropy() -> None:
    check = LearningCheck()
    verdict = check.judge(_history(ZERO_RATE_LOSSES))
    assert not verdict.learned and "held-out loss went from" in verdict.sentence
    fallen = [*ZERO_RATE_LOSSES[:-2], 7.0, 6.9]
    verdict = check.judge(_history(fallen, ZERO_RATE_ENTROPIES))
    assert not verdict.learned and "all crops look alike" in verdict.sentence


def test_a_flat_mae_fails_and_a_falling_one_passes() -> None:
    assert not LearningCheck().judge(_history([0.998] * 6)).learned
    verdict = LearningCheck().judge(_history([1.12, 0.98, 0.9, 0.85, 0.81, 0.79]))
    assert verdict.learned
    assert verdict.sentence == "Learning: held-out loss went from 1.1200 to 0.8000 (-28.6%)."


def test_a_dino_that_first_rises_is_compared_with_its_peak() -> None:
    verdict = LearningCheck().judge(_history([7.9, 8.3, 8.2, 7.9, 7.6, 7.4], [0.99, 0.98, 0.97, 0.93, 0.9, 0.88]))
    assert verdict.learned
    assert "from 8.2500 to 7.5000" in verdict.sentence and "within 0.880 and 0.930 ln k" in verdict.sentence


def test_a_fall_within_the_margin_or_a_late_rise_fails() -> None:
    assert not LearningCheck(margin=0.05).judge(_history([1.0, 0.99, 0.98, 0.97, 0.96, 0.96])).learned
    assert not LearningCheck().judge(_history([1.0, 0.8, 0.7, 0.8, 1.0, 1.1])).learned


def test_a_loss_that_falls_by_the_teachers_entropy_alone_fails() -> None:
    losses, entropies = [5.5, 5.8, 5.8, 5.6, 5.4], [0.70, 0.69, 0.66, 0.65, 0.63]

    def judge(divergences: list[float]) -> Verdict:
        lines = zip(losses, entropies, divergences, strict=True)
        history = [
            Evaluation(step=20 * i, loss=loss, teacher_entropy_lnk=entropy, teacher_kl_lnk=kl)
            for i, (loss, entropy, kl) in enumerate(lines)
        ]
        return LearningCheck().judge(history)

    verdict = judge([0.29, 0.32, 0.34, 0.33, 0.34])
    assert not verdict.learned
    assert "KL(teacher, student) from 0.330 to 0.335 ln k (+2%), needed is -15% or less" in verdict.sentence
    assert judge([0.29, 0.32, 0.30, 0.26, 0.22]).learned


def test_a_student_that_stays_equal_to_its_teacher_is_judged_and_not_divided_by() -> None:
    history = [
        Evaluation(step=20 * i, loss=loss, teacher_entropy_lnk=0.5, teacher_kl_lnk=0.0)
        for i, loss in enumerate([1.0, 0.9, 0.8, 0.7])
    ]
    verdict = LearningCheck().judge(history)
    assert not verdict.learned
    assert "KL(teacher, student) from 0.000 to 0.000 ln k (-0%), needed is -15% or less" in verdict.sentence


@pytest.mark.parametrize(("entropy", "reason"), [(0.1, "few prototypes"), (0.96, "alike"), (math.nan, "alike")])
def test_a_teacher_outside_its_bounds_after_warmup_fails(entropy: float, reason: str) -> None:
    losses = [8.0, 7.5, 7.0, 6.5, 6.0]
    assert LearningCheck().judge(_history(losses, [entropy, 0.5, 0.5, 0.5, 0.5])).learned
    verdict = LearningCheck().judge(_history(losses, [0.5, 0.5, 0.5, entropy, 0.5]))
    assert not verdict.learned and reason in verdict.sentence and "at step 60" in verdict.sentence


def _looked_up(losses: list[float], landmarks: list[float], floor: float = 19.3) -> list[Evaluation]:
    pairs = zip(losses, landmarks, strict=True)
    return [
        Evaluation(step=25 * i, loss=loss, landmark_mm=landmark, landmark_floor_mm=floor)
        for i, (loss, landmark) in enumerate(pairs)
    ]


def test_landmarks_found_better_are_evidence_where_the_loss_is_not_unless_there_was_an_alarm() -> None:
    risen = [5.5, 5.2, 5.3, 5.7, 5.9]
    sound = _looked_up(risen, [52.1, 51.8, 50.6, 49.9, 49.7])  # those of a sound dino
    verdict = LearningCheck().judge(sound)
    assert verdict.learned
    assert verdict.sentence == (
        "Learning, by its landmarks: held-out loss went from 5.5000 to 5.8000 (+5.5%), needed is -3.0% or less; "
        "landmarks from 52.1 to 49.8 mm, of which the grid alone has 19.3."
    )
    alarmed = LearningCheck().judge(sound, alarms=["embedding_std fell"])
    assert not alarmed.learned and alarmed.sentence.endswith("; alarms were raised.")
    # neither centred nor sharpened; at rate 0; without a number
    for landmarks in ([49.2, 49.3, 49.0, 49.0, 49.0], [49.2] * 5, [49.2, 49.3, math.nan, math.nan, math.nan]):
        assert not LearningCheck().judge(_looked_up(risen, landmarks)).learned


def test_a_loss_that_falls_by_a_collapse_is_no_learning() -> None:
    collapsed = _looked_up([0.439, 0.2, 0.05, 0.006, 0.005], [117.4, 115.0, 113.0, 112.0, 112.2])
    assert LearningCheck().judge(collapsed).learned
    verdict = LearningCheck().judge(collapsed, alarms=["embedding_std fell from 0.05448 to 0.007685"])
    assert not verdict.learned
    assert verdict.sentence.startswith("Not learning: held-out loss went from 0.4390 to 0.0055")
    assert verdict.sentence.endswith("; alarms were raised.")


def test_features_that_got_worse_while_the_loss_fell_are_told() -> None:
    verdict = LearningCheck().judge(_looked_up([1.16, 1.0, 0.9, 0.86], [32.8, 69.6, 80.1, 80.1], floor=20.1))
    assert verdict.learned and "from 32.8 to 80.1 mm" in verdict.sentence
    assert verdict.sentence.endswith("; its features find landmarks worse than at the start.")
    # half a millimetre on a grid of 22 mm says nothing
    fine = LearningCheck().judge(_looked_up([1.16, 1.0, 0.9, 0.86], [24.0, 24.3, 24.6, 24.6], floor=22.1))
    assert fine.learned and "worse" not in fine.sentence


def test_a_uniform_teacher_fails_whatever_its_landmarks_say() -> None:
    pairs = zip(_looked_up([8.0, 7.5, 7.0, 6.5], [50.0, 40.0, 30.0, 25.0]), [0.5, 0.5, 0.99, 0.99], strict=True)
    history = [replace(evaluation, teacher_entropy_lnk=entropy) for evaluation, entropy in pairs]
    assert "all crops look alike" in LearningCheck().judge(history).sentence


def test_a_loss_that_became_nan_fails() -> None:
    assert not LearningCheck().judge(_history([1.0, 0.9, 0.8, math.nan])).learned


def test_too_few_or_unordered_evaluations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 3 evaluations at rising steps, got steps \[0, 20\]"):
        LearningCheck().judge(_history([1.0, 0.9]))
    with pytest.raises(ValueError, match="rising steps"):
        LearningCheck().judge(_history([1.0, 0.9, 0.8])[::-1])
