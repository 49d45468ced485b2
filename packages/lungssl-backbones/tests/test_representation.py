import math

import pytest
import torch
from lungssl_backbones.representation import (
    alignment,
    effective_rank,
    knn_labels,
    landmark_error_mm,
    lidar,
    linear_cka,
    off_diagonal_cosine,
    paired_retrieval,
    pca_colours,
    phase_auc,
    rankme,
    uniformity,
)


def test_rankme_of_k_equal_singular_values_is_k() -> None:
    assert rankme(torch.eye(7, 12) * 3) == pytest.approx(7, rel=1e-4)


def test_rankme_of_a_known_spectrum() -> None:
    # p = (3/4, 1/4): exp(-(3/4 ln 3/4 + 1/4 ln 1/4)) = 4 / 3**(3/4)
    assert rankme(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75, rel=1e-5)


def test_rankme_counts_a_constant_as_one_dimension_and_effective_rank_as_none() -> None:
    constant = torch.randn(1, 16).expand(50, -1)
    assert rankme(constant) == pytest.approx(1, abs=1e-3)
    assert effective_rank(constant) == 0
    assert rankme(torch.zeros(5, 3)) == effective_rank(torch.zeros(5, 3)) == 0


def test_effective_rank_of_a_known_spectrum_ignores_the_mean() -> None:
    # Columns at +-3 and +-1, orthogonal and centred: singular values 6 and 2, p = (0.75, 0.25).
    features = torch.tensor([[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]])
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_rank(features) == pytest.approx(expected, rel=1e-6)
    assert effective_rank(features + torch.tensor([100.0, -7.0])) == pytest.approx(expected, rel=1e-6)


def test_retrieval_finds_the_twin_whatever_its_length_and_collapse_finds_nobody() -> None:
    torch.manual_seed(0)
    exhale = torch.randn(40, 16)
    exact = paired_retrieval(exhale, 3 * exhale)
    assert (exact.top1, exact.top5, exact.mrr, exact.n) == (1.0, 1.0, 1.0, 40)
    random = paired_retrieval(torch.randn(400, 8), torch.randn(400, 8))
    assert random.top1 < 0.02 and random.mrr < 0.04
    collapsed = paired_retrieval(torch.ones(40, 16), torch.ones(40, 16))
    assert (collapsed.top1, collapsed.top5) == (0.0, 0.0)
    assert collapsed.mrr == pytest.approx(1 / 40)  # ties count against


def test_retrieval_counts_ranks() -> None:
    # Unit vectors at these degrees; the twin of row 0 is the third nearest, of row 1 the nearest.
    exhale, inhale = (torch.deg2rad(torch.tensor(degrees)) for degrees in ([0.0, 90.0, 180.0], [40.0, 95.0, 5.0]))
    circle = [torch.stack([a.cos(), a.sin()], dim=1) for a in (exhale, inhale)]
    result = paired_retrieval(*circle)
    assert result.top1 == pytest.approx(1 / 3)
    assert 1 / 3 < result.mrr < 1
    assert result.top5 == 1.0


def test_landmark_error_is_the_distance_of_the_best_match_in_mm() -> None:
    candidates = torch.eye(4)
    candidates_mm = torch.tensor([[0.0, 0.0, 0.0], [3.0, 4.0, 0.0], [0.0, 0.0, 10.0], [7.0, 7.0, 7.0]])
    queries = torch.tensor([[0.1, 5.0, 0.0, 0.0], [0.0, 0.0, 0.2, 0.1]])
    error = landmark_error_mm(queries, candidates, candidates_mm=candidates_mm, truth_mm=torch.zeros(2, 3))
    assert error.tolist() == [5.0, 10.0]


def test_pca_colours_give_one_feature_one_colour_in_both_phases() -> None:
    torch.manual_seed(0)
    anatomy = torch.randn(200, 10) * torch.tensor([9.0, 5, 3, 1, 1, 1, 1, 1, 1, 1])
    exhale, inhale = anatomy[:150], anatomy[100:]
    both = torch.cat([exhale, inhale])
    exhale_rgb, inhale_rgb = pca_colours(exhale, fit_on=both), pca_colours(inhale, fit_on=both)
    torch.testing.assert_close(exhale_rgb[100:], inhale_rgb[:50])
    assert exhale_rgb.min() >= 0
    assert exhale_rgb.max() <= 1
    red = torch.corrcoef(torch.stack([exhale_rgb[:, 0], exhale[:, 0].double()]))[0, 1]
    assert abs(red) > 0.95


def test_pca_colours_do_not_depend_on_the_order_of_rows() -> None:
    torch.manual_seed(0)
    features = torch.randn(60, 5) * torch.tensor([5.0, 4, 3, 2, 1])
    order = torch.randperm(60)
    torch.testing.assert_close(pca_colours(features[order]), pca_colours(features)[order])


def test_pca_colours_of_two_dimensions_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"3 dimensions to fit on, got \(9, 2\)"):
        pca_colours(torch.ones(9, 2))


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


def test_collapsed_features_have_no_rank() -> None:
    constant = torch.full((16, 8), 0.3)
    assert effective_rank(constant) == 0.0
    assert off_diagonal_cosine(constant) == pytest.approx(1.0)
    line = torch.linspace(1, 2, 16)[:, None] * torch.randn(1, 8)
    assert effective_rank(line) == pytest.approx(1.0, abs=1e-3) and rankme(line) == pytest.approx(1.0, abs=1e-3)


def test_opposite_features_have_a_cosine_of_none() -> None:
    assert off_diagonal_cosine(torch.cat([torch.eye(8), -torch.eye(8)])) == pytest.approx(-1 / 15)


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


def test_linear_cka_ignores_rotation_and_scale_and_equals_the_kernels_form() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 6)
    turned, _ = torch.linalg.qr(torch.randn(6, 6))
    assert linear_cka(x, 3 * x @ turned + 5) == pytest.approx(1, abs=1e-6)
    y = torch.randn(40, 9)
    centre = torch.eye(40) - 1 / 40
    k, m = (centre @ (v @ v.T) @ centre for v in (x, y))
    assert linear_cka(x, y) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())), rel=1e-4)
    assert math.isnan(linear_cka(x, torch.ones(40, 2)))


def test_lidar_counts_the_directions_that_tell_patients_apart() -> None:
    torch.manual_seed(1)
    patients = torch.zeros(200, 12)
    patients[:, :4] = 10 * torch.randn(200, 4)
    views = patients[:, None] + 0.1 * torch.randn(200, 6, 12)
    assert lidar(views) == pytest.approx(4, rel=0.05)
    assert lidar(0.1 * torch.randn(200, 6, 12)) == pytest.approx(12, rel=0.1)  # nothing tells them apart: noise spreads
    assert lidar(torch.ones(3, 2, 4)) == 0
    with pytest.raises(ValueError, match="2 patients with 2 views"):
        lidar(torch.ones(3, 1, 4))


def test_nearest_neighbours_vote_by_cosine() -> None:
    known = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    queries = torch.tensor([[5.0, 0.2], [0.1, 0.3], [-2.0, 0.1]])
    assert knn_labels(queries, known, labels, k=3).tolist() == [0, 1, 2]  # the last: one near against two far
    assert knn_labels(queries, known, labels, k=1).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="1 to the 5 known"):
        knn_labels(queries, known, labels)


def test_alignment_and_uniformity_of_known_points() -> None:
    corners = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, -1.0]])
    assert alignment(corners, 7 * corners) == 0 and alignment(corners, -corners) == 4
    # of six pairs four are sqrt(2) apart and two 2
    assert uniformity(corners) == pytest.approx(math.log((4 * math.exp(-4) + 2 * math.exp(-8)) / 6), rel=1e-9)
    assert uniformity(torch.ones(3, 5)) == pytest.approx(0, abs=1e-9)
