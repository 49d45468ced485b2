"""A convolutional encoder that knows nothing of hidden voxels: not their values, and not which they are.

Source: SparK, Tian et al. 2023, https://arxiv.org/abs/2301.03580: sparse convolution is emulated by hiding again after
every layer, because each convolution would spread the borders of hidden blocks, until the mask has vanished. Norms take
their statistics from visible voxels alone. The arithmetic is that of the dense encoder, so nothing is saved.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

_HIDING = (nn.Conv3d, nn.AvgPool3d, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm3d)
_HARMLESS = (nn.Identity, nn.LeakyReLU, nn.ReLU, nn.GELU)
"""Those that keep 0 at 0 and mix no voxels."""


def check_sparse(encoder: nn.Module) -> None:
    """ValueError for encoders with parts that this module can't hide from: attention, linear layers, batch norms."""
    for name, part in encoder.named_modules():
        leaf = not any(True for _ in part.children())
        if leaf and not isinstance(part, _HIDING + _HARMLESS):
            raise ValueError(
                f"spark needs an encoder of convolutions, average pools and group, instance or layer norms; {name!r} "
                f"in {type(encoder).__name__} is a {type(part).__name__}. Take resenc_tiny, or mae, which fits any"
            )


@contextmanager
def hidden_from(encoder: nn.Module, hidden: Bool[Tensor, "b z y x"]) -> Iterator[None]:
    """Within it, `encoder` computes on visible voxels only, and all its features of hidden ones are 0.

    `hidden`: per token of the encoder's coarsest stride. The image's hidden voxels are the caller's to set to 0.
    Weights and state keep their names. Raises ValueError for a compiled encoder, whose inner layers can't be reached.
    """
    if getattr(encoder, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "spark hides between an encoder's layers, which a compiled one hasn't got; set train.compile: false"
        )
    hooks = [part.register_forward_hook(_hide(~hidden)) for part in encoder.modules() if isinstance(part, _HIDING)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def widen(mask: Bool[Tensor, "b z y x"], size: torch.Size) -> Bool[Tensor, "b 1 _z _y _x"]:
    """A mask of blocks at a finer resolution (z, y, x), each of its cells repeated."""
    return F.interpolate(mask[:, None].float(), size=tuple(size), mode="nearest") > 0.5


def visible_norm(
    x: Float[Tensor, "b c z y x"],
    visible: Bool[Tensor, "b 1 z y x"],
    groups: int,
    *,
    weight: Float[Tensor, " c"] | None,
    bias: Float[Tensor, " c"] | None,
    eps: float,
) -> Float[Tensor, "b c z y x"]:
    """`F.group_norm` with mean and variance over visible voxels; 0 elsewhere. In float32; `groups` = c is InstanceNorm.

    NaN-free as long as each sample has a visible voxel.
    """
    parts = x.float().unflatten(1, (groups, -1))
    seen = visible[:, None].float()
    dims = (2, 3, 4, 5)
    count = seen.sum(dims, keepdim=True) * parts.shape[2]
    mean = (parts * seen).sum(dims, keepdim=True) / count
    away = (parts - mean) * seen
    normed = (away * torch.rsqrt(away.square().sum(dims, keepdim=True) / count + eps)).flatten(1, 2)
    if weight is not None:
        normed = normed * weight.float().view(1, -1, 1, 1, 1)
    if bias is not None:
        normed = normed + bias.float().view(1, -1, 1, 1, 1)
    return normed * visible


def _hide(visible: Bool[Tensor, "b z y x"]):  # noqa: ANN202 (torch's own type of hooks is private)
    def hook(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if isinstance(part, nn.LayerNorm):  # channels last: tokens, or a map
            seen = visible.flatten(1) if output.ndim == 3 else widen(visible, output.shape[1:4])[:, 0]
            return output * seen[..., None]
        seen = widen(visible, output.shape[2:])
        if isinstance(part, nn.GroupNorm | nn.InstanceNorm3d):
            groups = part.num_groups if isinstance(part, nn.GroupNorm) else part.num_features
            weight, bias = part.weight if part.affine else None, part.bias if part.affine else None
            return visible_norm(inputs[0], seen, groups, weight=weight, bias=bias, eps=part.eps).to(output.dtype)
        return output * seen

    return hook
