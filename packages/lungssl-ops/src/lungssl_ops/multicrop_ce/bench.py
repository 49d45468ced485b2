"""The multi-crop cross-entropy beside its rivals."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lungssl_ops.measure import Case
from lungssl_ops.multicrop_ce import multicrop_cross_entropy
from lungssl_ops.multicrop_ce.reference import multicrop_cross_entropy_reference


def cases(*, quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """The sizes of the README's table, or tiny ones."""
    sizes = [(6, 2, 4, 512)] if quick else [(6, 2, 16, 4096), (10, 2, 32, 8192), (10, 2, 8, 65536)]
    for s, t, b, k in sizes:
        yield _case(s, t, b, k, device, compiled=compiled)


def _case(s: int, t: int, b: int, k: int, device: str, *, compiled: bool) -> Case:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(s, b, k, generator=generator) * 0.6).to(device).requires_grad_()
    probs = torch.softmax(torch.randn(t, b, k, generator=generator), dim=-1).to(device)
    weight = (torch.ones(s, t) - torch.eye(s, t)).to(device)

    def eager(logits: Tensor, probs: Tensor, weight: Tensor) -> Tensor:
        # DINOv3's form (dinov3/loss/dino_clstoken_loss.py): all pairs by einsum, the diagonal taken out afterwards.
        pairs = -torch.einsum("sbk,tbk->st", F.log_softmax(logits.float(), dim=-1), probs)
        return (pairs * weight).sum() / (weight.sum() * logits.shape[1])

    def run(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(function(logits, probs, weight), logits)[0]

    def expected() -> Tensor:
        exact = logits.detach().double().requires_grad_()
        return torch.autograd.grad(multicrop_cross_entropy_reference(exact, probs.double(), weight.double()), exact)[0]

    runs = {
        "ours": run(multicrop_cross_entropy),
        "reference": run(multicrop_cross_entropy_reference),
        "eager": run(eager),
    }
    if compiled:
        runs["compile"] = run(torch.compile(eager))
    # Forward reads the logits and probabilities, backward reads both again and writes the gradient.
    floor = 4 * (3 * s + 2 * t) * b * k
    return Case(op="multicrop_ce", size=f"S{s}_T{t}_B{b}_K{k}", floor_bytes=floor, runs=runs, expected=expected)
