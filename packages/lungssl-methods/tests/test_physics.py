"""T13: mass, expansion and their signs."""

import math

import pytest
import torch
from lungssl_data.batch import HU_WINDOW
from lungssl_data.views import scale_hu
from lungssl_methods.physics import (
    compressed_hu,
    jacobian_of_map,
    log_jacobian_from_density,
    mass_residual,
    tissue_fraction,
    to_hu,
    undisturbed_hu,
)
from lungssl_ops.ct_views import ViewTable, ct_views, view_affine


def grid(n: int, spacing_mm: tuple[float, float, float]) -> torch.Tensor:
    axes = [torch.arange(n, dtype=torch.float64) * h for h in spacing_mm]
    return torch.stack(torch.meshgrid(*axes[::-1], indexing="ij")[::-1])[None]


def test_a_uniform_expansion_by_a_half_takes_minus_700_to_minus_800_hu() -> None:
    inhale, jacobian = torch.tensor([-800.0], dtype=torch.float64), torch.tensor([1.5], dtype=torch.float64)
    assert compressed_hu(inhale, jacobian).item() == -700.0
    exhale = torch.tensor([-700.0], dtype=torch.float64)
    there = torch.tensor([True])
    assert mass_residual(exhale, inhale, jacobian, there).item() == pytest.approx(0.0, abs=1e-12)
    found = log_jacobian_from_density(tissue_fraction(exhale), tissue_fraction(inhale))
    assert found.item() == pytest.approx(math.log(1.5))
    assert inhale.item() < exhale.item()  # expansion lowers HU
    wrong = mass_residual(exhale, inhale, torch.ones(1, dtype=torch.float64), there)
    assert wrong.item() == pytest.approx(0.1)
    assert mass_residual(exhale, inhale, jacobian, ~there).item() == 0.0


def test_a_views_own_shift_and_gamma_are_undone() -> None:
    size, views = (8, 8, 8), 3
    hu = torch.randint(-950, 300, (1, *size), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    shift_hu, gamma = torch.tensor([-10.0, 0.0, 10.0]), torch.tensor([0.9, 1.0, 1.1])
    table = ViewTable(
        volume=torch.zeros(views, dtype=torch.int64),
        affine=view_affine(size, torch.full((views, 3), 3.5), torch.eye(3).expand(views, 3, 3)),
        window_hu=torch.tensor([HU_WINDOW]).expand(views, 2),
        shift_hu=shift_hu,
        gamma=gamma,
    )
    image = ct_views(hu, table, size)
    assert (to_hu(image)[0, 0] - hu[0]).abs().max() > 20.0
    found = undisturbed_hu(image, shift_hu=shift_hu, gamma=gamma)
    torch.testing.assert_close(found, hu.float().expand_as(found), atol=0.01, rtol=0)


def test_network_input_comes_back_as_hu() -> None:
    hu = torch.tensor([-1200.0, -1000.0, -700.0, 0.0, 400.0, 900.0])
    torch.testing.assert_close(to_hu(scale_hu(hu)), hu.clamp(-1000, 400), atol=1e-3, rtol=0)


def test_an_affine_map_has_the_determinant_of_its_matrix() -> None:
    spacing_mm = (2.0, 3.0, 4.0)
    matrix = torch.tensor([[1.2, 0.1, 0.0], [0.0, 1.1, -0.2], [0.3, 0.0, 0.9]], dtype=torch.float64)
    place = torch.einsum("ij,bjzyx->bizyx", matrix, grid(5, spacing_mm))
    found = jacobian_of_map(place, spacing_mm)
    torch.testing.assert_close(found, torch.full_like(found, torch.linalg.det(matrix).item()))


def test_finite_differences_of_a_wave_converge_with_the_square_of_the_step() -> None:
    errors = []
    for n in (9, 17, 33):
        h = 8.0 / (n - 1)
        x = grid(n, (h, h, h))
        bend = 0.3 * torch.sin(x)
        place = x + bend
        exact = (1 + 0.3 * torch.cos(x)).prod(dim=1)
        inner = (slice(None), *(slice(1, -1),) * 3)
        errors.append((jacobian_of_map(place, (h, h, h)) - exact)[inner].abs().max().item())
    assert 3.0 < errors[0] / errors[1] < 5.0 and 3.0 < errors[1] / errors[2] < 5.0
