import importlib
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lungssl_ops.dispatch import Backend
from lungssl_ops.mind import _dispatch, mind_ssc
from lungssl_ops.mind.reference import NEIGHBOURS, PAIRS
from torch import Tensor

BACKENDS = _dispatch.available(torch.zeros(1))
FAST = [backend for backend in BACKENDS if backend != "reference"]


def _image(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def _by_hand(image: Tensor, radius: int, dilation: int) -> Tensor:
    """The formulas, voxel by voxel: image [z, y, x] to [12, z, y, x]."""
    size = image.shape

    def at(voxel: list[int]) -> Tensor:
        z, y, x = (min(max(i, 0), n - 1) for i, n in zip(voxel, size, strict=True))
        return image[z, y, x]

    window = range(-radius, radius + 1)
    distances = torch.zeros(12, *size, dtype=image.dtype)
    for voxel in product(*(range(n) for n in size)):
        for p, (i, j) in enumerate(PAIRS):
            total = 0.0
            for offset in product(window, window, window):
                centre = [min(max(v + o, 0), n - 1) for v, o, n in zip(voxel, offset, size, strict=True)]
                first, second = (
                    at([c + dilation * o for c, o in zip(centre, NEIGHBOURS[k], strict=True)]) for k in (i, j)
                )
                total += (first - second).item() ** 2
            distances[(p, *voxel)] = total / (2 * radius + 1) ** 3
    distances -= distances.amin(dim=0)
    variance = distances.mean(dim=0)
    return torch.exp(-distances / variance.clamp(0.001 * variance.mean(), 1000 * variance.mean()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("radius", "dilation"), [(1, 2), (0, 1)])
def test_equals_the_formulas_computed_voxel_by_voxel(backend: Backend, radius: int, dilation: int) -> None:
    image = _image(1, 1, 3, 4, 5)
    found = mind_ssc(image, radius=radius, dilation=dilation, backend=backend)
    torch.testing.assert_close(found[0], _by_hand(image[0, 0], radius, dilation), rtol=0, atol=1e-12)


def test_a_step_between_two_slabs_is_seen_by_the_pairs_across_it() -> None:
    # Image 0 below plane 4 and 1 above: at plane 2 with dilation 2 only the neighbour +z (index 1) differs.
    image = torch.zeros(1, 1, 9, 9, 9)
    image[:, :, 4:] = 1
    similarity = mind_ssc(image, radius=0, dilation=2)[0, :, 2, 4, 4]
    across = torch.tensor([1 in pair for pair in PAIRS])
    assert across.sum() == 4
    assert (similarity[~across] == 1).all()
    # d = 1 for four of twelve pairs, so the variance is 1/3.
    torch.testing.assert_close(similarity[across], torch.full((4,), -3.0).exp())


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("size", "radius", "dilation"),
    [((2, 1, 3, 5, 9), 1, 2), ((1, 1, 1, 1, 1), 1, 2), ((1, 1, 2, 7, 16), 0, 3), ((1, 1, 1, 3, 17), 2, 1)],
)
def test_odd_sizes_and_batches_agree_with_the_definition(
    backend: Backend, size: tuple[int, ...], radius: int, dilation: int
) -> None:
    image = _image(*size)
    expected = mind_ssc(image, radius=radius, dilation=dilation, backend="reference")
    for given_image, tolerance in ((image, 1e-12), (image.float(), 2e-6)):  # one digit is lost to the square
        found = mind_ssc(given_image, radius=radius, dilation=dilation, backend=backend)
        assert _error(found, expected) < tolerance


@pytest.mark.parametrize("backend", FAST)
def test_a_sample_does_not_depend_on_its_batch(backend: Backend) -> None:
    image = _image(2, 1, 3, 4, 8)
    image[1] *= 100  # so that a variance shared by the batch would differ
    whole = mind_ssc(image, backend=backend)
    assert torch.equal(whole[1:], mind_ssc(image[1:], backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 2.0**-11), (torch.uint8, 0.5001)])
def test_small_types_are_the_rounded_similarities(backend: Backend, dtype: torch.dtype, atol: float) -> None:
    image = _image(1, 1, 3, 4, 19).float()
    full = mind_ssc(image.double(), backend="reference")
    found = mind_ssc(image, dtype=dtype, backend=backend)
    assert found.dtype == dtype
    assert (found.double() - (255 * full if dtype == torch.uint8 else full)).abs().max() <= atol


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_images_are_computed_in_float32(backend: Backend) -> None:
    image = _image(1, 1, 3, 4, 9).half()
    found = mind_ssc(image, backend=backend)
    assert found.dtype == torch.float32
    assert _error(found, mind_ssc(image.double(), backend="reference")) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_images_are_computed_in_float32(backend: Backend) -> None:
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter computes bfloat16 wrongly (triton#11584): needs a GPU")
    image = _image(1, 1, 3, 4, 9).bfloat16()
    assert _error(mind_ssc(image, backend=backend), mind_ssc(image.double(), backend="reference")) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_image_gives_ones(backend: Backend) -> None:
    assert torch.equal(mind_ssc(torch.full((1, 1, 2, 3, 4), -800.0), backend=backend), torch.ones(1, 12, 2, 3, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_makes_its_sample_nan_and_no_other(backend: Backend) -> None:
    image = _image(2, 1, 2, 3, 4)
    image[0, 0, 0, 0, 0] = torch.nan
    found = mind_ssc(image, backend=backend)
    assert found[0].isnan().all() and found[1].isfinite().all()


@settings(max_examples=10, deadline=None)
@given(scale=st.sampled_from([0.25, 2.0, 1024.0]), shift=st.integers(-1000, 1000), seed=st.integers(0, 99))
def test_shift_and_scale_of_the_intensities_do_not_matter(scale: float, shift: int, seed: int) -> None:
    image = (1000 * _image(1, 1, 4, 5, 6, seed=seed)).round()  # whole HU, so that the shift is exact
    for backend in ("reference", "cpp") if "cpp" in BACKENDS else ("reference",):
        expected = mind_ssc(image, backend=backend)
        torch.testing.assert_close(mind_ssc(scale * (image + shift), backend=backend), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", FAST)
def test_exchanging_two_axes_permutes_the_channels(backend: Backend) -> None:
    image = _image(1, 1, 3, 4, 5)
    swapped = mind_ssc(image.transpose(2, 4), backend=backend)  # not contiguous
    axis = {0: 4, 1: 5, 2: 2, 3: 3, 4: 0, 5: 1}
    sets = [frozenset(pair) for pair in PAIRS]
    order = [sets.index(frozenset(axis[k] for k in pair)) for pair in PAIRS]
    expected = mind_ssc(image, backend=backend)[:, order].transpose(2, 4)
    torch.testing.assert_close(swapped, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_element_of_the_result_is_written(
    backend: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = _image(1, 1, 3, 5, 13).float()
    expected = mind_ssc(image, dtype=dtype, backend=backend)
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        return empty(*args, **kwargs).fill_(torch.nan)  # pyright: ignore[reportCallIssue, reportArgumentType]

    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(mind_ssc(image, dtype=dtype, backend=backend), expected)


@pytest.mark.parametrize("backend", FAST)
def test_repeats_are_bit_equal_with_any_number_of_threads(backend: Backend) -> None:
    image = _image(1, 1, 5, 6, 7).float()
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2, 2):
        torch.set_num_threads(number)
        results.append(mind_ssc(image, backend=backend))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


def test_the_gradient_is_the_definitions() -> None:
    image = _image(1, 1, 2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda i: mind_ssc(i, radius=1, dilation=1), (image,))


@pytest.mark.parametrize("backend", FAST)
def test_a_forced_fast_path_refuses_an_image_with_a_gradient(backend: Backend) -> None:
    image = torch.rand(1, 1, 3, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"mind_ssc_with_gradient has no backend '{backend}', .* it has reference"):
        mind_ssc(image, backend=backend)
    with torch.no_grad():
        assert mind_ssc(image, backend=backend).shape == (1, 12, 3, 3, 3)


@pytest.mark.parametrize("backend", FAST)
def test_the_custom_op_keeps_its_promises_to_torch(backend: Backend) -> None:
    module = importlib.import_module(f"lungssl_ops.mind.{'cpu' if backend == 'cpp' else backend}")
    torch.library.opcheck(module._mind_ssc, (torch.rand(1, 1, 2, 3, 4), 0, 2, torch.float16))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("backend", FAST)
def test_compiles_into_one_graph(backend: Backend) -> None:
    image = torch.rand(1, 1, 3, 4, 5)
    compiled = torch.compile(lambda i: 2 * mind_ssc(i, backend=backend), fullgraph=True, backend="eager")
    assert torch.equal(compiled(image), 2 * mind_ssc(image, backend=backend))


def test_wrong_arguments_are_named() -> None:
    image = torch.rand(1, 1, 3, 3, 3)
    with pytest.raises(ValueError, match=r"a radius from 0 and a dilation from 1 to 2047 voxels, got -1 and 2"):
        mind_ssc(image, radius=-1)
    with pytest.raises(ValueError, match=r"can't give torch.int16; it gives torch.float16"):
        mind_ssc(image, dtype=torch.int16)
    with pytest.raises(ValueError, match=r"no voxels, shape \(1, 1, 0, 3, 3\)"):
        mind_ssc(torch.rand(1, 1, 0, 3, 3))
