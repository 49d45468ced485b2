"""What `lncc` computes: every backend against the definition and against values from outside."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lungssl_ops.dispatch import Backend
from lungssl_ops.lncc import _dispatch, lncc
from torch import Tensor

BACKENDS: tuple[Backend, ...] = ("triton", "cpp", "reference")
OPTIONS = {
    "count": {},
    "weights": {"mask": "weights"},
    "mask": {"mask": "mask"},
    "zeros": {"borders": "zeros"},
}


def _images(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Related images in HU, far from 0."""
    fixed = 100 * torch.randn(shape, dtype=torch.float64) - 700
    moving = 0.5 * fixed + 40 * torch.randn(shape, dtype=torch.float64) + 30
    return fixed.to(dtype), moving.to(dtype)


def _options(name: str, shape: torch.Size, dtype: torch.dtype) -> dict[str, object]:
    options: dict[str, object] = dict(OPTIONS[name])
    if "mask" in options:
        mask = torch.rand(shape, dtype=dtype) * (torch.rand(shape) > 0.4)
        mask[:, :, :1] = 0
        options["mask"] = mask if options["mask"] == "weights" else mask > 0
    return options


def _value_and_gradients(backend: Backend, fixed: Tensor, moving: Tensor, **options: object) -> list[Tensor]:
    place = _place(backend)
    fixed, moving = (image.detach().clone().to(place).requires_grad_() for image in (fixed, moving))
    options = {key: value.to(place) if isinstance(value, Tensor) else value for key, value in options.items()}
    value = lncc(fixed, moving, backend=backend, **options)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=place).view_as(value)
    gradients = torch.autograd.grad((value * upstream).sum(), (fixed, moving))
    return [result.detach().cpu() for result in (value, *gradients)]


def _place(backend: Backend) -> str:
    """Kernels run on the GPU if there is one, else on the CPU, by Triton's interpreter."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def _need(backend: Backend) -> None:
    if backend not in _dispatch.available(torch.zeros(1, 1, 1, 1, 1, device=_place(backend))):
        pytest.skip(f"backend {backend!r} can't run here")


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def test_a_window_is_the_squared_correlation_of_its_voxels() -> None:
    fixed, moving = _images(1, 1, 5, 6, 7)
    found = lncc(fixed, moving, window=3, eps=1e-9, reduction="none", backend="reference")
    for z, y, x in ((2, 3, 4), (0, 0, 0), (4, 2, 6)):
        at = (0, 0, *(slice(max(0, i - 1), i + 2) for i in (z, y, x)))
        pair = torch.stack([fixed[at].flatten(), moving[at].flatten()])
        assert found[0, 0, z, y, x].item() == pytest.approx(torch.corrcoef(pair)[0, 1].item() ** 2, rel=1e-9)


def test_a_masked_window_is_the_squared_correlation_of_the_voxels_that_count() -> None:
    fixed, moving = _images(1, 1, 5, 6, 7)
    mask = torch.rand(1, 1, 5, 6, 7) > 0.4
    mask[0, 0, 2, 3, 4] = True
    found = lncc(fixed, moving, window=3, eps=1e-9, mask=mask, reduction="none", backend="reference")
    at = (0, 0, slice(1, 4), slice(2, 5), slice(3, 6))
    pair = torch.stack([fixed[at][mask[at]], moving[at][mask[at]]])
    assert found[0, 0, 2, 3, 4].item() == pytest.approx(torch.corrcoef(pair)[0, 1].item() ** 2, rel=1e-9)
    assert torch.equal(found != 0, mask)
    mean = lncc(fixed, moving, window=3, eps=1e-9, mask=mask, backend="reference")
    assert mean.item() == pytest.approx(found[mask].mean().item(), rel=1e-12)


@pytest.mark.parametrize("backend", ["triton", "cpp"])
@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_value_and_gradients_are_the_definitions_in_float64(backend: Backend, name: str, reduction: str) -> None:
    # The interpreter takes milliseconds a program, of which there is one per plane of a volume.
    fixed, moving = _images(2, 1, 2 if backend == "triton" else 7, 5, 6)
    _need(backend)
    options = {"window": 3, "reduction": reduction, **_options(name, fixed.shape, fixed.dtype)}
    found = _value_and_gradients(backend, fixed, moving, **options)
    expected = _value_and_gradients("reference", fixed, moving, **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
        assert _error(a, b) < 1e-12


@pytest.mark.parametrize("shape", [(1, 1, 70, 4, 9), (1, 1, 3, 2, 1), (2, 1, 1, 17, 3), (1, 1, 35, 1, 11)])
@pytest.mark.parametrize("window", [3, 9, 21])
def test_cpp_is_the_definition_where_the_sums_start_afresh_and_windows_are_larger_than_the_volume(
    shape: tuple[int, ...], window: int
) -> None:
    fixed, moving = _images(*shape)
    _need("cpp")
    for name in OPTIONS:
        options = {"window": window, "eps": 1.0, **_options(name, fixed.shape, fixed.dtype)}
        found = _value_and_gradients("cpp", fixed, moving, **options)
        for a, b in zip(found, _value_and_gradients("reference", fixed, moving, **options), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, equal_nan=True)  # of an empty mask


def test_triton_is_the_definition_where_a_window_is_larger_than_the_volume() -> None:
    fixed, moving = _images(1, 1, 2, 3, 5)
    _need("triton")
    for name in OPTIONS:
        options = {"window": 7, "eps": 1.0, **_options(name, fixed.shape, fixed.dtype)}
        found = _value_and_gradients("triton", fixed, moving, **options)
        for a, b in zip(found, _value_and_gradients("reference", fixed, moving, **options), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, equal_nan=True)  # of an empty mask


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_in_raw_air_is_within_a_millionth_of_float64(backend: Backend) -> None:
    # sd 2 HU at -1000: sums of squares in plain float32 lose all digits but none here.
    fixed = (-1000 + 2 * torch.randn(1, 1, 3, 12, 16)).float()
    moving = (-1000 + 0.5 * (fixed + 1000) + torch.randn(1, 1, 3, 12, 16)).float()
    _need(backend)
    found = _value_and_gradients(backend, fixed, moving, reduction="none")
    expected = _value_and_gradients("reference", fixed.double(), moving.double(), reduction="none")
    assert [_error(a, b) < 1e-6 for a, b in zip(found, expected, strict=True)] == [True] * 3
    assert found[0].dtype == torch.float32 and found[2].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_holds_in_air_beside_tissue_and_beside_the_scanners_constant(backend: Backend) -> None:
    fixed, moving = (-1000 + 2 * torch.randn(2, 1, 1, 4, 12, 16)).float().unbind()
    for image in (fixed, moving):
        image[..., 8:] += 1050
        image[:, :, :2, :, 8:] = -1024
    _need(backend)
    found = _value_and_gradients(backend, fixed, moving, window=5, reduction="none")
    expected = _value_and_gradients("reference", fixed.double(), moving.double(), window=5, reduction="none")
    assert [_error(a, b) < 1e-5 for a, b in zip(found, expected, strict=True)] == [True] * 3


@pytest.mark.parametrize("borders", ["count", "zeros"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_images_give_zero_and_no_gradient(backend: Backend, borders: str) -> None:
    fixed, moving = torch.full((1, 1, 3, 5, 6), -1023.7), torch.full((1, 1, 3, 5, 6), 12.3)
    _need(backend)
    options = {"window": 3, "borders": borders, "eps": 20.0}
    if borders == "zeros":
        # Not zero at the border, where zero padding makes a step in both images; inside the gradient is.
        value, *gradients = _value_and_gradients(backend, fixed, moving, reduction="none", **options)
        assert value[..., 1:-1, 1:-1, 1:-1].abs().max() < 1e-9 and value[0, 0, 0, 0, 0] == pytest.approx(1, abs=1e-4)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        return
    value, *gradients = _value_and_gradients(backend, fixed, moving, **options)
    assert value.item() < 1e-12 and all(gradient.abs().max() < 1e-9 for gradient in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_mask_gives_nan_for_its_volume_only_and_no_gradient(backend: Backend) -> None:
    fixed, moving = _images(2, 1, 3, 5, 6, dtype=torch.float32)
    _need(backend)
    mask = torch.ones(2, 1, 3, 5, 6, dtype=torch.bool)
    mask[0] = False
    value, *gradients = _value_and_gradients(backend, fixed, moving, window=3, mask=mask)
    assert value.isnan().tolist() == [True, False]
    assert all(torch.equal(gradient[0], torch.zeros_like(gradient[0])) for gradient in gradients)
    expected = _value_and_gradients(backend, fixed[1:], moving[1:], window=3)
    torch.testing.assert_close(value[1:] * 1.5, expected[0] * 1.5, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_outside_the_mask_is_never_used(backend: Backend) -> None:
    fixed, moving = _images(1, 1, 3, 5, 6)
    _need(backend)
    mask = torch.rand(fixed.shape) > 0.3
    expected = _value_and_gradients(backend, fixed, moving, window=3, mask=mask)
    spoiled = [torch.where(mask, image, torch.nan) for image in (fixed, moving)]
    found = _value_and_gradients(backend, *spoiled, window=3, mask=mask)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)
    assert all(torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask])) for gradient in found[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_voxel_that_counts_and_is_nan_makes_its_volumes_mean_nan(backend: Backend) -> None:
    fixed, moving = _images(2, 1, 3, 5, 6, dtype=torch.float32)
    _need(backend)
    fixed[0, 0, 1, 2, 3] = torch.nan
    assert _value_and_gradients(backend, fixed, moving, window=3)[0].isnan().tolist() == [True, False]


@settings(max_examples=15, deadline=None)
@given(
    gain=st.floats(0.1, 10) | st.floats(-10, -0.1),
    offset=st.floats(-2000, 2000),
    window=st.sampled_from([3, 5, 9]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(2, 9)),
)
def test_gain_and_offset_change_nothing_and_the_images_may_be_exchanged(
    gain: float, offset: float, window: int, size: tuple[int, int, int]
) -> None:
    fixed, moving = _images(1, 1, *size)
    plain = lncc(fixed, moving, window=window, eps=1e-9)
    changed = lncc(fixed, gain * moving + offset, window=window, eps=1e-9)
    torch.testing.assert_close(changed, plain, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(lncc(moving, fixed, window=window, eps=1e-9), plain, rtol=1e-12, atol=1e-14)
    own = lncc(fixed, gain * fixed + offset, window=window, eps=1e-9)
    assert 0 <= plain.item() <= 1 + 1e-9 and own.item() == pytest.approx(1, abs=1e-6)


def test_int16_is_computed_in_float32_and_may_meet_a_warped_float_image() -> None:
    fixed, moving = (image.round().to(torch.int16) for image in _images(1, 1, 6, 7, 8))
    found = lncc(fixed, moving, window=5)
    assert found.dtype == torch.float32
    assert torch.equal(found, lncc(fixed.float(), moving.float(), window=5))
    warped = moving.float().requires_grad_()
    (gradient,) = torch.autograd.grad(lncc(fixed, warped, window=5).sum(), warped)
    assert gradient.shape == fixed.shape and gradient.abs().max() > 0


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_borders_are_monais_loss_and_gradients(dtype: torch.dtype) -> None:
    losses = pytest.importorskip("monai.losses.image_dissimilarity")
    fixed, moving = torch.rand(2, 2, 1, 4, 12, 13, dtype=torch.float64).unbind()
    moving = (0.6 * fixed + 0.4 * moving).requires_grad_()
    for window in (3, 9):
        peer = losses.LocalNormalizedCrossCorrelationLoss(kernel_size=window, kernel_type="rectangular")(moving, fixed)
        (peer_gradient,) = torch.autograd.grad(peer, moving)
        for backend in _dispatch.available(fixed):
            if backend == "compiled" or (backend == "triton" and window == 9):
                continue  # too slow to compile, or to interpret
            own = moving.detach().to(dtype).requires_grad_()
            loss = -lncc(fixed.to(dtype), own, window=window, borders="zeros", backend=backend).mean()
            (gradient,) = torch.autograd.grad(loss, own)
            assert loss.item() == pytest.approx(peer.item(), abs=1e-5 if dtype == torch.float32 else 1e-12)
            assert _error(gradient, peer_gradient) < (1e-5 if dtype == torch.float32 else 1e-11)
