import pytest
import torch
from lungssl_methods.variance import barlow_twins, direction_spread, spread_terms, vicreg_terms

# T9


def _whitened(n: int = 8, d: int = 3) -> torch.Tensor:
    """Rows of mean 0 whose channels are orthogonal with a variance of 4 (over n - 1)."""
    columns = torch.linalg.qr(torch.cat([torch.ones(n, 1), torch.randn(n, d)], dim=1).double())[0]
    return 2.0 * (n - 1) ** 0.5 * columns[:, 1:]


def test_constant_features_cost_25_less_the_floor_of_the_deviation() -> None:
    x = torch.full((6, 4), 0.3)
    invariance, variance, covariance = vicreg_terms(x, x)
    assert (25 * invariance + 25 * variance + covariance).item() == pytest.approx(24.75, abs=1e-5)
    assert invariance.item() == 0.0 and covariance.item() == pytest.approx(0.0, abs=1e-12)


def test_whitened_features_cost_only_their_difference() -> None:
    x = _whitened()
    invariance, variance, covariance = vicreg_terms(x, x + 0.5)
    assert invariance.item() == pytest.approx(0.25)
    assert variance.item() == 0.0 and covariance.item() == pytest.approx(0.0, abs=1e-20)


def test_the_covariance_of_two_channels_is_the_known_one() -> None:
    # deviations of -1.25, -1.25, 0.75, 1.75 and -2.25, -1.25, 0.75, 2.75: their products sum to 9.75, over n - 1 = 3;
    # twice squared off the diagonal, over 2 channels, for both views
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 3.0], [3.0, 5.0]])
    covariance = torch.cov(x.T)[0, 1].item()
    assert covariance == pytest.approx(3.25)
    assert vicreg_terms(x, x)[2].item() == pytest.approx(2 * 2 * 3.25**2 / 2, rel=1e-6)


def test_each_views_missing_spread_counts_half() -> None:
    x = _whitened()
    flat = torch.zeros_like(x)
    assert vicreg_terms(x, flat)[1].item() == pytest.approx((1 - 1e-2) / 2)


def test_the_variance_term_pushes_a_nearly_collapsed_batch_apart() -> None:
    x = (1e-3 * torch.randn(8, 4)).requires_grad_()
    loss = vicreg_terms(x, x)[1]
    (gradient,) = torch.autograd.grad(loss, x)
    assert vicreg_terms(x - gradient, x - gradient)[1] < loss


def test_barlow_twins_is_zero_for_decorrelated_equal_views_and_d_for_collapsed_ones() -> None:
    x = _whitened()
    assert barlow_twins(x, x).item() == pytest.approx(0.0, abs=1e-9)
    assert barlow_twins(torch.ones(6, 5), torch.ones(6, 5)).item() == pytest.approx(5.0, abs=1e-5)


def test_barlow_twins_weighs_redundancy_as_told() -> None:
    # two equal channels: each of the two entries off the diagonal is 1
    x = torch.randn(9, 1).double().expand(-1, 2)
    assert barlow_twins(x, x, redundancy_weight=0.25, eps=0.0).item() == pytest.approx(0.5, rel=1e-9)


def test_barlow_twins_does_not_change_with_scale_and_offset() -> None:
    x, y = torch.randn(9, 3).double(), torch.randn(9, 3).double()
    scale = torch.tensor([0.5, 2.0, 9.0]).double()
    changed = barlow_twins(x * scale + 3.0, y - 1.0, eps=0.0)
    assert changed.item() == pytest.approx(barlow_twins(x, y, eps=0.0).item(), rel=1e-9)


def test_gradients_are_those_of_the_losses() -> None:
    x, y = (0.3 * torch.randn(5, 3).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(barlow_twins, (x, y))
    assert torch.autograd.gradcheck(vicreg_terms, (x, y))


def test_one_row_has_no_statistics() -> None:
    x = torch.ones(1, 4)
    with pytest.raises(ValueError, match="VICReg needs at least 2 rows for its statistics, got 1"):
        vicreg_terms(x, x)
    with pytest.raises(ValueError, match="barlow_twins needs at least 2 rows for its statistics, got 1"):
        barlow_twins(x, x)


def test_losses_are_float32_under_autocast() -> None:
    x, y = torch.randn(5, 3).bfloat16(), torch.randn(5, 3).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [barlow_twins(x, y), *vicreg_terms(x, y)]
    expected = [barlow_twins(x.float(), y.float()), *vicreg_terms(x.float(), y.float())]
    assert [a.item() for a in found] == [b.item() for b in expected]
    assert {a.dtype for a in found} == {torch.float32}


def test_directions_all_over_the_sphere_spread_by_1_and_equal_ones_by_0() -> None:
    assert direction_spread(torch.randn(2, 2000, 16)).item() == pytest.approx(1.0, abs=0.02)
    assert direction_spread(torch.ones(7, 16)).item() == pytest.approx(0.0, abs=1e-6)


def test_the_floor_of_one_batch_is_that_of_vicreg() -> None:
    hinge, covariance = spread_terms(torch.ones(5, 3))
    assert hinge.item() == pytest.approx(1 - 1e-4**0.5) and covariance.item() == 0.0
    whitened = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert [term.item() for term in spread_terms(whitened)] == pytest.approx([0.0, 0.0], abs=1e-7)
    # two equal channels of variance 4/3: covariance 4/3 twice, over 2 channels
    hinge, covariance = spread_terms(whitened[:, :1].expand(4, 2))
    assert hinge.item() == 0.0 and covariance.item() == pytest.approx((4 / 3) ** 2)
    with pytest.raises(ValueError, match="at least 2 rows for its statistics, got 1"):
        spread_terms(torch.ones(1, 3))
