import hashlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lungssl_data.draws import draw_patients

PATIENTS = [f"p{i:03d}" for i in range(50)]


@given(draw=st.integers(0, 9), seed=st.integers(0, 99), order=st.permutations(PATIENTS[:12]))
def test_draws_are_nested_and_do_not_depend_on_the_order(draw: int, seed: int, order: list[str]) -> None:
    sizes = [draw_patients(order, n, draw=draw, seed=seed) for n in range(1, 13)]
    assert all(small == large[: len(small)] for small, large in itertools.pairwise(sizes))
    assert sorted(sizes[-1]) == PATIENTS[:12]
    assert sizes[4] == draw_patients(PATIENTS[:12], 5, draw=draw, seed=seed)


def test_the_first_patient_has_the_least_hash() -> None:
    expected = min(PATIENTS, key=lambda p: hashlib.sha256(b"7/2/" + p.encode()).hexdigest())
    assert draw_patients(PATIENTS, 1, draw=2, seed=7) == [expected]


def test_a_patient_who_joins_changes_at_most_one_name() -> None:
    for draw in range(20):
        before = set(draw_patients(PATIENTS[:-1], 5, draw=draw))
        assert len(before - set(draw_patients(PATIENTS, 5, draw=draw))) <= 1


def test_five_draws_differ() -> None:
    assert len({tuple(draw_patients(PATIENTS, 5, draw=draw)) for draw in range(5)}) == 5


@pytest.mark.parametrize("n", [0, 51])
def test_more_than_there_are_are_refused_with_both_numbers(n: int) -> None:
    with pytest.raises(ValueError, match=f"cannot draw {n} patients from 50"):
        draw_patients(PATIENTS, n, draw=0)


def test_a_patient_who_comes_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="1 patient ids come twice"):
        draw_patients([*PATIENTS, "p007"], 5, draw=0)
