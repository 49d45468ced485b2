"""What the C++ and the Triton path share: custom ops that autograd and `torch.compile` understand.

The gradient of a mean is the same up to a factor per volume, so one sweep gives the mean and, where asked for, both
gradients, kept until the backward multiplies them. The map's gradient needs a second sweep with the incoming one.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Sweep(Protocol):
    """Adjoints are weighted with `upstream`, a map, or without it with 1 / the voxels of each volume that count."""

    def __call__(
        self,
        fixed: Tensor,
        moving: Tensor,
        mask: Tensor | None,
        upstream: Tensor | None,
        *,
        window: int,
        eps: float,
        zeros: bool,
        with_map: bool = False,
        grad_fixed: bool = False,
        grad_moving: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean [b], map and both gradients [b, 1, z, y, x]; tensors of no element for what wasn't asked for."""
        ...


def operators(backend: str, sweep: Sweep) -> Callable[..., Tensor]:
    """Defines `lungssl_ops::lncc_<backend>` and, with `_map`, `_map_backward`, `_scale` before the backend, its kin."""

    # An op without a gradient, so that a second derivative raises instead of missing a term.
    @torch.library.custom_op(f"lungssl_ops::lncc_scale_{backend}", mutates_args=())
    def scale_op(gradient: Tensor, upstream: Tensor) -> Tensor:
        return gradient * upstream.view(-1, 1, 1, 1, 1)

    @scale_op.register_fake
    def _(gradient: Tensor, upstream: Tensor) -> Tensor:
        return _like(gradient)

    @torch.library.custom_op(f"lungssl_ops::lncc_{backend}", mutates_args=())
    def mean_op(
        fixed: Tensor,
        moving: Tensor,
        mask: Tensor | None,
        window: int,
        eps: float,
        zeros: bool,
        grad_fixed: bool,
        grad_moving: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, _, to_fixed, to_moving = sweep(
            fixed,
            moving,
            mask,
            None,
            window=window,
            eps=eps,
            zeros=zeros,
            grad_fixed=grad_fixed,
            grad_moving=grad_moving,
        )
        return mean, to_fixed, to_moving

    @mean_op.register_fake
    def _(
        fixed: Tensor,
        moving: Tensor,
        mask: Tensor | None,
        window: int,
        eps: float,
        zeros: bool,
        grad_fixed: bool,
        grad_moving: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return fixed.new_empty(len(fixed)), _like(fixed, grad_fixed), _like(moving, grad_moving)

    def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.save_for_backward(output[1], output[2])

    def scale_gradients(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.needs_input_grad[:2], ctx.saved_tensors, strict=True)
        return (*(scale_op(gradient, upstream) if needed else None for needed, gradient in wanted), *(None,) * 6)

    mean_op.register_autograd(scale_gradients, setup_context=save_gradients)

    @torch.library.custom_op(f"lungssl_ops::lncc_map_{backend}", mutates_args=())
    def map_op(fixed: Tensor, moving: Tensor, mask: Tensor | None, window: int, eps: float, zeros: bool) -> Tensor:
        return sweep(fixed, moving, mask, None, window=window, eps=eps, zeros=zeros, with_map=True)[1]

    @map_op.register_fake
    def _(fixed: Tensor, moving: Tensor, mask: Tensor | None, window: int, eps: float, zeros: bool) -> Tensor:
        return _like(fixed)

    @torch.library.custom_op(f"lungssl_ops::lncc_map_backward_{backend}", mutates_args=())
    def map_backward_op(
        fixed: Tensor,
        moving: Tensor,
        mask: Tensor | None,
        upstream: Tensor,
        window: int,
        eps: float,
        zeros: bool,
        grad_fixed: bool,
        grad_moving: bool,
    ) -> tuple[Tensor, Tensor]:
        _, _, to_fixed, to_moving = sweep(
            fixed,
            moving,
            mask,
            upstream,
            window=window,
            eps=eps,
            zeros=zeros,
            grad_fixed=grad_fixed,
            grad_moving=grad_moving,
        )
        return to_fixed, to_moving

    @map_backward_op.register_fake
    def _(
        fixed: Tensor,
        moving: Tensor,
        mask: Tensor | None,
        upstream: Tensor,
        window: int,
        eps: float,
        zeros: bool,
        grad_fixed: bool,
        grad_moving: bool,
    ) -> tuple[Tensor, Tensor]:
        return _like(fixed, grad_fixed), _like(moving, grad_moving)

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        fixed, moving, mask, ctx.window, ctx.eps, ctx.zeros = inputs
        ctx.save_for_backward(fixed, moving, mask)

    def sweep_again(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:2]
        found = map_backward_op(*ctx.saved_tensors, upstream, ctx.window, ctx.eps, ctx.zeros, *needed)
        return (*(gradient if n else None for n, gradient in zip(needed, found, strict=True)), *(None,) * 4)

    map_op.register_autograd(sweep_again, setup_context=save_inputs)

    def run(
        fixed: Float[Tensor, "b 1 z y x"],
        moving: Float[Tensor, "b 1 z y x"],
        *,
        window: int,
        eps: float,
        mask: Float[Tensor, "b 1 z y x"] | None,
        borders: str,
        reduction: str,
    ) -> Float[Tensor, "b"] | Float[Tensor, "b 1 z y x"]:
        zeros = borders == "zeros"
        if reduction == "none":
            return map_op(fixed, moving, mask, window, eps, zeros)
        enabled = torch.is_grad_enabled()
        needed = enabled and fixed.requires_grad, enabled and moving.requires_grad
        return mean_op(fixed, moving, mask, window, eps, zeros, *needed)[0]

    return run


def _like(image: Tensor, wanted: bool = True) -> Tensor:
    return image.new_empty(image.shape if wanted else (0,))
