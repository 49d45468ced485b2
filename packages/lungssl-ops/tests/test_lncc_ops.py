"""How `lncc` behaves as an op: autograd, compilation, layouts, threads, what it writes, what it refuses."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from lungssl_ops.dispatch import Backend, triton_problem
from lungssl_ops.lncc import _dispatch, lncc
from torch import Tensor

KERNELS: tuple[Backend, ...] = ("triton", "cpp")
# The interpreter takes a tenth of a second a kernel: what Triton and C++ share (operators.py) is tested with C++.
CASES = [("cpp", "mean"), ("cpp", "none"), ("triton", "mean")]


def _images(backend: Backend, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Related images where the backend runs: Triton's on the GPU if there is one, else on the CPU, interpreted."""
    place = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    if backend not in _dispatch.available(torch.zeros(1, 1, 1, 1, 1, device=place)):
        pytest.skip(f"backend {backend!r} can't run here")
    fixed = torch.randn(shape, dtype=dtype)
    return fixed.to(place), (0.5 * fixed + torch.randn(shape, dtype=dtype)).to(place)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("backend", "reduction", "borders"),
    [
        *((b, r, s) for b in ("cpp", "reference") for r in ("mean", "none") for s in ("count", "zeros")),
        ("triton", "mean", "zeros"),
        ("triton", "none", "count"),
    ],
)
def test_the_gradients_are_the_numerical_ones(backend: Backend, reduction: str, borders: str) -> None:
    fixed, moving = (image.requires_grad_() for image in _images(backend, 1, 1, 2 if backend == "triton" else 4, 3, 5))

    def run(fixed: Tensor, moving: Tensor) -> Tensor:
        options = {"window": 3, "eps": 0.1, "reduction": reduction, "borders": borders, "backend": backend}
        return lncc(fixed, moving, **options)

    # Every element of every gradient with C++; the interpreter takes a random direction instead.
    assert torch.autograd.gradcheck(run, (fixed, moving), fast_mode=backend != "cpp" or reduction == "none")


# opcheck itself asks copies of its inputs for their gradients.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", KERNELS)
def test_the_custom_ops_pass_opcheck(backend: Backend, unchecked: None) -> None:
    shape = (1, 1, 2, 2, 3) if backend == "triton" else (2, 1, 3, 4, 5)
    fixed, moving = (image.requires_grad_() for image in _images(backend, *shape))
    import_module({"triton": "lungssl_ops.lncc.triton", "cpp": "lungssl_ops.lncc.cpu"}[backend])
    ops = torch.ops.lungssl_ops
    mask, upstream = (torch.rand_like(fixed, requires_grad=False) for _ in range(2))
    torch.library.opcheck(getattr(ops, f"lncc_{backend}"), (fixed, moving, mask, 3, 0.1, False, True, True))
    if backend == "triton":
        return  # the others share its fakes and gradients with C++'s
    torch.library.opcheck(ops.lncc_cpp, (fixed, moving.detach(), None, 3, 0.1, True, True, False))
    torch.library.opcheck(ops.lncc_map_cpp, (fixed, moving, mask, 3, 0.1, False))
    plain = (fixed.detach(), moving.detach(), mask, upstream, 3, 0.1, False, False, True)
    torch.library.opcheck(ops.lncc_map_backward_cpp, plain)
    torch.library.opcheck(ops.lncc_scale_cpp, (upstream, upstream[:, 0, 0, 0, 0]))


@pytest.mark.parametrize(("backend", "reduction"), CASES)
def test_it_compiles_as_one_graph_with_its_backward(backend: Backend, reduction: str, unchecked: None) -> None:
    fixed, moving = _images(backend, 1, 1, 2, 5, 6)
    moving.requires_grad_()

    def loss(fixed: Tensor, moving: Tensor) -> Tensor:
        return 1 - lncc(fixed, 2 * moving, window=3, reduction=reduction, backend=backend).mean()

    (expected,) = torch.autograd.grad(loss(fixed, moving), moving)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(fixed, moving), moving)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("backend", "reduction"), CASES[:2])
def test_a_second_derivative_raises(backend: Backend, reduction: str) -> None:
    fixed, moving = (image.requires_grad_() for image in _images(backend, 1, 1, 3, 4, 5))
    value = lncc(fixed, moving, window=3, reduction=reduction, backend=backend)
    (gradient,) = torch.autograd.grad((value**2).sum(), moving, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


@pytest.mark.parametrize(("backend", "reduction"), CASES)
def test_one_images_gradient_alone_is_the_same_as_with_both(backend: Backend, reduction: str) -> None:
    fixed, moving = (image.requires_grad_() for image in _images(backend, 2, 1, 2, 4, 6))
    options = {"window": 3, "reduction": reduction, "backend": backend}
    both = torch.autograd.grad(lncc(fixed, moving, **options).sum(), (fixed, moving))
    (alone_fixed,) = torch.autograd.grad(lncc(fixed, moving.detach(), **options).sum(), fixed)
    (alone_moving,) = torch.autograd.grad(lncc(fixed.detach(), moving, **options).sum(), moving)
    torch.testing.assert_close(alone_fixed, both[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(alone_moving, both[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", KERNELS)
def test_strided_inputs_and_expanded_gradients_are_as_good_as_contiguous_ones(backend: Backend) -> None:
    fixed, moving = _images(backend, 2, 1, 2, 4, 6)
    strided = [image.transpose(2, 4).contiguous().transpose(2, 4) for image in (fixed, moving)]
    assert not strided[0].is_contiguous()
    mask = torch.rand(6, 4, 2, 1, 2).to(fixed).permute(4, 3, 2, 1, 0)
    for reduction in ("none",) if backend == "triton" else ("mean", "none"):
        found, expected = [], []
        for images, weights, results in ((strided, mask, found), ((fixed, moving), mask.contiguous(), expected)):
            f, m = (image.detach().requires_grad_() for image in images)
            value = lncc(f, m, window=3, mask=weights, reduction=reduction, backend=backend)
            results += [value, *torch.autograd.grad(value.sum(), (f, m))]  # sum: an expanded gradient of ones
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("backend", KERNELS)
def test_everything_it_allocates_is_written(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, moving = (image.requires_grad_() for image in _images(backend, 2, 1, 2, 4, 6))

    def run() -> list[Tensor]:
        found = []
        for reduction in ("none",) if backend == "triton" else ("mean", "none"):
            mask = {"mask": torch.ones_like(fixed, requires_grad=False)}
            for options in (mask,) if backend == "triton" else ({}, {"borders": "zeros"}, mask):
                value = lncc(fixed, moving, window=3, reduction=reduction, backend=backend, **options)
                found += [value, *torch.autograd.grad(value.sum(), (fixed, moving))]
        return found

    expected = run()
    empty, new_empty = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
    monkeypatch.setattr(
        Tensor, "new_empty", lambda self, *a, **options: new_empty(self, *a, **options).fill_(torch.nan)
    )
    assert torch.empty(1).isnan() and fixed.new_empty(1).isnan()
    for a, b in zip(run(), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("borders", ["count", "zeros"])
def test_cpp_gives_the_same_bits_again_and_with_any_number_of_threads(borders: str) -> None:
    fixed, moving = (image.requires_grad_() for image in _images("cpp", 2, 1, 50, 6, 7, dtype=torch.float32))

    def run(threads: int) -> list[Tensor]:
        with _threads(threads):
            found = []
            for reduction in ("mean", "none"):
                value = lncc(fixed, moving, window=5, borders=borders, reduction=reduction, backend="cpp")
                found += [value, *torch.autograd.grad(value.sum(), (fixed, moving))]
            with torch.no_grad():
                found.append(lncc(fixed, moving, window=5, borders=borders, backend="cpp"))
            return found

    once = run(1)
    for threads in (1, 2, 3, 8):
        assert all(torch.equal(a, b) for a, b in zip(run(threads), once, strict=True))


def test_triton_gives_the_same_bits_again() -> None:
    fixed, moving = (image.requires_grad_() for image in _images("triton", 1, 1, 2, 4, 6, dtype=torch.float32))
    first, second = (
        torch.autograd.grad(lncc(fixed, moving, window=3, backend="triton").sum(), (fixed, moving)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_compiled_formulation_is_the_definition() -> None:
    # Uncompiled here: compilation takes longer than all other tests, and the benchmark runs it.
    from lungssl_ops.lncc.compiled import box_by_cumsum
    from lungssl_ops.lncc.reference import lncc_by

    fixed, moving = _images("reference", 2, 1, 7, 3, 12)
    mask = torch.rand(2, 1, 7, 3, 12, dtype=torch.float64)
    for borders, weights in (("count", None), ("count", mask), ("zeros", None)):
        found = lncc_by(box_by_cumsum, fixed, moving, weights, 5, 0.1, borders, "none")
        expected = lncc(fixed, moving, window=5, eps=0.1, mask=weights, borders=borders, reduction="none")
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_bfloat16_kernels_are_left_to_no_backend() -> None:
    if triton_problem():
        pytest.skip(f"Triton can't run here: {triton_problem()}")
    image = torch.zeros(1, 1, 3, 3, 3, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"fixed is torch.bfloat16, whose rounding.*pass int16, float32 or float64"):
        lncc(image, image, backend="triton")


def test_half_precision_is_refused_with_the_reason() -> None:
    image = torch.zeros(1, 1, 3, 3, 3)
    with pytest.raises(TypeError, match=r"moving is torch.float16, whose rounding"):
        lncc(image, image.half())


@pytest.mark.parametrize("window", [4, 1, -3, 0])
def test_a_window_without_a_middle_is_refused(window: int) -> None:
    image = torch.zeros(1, 1, 3, 3, 3)
    with pytest.raises(ValueError, match=f"odd window of 3 to 4095 voxels, got {window}"):
        lncc(image, image, window=window)


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan"), float("inf")])
def test_an_eps_that_leaves_constant_windows_undefined_is_refused(eps: float) -> None:
    image = torch.zeros(1, 1, 3, 3, 3)
    with pytest.raises(ValueError, match=rf"finite eps > 0, .*got {eps}"):
        lncc(image, image, eps=eps)


def test_masks_that_make_no_sense_are_refused() -> None:
    image, mask = torch.zeros(2, 1, 3, 4, 5), torch.ones(2, 1, 3, 4, 5)
    with pytest.raises(ValueError, match=r"MONAI's loss, which has no mask; use borders='count'"):
        lncc(image, image, mask=mask, borders="zeros")
    with pytest.raises(ValueError, match=r"mask requires a gradient; detach\(\) it"):
        lncc(image, image, mask=mask.requires_grad_())


def test_an_empty_volume_is_refused_with_its_shape() -> None:
    image = torch.zeros(1, 1, 3, 0, 3)
    with pytest.raises(ValueError, match=r"not empty, got \[1, 1, 3, 0, 3\]"):
        lncc(image, image)


def test_unknown_words_are_refused_with_the_known_ones() -> None:
    image = torch.zeros(1, 1, 3, 3, 3)
    for options, message in (
        ({"reduction": "sum"}, "reduction 'sum' is unknown; known are 'mean' and 'none'"),
        ({"borders": "reflect"}, "borders 'reflect' is unknown; known are 'count' and 'zeros'"),
    ):
        function = getattr(lncc, "__wrapped__", lncc)  # beartype, active in tests, would be first
        with pytest.raises(ValueError, match=message):
            function(image, image, **options)
