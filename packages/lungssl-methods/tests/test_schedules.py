import math

import pytest
from lungssl_methods.schedules import auto_momentum, cosine_momentum, linear_warmup_then_constant, warmup_cosine


def test_warmup_cosine_at_its_corners() -> None:
    def lr(step: int) -> float:
        return warmup_cosine(step, base=1e-3, final=1e-5, warmup_steps=10, total_steps=111)

    assert lr(0) == pytest.approx(1e-4)
    assert lr(4) == pytest.approx(5e-4)
    assert lr(9) == pytest.approx(1e-3)
    assert lr(10) == pytest.approx(1e-3)
    assert lr(60) == pytest.approx((1e-3 + 1e-5) / 2)  # half of the 100 steps after warm-up
    assert lr(110) == pytest.approx(1e-5)
    assert lr(10_000) == pytest.approx(1e-5)


def test_without_warmup_it_starts_at_the_base() -> None:
    assert warmup_cosine(0, base=0.5, final=0.0, warmup_steps=0, total_steps=5) == 0.5
    assert warmup_cosine(0, base=0.5, final=0.1, warmup_steps=0, total_steps=1) == 0.5


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps 5 must be at least 0 and less than total_steps 5"):
        warmup_cosine(0, base=1.0, final=0.0, warmup_steps=5, total_steps=5)


def test_linear_warmup_then_constant_at_its_corners() -> None:
    values = [linear_warmup_then_constant(s, start=0.04, end=0.06, warmup_steps=30) for s in (0, 15, 30, 31, 1000)]
    assert values == pytest.approx([0.04, 0.05, 0.06, 0.06, 0.06])
    assert linear_warmup_then_constant(0, start=0.04, end=0.06, warmup_steps=0) == 0.06


def test_cosine_momentum_at_its_corners() -> None:
    values = [cosine_momentum(s, base=0.99, total_steps=101) for s in (0, 50, 100)]
    assert values == pytest.approx([0.99, 0.995, 1.0])
    assert values[-1] == 1.0


def test_auto_momentum_is_dinos_at_batch_256_and_capped_in_short_runs() -> None:
    assert auto_momentum(effective_batch=256, total_steps=100_000) == pytest.approx(0.996)
    assert auto_momentum(effective_batch=16, total_steps=100_000) == pytest.approx(0.999750, abs=1e-6)
    short = auto_momentum(effective_batch=16, total_steps=2000)
    assert math.log(0.5) / math.log(short) == pytest.approx(100.0)
    assert auto_momentum(effective_batch=16, total_steps=200) == 0.95
