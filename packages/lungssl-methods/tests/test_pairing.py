from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lungssl_data.batch import PairBatch
from lungssl_methods.pairing import PairPolicy, pair_weight, policy_weights

# Views of a batch with 1 global and 2 local views per slot: slots 0 1 | 0 1 0 1; teachers are the first two.


def test_all_is_ones_minus_eye(make_batch: Callable[..., PairBatch]) -> None:
    weight = pair_weight(make_batch(3), "all")
    assert weight.shape == (6, 2, 3)
    assert torch.equal(weight, (torch.ones(6, 2) - torch.eye(6, 2))[:, :, None].expand(6, 2, 3))


def test_cross_pairs_have_different_slots_and_within_pairs_the_same(make_batch: Callable[..., PairBatch]) -> None:
    batch = make_batch(2)
    cross = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0]], dtype=torch.float32)
    within = torch.tensor([[0, 0], [0, 0], [1, 0], [0, 1], [1, 0], [0, 1]], dtype=torch.float32)
    assert torch.equal(pair_weight(batch, "cross")[:, :, 0], cross)
    assert torch.equal(pair_weight(batch, "within")[:, :, 0], within)


def test_mixed_is_a_point_between_the_two(make_batch: Callable[..., PairBatch]) -> None:
    batch = make_batch(2, globals_per_slot=2)
    parts = 0.3 * pair_weight(batch, "cross") + 2.0 * pair_weight(batch, "within")
    torch.testing.assert_close(pair_weight(batch, (0.3, 2.0)), parts)
    torch.testing.assert_close(pair_weight(batch, (1.0, 1.0)), pair_weight(batch, "all"))


@pytest.mark.parametrize("policy", ["all", "cross", "within", (0.5, 1.0)])
def test_no_view_is_its_own_teacher(make_batch: Callable[..., PairBatch], policy: PairPolicy) -> None:
    weight = pair_weight(make_batch(2, globals_per_slot=3), policy)
    assert weight.shape == (10, 6, 2)
    assert (weight.diagonal(dim1=0, dim2=1) == 0).all()


def test_patients_with_one_scan_count_as_many_pairs_as_patients_with_two(make_batch: Callable[..., PairBatch]) -> None:
    assert torch.equal(pair_weight(make_batch(paired=True), "cross"), pair_weight(make_batch(paired=False), "cross"))


def test_a_view_that_fell_into_padding_is_in_no_pair(make_batch: Callable[..., PairBatch]) -> None:
    batch = make_batch(2)
    valid = batch.views[1].valid.clone()
    valid[0] = False
    views = list(batch.views)
    views[1] = replace(views[1], valid=valid)
    weight = pair_weight(replace(batch, views=tuple(views)), "all")
    assert (weight[1, :, 0] == 0).all() and (weight[:, 1, 0] == 0).all()
    assert weight[0, :, 0].tolist() == [0.0, 0.0] and weight[2, :, 0].tolist() == [1.0, 0.0]
    assert torch.equal(weight[:, :, 1], torch.ones(6, 2) - torch.eye(6, 2))


def test_a_policy_without_pairs_is_refused(make_batch: Callable[..., PairBatch]) -> None:
    with pytest.raises(ValueError, match=r"'within' leaves no student-teacher pair .*add local views"):
        pair_weight(make_batch(locals_per_slot=0), "within")


@pytest.mark.parametrize("policy", [(0.0, 0.0), (-1.0, 1.0)])
def test_impossible_weights_are_refused(policy: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be one of all, cross, within, or two weights"):
        policy_weights(policy)


def test_global_views_must_come_first(make_batch: Callable[..., PairBatch]) -> None:
    batch = make_batch(1)
    with pytest.raises(ValueError, match="global views must come before local ones"):
        pair_weight(replace(batch, views=batch.views[::-1]), "all")
