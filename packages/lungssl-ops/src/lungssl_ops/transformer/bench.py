"""A transformer layer, forward and backward, beside how it is usually written."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lungssl_ops.dispatch import forced
from lungssl_ops.measure import Case
from lungssl_ops.transformer import Affine, residual_attention, residual_mlp


def cases(*, quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """A layer of `vit3d_s` on eight views of 216 tokens with five more, or a tiny one."""
    sizes = (2, 9, 48, 2) if quick else (8, 221, 384, 6)
    for dtype in (torch.bfloat16, torch.float32):
        yield _case(*sizes, dtype, device, compiled=compiled)


def _case(b: int, t: int, d: int, heads: int, dtype: torch.dtype, device: str, *, compiled: bool) -> Case:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, spread: float = 1.0) -> Tensor:
        return (spread * torch.randn(*shape, generator=generator)).to(device).requires_grad_()

    def affine(to: int, size: int) -> Affine:
        return Affine(drawn(to, size, spread=size**-0.5), drawn(to))

    tokens, upstream = drawn(b, t, d), drawn(b, t, d).detach()
    norms = [Affine(drawn(d), drawn(d)) for _ in range(2)]
    joint, out, widen, narrow = affine(3 * d, d), affine(d, d), affine(4 * d, d), affine(d, 4 * d)
    layers = [*norms, joint, out, widen, narrow]
    scale = drawn(1, d, spread=0.1)

    def ours(tokens: Tensor, norms: list[Affine], joint: Affine, out: Affine, widen: Affine, narrow: Affine) -> Tensor:
        counts = [tokens.shape[:2]]
        rows = residual_attention(tokens.flatten(0, 1), norms[0], joint, out, counts=counts, heads=heads, scale=scale)
        return residual_mlp(rows, norms[1], widen, narrow, counts=counts, scale=scale).unflatten(0, (b, t))

    def usual(tokens: Tensor, norms: list[Affine], joint: Affine, out: Affine, widen: Affine, narrow: Affine) -> Tensor:
        q, k, v = F.linear(F.layer_norm(tokens, (d,), *norms[0]), *joint).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + scale * F.linear(attended, *out)
        hidden = F.gelu(F.linear(F.layer_norm(tokens, (d,), *norms[1]), *widen))
        return tokens + scale * F.linear(hidden, *narrow)

    def run(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        def gradients() -> Tensor:
            with torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=dtype != torch.float32):
                result = function(tokens, norms, joint, out, widen, narrow)
            found = torch.autograd.grad(result, [tokens, *(part for layer in layers for part in layer)], upstream)
            return found[0]

        return gradients

    def definition(*given: object) -> Tensor:
        with forced(residual_attention="reference", residual_mlp="reference"):
            return ours(*given)  # pyright: ignore[reportArgumentType]

    def expected() -> Tensor:
        exact, weights = tokens.detach().double().requires_grad_(), [Affine(*(p.double() for p in x)) for x in layers]
        result = usual(exact, weights[:2], *weights[2:])
        return torch.autograd.grad(result, exact, upstream.double())[0]

    runs = {"ours": run(ours), "reference": run(definition), "sdpa": run(usual)}
    if compiled:
        runs["compile"] = run(torch.compile(usual))
    products = 3 * (24 * d * d + 4 * t * d) * b * t
    return Case(
        op="transformer",
        size=f"B{b}_T{t}_D{d}_{'fp32' if dtype == torch.float32 else 'bf16'}",
        # Tokens in and out, twice; weights read twice, their gradients written. The table's FLOPs are of float32.
        floor_bytes=4 * (4 * b * t * d + 3 * 12 * d * d),
        floor_flops=products if dtype == torch.float32 else 0,
        runs=runs,
        expected=expected,
        tolerance=dict.fromkeys(runs, 1e-5 if dtype == torch.float32 else 1e-2),
    )
