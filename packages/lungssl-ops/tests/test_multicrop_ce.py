import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float
from lungssl_ops.multicrop_ce import multicrop_cross_entropy
from lungssl_ops.multicrop_ce.reference import multicrop_cross_entropy_reference
from torch import Tensor


def _inputs(s: int, t: int, b: int, k: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(s * 1000 + k)
    logits = torch.randn(s, b, k, generator=generator, dtype=dtype) * 3
    probs = torch.softmax(torch.randn(t, b, k, generator=generator, dtype=dtype) * 2, dim=-1)
    return logits, probs, torch.rand(s, t, b, generator=generator, dtype=dtype)


def _loss_and_gradient(
    function: Callable[..., Tensor], logits: Tensor, probs: Tensor, weight: Tensor
) -> tuple[Float[Tensor, ""], Float[Tensor, "s b k"]]:
    logits = logits.clone().requires_grad_()
    loss = function(logits, probs, weight)
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


def test_a_uniform_student_costs_ln_k_for_any_teacher() -> None:
    _, probs, weight = _inputs(4, 2, 3, 4096)
    loss = multicrop_cross_entropy(torch.zeros(4, 3, 4096, dtype=torch.float64), probs, weight)
    assert loss.item() == pytest.approx(8.317766, abs=1e-6)


def test_a_hand_computed_pair() -> None:
    # p = (3/4, 1/4), softmax(l) = (1/2, 1/2) and (1/5, 4/5) for two students with weights 1 and 3.
    logits = torch.tensor([[[0.0, 0.0]], [[0.0, math.log(4.0)]]], dtype=torch.float64)
    probs = torch.tensor([[[0.75, 0.25]]], dtype=torch.float64)
    expected = (math.log(2.0) + 3.0 * (0.75 * math.log(5.0) + 0.25 * math.log(1.25))) / 4.0
    weight = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    assert multicrop_cross_entropy(logits, probs, weight).item() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(s=st.integers(1, 6), t=st.integers(1, 3), b=st.integers(1, 5), k=st.integers(1, 37))
def test_collapsing_the_pairs_changes_neither_the_loss_nor_the_gradient(s: int, t: int, b: int, k: int) -> None:
    logits, probs, weight = _inputs(s, t, b, k)
    loss, gradient = _loss_and_gradient(multicrop_cross_entropy, logits, probs, weight)
    expected, expected_gradient = _loss_and_gradient(multicrop_cross_entropy_reference, logits, probs, weight)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-13)


def test_a_weight_per_pair_is_the_same_for_every_sample() -> None:
    logits, probs, weight = _inputs(5, 2, 3, 7)
    pair = weight[:, :, 0]
    loss = multicrop_cross_entropy(logits, probs, pair)
    torch.testing.assert_close(loss, multicrop_cross_entropy_reference(logits, probs, pair))
    torch.testing.assert_close(loss, multicrop_cross_entropy(logits, probs, pair[:, :, None].expand(5, 2, 3)))


def test_the_gradient_is_the_numerical_one_for_strided_inputs() -> None:
    logits, probs, weight = _inputs(3, 2, 5, 7)
    logits = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    probs = probs.transpose(0, 1).contiguous().transpose(0, 1)
    assert not logits.is_contiguous() and not probs.is_contiguous()
    assert torch.autograd.gradcheck(lambda x: multicrop_cross_entropy(x, probs, weight), (logits,))


def test_large_logits_stay_finite_and_a_constant_shift_changes_nothing() -> None:
    logits, probs, weight = _inputs(2, 2, 3, 11, dtype=torch.float32)
    loss, gradient = _loss_and_gradient(multicrop_cross_entropy, logits * 300, probs, weight)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    shifted = multicrop_cross_entropy(logits + 100.0, probs, weight)
    torch.testing.assert_close(shifted, multicrop_cross_entropy(logits, probs, weight), rtol=1e-5, atol=0)


def test_float32_stays_float32_under_autocast() -> None:
    logits, probs, weight = _inputs(4, 2, 3, 515, dtype=torch.float32)
    loss, gradient = _loss_and_gradient(multicrop_cross_entropy, logits, probs, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_loss, cast_gradient = _loss_and_gradient(multicrop_cross_entropy, logits, probs, weight)
    assert torch.equal(loss, cast_loss) and torch.equal(gradient, cast_gradient)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, probs, weight = _inputs(4, 2, 3, 515, dtype=torch.float32)
    logits = logits.bfloat16()
    loss, gradient = _loss_and_gradient(multicrop_cross_entropy, logits, probs, weight)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    exact = multicrop_cross_entropy_reference(logits.double(), probs.double(), weight.double())
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_pairs_of_weight_zero_count_for_nothing() -> None:
    logits, probs, weight = _inputs(3, 2, 2, 5)
    weight[1] = 0
    loss, gradient = _loss_and_gradient(multicrop_cross_entropy, logits, probs, weight)
    kept = [0, 2]
    torch.testing.assert_close(loss, multicrop_cross_entropy(logits[kept], probs, weight[kept]))
    assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))


def test_all_zero_weights_give_nan() -> None:
    logits, probs, weight = _inputs(3, 2, 2, 5)
    assert torch.isnan(multicrop_cross_entropy(logits, probs, torch.zeros_like(weight)))


def test_a_teacher_with_a_gradient_is_refused() -> None:
    logits, probs, weight = _inputs(2, 2, 1, 3)
    with pytest.raises(ValueError, match=r"differentiates student_logits only.*detach\(\)"):
        multicrop_cross_entropy(logits, probs.requires_grad_(), weight)
