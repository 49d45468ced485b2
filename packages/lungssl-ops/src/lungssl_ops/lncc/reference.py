"""The definition of `lncc`, in plain PyTorch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def lncc_reference(
    fixed: Float[Tensor, "b 1 z y x"],
    moving: Float[Tensor, "b 1 z y x"],
    *,
    window: int = 9,
    eps: float = 1e-5,
    mask: Float[Tensor, "b 1 z y x"] | None = None,
    borders: str = "count",
    reduction: str = "mean",
) -> Float[Tensor, "b"] | Float[Tensor, "b 1 z y x"]:
    """As `lungssl_ops.lncc.lncc`; sums and gradients in float64 whatever the images are."""
    found = lncc_by(_box, fixed.double(), moving.double(), mask, window, eps, borders, reduction)
    return found.to(fixed.dtype)


def lncc_by(
    box: Callable[[Tensor, int], Tensor],
    fixed: Float[Tensor, "b 1 z y x"],
    moving: Float[Tensor, "b 1 z y x"],
    mask: Float[Tensor, "b 1 z y x"] | None,
    window: int,
    eps: float,
    borders: str,
    reduction: str,
) -> Float[Tensor, "b"] | Float[Tensor, "b 1 z y x"]:
    """The formulas, in the images' dtype; `box(image, window)` sums over the cube around each voxel, 0 outside."""
    weight = torch.ones_like(fixed[:1]) if mask is None else mask.to(fixed.dtype)
    if mask is not None:
        # Not a product: what lies outside the mask may be NaN.
        fixed, moving = torch.where(weight > 0, fixed, 0), torch.where(weight > 0, moving, 0)
    if borders == "count":
        n = box(weight, window)
        n = torch.where(n > 0, n, 1)
        # The sums of squares cancel less near 0. Zero padding forbids it: the step at the border belongs to the result.
        fixed, moving = fixed - _mean(fixed, weight), moving - _mean(moving, weight)
    else:
        n = torch.full_like(weight, window**3)
    f, m = weight * fixed, weight * moving
    s_f, s_m = box(f, window), box(m, window)
    cross = box(f * moving, window) - s_f * s_m / n
    v_f = box(f * fixed, window) - s_f**2 / n
    v_m = box(m * moving, window) - s_m**2 / n
    if borders == "count":
        found = (cross / n) ** 2 / ((v_f.clamp(min=0) / n + eps) * (v_m.clamp(min=0) / n + eps))
    else:
        found = cross**2 / (v_f.clamp(min=eps) * v_m.clamp(min=eps))
    if reduction == "none":
        return torch.where(weight > 0, found, 0)
    weight = weight.expand_as(found)
    return (weight * found).sum(dim=(1, 2, 3, 4)) / weight.sum(dim=(1, 2, 3, 4))


def _mean(image: Float[Tensor, "b 1 z y x"], weight: Float[Tensor, "_b 1 z y x"]) -> Float[Tensor, "b 1 1 1 1"]:
    """No gradient: LNCC doesn't change when a constant is subtracted."""
    axes = (2, 3, 4)
    return (weight * image.detach()).sum(axes, keepdim=True) / weight.sum(axes, keepdim=True)


def _box(image: Float[Tensor, "b 1 z y x"], window: int) -> Float[Tensor, "b 1 z y x"]:
    """Sums along each axis in turn."""
    # Padded here: avg_pool3d refuses a volume smaller than the window, whatever its padding.
    image = F.pad(image, (window // 2,) * 6)
    for axis in range(3):
        image = F.avg_pool3d(image, [window if a == axis else 1 for a in range(3)], stride=1) * window
    return image
