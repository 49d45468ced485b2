import math

import pytest
import torch
from lungssl_methods.spectrum import (
    effective_rank,
    embedding_std,
    off_diagonal_cosine,
    paired_retrieval,
    phase_auc,
    rankme,
)


def orthogonal(n: int, d: int) -> torch.Tensor:
    """Centred rows whose columns are orthonormal."""
    random = torch.randn(n, d, dtype=torch.float64)
    return torch.linalg.qr(random - random.mean(0)).Q


def test_the_rank_of_white_features_is_their_width() -> None:
    features = orthogonal(64, 8)
    assert effective_rank(features) == pytest.approx(8.0, rel=1e-9)
    assert effective_rank(features + 5.0) == pytest.approx(8.0, rel=1e-9)
    assert rankme(features) == pytest.approx(8.0, rel=1e-4)
    assert rankme(features + 5.0) < 4.0  # it sees the mean, as published


def test_ranks_of_two_singular_values_in_closed_form() -> None:
    features = orthogonal(32, 2) * torch.tensor([3.0, 1.0], dtype=torch.float64)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(features) == pytest.approx(math.exp(entropy), rel=1e-9)


def test_collapsed_features_have_no_rank_and_no_spread() -> None:
    constant = torch.full((16, 8), 0.3)
    assert effective_rank(constant) == 0.0 and embedding_std(constant) == pytest.approx(0.0, abs=1e-7)
    assert off_diagonal_cosine(constant) == pytest.approx(1.0)
    line = torch.linspace(1, 2, 16)[:, None] * torch.randn(1, 8)
    assert effective_rank(line) == pytest.approx(1.0, abs=1e-3) and rankme(line) == pytest.approx(1.0, abs=1e-3)


def test_spread_features_have_a_spread_of_one_and_a_cosine_of_none() -> None:
    features = torch.cat([torch.eye(8), -torch.eye(8)])
    assert embedding_std(features) == pytest.approx(1.0)
    assert off_diagonal_cosine(features) == pytest.approx(-1 / 15)


def test_retrieval_of_equal_of_random_and_of_constant_features() -> None:
    features = torch.randn(40, 16)
    assert paired_retrieval(features, 3 * features) == (1.0, 1.0)
    first, rank = paired_retrieval(torch.randn(400, 8), torch.randn(400, 8))
    assert first < 0.02 and rank < 0.04
    assert paired_retrieval(torch.ones(10, 4), torch.ones(10, 4)) == (0.0, 0.1)  # ties count against


def test_the_phase_is_found_where_it_is_written_and_nowhere_else() -> None:
    patient = torch.arange(30).repeat_interleave(2)
    inhale = torch.arange(60) % 2 == 1
    person = torch.randn(30, 8).repeat_interleave(2, 0)
    noise = torch.randn(60, 8)
    written = person + noise
    written[:, 0] += 6.0 * inhale
    assert phase_auc(written, inhale, patient) > 0.98
    aucs = [phase_auc(torch.randn(60, 8), inhale, patient) for _ in range(20)]
    assert abs(sum(aucs) / 20 - 0.5) < 0.08
    with pytest.raises(ValueError, match="needs scans of both phases, got 0 inhale and 60 exhale"):
        phase_auc(noise, torch.zeros(60, dtype=torch.bool), patient)
