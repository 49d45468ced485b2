import importlib
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lungssl_ops.cost_volume import _cost_volume, cost_volume, coupled_convex, inverse_consistent, label_displacements
from lungssl_ops.dispatch import Backend
from torch import Tensor

BACKENDS = _cost_volume.available(torch.zeros(1), torch.zeros(1))
FAST = [backend for backend in BACKENDS if backend != "reference"]


def _pair(*size: int, seed: int = 0, mean: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    fixed, moving = torch.randn(2, *size, generator=generator, dtype=torch.float64) + mean
    return fixed, moving


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def _by_hand(fixed: Tensor, moving: Tensor, reach: int, *, zero: bool) -> Tensor:
    """Without smoothing, voxel by voxel: [c, z, y, x] twice to [l, z, y, x]."""
    size = fixed.shape[1:]
    steps = range(-reach, reach + 1)
    out = torch.zeros(len(steps) ** 3, *size, dtype=fixed.dtype)
    for voxel in product(*(range(n) for n in size)):
        for label, displacement in enumerate(product(steps, steps, steps)):  # z y x: x fastest
            place = [v + d for v, d in zip(voxel, displacement, strict=True)]
            inside = all(0 <= p < n for p, n in zip(place, size, strict=True))
            z, y, x = (min(max(p, 0), n - 1) for p, n in zip(place, size, strict=True))
            there = moving[:, z, y, x] * (inside or not zero)
            out[(label, *voxel)] = (fixed[:, voxel[0], voxel[1], voxel[2]] - there).square().sum()
    return out


def test_labels_run_fastest_along_x() -> None:
    displacements = label_displacements(1)
    assert displacements.shape == (27, 3)
    assert displacements[:4].tolist() == [[-1, -1, -1], [0, -1, -1], [1, -1, -1], [-1, 0, -1]]
    assert displacements[13].tolist() == [0, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ["replicate", "zero"])
def test_equals_the_differences_computed_voxel_by_voxel(backend: Backend, padding: Any) -> None:
    fixed, moving = _pair(1, 3, 2, 1, 3)
    found = cost_volume(fixed, moving, reach=1, smoothing=0, padding=padding, backend=backend)
    expected = _by_hand(fixed[0], moving[0], 1, zero=padding == "zero")
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("padding", ["replicate", "zero"])
def test_smoothed_costs_of_odd_grids_and_batches_agree_with_the_definition(backend: Backend, padding: Any) -> None:
    fixed, moving = _pair(2, 5, 1, 1, 3) if backend == "triton" else _pair(2, 5, 3, 4, 9)
    options: dict[str, Any] = {"reach": 1, "padding": padding, "reduction": "mean"}
    expected = cost_volume(fixed, moving, **options, backend="reference")
    assert _error(cost_volume(fixed, moving, **options, backend=backend), expected) < 1e-12
    fixed, moving = fixed.float(), moving.float()
    assert _error(cost_volume(fixed, moving, **options, backend=backend), expected) < 1e-5
    halves = cost_volume(fixed, moving, **options, dtype=torch.float16, backend=backend)
    assert halves.dtype == torch.float16
    assert _error(halves, expected) < 1e-3


@pytest.mark.skipif("cpp" not in BACKENDS, reason="no C++ compiler")
@pytest.mark.parametrize(("smoothing", "passes", "reach"), [(2, 1, 2), (1, 3, 1), (3, 0, 4), (2, 2, 0)])
@pytest.mark.parametrize("padding", ["replicate", "zero"])
def test_wide_windows_and_reaches_agree_with_the_definition(
    smoothing: int, passes: int, reach: int, padding: Any
) -> None:
    fixed, moving = _pair(1, 2, 3, 1, 10)
    options: dict[str, Any] = {"reach": reach, "smoothing": smoothing, "passes": passes, "padding": padding}
    expected = cost_volume(fixed, moving, **options, backend="reference")
    assert _error(cost_volume(fixed, moving, **options, backend="cpp"), expected) < 1e-12


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("channels", [1, 12, 64, 384])
def test_float32_costs_are_right_for_few_and_many_channels(backend: Backend, channels: int) -> None:
    # A mean of 100 standard deviations: without centring, the products would lose four digits.
    fixed, moving = _pair(1, channels, 1, 1, 3, mean=100.0)
    expected = cost_volume(fixed, moving, reach=1, smoothing=0, backend="reference")
    found = cost_volume(fixed.float(), moving.float(), reach=1, smoothing=0, backend=backend)
    assert _error(found, expected) < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_features_give_float32_costs(backend: Backend) -> None:
    fixed, moving = (t.half() for t in _pair(1, 4, 1, 1, 3, mean=0.0))
    found = cost_volume(fixed, moving, reach=1, smoothing=0, backend=backend)
    assert found.dtype == torch.float32
    expected = cost_volume(fixed.double(), moving.double(), reach=1, smoothing=0, backend="reference")
    assert _error(found, expected) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_features_give_float32_costs(backend: Backend) -> None:
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter computes bfloat16 products wrongly (triton#11584): needs a GPU")
    fixed, moving = (t.bfloat16() for t in _pair(1, 4, 1, 1, 3, mean=0.0))
    found = cost_volume(fixed, moving, reach=1, smoothing=0, backend=backend)
    expected = cost_volume(fixed.double(), moving.double(), reach=1, smoothing=0, backend="reference")
    assert _error(found, expected) < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_constant_features_cost_nothing(backend: Backend) -> None:
    features = torch.full((1, 3, 1, 1, 3), 0.1)
    assert torch.equal(cost_volume(features, features, reach=1, backend=backend), torch.zeros(1, 27, 1, 1, 3))


@pytest.mark.skipif("cpp" not in BACKENDS, reason="no C++ compiler")
@settings(max_examples=8, deadline=None)
@given(shift=st.lists(st.integers(-2, 2), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_a_known_whole_shift_is_found_exactly_away_from_the_border(shift: list[int], seed: int) -> None:
    fixed, _ = _pair(1, 12, 8, 9, 10, seed=seed)
    dx, dy, dz = shift
    moving = fixed.roll((dz, dy, dx), dims=(2, 3, 4))  # moving(v + d) = fixed(v)
    field = coupled_convex(cost_volume(fixed.float(), moving.float(), reach=2), backend="cpp")
    inside = field[0, :, 4:-4, 4:-4, 4:-4]
    expected = torch.tensor(shift).float()[:, None, None, None].expand_as(inside)
    torch.testing.assert_close(inside, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_element_of_the_costs_is_written(
    backend: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed, moving = (t.float() for t in _pair(1, 2, 1, 1, 5))
    expected = cost_volume(fixed, moving, reach=1, dtype=dtype, backend=backend)
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        return empty(*args, **kwargs).fill_(torch.nan)  # pyright: ignore[reportCallIssue, reportArgumentType]

    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(cost_volume(fixed, moving, reach=1, dtype=dtype, backend=backend), expected)


@pytest.mark.parametrize("backend", FAST)
def test_layout_and_threads_do_not_change_a_bit(backend: Backend) -> None:
    fixed, moving = (t.float().transpose(1, 4) for t in _pair(1, 3, 2, 1, 1))  # not contiguous
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2):
        torch.set_num_threads(number)
        results.append(cost_volume(fixed, moving, reach=1, backend=backend))
    torch.set_num_threads(threads)
    results.append(cost_volume(fixed.contiguous(), moving.contiguous(), reach=1, backend=backend))
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


def test_the_gradient_is_the_definitions() -> None:
    fixed, moving = (t.requires_grad_() for t in _pair(1, 2, 2, 1, 2))
    assert torch.autograd.gradcheck(lambda f, m: cost_volume(f, m, reach=1), (fixed, moving))


@pytest.mark.parametrize("backend", FAST)
def test_a_forced_fast_path_refuses_features_with_a_gradient(backend: Backend) -> None:
    features = torch.rand(1, 2, 1, 2, 3, requires_grad=True)
    with pytest.raises(
        RuntimeError, match=f"cost_volume_with_gradient has no backend '{backend}', .* it has reference"
    ):
        cost_volume(features, features.detach(), reach=1, backend=backend)


@pytest.mark.parametrize("backend", FAST)
def test_the_custom_op_keeps_its_promises_to_torch(backend: Backend) -> None:
    module = importlib.import_module(f"lungssl_ops.cost_volume.{'cpu' if backend == 'cpp' else backend}")
    op = module._correlate if backend == "cpp" else module._cost_volume
    fixed, moving = torch.rand(2, 1, 2, 1, 1, 2)
    torch.library.opcheck(op, (fixed, moving, 1, 1, 1, True, False, torch.float32))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("backend", FAST)
def test_compiles_into_one_graph(backend: Backend) -> None:
    fixed, moving = torch.rand(2, 1, 2, 1, 1, 2)

    def register(fixed: Tensor, moving: Tensor) -> Tensor:
        return coupled_convex(cost_volume(fixed, moving, reach=1, backend=backend), weights=(0.1,), backend=backend)

    compiled = torch.compile(register, fullgraph=True, backend="eager")
    assert torch.equal(compiled(fixed, moving), register(fixed, moving))


def test_wrong_arguments_are_named() -> None:
    features = torch.rand(1, 2, 2, 3, 4)
    with pytest.raises(
        ValueError, match=r"one shape and floating type, got \(1, 2, 2, 3, 4\) torch.float32 and .* torch.float16"
    ):
        cost_volume(features, features.half(), reach=1)
    with pytest.raises(ValueError, match="reach, smoothing and passes of 0 or more, got -1, 1 and 2"):
        cost_volume(features, features, reach=-1)
    with pytest.raises(ValueError, match=r"can't give torch.int32"):
        cost_volume(features, features, reach=1, dtype=torch.int32)


def test_two_fields_become_inverse_to_each_other() -> None:
    z, y, x = torch.meshgrid(*(torch.linspace(0, torch.pi, n, dtype=torch.float64) for n in (7, 8, 9)), indexing="ij")
    bump = z.sin() * y.sin() * x.sin()
    forward = torch.stack([0.8 * bump, -0.5 * bump, 0.3 * bump])[None]
    there, back = inverse_consistent(forward, -0.6 * forward)

    def residual(u: Tensor, w: Tensor) -> float:
        # What one more iteration changes: half of u(v) + w(v + u(v)).
        changed, _ = inverse_consistent(u, w, iterations=1)
        return (changed - u).abs().max().item()

    before = residual(forward, -0.6 * forward)
    assert before > 0.1
    assert residual(there, back) < 0.1 * before
    with pytest.raises(ValueError, match=r"of one shape and type and 0 or more iterations, got .* and -1"):
        inverse_consistent(forward, forward, iterations=-1)
