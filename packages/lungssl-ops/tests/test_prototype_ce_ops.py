"""How `prototype_cross_entropy` behaves as an op: autograd, compilation, layouts, memory, what it refuses."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lungssl_ops.dispatch import Backend
from lungssl_ops.measure import peak_mb
from lungssl_ops.prototype_ce import _dispatch, prototype_cross_entropy
from torch import Tensor

PATHS: list[tuple[Backend, str]] = [("torch", "row"), ("triton", "row"), ("triton", "flash")]


def _need(backend: Backend, device: str, dtype: torch.dtype = torch.float32) -> str:
    """The device to test it on; only Triton's kernels need the GPU, and float64 on one is not for Triton."""
    place = device if backend == "triton" else "cpu"
    if backend not in _dispatch.available(torch.zeros(1, device=place, dtype=dtype)):
        pytest.skip(f"backend {backend!r} can't run {dtype} here")
    return place


def _inputs(
    s: int, t: int, b: int, k: int, d: int, *, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """Student, teacher, both prototypes, weight, bias."""
    shapes = ((s, b, d), (t, b, d), (k, d), (k, d))
    rows = [torch.randn(shape, dtype=dtype, device=device).div_(math.sqrt(d)) for shape in shapes]
    weight, bias = torch.rand(s, t, b, dtype=dtype, device=device), torch.randn(k, dtype=dtype, device=device)
    for differentiable in (rows[0], rows[2]):
        differentiable.requires_grad_()
    return (*rows, weight, bias)


def _loss(inputs: tuple[Tensor, ...], **options: Any) -> Tensor:
    *tensors, bias = inputs
    return prototype_cross_entropy(
        *tensors, bias=bias, **({"student_temperature": 0.1, "teacher_temperature": 0.06} | options)
    ).loss


def _gradients(inputs: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(_loss(inputs, **options), (inputs[0], inputs[2]))


@pytest.mark.parametrize(("backend", "tier"), PATHS)
def test_the_gradients_are_the_numerical_ones(backend: Backend, tier: str, device: str) -> None:
    student, teacher, prototypes, *rest = _inputs(2, 2, 3, 5, 4, device=_need(backend, device, torch.float64))

    def loss(student: Tensor, prototypes: Tensor) -> Tensor:
        options = {"backend": backend, "tier": tier, "student_temperature": 0.7, "teacher_temperature": 0.5}
        return 3 * _loss((student, teacher, prototypes, *rest), **options)

    # Every element with torch; the interpreter takes a random direction instead.
    assert torch.autograd.gradcheck(loss, (student, prototypes), fast_mode=backend == "triton")


# opcheck looks at `.grad` of its arguments' copies; torch's own filter for the warning doesn't stop it as an error.
QUIETLY = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@QUIETLY
@pytest.mark.parametrize("fused", [False, True])
def test_the_row_op_passes_opcheck(fused: bool, device: str) -> None:
    place = _need("triton" if fused else "torch", device, torch.float64)
    inputs = _inputs(2, 2, 3, 19, 4, device=place)
    from lungssl_ops.prototype_ce.rows import _rows_op

    torch.library.opcheck(_rows_op, (*inputs, 0.1, 0.06, 19 * 4 * 8 * 2, fused, True, True))
    fixed = (inputs[0].detach(), *inputs[1:5], None)
    torch.library.opcheck(_rows_op, (*fixed, 0.1, 0.06, 10**6, fused, False, True))


@QUIETLY
def test_the_flash_ops_pass_opcheck(device: str) -> None:
    inputs = _inputs(2, 2, 3, 19, 4, device=_need("triton", device, torch.float64))
    from lungssl_ops.prototype_ce.flash import flash_backward_op, flash_op

    torch.library.opcheck(flash_op, (*inputs, 0.1, 0.06, True))
    plain = [tensor.detach() for tensor in inputs]
    lse = [torch.randn(2, 3, dtype=plain[0].dtype, device=plain[0].device) for _ in range(2)]
    torch.library.opcheck(flash_backward_op, (*plain, *lse, 0.1, 0.06))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("backend", "tier"), PATHS)
def test_it_compiles_as_one_graph_with_its_backward(backend: Backend, tier: str, device: str) -> None:
    inputs = _inputs(2, 1, 3, 19, 4, dtype=torch.float32, device=_need(backend, device))

    def loss(student: Tensor, prototypes: Tensor) -> Tensor:
        parts = (2 * student, inputs[1], prototypes / 2, *inputs[3:])
        return 5 * _loss(parts, backend=backend, tier=tier)

    expected = torch.autograd.grad(loss(inputs[0], inputs[2]), (inputs[0], inputs[2]))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(inputs[0], inputs[2]), (inputs[0], inputs[2]))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("backend", "tier"), PATHS)
def test_a_retained_graph_gives_the_same_gradients_again_scaled_by_what_comes_in(
    backend: Backend, tier: str, device: str
) -> None:
    inputs = _inputs(2, 2, 3, 19, 4, dtype=torch.float32, device=_need(backend, device))
    loss = _loss(inputs, backend=backend, tier=tier)
    first = torch.autograd.grad(loss, (inputs[0], inputs[2]), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, (inputs[0], inputs[2]), torch.tensor(-4.0, device=loss.device))
    torch.testing.assert_close(first, tuple(kept), rtol=0, atol=0)
    torch.testing.assert_close(second, tuple(-4 * gradient for gradient in kept), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("backend", "tier"), PATHS)
def test_a_second_derivative_raises(backend: Backend, tier: str, device: str) -> None:
    inputs = _inputs(1, 1, 3, 7, 4, dtype=torch.float32, device=_need(backend, device))
    loss = _loss(inputs, backend=backend, tier=tier)
    (gradient,) = torch.autograd.grad(loss**2, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(("backend", "tier"), PATHS)
def test_one_gradient_alone_is_the_same_as_with_both(backend: Backend, tier: str, device: str) -> None:
    inputs = _inputs(2, 2, 5, 19, 4, dtype=torch.float32, device=_need(backend, device))
    both = _gradients(inputs, backend=backend, tier=tier)
    for wanted, fixed in ((0, 2), (2, 0)):
        parts = [tensor.detach() if i == fixed else tensor for i, tensor in enumerate(inputs)]
        (alone,) = torch.autograd.grad(_loss(tuple(parts), backend=backend, tier=tier), inputs[wanted])
        assert torch.equal(alone, both[wanted // 2])
    with torch.no_grad():
        evaluated = _loss(inputs, backend=backend, tier=tier)
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, _loss(inputs, backend=backend, tier=tier).detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("backend", "tier"), PATHS)
def test_strided_inputs_are_as_good_as_contiguous_ones(backend: Backend, tier: str, device: str) -> None:
    inputs = _inputs(2, 2, 5, 19, 4, dtype=torch.float32, device=_need(backend, device))
    strided = tuple(_strided(tensor).requires_grad_(tensor.requires_grad) for tensor in inputs)
    assert not any(tensor.is_contiguous() for tensor in strided)
    expected = _gradients(inputs, backend=backend, tier=tier)
    torch.testing.assert_close(_gradients(strided, backend=backend, tier=tier), expected, rtol=1e-5, atol=1e-7)


def _strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor.detach(), torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]


@pytest.mark.parametrize(("backend", "tier"), PATHS)
def test_everything_that_is_allocated_is_written_and_repeats_have_equal_bits(
    backend: Backend, tier: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows and prototypes that fill no block; 300 prototypes are shared out among programs.
    inputs = _inputs(2, 2, 3, 300, 5, dtype=torch.float32, device=_need(backend, device))
    options = {"backend": backend, "tier": tier, "block_bytes": 4 * 300 * 4}
    expected = _loss(inputs, **options).detach(), *_gradients(inputs, **options)
    _poison(monkeypatch)
    found = _loss(inputs, **options).detach(), *_gradients(inputs, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **options: function(*args, **options).fill_(torch.nan)

    for place, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(place, name, poisoned(getattr(place, name)))
    assert torch.isnan(torch.zeros(1).new_empty(3)).all()


def test_memory_stays_within_the_block_and_the_gradients() -> None:
    inputs = _inputs(1, 1, 256, 2048, 16, dtype=torch.float32)
    block, gradients = 2**18, 4 * (2048 + 256) * 16
    peak = peak_mb(lambda: _gradients(inputs, backend="torch", block_bytes=block)[0], "cpu") * 2**20
    assert gradients < peak < 1.7 * block + gradients  # as much again for pieces of a small block
    in_full = peak_mb(lambda: _gradients(inputs, backend="reference")[0], "cpu") * 2**20
    assert in_full > 4 * 256 * 2048 * 4 > 8 * peak


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_temperature": 0.0}, r"finite student_temperature above 0, got 0.0; DINO takes 0.1"),
        ({"teacher_temperature": math.inf}, r"finite teacher_temperature above 0, got inf"),
        ({"tier": "fast"}, r"tier 'fast' is unknown; known are 'auto', 'row' and 'flash'"),
        ({"tier": "flash", "backend": "torch"}, r"tier 'flash' needs backend 'triton'; use tier='row' or 'auto'"),
        ({"block_bytes": 0}, r"block_bytes 0 leaves no room for logits"),
        ({"student": torch.zeros(3, 4)}, r"takes student \[s b d\].*student \[3, 4\]"),
        ({"teacher": torch.zeros(2, 5, 4)}, r"teacher \[2, 5, 4\], prototypes \[7, 4\]"),
        (
            {"teacher_prototypes": torch.zeros(8, 4)},
            r"both prototypes must be \[k, 4\], as many for student and teacher",
        ),
        ({"weight": torch.ones(2, 3)}, r"weight must be \[3, 2\] or \[3, 2, 6\].*weight \[2, 3\]"),
        ({"bias": torch.zeros(6)}, r"bias must be \[7\].*bias \[6\]"),
        ({"teacher": torch.zeros(2, 6, 4, requires_grad=True)}, r"but teacher requires a gradient.*detach\(\) it"),
        ({"weight": torch.zeros(3, 2, requires_grad=True)}, r"but weight requires a gradient"),
        ({"student": torch.zeros(3, 0, 4), "teacher": torch.zeros(2, 0, 4)}, r"at least one view, sample, prototype"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = {
        "student": torch.zeros(3, 6, 4),
        "teacher": torch.zeros(2, 6, 4),
        "student_prototypes": torch.zeros(7, 4),
        "teacher_prototypes": torch.zeros(7, 4),
        "weight": torch.ones(3, 2),
        "student_temperature": 0.1,
        "teacher_temperature": 0.04,
    }
    with pytest.raises(ValueError, match=message):
        prototype_cross_entropy(**(inputs | changes))


def test_flash_refuses_more_features_than_its_blocks_hold(device: str) -> None:
    inputs = _inputs(1, 1, 1, 2, 300, dtype=torch.float32, device=_need("triton", device))
    with pytest.raises(ValueError, match="tier 'flash' takes up to 256 features, not 300; use 'row'"):
        _loss(inputs, backend="triton", tier="flash")
