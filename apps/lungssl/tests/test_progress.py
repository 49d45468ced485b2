import pytest
from lungssl.training.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.4, "7 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_holds_loss_entropy_rate_time_left_and_data_wait() -> None:
    progress = Progress(111, 10, say=print, note=print)
    progress.update(11, {}, wait_s=9.0)  # the first step opens files: not counted
    progress.update(12, {}, wait_s=2.0)
    line = progress.line(61, {"loss": 6.25, "teacher_entropy_lnk": 0.8125, "lr": 3e-4, "other": 1.0}, elapsed_s=25.0)
    assert line == (
        "step 61/111  loss 6.25  teacher_entropy_lnk 0.8125  lr 0.0003  2.00 steps/s, 25 s left  data wait 8%"
    )


def test_waiting_for_data_comes_with_advice() -> None:
    progress = Progress(10, 0, say=print, note=print)
    progress.update(1, {}, wait_s=0.0)
    progress.update(2, {}, wait_s=4.0)
    assert progress.line(6, {}, elapsed_s=10.0).endswith("data wait 40%  (raise train.workers)")


def test_the_last_step_is_always_printed() -> None:
    said: list[str] = []
    progress = Progress(2, 0, say=said.append, note=said.append)
    progress.update(1, {"loss": 1.0}, 0.0)
    assert said == []
    progress.update(2, {"loss": 0.5}, 0.0)
    assert len(said) == 1 and said[0].startswith("step 2/2  loss 0.5")
