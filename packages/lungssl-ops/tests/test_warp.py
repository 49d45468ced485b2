import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lungssl_ops.dispatch import Backend
from lungssl_ops.warp import (
    Padding,
    _warp,
    bending,
    compose,
    diffusion,
    exponential,
    folding,
    jacobian_determinant,
    warp,
    warp_loss_terms,
)
from torch import Tensor

BACKENDS: list[Backend] = [b for b in _warp.available(torch.zeros(1)) if b in ("reference", "cpp", "triton")]
FAST: list[Backend] = [b for b in BACKENDS if b != "triton"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def _coordinates(z: int, y: int, x: int) -> Tensor:
    """Voxel coordinates (x, y, z) of a grid, [1, 3, z, y, x]."""
    axes = [torch.arange(side, dtype=torch.float64) for side in (z, y, x)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1])[None]


def _linear(matrix: Tensor, z: int, y: int, x: int) -> Tensor:
    """The field M (v - centre), [1, 3, z, y, x]."""
    centre = torch.tensor([x - 1, y - 1, z - 1], dtype=torch.float64).reshape(1, 3, 1, 1, 1) / 2
    return torch.einsum("ij,bjzyx->bizyx", matrix, _coordinates(z, y, x) - centre)


def _shift(x: float, y: float, z: float, *sides: int) -> Tensor:
    return torch.tensor([x, y, z], dtype=torch.float64).reshape(1, 3, 1, 1, 1).expand(1, 3, *sides)


MATRIX = torch.tensor([[0.2, -0.3, 0.1], [0.15, -0.1, 0.25], [-0.2, 0.05, 0.3]], dtype=torch.float64)


@every_backend
@pytest.mark.parametrize("padding", ["border", "zeros", -1000])
def test_no_displacement_gives_the_image_back_to_the_bit(backend: Backend, padding: Padding) -> None:
    image = torch.randn(1, 2, 3, 4, 5)
    assert torch.equal(warp(image, torch.zeros(1, 3, 3, 4, 5), padding="border", backend=backend), image)
    warped = warp(image, torch.zeros(1, 3, 3, 4, 5), padding=padding, backend=backend)
    # Adding -1000 and taking it away rounds.
    torch.testing.assert_close(warped, image, rtol=0, atol=1e-4 if padding == -1000 else 0)


@every_backend
def test_whole_shifts_move_voxels_and_leave_the_fill_behind(backend: Backend) -> None:
    image = torch.randn(1, 1, 4, 5, 6, dtype=torch.float64)
    warped = warp(image, _shift(2, -1, 1, 4, 5, 6), padding=-1000, backend=backend)
    expected = torch.full_like(image, -1000.0)
    expected[..., :3, 1:, :4] = image[..., 1:, :4, 2:]
    torch.testing.assert_close(warped, expected, rtol=0, atol=1e-12)


@every_backend
def test_the_last_voxel_is_reached_and_the_border_repeats(backend: Backend) -> None:
    image = torch.arange(4.0, dtype=torch.float64).reshape(1, 1, 1, 1, 4)
    for move, expected in ((1.0, [1, 2, 3, 3]), (-1.5, [0, 0, 0.5, 1.5]), (2.25, [2.25, 3, 3, 3])):
        warped = warp(image, _shift(move, 0, 0, 1, 1, 4), backend=backend)
        assert warped.flatten().tolist() == pytest.approx(expected, abs=1e-12)
    zeros = warp(image, _shift(0.5, 0, 0, 1, 1, 4), padding="zeros", backend=backend)
    assert zeros.flatten().tolist() == pytest.approx([0.5, 1.5, 2.5, 1.5], abs=1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_values_and_gradients_are_those_of_grid_sample(backend: Backend, padding: Padding) -> None:
    sides = (4, 5, 7)
    image = torch.randn(2, 3, *sides, dtype=torch.float64, requires_grad=True)
    u_vox = (2 * torch.randn(2, 3, *sides, dtype=torch.float64)).requires_grad_()
    size = torch.tensor(sides[::-1], dtype=torch.float64).reshape(1, 3, 1, 1, 1)
    grid = (2 * (_coordinates(*sides) + u_vox) / (size - 1) - 1).permute(0, 2, 3, 4, 1)
    expected = F.grid_sample(image, grid, padding_mode=str(padding), align_corners=True)
    warped = warp(image, u_vox, padding=padding, backend=backend)
    torch.testing.assert_close(warped, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(warped)
    ours = torch.autograd.grad(warped, (image, u_vox), upstream)
    theirs = torch.autograd.grad(expected, (image, u_vox), upstream)
    for gradient, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-11, atol=1e-11)


@every_backend
def test_nan_shows_where_it_is_and_infinity_is_outside(backend: Backend) -> None:
    image = torch.rand(1, 1, 2, 3, 5, dtype=torch.float64) + 1
    u_vox = torch.zeros(1, 3, 2, 3, 5, dtype=torch.float64)
    u_vox[0, 1, 1, 2, 3], u_vox[0, 0, 0, 1, 2], u_vox[0, 0, 0, 1, 1] = math.nan, math.inf, -math.inf
    cases: tuple[tuple[Padding, Tensor | float, Tensor | float], ...] = (
        ("border", image[0, 0, 0, 1, 4], image[0, 0, 0, 1, 0]),
        (7.0, 7.0, 7.0),
    )
    for padding, high, low in cases:
        warped = warp(image, u_vox, padding=padding, backend=backend)
        assert warped.isnan().nonzero().tolist() == [[0, 0, 1, 2, 3]]
        assert warped[0, 0, 0, 1, 2].item() == pytest.approx(float(high), rel=1e-12)
        assert warped[0, 0, 0, 1, 1].item() == pytest.approx(float(low), rel=1e-12)


def test_float32_places_samples_exactly_far_from_the_origin() -> None:
    image = torch.arange(2000.0).reshape(1, 1, 1, 1, 2000) % 2  # slope 1 everywhere
    u_vox = torch.zeros(1, 3, 1, 1, 2000)
    u_vox[:, 0] = 0.1
    exact = warp(image.double(), u_vox.double())
    for backend in FAST:
        assert (warp(image, u_vox, backend=backend) - exact).abs().max() < 1e-7


def test_the_determinant_of_an_affine_map_is_that_of_its_matrix_everywhere() -> None:
    det = jacobian_determinant(_linear(MATRIX, 4, 5, 6))
    expected = torch.linalg.det(torch.eye(3, dtype=torch.float64) + MATRIX)
    torch.testing.assert_close(det, expected.expand_as(det), rtol=1e-12, atol=0)


def test_the_determinant_takes_the_differences_of_numpy_gradient() -> None:
    u_vox = torch.randn(2, 3, 3, 4, 5, dtype=torch.float64)
    rows = [torch.stack(torch.gradient(u_vox[:, i], dim=(3, 2, 1), edge_order=1), dim=-1) for i in range(3)]
    jacobian = torch.stack(rows, dim=-2) + torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(jacobian_determinant(u_vox), torch.linalg.det(jacobian), rtol=1e-12, atol=1e-12)


def test_a_reflection_folds_by_one_and_a_diffusion_has_its_hand_computed_value() -> None:
    z, y, x = 3, 4, 5
    mirror = _linear(torch.diag(torch.tensor([-2.0, 0, 0], dtype=torch.float64)), z, y, x)
    assert folding(mirror).item() == pytest.approx(1.0, rel=1e-12)
    # (s_i / s_j M_ij)^2 on the edges along j, of which a row of n voxels has n - 1.
    spacing = (0.7, 1.1, 2.5)
    expected = sum(
        (MATRIX[i, j].item() * spacing[i] / spacing[j]) ** 2 * (n - 1) / n
        for i in range(3)
        for j, n in enumerate((x, y, z))
    )
    assert diffusion(_linear(MATRIX, z, y, x), spacing_mm=spacing).item() == pytest.approx(expected, rel=1e-12)


def test_affine_maps_bend_by_nothing_and_quadratic_ones_by_their_second_derivatives() -> None:
    spacing, (z, y, x) = (0.5, 2.0, 3.0), (4, 5, 6)
    assert bending(_linear(MATRIX, z, y, x), spacing_mm=spacing).item() == pytest.approx(0.0, abs=1e-24)
    v = _coordinates(z, y, x)
    u_vox = torch.zeros_like(v)
    u_vox[:, 0] = v[:, 0] ** 2  # x''= 2 voxels per voxel^2 at the voxels with both neighbours
    assert bending(u_vox, spacing_mm=spacing).item() == pytest.approx((2 * 0.5 / 0.25) ** 2 * (x - 2) / x)
    u_vox[:, 0] = v[:, 1] * v[:, 2]  # mixed derivative 1 in the squares, counted twice
    expected = 2 * (0.5 / (2.0 * 3.0)) ** 2 * (y - 1) * (z - 1) / (y * z)
    assert bending(u_vox, spacing_mm=spacing).item() == pytest.approx(expected)


def test_an_alternating_field_does_not_escape_the_diffusion() -> None:
    u_vox = torch.zeros(1, 3, 1, 1, 8)
    u_vox[0, 0, 0, 0] = torch.tensor([1.0, -1.0]).repeat(4)
    assert diffusion(u_vox).item() == pytest.approx(4 * 7 / 8)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5), st.integers(1, 70), st.booleans())
def test_the_fast_path_is_the_definition_at_any_size(b: int, z: int, y: int, x: int, weighted: bool) -> None:
    if "cpp" not in BACKENDS:
        pytest.skip("no C++ compiler")
    image = torch.randn(b, 2, z, y, x, dtype=torch.float64)
    u_vox = 1.5 * torch.randn(b, 3, z, y, x, dtype=torch.float64)
    weight = torch.rand(b, 1, z, y, x, dtype=torch.float64) if weighted else None
    ours, definition = (
        warp_loss_terms(image, u_vox, weight=weight, spacing_mm=(0.7, 1.2, 2.0), with_bending=True, backend=backend)
        for backend in ("cpp", "reference")
    )
    for value, expected in zip(ours, definition, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dim", [2, 3, 4])
def test_mirroring_everything_along_an_axis_leaves_the_terms_as_they_are(backend: Backend, dim: int) -> None:
    image, u_vox = torch.randn(1, 1, 4, 5, 6, dtype=torch.float64), torch.randn(1, 3, 4, 5, 6, dtype=torch.float64)
    weight = torch.rand(1, 1, 4, 5, 6, dtype=torch.float64)
    mirrored = u_vox.flip(dim).clone()
    mirrored[:, 4 - dim] *= -1
    before = warp_loss_terms(image, u_vox, weight=weight, with_bending=True, backend=backend)
    after = warp_loss_terms(image.flip(dim), mirrored, weight=weight.flip(dim), with_bending=True, backend=backend)
    torch.testing.assert_close(after.warped, before.warped.flip(dim), rtol=1e-12, atol=1e-12)
    for one, other in zip(after[1:], before[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@every_backend
def test_voxels_of_no_weight_count_for_nothing_and_an_empty_mask_gives_zeros(backend: Backend) -> None:
    image = torch.randn(2, 1, 3, 4, 9, dtype=torch.float64)
    u_vox = (2 * torch.randn(2, 3, 3, 4, 9, dtype=torch.float64)).requires_grad_()
    weight = torch.zeros(2, 1, 3, 4, 9, dtype=torch.float64)
    weight[0, ..., :4] = 1.0
    # Triton's interpreter takes seconds for the bending.
    terms = warp_loss_terms(image, u_vox, weight=weight, with_bending=backend != "triton", backend=backend)
    # A voxel two away from the mask reaches no difference that has a weight.
    changed = u_vox.detach().clone()
    changed[..., 6:] += 5.0
    other = warp_loss_terms(image, changed, weight=weight, with_bending=backend != "triton", backend=backend)
    total = torch.zeros((), dtype=torch.float64)
    for value, same in zip(terms[1:], other[1:], strict=True):
        if value is None:
            continue
        assert value[0] > 0 and value[1] == 0
        torch.testing.assert_close(same, value.detach(), rtol=1e-12, atol=0)
        total = total + value.sum()
    (gradient,) = torch.autograd.grad(total, u_vox)
    assert gradient[0, ..., :4].abs().sum() > 0
    assert not gradient[0, ..., 6:].any() and not gradient[1].any()


def test_translations_compose_by_addition() -> None:
    one, other = _shift(0.5, -1.25, 2.0, 4, 5, 6), _shift(-2.0, 0.75, 0.1, 4, 5, 6)
    torch.testing.assert_close(compose(one, other), one + other, rtol=1e-12, atol=1e-12)


def test_warping_by_a_composition_is_warping_twice() -> None:
    sides = (7, 8, 9)
    # Shrinking maps stay in the grid; linear images are interpolated without error.
    u, v = (
        _linear(-0.2 * torch.eye(3).double() + 0.1 * MATRIX, *sides),
        _linear(0.2 * MATRIX - 0.3 * torch.eye(3), *sides),
    )
    image = _coordinates(*sides)[:, :1] + 3 * _coordinates(*sides)[:, 2:]
    torch.testing.assert_close(warp(image, compose(u, v)), warp(warp(image, u), v), rtol=1e-12, atol=1e-12)


@every_backend
def test_the_exponential_of_a_linear_velocity_is_the_matrix_exponential(backend: Backend) -> None:
    generator = 0.2 * MATRIX - 0.25 * torch.eye(3, dtype=torch.float64)
    sides, steps = ((4, 5, 6), 7) if backend != "triton" else ((2, 2, 3), 2)
    u_vox = exponential(_linear(generator, *sides), steps=steps, backend=backend)
    eye = torch.eye(3, dtype=torch.float64)
    squared = torch.linalg.matrix_power(eye + generator / 2**steps, 2**steps)
    torch.testing.assert_close(u_vox, _linear(squared - eye, *sides), rtol=1e-10, atol=1e-10)
    true = _linear(torch.matrix_exp(generator) - eye, *sides)
    assert (u_vox - true).norm() < 0.4 * 2**-steps * true.norm()


def test_the_exponential_of_a_constant_is_the_constant_and_minus_inverts() -> None:
    constant = _shift(1.5, -0.5, 2.25, 4, 4, 4)
    torch.testing.assert_close(exponential(constant), constant, rtol=1e-12, atol=1e-12)
    sides = (16, 17, 18)
    v = _coordinates(*sides)
    waves = torch.sin(2 * math.pi * v / torch.tensor([17.0, 16.0, 15.0]).double().reshape(1, 3, 1, 1, 1))
    velocity = 1.5 * waves.prod(dim=1, keepdim=True) * torch.tensor([1.0, -0.5, 0.8]).double().reshape(1, 3, 1, 1, 1)
    forth, back = exponential(velocity), exponential(-velocity)
    assert compose(forth, forth).abs().max() > 1.5
    assert compose(forth, back).abs().max() < 0.1  # of trilinear interpolation; forth twice moves by 2
    assert jacobian_determinant(forth).min() > 0
