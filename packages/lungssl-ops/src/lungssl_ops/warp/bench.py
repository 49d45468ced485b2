"""Warp, folding and diffusion beside their rivals: the gradient in u of a mean squared difference with both."""

import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lungssl_ops.measure import Case
from lungssl_ops.warp import warp_loss_terms
from lungssl_ops.warp.reference import diffusion, folding, warp_terms_reference


def cases(*, quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """96^3, on a GPU also 160^3; or a tiny size."""
    sides = [24] if quick else ([96, 160] if device.startswith("cuda") else [96])
    for side in sides:
        yield _case(side, device, compiled=compiled)


def _case(side: int, device: str, *, compiled: bool) -> Case:
    generator = torch.Generator().manual_seed(0)

    def smooth(channels: int, coarse: int) -> Tensor:
        noise = torch.randn(1, channels, coarse, coarse, coarse, generator=generator)
        return F.interpolate(noise, size=(side, side, side), mode="trilinear", align_corners=True).to(device)

    image, fixed = smooth(1, side // 4), smooth(1, side // 4)
    # 3 voxels over 12: a few percent of the voxels fold, so the folding has a gradient.
    u_vox = (3.0 * smooth(3, side // 12)).requires_grad_()

    def loss(warped: Tensor, folded: Tensor, smoothness: Tensor, fixed: Tensor = fixed) -> Tensor:
        return (warped - fixed).square().mean() + folded.sum() + 0.1 * smoothness.sum()

    def ours() -> Tensor:
        terms = warp_loss_terms(image, u_vox)
        return loss(terms.warped, terms.folding, terms.diffusion)

    def gather(image: Tensor, u_vox: Tensor, fixed: Tensor) -> Tensor:
        warped, terms = warp_terms_reference(
            image, u_vox, None, fill=None, spacing_mm=(1.0, 1.0, 1.0), with_bending=False
        )
        return loss(warped, terms[:, 0], terms[:, 1], fixed)

    def run(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(function(), u_vox)[0]

    def expected() -> Tensor:
        u = u_vox.detach().double().requires_grad_()
        return torch.autograd.grad(gather(image.double(), u, fixed.double()), u)[0]

    runs = {
        "ours": run(ours),
        "reference": run(lambda: gather(image, u_vox, fixed)),
        "eager": run(lambda: loss(_grid_sample(image, u_vox), folding(u_vox), diffusion(u_vox))),
    }
    if compiled:
        fused = torch.compile(gather)
        runs["compile"] = run(lambda: fused(image, u_vox, fixed))
        partly = torch.compile(lambda: loss(_grid_sample(image, u_vox), folding(u_vox), diffusion(u_vox)))
        runs["compile_grid_sample"] = run(partly)
    monai = _monai_warp()
    if monai is not None:
        runs["monai"] = run(lambda: loss(monai(image, u_vox.flip(1)), folding(u_vox), diffusion(u_vox)))
    # Forward reads u and the image, writes the warped image; backward reads these and its gradient, writes grad u.
    return Case(
        op="warp",
        size=f"{side}",
        stem="warp" if side == 96 or side == 24 else f"warp_{side}",
        floor_bytes=4 * (3 + 1 + 1 + 3 + 1 + 1 + 3) * side**3,
        runs=runs,
        expected=expected,
        tolerance={"ours": 1e-5, "reference": 1e-5},
        slow=("reference",),
    )


def _grid_sample(image: Tensor, u_vox: Tensor) -> Tensor:
    """As VoxelMorph and most others warp: identity grid, normalised, permuted, sampled."""
    sides = image.shape[2:]
    axes = [torch.arange(side, device=image.device, dtype=image.dtype) for side in sides]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1]) + u_vox
    size = torch.tensor(sides[::-1], device=image.device, dtype=image.dtype).reshape(3, 1, 1, 1)
    grid = (2.0 * grid / (size - 1.0) - 1.0).permute(0, 2, 3, 4, 1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)


def _monai_warp() -> Callable[[Tensor, Tensor], Tensor] | None:
    """MONAI's Warp (displacement components (z, y, x)), where it is installed."""
    try:
        from monai.networks.blocks.warp import Warp  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*PyTorch native grid_sample", category=UserWarning)
        return Warp(mode="bilinear", padding_mode="border")
