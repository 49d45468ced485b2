"""2-D weights made into 3-D ones: photographs' filters as a start for volumes.

A 2-D kernel becomes a 3-D one of the same sum along z: all of it in one slice ("centre") or an equal share in each
("mean"), Carreira & Zisserman 2017, https://arxiv.org/abs/1705.07750. A volume that is constant along z then gives the
2-D network's features: everywhere with "centre", away from the padding with "mean". Colour channels are summed, which
for a grey picture is the same.
Axes: o output and i input channels, z y x places in the kernel with z from inferior to superior.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lungssl_backbones.convnext3d import ConvNext3d
from lungssl_backbones.vit3d import Vit3d
from lungssl_backbones.weights import LoadReport, load_weights

How = Literal["centre", "mean"]

_CHECK_VOX = (32, 64, 64)
"""Of the picture that a converted network is tried on: two cells at stride 32 in plane, one along z."""


def inflate_kernel(
    kernel: Float[Tensor, "o i y x"], depth: int, *, how: How, slice_index: int | None = None
) -> Float[Tensor, "o i z y x"]:
    """The kernel in three dimensions. `slice_index`: where "centre" puts it, by default the middle."""
    if how == "mean":
        return (kernel / depth)[:, :, None].expand(-1, -1, depth, -1, -1).contiguous()
    inflated = kernel.new_zeros(*kernel.shape[:2], depth, *kernel.shape[2:])
    inflated[:, :, (depth - 1) // 2 if slice_index is None else slice_index] = kernel
    return inflated


def inflate_conv_net(net: nn.Module, *, how: How = "centre", in_channels: int = 1) -> nn.Module:
    """A 3-D copy of a 2-D convolutional network (ResNet, RegNet, EfficientNet and the like, of timm or torchvision).

    Convolutions, batch norms, pools and squeeze-and-excitation are converted; what else there is stays, and may name
    axes that are others in 3-D. So the copy with "centre" kernels is tried on a picture constant along z before it is
    returned (not on the `meta` device). Batch norms keep their statistics; where a step has few volumes, leave them in
    eval mode.

    Raises ValueError where the copy's outputs differ from the network's, or a layer cannot be converted.
    """
    copied = copy.deepcopy(net)
    first = next((m for m in copied.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"{type(net).__name__} has no Conv2d to inflate")
    colours = first.in_channels
    inflated = _inflated(copied)
    stem = next(m for m in inflated.modules() if isinstance(m, nn.Conv3d))
    grey = stem.weight.detach().sum(dim=1, keepdim=True) / in_channels
    stem.weight = nn.Parameter(grey.repeat(1, in_channels, 1, 1, 1))
    stem.in_channels = in_channels
    if not stem.weight.is_meta:
        _try_on_constant_volume(net, inflated, colours, in_channels)
    if how == "mean":
        for module in inflated.modules():
            if isinstance(module, nn.Conv3d):
                flat_kernel = module.weight.detach().sum(dim=2)
                module.weight = nn.Parameter(inflate_kernel(flat_kernel, module.kernel_size[0], how="mean"))
    return inflated.train(net.training)


def inflate_convnext(
    encoder: ConvNext3d,
    state: Mapping[str, Tensor],
    *,
    how: How = "centre",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> LoadReport:
    """Load the weights of a timm ConvNeXt (V1 or V2, `create_model(...).state_dict()`) into our 3-D one.

    `mean`, `std`: of the colours that the 2-D network expects, e.g. ImageNet's; folded into the stem, so that our input
    in [0, 1] needs no other scaling. Raises ValueError as `load_weights`, and for weights that the encoder has no place
    for: widths, depths, `stem_vox`, `kernel_vox` and `response_norm` must be those of the 2-D network.
    """
    inflated = {}
    weight, bias = _grey(state["stem.0.weight"], state["stem.0.bias"], mean, std)
    channels = encoder.config.in_channels
    for name, tensor in {**state, "stem.0.weight": weight, "stem.0.bias": bias}.items():
        if name.startswith(("head.", "norm_pre.")):
            continue
        if tensor.ndim == 4 and ".mlp." in name:
            tensor = tensor[:, :, 0, 0]  # some sizes hold their MLP as 1x1 convolutions
        elif tensor.ndim == 4:
            tensor = inflate_kernel(tensor, tensor.shape[2], how=how)
        if name == "stem.0.weight":
            tensor = (tensor / channels).expand(-1, channels, -1, -1, -1)
        inflated[name] = tensor
    if strange := sorted(inflated.keys() - encoder.state_dict().keys()):
        raise ValueError(
            f"the 2-D network has {len(strange)} tensors that the encoder lacks ({strange[0]}, ...); V1 has "
            "LayerScale, V2 (response_norm=True) has none"
        )
    return load_weights(encoder, inflated, source="the inflated ConvNeXt")


def inflate_vit(
    encoder: Vit3d,
    state: Mapping[str, Tensor],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> LoadReport:
    """Load the weights of a timm ViT (DeiT, DINO, MAE, DINOv2 up to L; `create_model(...).state_dict()`) into Vit3d.

    The patch embedding is averaged along z and resized where `patch_vox` is another. A table of absolute positions
    cannot serve: its mean over the picture goes into the patch bias, its first row into the summary token, and the
    places themselves are Vit3d's rotation. `mean`, `std` as in `inflate_convnext`. Raises ValueError as `load_weights`:
    dim, depth and heads must be those of the 2-D network.
    """
    weight, bias = _grey(state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], mean, std)
    patch, channels = encoder.config.patch_vox, encoder.config.in_channels
    weight = _resize_patch(weight, patch)
    cubes = inflate_kernel(weight, patch, how="mean").expand(-1, channels, -1, -1, -1) / channels
    extra = torch.cat([state["cls_token"], *([state["reg_token"]] if "reg_token" in state else [])], dim=1)
    if "pos_embed" in state:
        table = state["pos_embed"]
        rows = _rows_before_the_grid(table.shape[1], extra.shape[1])
        extra = extra + F.pad(table[:, :rows], (0, 0, 0, extra.shape[1] - rows))
        bias = bias + table[:, rows:].mean(dim=(0, 1))
    ours = {"patch_embed.weight": cubes.flatten(1), "patch_embed.bias": bias, "cls_token": extra[:, :1]}
    if extra.shape[1] > 1:
        ours["register_tokens"] = extra[:, 1:]
    names = {
        **{"attn.qkv": "qkv", "attn.proj": "proj", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"},
        **{"norm1": "norm1", "norm2": "norm2"},
    }
    for i in range(encoder.config.depth):
        for theirs, our in names.items():
            for leaf in ("weight", "bias"):
                if (name := f"blocks.{i}.{theirs}.{leaf}") in state:
                    ours[f"blocks.{i}.{our}.{leaf}"] = state[name]
        for branch in (1, 2):
            ones = torch.ones(encoder.dim)  # a network without LayerScale has scale 1
            ours[f"blocks.{i}.scale{branch}"] = state.get(f"blocks.{i}.ls{branch}.gamma", ones)
    ours |= {name: state[name] for name in ("norm.weight", "norm.bias") if name in state}
    return load_weights(encoder, ours, source="the inflated ViT")


def _rows_before_the_grid(length: int, extra: int) -> int:
    """Rows of a table of absolute positions that belong to the summary and register tokens; the rest is a square."""
    for rows in (0, 1, extra):
        if math.isqrt(length - rows) ** 2 == length - rows:
            return rows
    raise ValueError(f"a table of {length} positions is no square grid, with or without {extra} further tokens")


def _grey(
    weight: Float[Tensor, "o i y x"],
    bias: Float[Tensor, "o"],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[Float[Tensor, "o 1 y x"], Float[Tensor, "o"]]:
    """The kernel for one grey channel in [0, 1] instead of colours scaled by `mean` and `std`; for unpadded layers."""
    scale = weight.new_tensor(std if std is not None else [1.0] * weight.shape[1])
    offset = weight.new_tensor(mean if mean is not None else [0.0] * weight.shape[1])
    scaled = weight / scale[:, None, None]
    return scaled.sum(dim=1, keepdim=True), bias - (scaled * offset[:, None, None]).sum(dim=(1, 2, 3))


def _resize_patch(weight: Float[Tensor, "o i y x"], side: int) -> Float[Tensor, "o i v u"]:
    """A patch embedding for patches of another side that sees an enlarged patch as the old one saw the original: the
    pseudo-inverse of linear interpolation, FlexiViT, Beyer et al. 2023, https://arxiv.org/abs/2212.08013."""
    if weight.shape[2] == side:
        return weight
    enlarge = F.interpolate(torch.eye(weight.shape[2])[None], size=side, mode="linear", align_corners=False)[0].T
    inverse = torch.linalg.pinv(enlarge.double()).to(weight)
    # Two axes are averaged along z later; the cube's third side is new, so only y and x are resized here.
    return torch.einsum("oiyx,yv,xu->oivu", weight, inverse, inverse)


def _inflated(module: nn.Module) -> nn.Module:
    """The layer's 3-D version, or the module itself with its children inflated."""
    kind = type(module)
    if isinstance(module, nn.Conv2d):
        if kind.forward is not nn.Conv2d.forward or isinstance(module.padding, str) or module.padding_mode != "zeros":
            raise ValueError(f"a {kind.__name__} that pads by a rule of its own cannot be inflated")
        return _conv3d(module)
    if isinstance(module, nn.BatchNorm2d):
        return _batch_norm3d(module)
    if kind.__name__ in ("SEModule", "SqueezeExcite"):
        return _Gate3d(module)
    if isinstance(module, nn.MaxPool2d):
        return nn.MaxPool3d(
            _three(module.kernel_size), _three(module.stride), _three(module.padding), _three(module.dilation),
            ceil_mode=module.ceil_mode,
        )  # fmt: skip
    if isinstance(module, nn.AvgPool2d):
        return nn.AvgPool3d(
            _three(module.kernel_size), _three(module.stride), _three(module.padding), ceil_mode=module.ceil_mode,
            count_include_pad=module.count_include_pad,
        )  # fmt: skip
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return nn.AdaptiveAvgPool3d(_three(module.output_size))
    for name, child in module.named_children():
        setattr(module, name, _inflated(child))
    return module


def _three(size: Any) -> tuple[Any, Any, Any]:
    """(y, x) or one number as (z, y, x); z is as y."""
    return (size[0], *size) if isinstance(size, tuple) else (size, size, size)


def _conv3d(conv: nn.Conv2d) -> nn.Conv3d:
    inflated = nn.Conv3d(
        conv.in_channels, conv.out_channels, _three(conv.kernel_size), stride=_three(conv.stride),
        padding=_three(conv.padding), dilation=_three(conv.dilation), groups=conv.groups, bias=conv.bias is not None,
        device=conv.weight.device, dtype=conv.weight.dtype,
    )  # fmt: skip
    # The slice that meets the first voxel in the first window: never one of the padding.
    index = int(conv.padding[0]) // conv.dilation[0]
    kernel = inflate_kernel(conv.weight.detach(), conv.kernel_size[0], how="centre", slice_index=index)
    inflated.weight = nn.Parameter(kernel)
    inflated.bias = conv.bias
    return inflated


def _batch_norm3d(norm: nn.BatchNorm2d) -> nn.Module:
    """With the dropout and activation that timm's BatchNormAct2d holds."""
    inflated = nn.BatchNorm3d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats,
        device=None if norm.weight is None else norm.weight.device,
    )  # fmt: skip
    inflated.weight, inflated.bias = norm.weight, norm.bias
    inflated.running_mean, inflated.running_var = norm.running_mean, norm.running_var
    inflated.num_batches_tracked = norm.num_batches_tracked
    extra = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    return nn.Sequential(inflated, *extra) if extra else inflated


class _Gate3d(nn.Module):
    """Squeeze-and-excitation over volumes; timm's two modules of that kind average over axes 2 and 3 only."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if getattr(module, "add_maxpool", False):
            raise ValueError("squeeze-and-excitation with max pooling cannot be inflated")
        names = ("conv_reduce", "act1", "conv_expand", "gate", "fc1", "bn", "act", "fc2")
        order = names[:4] if hasattr(module, "conv_reduce") else (*names[4:], "gate")
        self.layers = nn.Sequential(*[_inflated(module.get_submodule(name)) for name in order])

    def forward(self, x: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b c z y x"]:
        return x * self.layers(x.mean(dim=(2, 3, 4), keepdim=True))


@torch.no_grad()
def _try_on_constant_volume(net: nn.Module, inflated: nn.Module, colours: int, in_channels: int) -> None:
    training = net.training
    parameter = next(net.parameters())
    z, y, x = _CHECK_VOX
    picture = torch.rand(1, 1, y, x, generator=torch.Generator().manual_seed(0)).to(parameter)
    try:
        flat = net.eval()(picture.expand(-1, colours, -1, -1))
        solid = inflated.eval()(picture[:, :, None].expand(-1, in_channels, z, -1, -1))
    finally:
        net.train(training)
    flat, solid = (output if isinstance(output, (list, tuple)) else [output] for output in (flat, solid))
    for expected, found in zip(flat, solid, strict=True):
        expected = expected[:, :, None].expand_as(found) if found.ndim == 5 else expected
        error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
        if not error < 1e-3:
            raise ValueError(
                f"the inflated {type(net).__name__} differs from the 2-D network by {error:.1%} on a volume constant "
                "along z: some layer names axes; ConvNeXt and ViT have functions of their own here"
            )
