from lungssl_data.splits import FRACTIONS, assign_splits


def test_shares_are_met_in_a_large_cohort() -> None:
    splits = assign_splits([f"p{i}" for i in range(200)], {})
    for split, share in FRACTIONS.items():
        assert abs(sum(s == split for s in splits.values()) - share * 200) <= 1


def test_three_patients_cover_all_splits() -> None:
    assert sorted(assign_splits(["a", "b", "c"], {}).values()) == ["test", "train", "val"]


def test_the_order_of_patients_does_not_matter() -> None:
    names = [f"p{i}" for i in range(17)]
    assert assign_splits(names, {}) == assign_splits(names[::-1], {})


def test_patients_keep_their_split_when_others_join() -> None:
    before = assign_splits([f"p{i}" for i in range(10)], {})
    after = assign_splits([f"p{i}" for i in range(30)], before)
    assert {patient: after[patient] for patient in before} == before
    assert len(after) == 30
