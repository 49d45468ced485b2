from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lungssl_ops import patches
from lungssl_ops.dispatch import Backend, compiled_problem
from lungssl_ops.patches import embed_patches, masked_patch_mse, patchify, unpatchify
from lungssl_ops.patches.reference import masked_patch_mse_reference
from torch import Tensor

_THREE = torch.zeros(1, 2, 3)
BACKENDS = [
    backend
    for backend in patches._masked_patch_mse.available(_THREE, _THREE, _THREE, _THREE)
    if backend != "compiled"  # it has a test of its own
]


def test_voxels_are_where_the_docstring_says() -> None:
    z, y, x = 4, 6, 9
    volume = torch.arange(2.0 * z * y * x).reshape(1, 2, z, y, x)
    patches = patchify(volume, (2, 2, 3))
    assert patches.shape == (1, 2 * 3 * 3, 2 * 2 * 2 * 3)
    # patch (z 1, y 2, x 0) is row 1 * 9 + 2 * 3 + 0
    torch.testing.assert_close(patches[0, 15], volume[0, :, 2:4, 4:6, 0:3].flatten())


@settings(max_examples=25, deadline=None)
@given(grid=st.tuples(*[st.integers(1, 4)] * 3), patch=st.tuples(*[st.integers(1, 3)] * 3), c=st.integers(1, 2))
def test_unpatchify_undoes_patchify(grid: tuple[int, int, int], patch: tuple[int, int, int], c: int) -> None:
    sides = [g * p for g, p in zip(grid, patch, strict=True)]
    volume = torch.randn(2, c, *sides)
    assert torch.equal(unpatchify(patchify(volume, patch), grid, patch), volume)


@pytest.mark.parametrize("patch", [(2, 3, 4), (1, 1, 2), (4, 6, 8)])
def test_the_embedding_is_a_convolution_whose_stride_is_its_kernel(patch: tuple[int, int, int]) -> None:
    volume = torch.randn(3, 8, 6, 4, 2, dtype=torch.float64).permute(0, 4, 3, 2, 1)  # b 2, z 4, y 6, x 8
    weight, bias = torch.randn(5, 2, *patch, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    expected = F.conv3d(volume, weight, bias, stride=patch).flatten(2).mT
    torch.testing.assert_close(embed_patches(volume, weight, bias), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(embed_patches(volume, weight), expected - bias, rtol=1e-12, atol=1e-12)


def test_the_embedding_s_gradients_are_the_numerical_ones() -> None:
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in [(1, 1, 2, 6, 4), (2, 1, 2, 3, 2), (2,)]]
    assert torch.autograd.gradcheck(embed_patches, [x.requires_grad_() for x in inputs])


def test_a_side_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 6, 9\) must be multiples of the patch \(4, 4, 4\); crop or pad"):
        patchify(torch.zeros(1, 1, 4, 6, 9), (4, 4, 4))
    with pytest.raises(ValueError, match="5 rows of 8 values don't fill a grid"):
        unpatchify(torch.zeros(1, 5, 8), (1, 2, 2), (2, 2, 2))
    with pytest.raises(ValueError, match=r"\(4, 6, 9\) must be multiples of the patch \(4, 3, 2\)"):
        embed_patches(torch.zeros(1, 1, 4, 6, 9), torch.zeros(5, 1, 4, 3, 2))


@pytest.mark.parametrize(("p", "expected"), [(64, 0.984375), (512, 0.998047), (4096, 0.999756)])
def test_predicting_zero_costs_p_minus_1_over_p(p: int, expected: float) -> None:
    target = 5.0 + 0.3 * torch.randn(2, 6, p)
    mask = torch.arange(6).expand(2, 6) < 4
    loss = masked_patch_mse(torch.zeros(2, 6, p), target, mask, torch.ones(2, 6, p))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_a_perfect_prediction_costs_nothing() -> None:
    target = torch.randn(2, 3, 27, dtype=torch.float64)
    pred = (target - target.mean(-1, keepdim=True)) / target.var(-1, keepdim=True).sqrt()
    mask, weight = torch.ones(2, 3, dtype=torch.bool), torch.ones_like(target)
    assert masked_patch_mse(pred, target, mask, weight).item() == pytest.approx(0.0, abs=1e-20)
    assert masked_patch_mse(target, target, mask, weight, norm="none").item() == 0.0


def test_without_normalisation_it_is_the_weighted_mean_square() -> None:
    pred, target = torch.tensor([[[1.0, 2.0], [3.0, 9.0]]]), torch.zeros(1, 2, 2)
    mask, weight = torch.tensor([[True, False]]), torch.tensor([[[1.0, 0.5], [1.0, 1.0]]])
    assert masked_patch_mse(pred, target, mask, weight, norm="none").item() == pytest.approx((1.0 + 0.5 * 4.0) / 1.5)


def test_visible_patches_and_padding_have_exactly_zero_gradient() -> None:
    pred, target = torch.randn(2, 4, 9, requires_grad=True), torch.randn(2, 4, 9, requires_grad=True)
    mask = torch.tensor([[True, False, True, False], [False, True, True, False]])
    weight = torch.ones(2, 4, 9)
    weight[0, 0, :4] = 0.0
    masked_patch_mse(pred, target, mask, weight).backward()
    assert pred.grad is not None and target.grad is not None
    for gradient in (pred.grad, target.grad):
        assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))
        assert torch.equal(gradient[0, 0, :4], torch.zeros(4))
        assert (gradient[0, 2] != 0).all()


def test_padding_does_not_enter_a_patch_s_mean_and_variance() -> None:
    target, weight = torch.randn(1, 1, 20), torch.ones(1, 1, 20)
    weight[..., 12:] = 0.0
    mask = torch.ones(1, 1, dtype=torch.bool)
    padded = target.clone()
    padded[..., 12:] = -7.0
    pred = torch.randn(1, 1, 20)
    kept = masked_patch_mse(pred[..., :12], target[..., :12], mask, weight[..., :12])
    torch.testing.assert_close(masked_patch_mse(pred, padded, mask, weight), kept)


def test_flat_patches_are_divided_by_the_floor() -> None:
    # noise of variance 1e-6 under a floor of 1e-4: the target's variance is 1e-2
    target = 0.2 + 1e-3 * torch.randn(1, 50, 512, dtype=torch.float64)
    mask, weight = torch.ones(1, 50, dtype=torch.bool), torch.ones_like(target)
    loss = masked_patch_mse(torch.zeros_like(target), target, mask, weight, variance_floor=1e-4)
    assert loss.item() == pytest.approx(0.01, rel=0.05)


def test_the_gradient_is_the_numerical_one_for_strided_inputs() -> None:
    pred = torch.randn(7, 2, 3, dtype=torch.float64).permute(1, 2, 0).requires_grad_()
    target = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    mask, weight = torch.tensor([[True, False, True], [True, True, False]]), torch.rand(2, 3, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p, t: masked_patch_mse(p, t, mask, weight), (pred, target))


def test_half_precision_is_summed_in_float32() -> None:
    pred, target = torch.randn(1, 8, 4096).bfloat16(), torch.randn(1, 8, 4096).bfloat16()
    mask, weight = torch.ones(1, 8, dtype=torch.bool), torch.ones(1, 8, 4096)
    loss = masked_patch_mse(pred, target, mask, weight)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(masked_patch_mse(pred.double(), target.double(), mask, weight).item(), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_mask_gives_nan(backend: Backend) -> None:
    nothing, three = torch.zeros(1, 2, dtype=torch.bool), torch.ones(1, 2, 3)
    assert torch.isnan(masked_patch_mse(torch.zeros(1, 2, 3), three, nothing, three, backend=backend))


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "reference"])
@pytest.mark.parametrize("norm", ["patch", "none"])
@pytest.mark.parametrize(("p", "dtype"), [(1, torch.float32), (33, torch.float32), (512, torch.bfloat16)])
def test_fast_paths_are_the_definition(
    backend: Backend, norm: Literal["patch", "none"], p: int, dtype: torch.dtype
) -> None:
    target, weight = 0.3 + 0.1 * torch.randn(3, 7, p), torch.rand(3, 7, p) * (torch.rand(3, 7, p) > 0.3)
    target[0, 0], weight[0, 1] = 0.5, 0.0  # a flat patch, and one of padding alone
    mask = torch.rand(3, 7) < 0.6
    mask[0, :2] = True
    pred = torch.randn(7, 3, p).to(dtype).transpose(0, 1).requires_grad_()
    exact = pred.detach().double().requires_grad_()
    loss = masked_patch_mse(pred, target, mask, weight, norm=norm, variance_floor=1e-4, backend=backend)
    expected = masked_patch_mse(
        exact, target.double(), mask, weight.double(), norm=norm, variance_floor=1e-4, backend="reference"
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (gradient,), (exact_gradient,) = torch.autograd.grad(3 * loss, pred), torch.autograd.grad(3 * expected, exact)
    assert gradient.dtype == dtype
    assert (gradient - exact_gradient).norm() < (1e-6 if dtype == torch.float32 else 5e-3) * exact_gradient.norm()
    with torch.no_grad():
        assert torch.equal(
            masked_patch_mse(pred, target, mask, weight, norm=norm, variance_floor=1e-4, backend=backend), loss
        )


def test_targets_with_gradients_and_of_half_precision_are_left_to_the_definition() -> None:
    pred, mask, weight = (
        torch.randn(1, 2, 3, requires_grad=True),
        torch.ones(1, 2, dtype=torch.bool),
        torch.rand(1, 2, 3),
    )
    target = torch.randn(1, 2, 3, requires_grad=True)
    masked_patch_mse(pred, target, mask, weight).backward()
    assert target.grad is not None and target.grad.abs().max() > 0
    assert masked_patch_mse(pred, target.detach().bfloat16(), mask, weight).isfinite()
    with pytest.raises(RuntimeError, match="masked_patch_mse has no backend 'cpp'"):
        masked_patch_mse(pred, target, mask, weight, backend="cpp")


needs_inductor = pytest.mark.skipif(bool(compiled_problem()), reason=compiled_problem())


@needs_inductor
@pytest.mark.usefixtures("unchecked")
def test_the_compiled_error_is_the_definition_s() -> None:
    pred, target = torch.randn(2, 5, 33, requires_grad=True), torch.randn(2, 5, 33)
    mask, weight = torch.rand(2, 5) < 0.6, torch.rand(2, 5, 33).round(decimals=1)
    exact = pred.detach().double().requires_grad_()
    expected = masked_patch_mse(exact, target.double(), mask, weight.double(), backend="reference")
    loss = masked_patch_mse(pred, target, mask, weight, backend="compiled")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    (gradient,), (exact_gradient,) = torch.autograd.grad(loss, pred), torch.autograd.grad(expected, exact)
    assert (gradient - exact_gradient).norm() < 1e-5 * exact_gradient.norm()


def test_on_a_cpu_the_definition_runs_unless_the_compiled_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUNGSSL_OPS", raising=False)
    three, mask = torch.rand(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    assert patches._with_other_gradients(three, three, mask, three) is masked_patch_mse_reference
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"can't run: .*torch.compile needs a C\+\+ compiler"):
        masked_patch_mse(three, three, mask, three, backend="compiled")


@pytest.mark.usefixtures("unchecked")
def test_an_outer_compilation_traces_error_and_embedding_without_a_break() -> None:
    def loss(volume: Tensor, weight: Tensor) -> Tensor:
        tokens = embed_patches(volume, weight)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
        return masked_patch_mse(tokens, tokens.flip(1), mask, torch.ones_like(tokens))

    inputs = torch.randn(1, 1, 4, 4, 6), torch.randn(7, 1, 2, 2, 3)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
