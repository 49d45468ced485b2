import pytest
from lungssl_data.pair import CacheError
from lungssl_data.splits import FRACTIONS, assign_splits, keyed_person, same_spelling


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


def test_all_patients_of_a_person_are_in_one_split() -> None:
    names = [f"p{i}" for i in range(60)]
    persons = {name: f"person{i // 2}" for i, name in enumerate(names)}
    splits = assign_splits(names, {}, persons)
    assert all(splits[a] == splits[b] for a, b in zip(names[::2], names[1::2], strict=True))
    assert set(splits.values()) == set(FRACTIONS)


def test_a_patient_named_as_anothers_person_is_that_person() -> None:
    splits = assign_splits(["copd1", "lung250m104", *(f"p{i}" for i in range(20))], {}, {"lung250m104": "copd1"})
    assert splits["copd1"] == splits["lung250m104"]


def test_a_patient_joins_the_split_of_the_person() -> None:
    for split in FRACTIONS:
        assert assign_splits(["a", "b"], {"a": split}, {"a": "one", "b": "one"})["b"] == split


def test_one_person_in_two_splits_is_refused_with_both_patients() -> None:
    with pytest.raises(CacheError, match=r"patients b \(test\) and a \(train\) are or may be one person"):
        assign_splits(["a", "b", "c"], {"a": "train", "b": "test"}, {"a": "one", "b": "one", "c": "one"})


def test_a_collection_that_stays_together_goes_where_it_fits_best() -> None:
    names = [f"p{i}" for i in range(100)]
    splits = assign_splits(names, {}, dict.fromkeys(names[:40], "nlst"))
    assert {splits[name] for name in names[:40]} == {"train"}
    assert abs(sum(split == "train" for split in splits.values()) - 60) <= 1


def test_a_collection_alone_is_split_by_its_people() -> None:
    names = [f"p{i}" for i in range(40)]
    for person in ("nlst:{}", "nlst:?lung250m/{}"):
        splits = assign_splits(names, {}, {name: person.format(name) for name in names})
        assert set(splits.values()) == set(FRACTIONS)


def test_a_collection_goes_together_where_another_holds_its_people_under_other_names() -> None:
    own = {f"a{i}": f"nlst:{i}" for i in range(10)}
    other = {f"b{i}": f"nlst:?lung250m/{i}" for i in range(10)} | {f"c{i}": f"copd:{i}" for i in range(20)}
    splits = assign_splits([*own, *other], {}, own | other)
    assert len({splits[name] for name in (*own, *(n for n in other if n[0] == "b"))}) == 1
    assert len({splits[f"c{i}"] for i in range(20)}) == 3


def test_a_collection_that_was_parted_cannot_be_joined_by_one_that_holds_its_people() -> None:
    own = {f"a{i}": f"nlst:{i}" for i in range(10)}
    before = assign_splits(own, {}, own)
    with pytest.raises(CacheError, match="may be one person and in two splits"):
        assign_splits([*own, "b"], before, own | {"b": "nlst:?lung250m/1"})


def test_keyed_ids_part_and_join_the_same_people() -> None:
    key = bytes(range(32))
    plain = {f"a{i}": f"tcia-4dlung:{i}" for i in range(6)}
    plain |= {f"b{i}": f"tcia-4dlung:?lung250m/03{i}" for i in range(6)} | {f"c{i}": f"copd-{i}" for i in range(6)}
    plain |= {"d0": "copd-0", "e0": "Somebody:1"}
    keyed = {patient: keyed_person(person, key) for patient, person in plain.items()}
    assert not any("Somebody" in person or "copd" in person for person in keyed.values())
    for persons in (plain, keyed):
        splits = assign_splits(persons, {}, persons)
        assert len({splits[name] for name in persons if name[0] in "ab"}) == 1
        assert splits["c0"] == splits["d0"]
    alone = {patient: person for patient, person in keyed.items() if patient[0] == "a"}
    assert len(set(assign_splits(alone, {}, alone).values())) == 3


def test_a_person_is_the_same_however_spelt() -> None:
    persons = {"a": "Jos\u00e9 1", "b": "jose\u0301 1 "} | {f"p{i}": f"p{i}" for i in range(6)}
    assert same_spelling(persons["a"]) == same_spelling(persons["b"])
    for order in (list(persons), list(persons)[::-1]):
        splits = assign_splits(order, {}, persons)
        assert splits["a"] == splits["b"]
    key = bytes(range(32))
    assert keyed_person(persons["a"], key) == keyed_person(persons["b"], key)
