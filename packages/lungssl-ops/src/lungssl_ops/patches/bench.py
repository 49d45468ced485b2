"""The masked patch error and the patch embedding beside their rivals."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lungssl_ops.measure import Case
from lungssl_ops.patches import embed_patches, masked_patch_mse


def cases(*, quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """The sizes of the README's table, or tiny ones."""
    yield _error(*((2, 64, 512) if quick else (8, 1728, 512)), device, compiled=compiled)
    for b, side, patch, dim in [(1, 16, 8, 32)] if quick else [(2, 96, 8, 384), (2, 96, 16, 384)]:
        yield _embedding(b, side, patch, dim, device)


def _error(b: int, n: int, p: int, device: str, *, compiled: bool) -> Case:
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(b, n, p, generator=generator).to(device).requires_grad_()
    target = torch.rand(b, n, p, generator=generator).to(device)
    weight = torch.ones(b, n, p, device=device)
    mask = (torch.rand(b, n, generator=generator) < 0.75).to(device)

    def eager(pred: Tensor, target: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        # The MAE repository's form (models_mae.py, forward_loss); it has no voxel weights.
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
        return (((pred - target) ** 2).mean(dim=-1) * mask).sum() / mask.sum()

    def run(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(function(pred, target, mask, weight), pred)[0]

    def expected() -> Tensor:
        exact = pred.detach().double().requires_grad_()
        loss = masked_patch_mse(exact, target.double(), mask, weight.double(), backend="reference")
        return torch.autograd.grad(loss, exact)[0]

    runs = {
        "ours": run(masked_patch_mse),
        "reference": run(partial(masked_patch_mse, backend="reference")),
        "mae_repository": run(eager),
    }
    if compiled:
        runs["compile"] = run(partial(masked_patch_mse, backend="compiled"))
    # Forward and backward read prediction, target and weight of masked rows; backward writes the whole gradient.
    floor = 4 * p * (6 * int(mask.sum()) + b * n)
    return Case(op="masked_patch_mse", size=f"B{b}_N{n}_P{p}", floor_bytes=floor, runs=runs, expected=expected)


def _embedding(b: int, side: int, patch: int, dim: int, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    volume = torch.rand(b, 1, side, side, side, generator=generator).to(device)
    weight = (torch.randn(dim, 1, patch, patch, patch, generator=generator) * patch**-1.5).to(device).requires_grad_()
    bias = torch.zeros(dim, device=device, requires_grad=True)
    n, p = b * (side // patch) ** 3, patch**3
    upstream = torch.randn(b, n // b, dim, generator=generator).to(device)

    def convolve(volume: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv3d(volume, weight, bias, stride=patch).flatten(2).mT

    def run(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(function(volume, weight, bias), [weight, bias], upstream)[0]

    def expected() -> Tensor:
        exact = weight.detach().double().requires_grad_()
        tokens = embed_patches(volume.double(), exact, bias.double())
        return torch.autograd.grad(tokens, exact, upstream.double())[0]

    return Case(
        op="embed_patches",
        size=f"B{b}_S{side}_P{patch}_D{dim}",
        # Forward and backward read the volume and write tokens or read their gradient; the weight's is written.
        floor_bytes=4 * (2 * b * side**3 + 2 * n * dim + 2 * p * dim),
        floor_flops=2 * 2 * n * p * dim,
        runs={"ours": run(embed_patches), "conv3d": run(convolve)},
        expected=expected,
    )
