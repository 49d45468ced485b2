"""LNCC beside its rivals: VoxelMorph's five dense convolutions, MONAI, pooling, torch.compile, fused_lncc."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lungssl_ops.lncc import lncc
from lungssl_ops.lncc.compiled import box_by_cumsum
from lungssl_ops.lncc.reference import lncc_by, lncc_reference
from lungssl_ops.measure import Case

WINDOW = 9
EPS = 1e-9
"""Next to no eps: each rival adds its own in another place."""


def cases(*, quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """The loss' gradient in `moving`, as registration uses it, at two sizes; and the map of raw air."""
    large = ((160, ""),) if device.startswith("cuda") else ()
    for size, stem in ((24, ""),) if quick else ((64, "lncc"), (96, ""), *large):
        yield _gradient_case(size, stem, device, compiled=compiled)
    yield _air_case(24 if quick else 48, device)


def _gradient_case(size: int, stem: str, device: str, *, compiled: bool) -> Case:
    fixed, moving = (image.to(device) for image in _images(size))
    moving.requires_grad_()

    def inner(gradient: Tensor) -> Tensor:
        # What whole windows alone give: rivals pad with zeros.
        kept = slice(WINDOW - 1, 1 - WINDOW)
        return gradient[..., kept, kept, kept]

    def run(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: inner(torch.autograd.grad(loss(fixed, moving), moving)[0])

    def expected() -> Tensor:
        exact = moving.detach().double().requires_grad_()
        return inner(torch.autograd.grad(_of_mean(lncc_reference)(fixed.double(), exact), exact)[0])

    runs = {"ours": run(_of_mean(lncc)), "reference": run(_of_mean(lncc_reference)), "pooling": run(_pooling)}
    if size <= 64:  # seconds per call above
        runs["voxelmorph"] = run(_voxelmorph)
    if (monai := _monai()) is not None:
        runs["monai"] = run(monai)
    if compiled:
        runs["compile"] = run(torch.compile(_cumsum))
    if device.startswith("cuda") and (fused := _fused_lncc()) is not None:
        runs["fused_lncc"] = run(fused)
    return Case(
        op="lncc",
        size=f"{size}x{size}x{size}_w{WINDOW}",
        stem=stem,
        floor_bytes=3 * 4 * size**3,  # two images in, a gradient out
        runs=runs,
        expected=expected,
        # The others' errors are shown: they lose digits, or have their own eps.
        tolerance={"ours": 1e-5, "reference": 1e-5},
        slow=("voxelmorph", "monai", "pooling", "reference"),
    )


def _air_case(size: int, device: str) -> Case:
    """The map, not a gradient: what sums of squares lose on -1000 HU with an sd of 2."""
    generator = torch.Generator().manual_seed(0)
    air = torch.randn(2, 1, 1, size, size, size, generator=generator, dtype=torch.float64)
    fixed, moving = ((-1000 + 2 * air[0]).float().to(device), (-1000 + air[0] + 1.7 * air[1]).float().to(device))
    inner = slice(WINDOW // 2, -(WINDOW // 2))

    def run(found: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        # Only whole windows: rivals pad with 0 HU, and what they make of the border is another question.
        return lambda: found(fixed, moving)[..., inner, inner, inner]

    def plain(box: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda f, m: lncc_by(box, f, m, None, WINDOW, 1e-5, "zeros", "none")

    runs = {
        "ours": run(lambda f, m: lncc(f, m, window=WINDOW, reduction="none")),
        "reference": run(lambda f, m: lncc_reference(f, m, window=WINDOW, reduction="none")),
        "pooling": run(plain(_pooled_box)),
        "voxelmorph": run(plain(_dense_box)),
        "cumsum": run(plain(box_by_cumsum)),
    }
    if (monai := _monai("none")) is not None:
        runs["monai"] = run(lambda f, m: -monai(f, m))
    return Case(
        op="lncc",
        size=f"air_{size}x{size}x{size}_w{WINDOW}",
        floor_bytes=3 * 4 * size**3,
        runs=runs,
        expected=lambda: lncc_reference(fixed.double(), moving.double(), window=WINDOW, reduction="none")[
            ..., inner, inner, inner
        ],
        tolerance={"ours": 1e-5, "reference": 1e-5},
        slow=("voxelmorph", "monai", "pooling", "reference"),
    )


def _images(size: int) -> tuple[Tensor, Tensor]:
    """In [0, 1]: smooth structure with noise, and the same moved by two voxels with other noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 1, size // 8, size // 8, size // 8, generator=generator)
    fixed = F.interpolate(coarse, size=(size, size, size), mode="trilinear", align_corners=True)
    noise = 0.02 * torch.randn(2, 1, 1, size, size, size, generator=generator)
    return (fixed + noise[0]).clamp(0, 1), (fixed.roll(2, dims=-1) + noise[1]).clamp(0, 1)


def _of_mean(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda fixed, moving: 1 - function(fixed, moving, window=WINDOW, eps=EPS).mean()


def _dense_box(image: Tensor, window: int) -> Tensor:
    return F.conv3d(image, image.new_ones(1, 1, window, window, window), padding=window // 2)


def _voxelmorph(fixed: Tensor, moving: Tensor) -> Tensor:
    """Balakrishnan et al. 2019, doi:10.1109/TMI.2019.2897538, equation 4, as VoxelMorph computes it."""
    sums = [_dense_box(t, WINDOW) for t in (fixed, moving, fixed * fixed, moving * moving, fixed * moving)]
    f, m, ff, mm, fm = sums
    n = WINDOW**3
    cross = fm - f * m / n
    return 1 - (cross * cross / ((ff - f * f / n) * (mm - m * m / n) + 1e-5)).mean()


def _pooled_box(image: Tensor, window: int) -> Tensor:
    for axis in range(3):
        kernel = [window if a == axis else 1 for a in range(3)]
        image = F.avg_pool3d(image, kernel, stride=1, padding=[k // 2 for k in kernel]) * window
    return image


def _pooling(fixed: Tensor, moving: Tensor) -> Tensor:
    return 1 - lncc_by(_pooled_box, fixed, moving, None, WINDOW, 1e-5, "zeros", "mean").mean()


def _cumsum(fixed: Tensor, moving: Tensor) -> Tensor:
    """In float32 and with zero padding, which spares the counts: what torch.compile makes fastest."""
    return 1 - lncc_by(box_by_cumsum, fixed, moving, None, WINDOW, 1e-5, "zeros", "mean").mean()


def _monai(reduction: str = "mean") -> Callable[[Tensor, Tensor], Tensor] | None:
    try:
        from monai.losses.image_dissimilarity import LocalNormalizedCrossCorrelationLoss
    except ImportError:
        return None
    return LocalNormalizedCrossCorrelationLoss(kernel_size=WINDOW, kernel_type="rectangular", reduction=reduction)


def _fused_lncc() -> Callable[[Tensor, Tensor], Tensor] | None:
    try:
        from fused_lncc import fused_lncc_loss  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return lambda fixed, moving: fused_lncc_loss(moving, fixed, kernel_size=WINDOW)
