"""What `prototype_cross_entropy` computes, by every backend and tier that runs here."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lungssl_ops.dispatch import Backend
from lungssl_ops.multicrop_ce import multicrop_cross_entropy
from lungssl_ops.prototype_ce import _dispatch, centering_bias, mean_logits, prototype_cross_entropy
from torch import Tensor

PATHS: list[tuple[Backend, str]] = [("reference", "auto"), ("torch", "row"), ("triton", "row"), ("triton", "flash")]
TEMPERATURES = {"student_temperature": 0.3, "teacher_temperature": 0.2}
# s, t, b, k, d: iBOT's one view; DINO's crops; one of everything; more than one block of any kernel.
SHAPES = [(1, 1, 9, 37, 5), (5, 2, 3, 70, 16), (1, 1, 1, 1, 1), (2, 1, 35, 300, 20)]


def _inputs(
    s: int, t: int, b: int, k: int, d: int, *, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(s * 1000 + k)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return {
        "student": normal(s, b, d).div_(math.sqrt(d)).requires_grad_(),
        "teacher": normal(t, b, d) / math.sqrt(d),
        "student_prototypes": normal(k, d).requires_grad_(),
        "teacher_prototypes": normal(k, d),
        "weight": torch.rand(s, t, b, generator=generator, dtype=torch.float64).to(device, dtype),
        "bias": normal(k),
    }


def _run(inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Loss, entropy, both gradients, in float64 on the CPU."""
    loss, entropy = prototype_cross_entropy(**inputs, **(TEMPERATURES | options))  # pyright: ignore[reportArgumentType]
    gradients = torch.autograd.grad(loss, (inputs["student"], inputs["student_prototypes"]))
    return [tensor.detach().double().cpu() for tensor in (loss, entropy, *gradients)]


def _exact(inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    doubles = {name: tensor.detach().double().cpu() for name, tensor in inputs.items()}
    for name in ("student", "student_prototypes"):
        doubles[name].requires_grad_()
    return _run(doubles, **options, backend="reference")


def _need(backend: Backend, device: str, dtype: torch.dtype = torch.float32) -> str:
    """The device to test it on; only Triton's kernels need the GPU, and float64 on one is not for Triton."""
    place = device if backend == "triton" else "cpu"
    if backend not in _dispatch.available(torch.zeros(1, device=place, dtype=dtype)):
        pytest.skip(f"backend {backend!r} can't run {dtype} here")
    return place


def _assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    names = ("loss", "entropy", "gradient of rows", "gradient of prototypes")
    for name, value, exact in zip(names, found, expected, strict=True):
        # The entropy of one prototype and its gradients are 0: then the difference counts itself.
        error = (value - exact).norm() / exact.norm().clamp_min(1e-3)
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "tier"), PATHS)
def test_every_path_is_the_definition_in_float64(
    backend: Backend, tier: str, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, device: str
) -> None:
    inputs = _inputs(*shape, dtype=dtype, device=_need(backend, device, dtype))
    _assert_close(_run(inputs, backend=backend, tier=tier), _exact(inputs), tolerance)


@pytest.mark.parametrize("tier", ["row", "flash"])
def test_bfloat16_operands_cost_two_percent_at_most(tier: str, device: str) -> None:
    if device != "cuda":
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly, silently: this needs a GPU")
    inputs = _inputs(2, 2, 70, 1111, 256, dtype=torch.bfloat16, device=device)
    loss, entropy, *gradients = _run(inputs, backend="triton", tier=tier)
    exact = _exact(inputs)
    for found, expected, tolerance in zip((loss, entropy, *gradients), exact, (1e-2, 1e-2, 2e-2, 2e-2), strict=True):
        assert (found - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize(("backend", "tier"), PATHS)
def test_a_hand_computed_pair(backend: Backend, tier: str, device: str) -> None:
    # Teacher: logits (ln 3, 0) at temperature 1 and bias (0, ln 3) are (1/2, 1/2); without the bias (3/4, 1/4).
    # Student: logits (0, ln 4) / 2 give (1/3, 2/3).
    place = _need(backend, device)
    row, prototypes = torch.ones(1, 1, 1, device=place), torch.tensor([[0.0], [math.log(4.0)]], device=place)
    targets = torch.tensor([[math.log(3.0)], [0.0]], device=place)

    def loss(bias: Tensor | None) -> tuple[float, float]:
        found = prototype_cross_entropy(
            row,
            row,
            prototypes,
            targets,
            torch.ones(1, 1, device=place),
            bias=bias,
            student_temperature=2.0,
            teacher_temperature=1.0,
            tier=tier,  # pyright: ignore[reportArgumentType]
            backend=backend,
        )
        return found.loss.item(), found.teacher_entropy.item()

    half = 0.5 * math.log(3.0) + 0.5 * math.log(1.5)
    assert loss(torch.tensor([0.0, math.log(3.0)], device=place)) == pytest.approx((half, math.log(2.0)), rel=1e-6)
    quarter = 0.75 * math.log(3.0) + 0.25 * math.log(1.5)
    assert loss(None) == pytest.approx((quarter, math.log(4.0) - 0.75 * math.log(3.0)), rel=1e-6)


@pytest.mark.parametrize(("backend", "tier"), PATHS)
def test_constant_rows_cost_ln_k_and_pull_nothing(backend: Backend, tier: str, device: str) -> None:
    inputs = _inputs(2, 2, 3, 50, 7, dtype=torch.float32, device=_need(backend, device))
    zero = {name: torch.zeros_like(tensor) for name, tensor in inputs.items()} | {"weight": inputs["weight"]}
    zero["student"].requires_grad_()
    zero["student_prototypes"].requires_grad_()
    loss, entropy, *gradients = _run(zero, backend=backend, tier=tier)
    assert loss.item() == pytest.approx(math.log(50), rel=1e-6)
    torch.testing.assert_close(entropy, torch.full((2, 3), math.log(50), dtype=torch.float64), rtol=1e-6, atol=0)
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize(("backend", "tier"), PATHS)
def test_logits_that_overflow_an_exponential_stay_finite(backend: Backend, tier: str, device: str) -> None:
    # exp(4 / 0.04) is infinite in float32; these logits reach some 100.
    inputs = _inputs(2, 2, 3, 50, 7, dtype=torch.float32, device=_need(backend, device))
    with torch.no_grad():
        inputs["student_prototypes"].mul_(50)
    inputs["teacher_prototypes"] *= 50
    found = _run(inputs, backend=backend, tier=tier, teacher_temperature=0.04)
    assert all(tensor.isfinite().all() for tensor in found)
    _assert_close(found, _exact(inputs, teacher_temperature=0.04), 1e-4)


@pytest.mark.parametrize(("backend", "tier"), PATHS)
def test_pairs_of_weight_zero_count_for_nothing(backend: Backend, tier: str, device: str) -> None:
    inputs = _inputs(3, 2, 4, 21, 6, device=_need(backend, device, torch.float64))
    inputs["weight"][1], inputs["weight"][:, :, 2] = 0, 0
    loss, _, to_rows, _ = _run(inputs, backend=backend, tier=tier)
    assert (to_rows[1] == 0).all() and (to_rows[:, 2] == 0).all() and (to_rows[0, 0] != 0).any()
    kept = {name: inputs[name][[0, 2]].detach().requires_grad_(name == "student") for name in ("student", "weight")}
    torch.testing.assert_close(loss, _run(inputs | kept, backend=backend, tier=tier)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("backend", "tier"), PATHS)
def test_all_zero_weights_give_nan(backend: Backend, tier: str, device: str) -> None:
    inputs = _inputs(2, 1, 3, 8, 4, dtype=torch.float32, device=_need(backend, device))
    inputs["weight"].zero_()
    assert torch.isnan(_run(inputs, backend=backend, tier=tier)[0])


@settings(max_examples=20, deadline=None)
@given(
    s=st.integers(1, 5),
    t=st.integers(1, 3),
    b=st.integers(1, 6),
    k=st.integers(1, 40),
    d=st.integers(1, 9),
    block_bytes=st.sampled_from([None, 1, 3000]),
)
def test_blocks_of_any_size_change_nothing_and_neither_does_a_shift_of_the_bias(
    s: int, t: int, b: int, k: int, d: int, block_bytes: int | None
) -> None:
    inputs = _inputs(s, t, b, k, d)
    expected = _exact(inputs)
    _assert_close(_run(inputs, backend="torch", block_bytes=block_bytes), expected, 1e-12)
    shifted = inputs | {"bias": inputs["bias"] + 100.0}
    _assert_close(_run(shifted, backend="torch", block_bytes=block_bytes), expected, 1e-11)


def test_it_is_the_multicrop_loss_of_the_logits() -> None:
    inputs = _inputs(4, 2, 3, 33, 8)
    centre, pair = torch.randn(33, dtype=torch.float64), torch.ones(4, 2) - torch.eye(4, 2)
    inputs |= {"weight": pair, "bias": centering_bias(centre, 0.2)}
    probs = torch.softmax((inputs["teacher"] @ inputs["teacher_prototypes"].T - centre) / 0.2, dim=-1)
    logits = inputs["student"] @ inputs["student_prototypes"].T / 0.3
    found = prototype_cross_entropy(**inputs, **TEMPERATURES)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(found.loss, multicrop_cross_entropy(logits, probs, pair.double()), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.teacher_entropy, torch.special.entr(probs).sum(-1), rtol=1e-12, atol=0)


def test_half_precision_is_computed_in_float32_on_a_cpu_whatever_autocast_says() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        inputs = _inputs(3, 2, 4, 515, 32, dtype=dtype)
        loss, entropy, *gradients = _run(inputs, backend="torch")
        exact_loss, exact_entropy, *exact_gradients = _exact(inputs)
        assert (loss - exact_loss).abs() / exact_loss < 1e-5
        assert (entropy - exact_entropy).norm() / exact_entropy.norm() < 1e-5
        for found, exact in zip(gradients, exact_gradients, strict=True):
            assert (found - exact).norm() / exact.norm() < 4e-3  # of their rounding to the inputs' dtype
    inputs = _inputs(3, 2, 4, 515, 32, dtype=torch.float32)
    plain = _run(inputs, backend="torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = _run(inputs, backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_the_mean_logits_are_those_of_all_rows() -> None:
    rows, prototypes = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(11, 7, dtype=torch.float64)
    torch.testing.assert_close(
        mean_logits(rows, prototypes), (rows @ prototypes.T).mean((0, 1)), rtol=1e-12, atol=1e-14
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mean_logits(rows.float(), prototypes.float())
    torch.testing.assert_close(found.double(), (rows @ prototypes.T).mean((0, 1)), rtol=1e-5, atol=1e-6)
