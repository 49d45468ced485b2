import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from lungssl_ops.dispatch import Backend
from lungssl_ops.warp import Padding, WarpTerms, _warp, compose, exponential, warp, warp_loss_terms
from torch import Tensor

GPU = "cuda" if torch.cuda.is_available() else "cpu"
"""Where Triton kernels are tested: without a GPU by Triton's interpreter."""
AVAILABLE = {*_warp.available(torch.zeros(1)), *_warp.available(torch.zeros(1, device=GPU))}
_KERNELS: tuple[Backend, ...] = ("cpp", "triton")
FAST: list[Backend] = [b for b in _KERNELS if b in AVAILABLE]
BACKENDS: list[Backend] = ["reference", *FAST]
SIZES = {"cpp": [(2, 3, 5, 6, 67), (1, 1, 1, 4, 130)], "triton": [(1, 2, 3, 7, 9)], "reference": [(2, 3, 3, 4, 5)]}
needs_cpp = pytest.mark.skipif("cpp" not in AVAILABLE, reason="no C++ compiler")
needs_triton = pytest.mark.skipif("triton" not in AVAILABLE, reason="no Triton (its interpreter needs numpy)")


def _place(backend: Backend) -> str:
    return GPU if backend == "triton" else "cpu"


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, *, amplitude: float = 1.5, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    b, _, *sides = shape
    image = torch.randn(shape, dtype=torch.float64).to(dtype)
    u_vox = (amplitude * torch.randn(b, 3, *sides, dtype=torch.float64)).to(dtype)
    if amplitude < 1:
        u_vox = u_vox.clamp(-0.9, 0.9)  # Triton's interpreter takes a second for what C++ does in a microsecond
    weight = torch.rand(b, 1, *sides, dtype=torch.float64).to(dtype)
    return image.to(device), u_vox.to(device), weight.to(device)


def _loss(terms: WarpTerms) -> Tensor:
    bending = torch.zeros_like(terms.folding) if terms.bending is None else terms.bending
    ramp = torch.linspace(-1, 1, terms.warped.numel()).to(terms.warped).reshape(terms.warped.shape)
    return (terms.warped * ramp).sum() + (3 * terms.folding + 2 * terms.diffusion + bending).sum()


def _everything(
    image: Tensor,
    u_vox: Tensor,
    weight: Tensor | None,
    backend: Backend,
    padding: Padding = "border",
    *,
    with_bending: bool = True,
) -> list[Tensor]:
    image, u_vox = image.detach().requires_grad_(), u_vox.detach().requires_grad_()
    terms = warp_loss_terms(
        image,
        u_vox,
        weight=weight,
        spacing_mm=(0.7, 1.1, 2.0),
        with_bending=with_bending,
        padding=padding,
        backend=backend,
    )
    gradients = torch.autograd.grad(_loss(terms), (image, u_vox))
    return [*(term.detach() for term in terms if term is not None), *gradients]


def _worst(ours: list[Tensor], exact: list[Tensor]) -> float:
    """The largest norm-relative error."""
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, exact, strict=True))


# Of the four combinations the interpreter, which takes seconds for each, gets two.
@pytest.mark.parametrize(
    ("backend", "shape", "padding", "dtype", "tolerance"),
    [
        (backend, shape, padding, dtype, tolerance)
        for backend in BACKENDS
        for shape in SIZES[backend]
        for padding, dtype, tolerance in (
            ("border", torch.float32, 1e-6),
            (0.1, torch.float64, 1e-12),
            ("border", torch.float64, 1e-12),
            (0.1, torch.float32, 1e-6),
        )[: 2 if backend == "triton" else 4]
    ],
)
def test_values_and_gradients_are_the_definition_s_in_float64(
    backend: Backend, shape: tuple[int, ...], padding: Padding, dtype: torch.dtype, tolerance: float
) -> None:
    image, u_vox, weight = _inputs(shape, dtype, amplitude=0.4, device=_place(backend))
    weighted = None if padding == "border" else weight
    exact = _everything(
        image.double(), u_vox.double(), None if weighted is None else weighted.double(), "reference", padding
    )
    assert _worst(_everything(image, u_vox, weighted, backend, padding), exact) < tolerance


@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs_give_the_same_bits(backend: Backend) -> None:
    inputs = _inputs((2, 2, 2, 3, 5), torch.float32, amplitude=0.4, device=_place(backend))
    image, u_vox, weight = (t.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0) for t in inputs)
    assert not any(t.is_contiguous() for t in (image, u_vox, weight))
    with_bending = backend != "triton"
    once = _everything(*inputs, backend, with_bending=with_bending)
    again = _everything(image, u_vox, weight, backend, with_bending=with_bending)
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", FAST)
def test_a_constant_image_has_no_gradient_in_the_field(backend: Backend) -> None:
    _, u_vox, _ = _inputs((1, 1, 2, 3, 5), torch.float64, device=_place(backend))
    u_vox.requires_grad_()
    warped = warp(torch.full_like(u_vox[:, :1], 4.0, requires_grad=False), u_vox, backend=backend)
    torch.testing.assert_close(warped, torch.full_like(warped, 4.0), rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad(warped.sum(), u_vox)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_the_terms_off_the_grid_nodes(backend: Backend) -> None:
    interpreted = backend == "triton"
    image, u_vox, weight = _inputs(
        (1, 1, 1, 2, 3) if interpreted else (2, 2, 3, 4, 5), torch.float64, device=_place(backend)
    )
    # No fraction within 0.1 of 0: there the derivative jumps.
    u_vox = u_vox.floor().clamp(-1, 0) + 0.1 + 0.8 * torch.rand_like(u_vox)

    def loss(image: Tensor, u_vox: Tensor) -> Tensor:
        terms = warp_loss_terms(
            image,
            u_vox,
            weight=weight,
            spacing_mm=(0.7, 1.1, 2.0),
            with_bending=not interpreted,
            padding=-0.5,
            backend=backend,
        )
        return _loss(terms)

    inputs = (image.requires_grad_(), u_vox.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=backend != "cpp", check_undefined_grad=not interpreted)


@pytest.mark.parametrize("backend", FAST)
def test_gradcheck_of_composition_and_exponential(backend: Backend) -> None:
    sides = (2, 2, 2) if backend == "triton" else (3, 4, 4)
    one, other = (0.1 + 0.3 * torch.rand(1, 3, *sides).to(_place(backend), torch.float64) for _ in range(2))
    inputs = (one.requires_grad_(), other.requires_grad_())
    assert torch.autograd.gradcheck(functools.partial(compose, backend=backend), inputs, fast_mode=backend != "cpp")
    if backend == "cpp":
        assert torch.autograd.gradcheck(functools.partial(exponential, steps=4, backend=backend), (one,))


# opcheck itself asks copies of its inputs for their gradients.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("backend", FAST)
def test_the_custom_ops_pass_opcheck(backend: Backend) -> None:
    # By name, so that neither is imported where it can't run.
    operator = getattr(torch.ops.lungssl_ops, f"warp_{backend}").default if _loaded(backend) else None
    assert operator is not None
    image, u_vox, weight = _inputs((1, 1, 2, 2, 3), torch.float32, amplitude=0.3, device=_place(backend))
    for fill, terms in ((None, 0), (0.5, 1 if backend == "triton" else 3)):
        inputs = (
            image.requires_grad_(),
            u_vox.requires_grad_(),
            weight if terms else None,
            fill,
            [1.0, 1.0, 2.0],
            terms,
        )
        torch.library.opcheck(operator, inputs)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("backend", FAST)
def test_it_compiles_without_a_graph_break(backend: Backend) -> None:
    image, u_vox, _ = _inputs((1, 1, 2, 2, 3), torch.float32, amplitude=0.3, device=_place(backend))

    def loss(u_vox: Tensor) -> Tensor:
        terms = warp_loss_terms(image, u_vox, backend=backend)
        return terms.warped.square().mean() + terms.folding.sum() + terms.diffusion.sum()

    u_vox.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(u_vox), u_vox)
    (expected,) = torch.autograd.grad(loss(u_vox), u_vox)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("backend", FAST)
def test_every_voxel_of_every_result_is_written(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    image, u_vox, weight = _inputs((2, 1, 2, 3, 5), torch.float32, amplitude=0.4, device=_place(backend))
    interpreted = backend == "triton"
    clean = _everything(image, u_vox, weight, backend, with_bending=not interpreted)
    assert _loaded(backend)

    def poisoned(like: Tensor) -> Tensor:
        return torch.full_like(like, torch.nan)

    monkeypatch.setattr(torch, "empty_like", poisoned)
    for result, expected in zip(
        _everything(image, u_vox, weight, backend, with_bending=not interpreted), clean, strict=True
    ):
        assert torch.equal(result, expected)


@needs_cpp
def test_cpp_gives_the_same_bits_every_time_and_for_any_number_of_threads() -> None:
    image, u_vox, weight = _inputs((2, 2, 7, 6, 33), torch.float32, amplitude=3.0)
    with _threads(1):
        once, again = (_everything(image, u_vox, weight, "cpp") for _ in range(2))
    for threads in (2, 3):
        with _threads(threads):
            for one, same, other in zip(once, again, _everything(image, u_vox, weight, "cpp"), strict=True):
                assert torch.equal(one, same) and torch.equal(one, other)


@needs_triton
@pytest.mark.parametrize("amplitude", [0.9, 1.9, 4.0])
def test_triton_gathers_the_image_gradient_of_small_displacements_and_scatters_that_of_large_ones(
    amplitude: float,
) -> None:
    image, u_vox, _ = _inputs((2, 3, 2, 3, 4), torch.float64, device=GPU)
    u_vox = amplitude * u_vox / u_vox.abs().max()
    upstream = torch.randn_like(image)
    image.requires_grad_()
    expected, ours = (
        torch.autograd.grad(warp(image, u_vox, padding="zeros", backend=b), image, upstream)[0]
        for b in ("reference", "triton")
    )
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@needs_triton
def test_deterministic_algorithms_make_triton_gather_large_displacements_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import lungssl_ops.warp.triton as path

    class NoScatter:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *_, **__: None

    monkeypatch.setattr(path, "scatter_kernel", NoScatter())
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    image, u_vox, _ = _inputs((1, 1, 2, 3, 4), torch.float64, amplitude=3.0, device=GPU)
    u_vox = u_vox.clamp(-2.5, 2.5)
    assert u_vox.abs().max() > path.GATHER_REACH
    image.requires_grad_()
    expected, ours = (
        torch.autograd.grad(warp(image, u_vox, backend=b).square().sum(), image)[0] for b in ("reference", "triton")
    )
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_computed_in_float32(backend: Backend) -> None:
    image, u_vox, _ = _inputs((1, 1, 2, 3, 4), torch.float16, device=_place(backend))
    u_vox.requires_grad_()
    warped = warp(image, u_vox, backend=backend)
    assert warped.dtype == torch.float32
    assert torch.equal(warped, warp(image.float(), u_vox.float(), backend=backend))
    assert torch.autograd.grad(warped.sum(), u_vox)[0].dtype == torch.float16


@needs_triton
def test_bfloat16_reaches_no_kernel() -> None:
    # The interpreter has no bfloat16; the kernels never see it, since inputs are widened before.
    image, u_vox, _ = _inputs((1, 1, 2, 3, 4), torch.bfloat16, device=GPU)
    exact = warp(image.double(), u_vox.double(), backend="reference")
    torch.testing.assert_close(warp(image, u_vox, backend="triton").double(), exact, rtol=1e-6, atol=1e-6)


@needs_cpp
def test_no_second_derivative_is_made_up() -> None:
    image, u_vox, _ = _inputs((1, 1, 2, 3, 4), torch.float64)
    u_vox.requires_grad_()
    (gradient,) = torch.autograd.grad(warp(image, u_vox, backend="cpp").square().sum(), u_vox, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(gradient.sum(), u_vox)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u_vox": torch.zeros(1, 3, 2, 3, 5)}, r"u_vox has shape \(1, 3, 2, 3, 5\), expected \(1, 3, 2, 3, 4\)"),
        ({"padding": "reflection"}, "padding 'reflection' is unknown, expected 'border', 'zeros' or a finite number"),
        ({"padding": float("nan")}, "padding nan is unknown"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, r"spacing_mm is \(1.0, 0.0, 1.0\), expected three positive numbers"),
        ({"weight": torch.ones(1, 1, 2, 3, 4, requires_grad=True)}, "requires a gradient; detach"),
        ({"weight": torch.ones(2, 1, 2, 3, 4)}, r"weight has shape \(2, 1, 2, 3, 4\), expected \(1, 1, 2, 3, 4\)"),
        ({"backend": "fast"}, "backend 'fast' of warp_terms is unknown"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], message: str) -> None:
    arguments = {"image": torch.zeros(1, 1, 2, 3, 4), "u_vox": torch.zeros(1, 3, 2, 3, 4)} | change
    with pytest.raises(ValueError, match=message):
        warp_loss_terms(**arguments)  # pyright: ignore[reportArgumentType]


def test_negative_squaring_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="takes -1 squaring steps, expected 0 or more"):
        exponential(torch.zeros(1, 3, 2, 2, 2), steps=-1)


def _loaded(backend: Backend) -> bool:
    """Import the path, so that its operators are registered."""
    at = _place(backend)
    warp(torch.zeros(1, 1, 1, 1, 2, device=at), torch.zeros(1, 3, 1, 1, 2, device=at), backend=backend)
    return True


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
