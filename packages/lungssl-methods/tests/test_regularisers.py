import math

import pytest
import torch
from lungssl_methods.regularisers import gram, koleo

ALONE = torch.arange(4)

# T6


def test_koleo_of_antipodal_and_of_orthonormal_rows() -> None:
    antipodal = torch.tensor([[1.0, 0.0], [-3.0, 0.0]], dtype=torch.float64)
    assert koleo(antipodal, ALONE[:2]).item() == pytest.approx(-math.log(2), abs=1e-6)
    orthonormal = torch.eye(4, dtype=torch.float64)
    assert koleo(orthonormal, ALONE).item() == pytest.approx(-math.log(math.sqrt(2)), abs=1e-6)


def test_koleo_of_equal_rows_is_finite_and_so_is_its_gradient() -> None:
    rows = torch.ones(4, 256, requires_grad=True)
    loss = koleo(rows, ALONE)
    loss.backward()
    assert loss.item() == pytest.approx(15.587, abs=2e-3)
    assert rows.grad is not None and torch.isfinite(rows.grad).all()


def test_koleo_does_not_push_a_patients_crops_apart() -> None:
    rows = torch.randn(4, 8, dtype=torch.float64)
    rows[1] = rows[0] + 1e-3
    twins = torch.tensor([0, 0, 1, 2])
    others = torch.nn.functional.normalize(rows, dim=-1)
    nearest = [min(torch.dist(others[i], others[j]).item() for j in range(4) if twins[i] != twins[j]) for i in range(4)]
    assert koleo(rows, twins).item() == pytest.approx(-sum(map(math.log, nearest)) / 4, rel=1e-6)
    assert koleo(rows, torch.zeros(4, dtype=torch.int64)).item() == 0.0


def test_koleo_and_gram_are_those_of_the_valid_rows() -> None:
    rows, valid = torch.randn(5, 8, dtype=torch.float64), torch.tensor([True, True, False, True, False])
    rows[2] = rows[0] + 1e-6  # the nearest of all, were it anything
    patients = torch.arange(5)
    expected = koleo(rows[valid], patients[valid])
    assert koleo(rows, patients, valid=valid).item() == pytest.approx(expected.item(), rel=1e-12)
    assert koleo(rows, patients, valid=~valid & (patients == 2)).item() == 0.0
    tokens, others = torch.randn(2, 5, 4, 8, dtype=torch.float64)
    expected = gram(tokens[valid], others[valid])
    assert gram(tokens, others, valid=valid).item() == pytest.approx(expected.item(), rel=1e-6)
    assert gram(tokens, others, valid=torch.zeros_like(valid)).item() == 0.0


def test_koleos_gradient_pushes_neighbours_apart() -> None:
    rows = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]], requires_grad=True)
    koleo(rows, ALONE[:3]).backward()
    assert rows.grad is not None
    moved = (rows - 0.01 * rows.grad).detach()
    assert torch.dist(moved[0], moved[1]) > torch.dist(rows[0], rows[1])


def test_gram_sees_similarities_and_not_the_features() -> None:
    tokens = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert gram(tokens, 3 * tokens @ rotation).item() == pytest.approx(0.0, abs=1e-12)
    other = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    loss = gram(tokens, other)
    loss.backward()
    first, second = (torch.nn.functional.normalize(x, dim=-1).detach() for x in (tokens, other))
    expected = torch.stack([(a @ a.T - b @ b.T).square().mean() for a, b in zip(first, second, strict=True)]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert tokens.grad is not None and other.grad is None
