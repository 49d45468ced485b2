"""The masked patch error beside its rivals."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lungssl_ops.measure import Case
from lungssl_ops.patches import masked_patch_mse


def cases(*, quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """The sizes of the README's table, or tiny ones."""
    yield _case(*((2, 64, 512) if quick else (8, 1728, 512)), device, compiled=compiled)


def _case(b: int, n: int, p: int, device: str, *, compiled: bool) -> Case:
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

    runs = {"reference": run(masked_patch_mse), "mae_repository": run(eager)}
    if compiled:
        runs["compile"] = run(torch.compile(masked_patch_mse))
    # Forward and backward read prediction, target and weight of masked rows; backward writes the whole gradient.
    floor = 4 * p * (6 * int(mask.sum()) + b * n)
    return Case(op="masked_patch_mse", size=f"B{b}_N{n}_P{p}", floor_bytes=floor, runs=runs)
