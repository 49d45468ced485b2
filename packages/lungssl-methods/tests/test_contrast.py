import math

import pytest
import torch
from lungssl_methods.contrast import chance_nats, dense_infonce, far_or_strangers, nt_xent, soft_positives


def _points() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)


# T8


@pytest.mark.parametrize(("n", "temperature", "expected"), [(4, 0.1, 0.000272), (8, 0.5, 1.062879)])
def test_aligned_orthonormal_rows_give_the_known_values(n: int, temperature: float, expected: float) -> None:
    z = torch.eye(n)
    loss = nt_xent(z, z, torch.arange(n), temperature).item()
    assert loss == pytest.approx(expected, abs=5e-7)
    assert loss == pytest.approx(math.log(1 + (2 * n - 2) * math.exp(-1 / temperature)), abs=1e-6)


def test_equal_rows_give_ln_2n_minus_1_which_is_chance() -> None:
    z, patients = torch.ones(4, 3), torch.arange(4)
    assert nt_xent(z, z, patients).item() == pytest.approx(1.945910, abs=1e-5)
    stranger = patients[:, None] != patients[None]
    assert chance_nats(stranger, torch.ones(4, dtype=torch.bool)).item() == pytest.approx(1.945910, abs=1e-6)


def test_rows_of_the_same_patient_are_never_negatives() -> None:
    z = torch.ones(4, 3)
    # patients of 2, 1 and 1 rows: 2 rows of each view have 2 strangers there, the other two have 3
    expected = (math.log(5) + math.log(7)) / 2
    patients = torch.tensor([3, 3, 1, 2])
    assert nt_xent(z, z, patients).item() == pytest.approx(expected, abs=1e-6)
    stranger = patients[:, None] != patients[None]
    assert chance_nats(stranger, torch.ones(4, dtype=torch.bool)).item() == pytest.approx(expected, abs=1e-6)


def test_a_batch_of_one_patient_costs_nothing_and_its_gradient_is_finite() -> None:
    first, second = (x.requires_grad_() for x in _points())
    loss = nt_xent(first, second, torch.zeros(5, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0 and first.grad is not None and not first.grad.any()


def test_rows_that_are_not_valid_might_as_well_not_be_there() -> None:
    first, second = _points()
    valid = torch.tensor([True, False, True, True, False])
    patients = torch.arange(5)
    fewer = nt_xent(first[valid], second[valid], patients[valid])
    assert nt_xent(first, second, patients, valid=valid).item() == pytest.approx(fewer.item(), rel=1e-12)
    assert nt_xent(first, second, patients, valid=torch.zeros(5, dtype=torch.bool)).item() == 0.0


def test_nt_xent_is_symmetric_and_knows_directions_only() -> None:
    first, second = _points()
    patients = torch.tensor([0, 1, 2, 2, 3])
    loss = nt_xent(first, second, patients)
    torch.testing.assert_close(nt_xent(second, first, patients), loss)
    torch.testing.assert_close(nt_xent(3.0 * first, 0.1 * second, patients), loss)
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(nt_xent(first[order], second[order], patients[order]), loss)


def test_gradients_are_those_of_the_loss() -> None:
    first, second = (x.requires_grad_() for x in _points())
    patients = torch.tensor([0, 1, 2, 2, 3])
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, patients), (first, second))
    positive = torch.rand(5, 5, dtype=torch.float64) * (torch.rand(5, 5) < 0.5)
    positive[2] = 0.0
    negative = (positive == 0) & (torch.rand(5, 5) < 0.7)
    assert torch.autograd.gradcheck(lambda a, b: dense_infonce(a, b, positive, negative), (first, second))


def test_losses_are_float32_under_autocast() -> None:
    first, second = (x.bfloat16() for x in _points())
    patients, eye = torch.arange(5), torch.eye(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = nt_xent(first, second, patients), dense_infonce(first, second, eye, eye == 0)
    assert [loss.dtype for loss in losses] == [torch.float32] * 2
    assert losses[0].item() == nt_xent(first.float(), second.float(), patients).item()
    assert losses[1].item() == dense_infonce(first.float(), second.float(), eye, eye == 0).item()


def test_with_hard_positives_it_is_plain_infonce() -> None:
    # two orthogonal points, temperature 1: each row is softmax([1, 0])
    z, eye = torch.eye(2), torch.eye(2)
    loss = dense_infonce(z, z, eye, eye == 0, temperature=1.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-6)
    same = torch.ones(6, 3)
    assert dense_infonce(same, same, torch.eye(6), torch.eye(6) == 0).item() == pytest.approx(math.log(6), rel=1e-6)


def test_soft_positives_are_best_matched_in_proportion_and_then_cost_their_entropy() -> None:
    # rows and columns of a symmetric matrix that sum to 1; logits that are its logarithm are the softmax's optimum
    share = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.5, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64)
    entropy = torch.special.entr(share).sum(1).mean().item()
    # a fourth channel gives all rows one length: then cosines to the axes over 1 / length are the first three
    rows = torch.cat([share.log(), torch.zeros(3, 1)], dim=1)
    length = rows.norm(dim=1).max()
    rows[:, 3] = (length**2 - rows.norm(dim=1) ** 2).clamp_min(0).sqrt()
    axes = torch.eye(3, 4, dtype=torch.float64)
    loss = dense_infonce(rows.requires_grad_(), axes, share, share == 0, temperature=1 / length.item())
    assert loss.item() == pytest.approx(entropy, rel=1e-9)
    (gradient,) = torch.autograd.grad(loss, rows)
    assert gradient[:, :3].abs().max() < 1e-9


def test_points_that_are_neither_positive_nor_negative_do_not_count() -> None:
    first, second = _points()
    positive = torch.eye(5, dtype=torch.float64)
    negative = torch.ones(5, 5, dtype=torch.bool).triu(2) | torch.ones(5, 5, dtype=torch.bool).tril(-2)
    forth_and_back = dense_infonce(first, second, positive, negative)
    logits = torch.cosine_similarity(first[:, None], second[None], dim=-1) / 0.1
    candidate = negative | positive.bool()
    expected = []
    for matrix, some in ((logits, candidate), (logits.T, candidate.T)):
        expected += [matrix[i][some[i]].logsumexp(0) - matrix[i, i] for i in range(5)]
    assert forth_and_back.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-9)


def test_rows_without_a_positive_are_in_no_term() -> None:
    first, second = _points()
    first.requires_grad_()
    positive = torch.diag(torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]))
    nothing = torch.zeros(5, 5)
    keep = positive.diagonal() > 0
    negative = keep[:, None] & keep[None] & (torch.eye(5) == 0)
    some = torch.eye(3)
    fewer = dense_infonce(first[keep], second[keep], some, some == 0)
    assert dense_infonce(first, second, positive, negative).item() == pytest.approx(fewer.item(), rel=1e-12)
    empty = dense_infonce(first, second, nothing, nothing.bool())
    empty.backward()
    assert empty.item() == 0.0 and first.grad is not None and not first.grad.any()


def test_soft_positives_fall_as_a_gaussian_and_end_at_three_sigma() -> None:
    distance = torch.tensor([[0.0, 3.0, 8.9], [9.1, 6.0, torch.nan], [torch.inf, 1.0, 2.0]])
    weight = soft_positives(distance, 3.0)
    assert weight[0].tolist() == pytest.approx([1.0, math.exp(-0.5), math.exp(-0.5 * (8.9 / 3) ** 2)], rel=1e-6)
    assert weight[1].tolist() == pytest.approx([0.0, math.exp(-2), 0.0], rel=1e-6)
    assert weight[2, 0] == 0.0
    assert soft_positives(distance, 0.0).tolist() == [[1.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3]


def test_negatives_are_far_points_and_other_patients_but_never_unknown_ones() -> None:
    # points 0 to 2 are one sample's; 3 another sample of that patient; 4 and 5 another patient's, 5 not known
    distance = torch.full((6, 6), torch.nan)
    distance[:3, :3] = torch.tensor([[0.0, 5.0, 30.0], [5.0, 0.0, 20.0], [30.0, 20.0, 0.0]])
    distance[3, 3] = distance[4, 4] = 0.0
    valid = torch.tensor([True] * 5 + [False])
    negative = far_or_strangers(distance, torch.tensor([7, 7, 7, 7, 8, 8]), valid, far_mm=20.0)
    pairs = {(i, j) for i, j in negative.nonzero().tolist() if i < j}
    assert pairs == {(0, 2), (0, 4), (1, 4), (2, 4), (3, 4)}
    assert torch.equal(negative, negative.T)
