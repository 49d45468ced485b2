"""Optimizer parameter groups: which parameters decay, and how fast each layer learns."""

import math
import re
from typing import Any

from torch import nn

from lungssl_backbones.encoder import Encoder

_NO_DECAY = re.compile(r"(_tokens?|pos_embed|mask_value|relative_position_bias_table)$")
_LAYER = re.compile(r"(?:^|\.)(?:(?:blocks|stages)\.(\d+)|layers([1-4])c?)\.")
"""A block of a ViT or a stage, counted from 0; or a stage of a Swin transformer, counted from 1."""


def param_groups(
    module: nn.Module, *, lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, in the module's own order, each trainable parameter in exactly one.

    No weight decay on norms, biases and other vectors, nor on class, register, mask and position tokens (the rule of
    DINO and MAE). In every encoder within `module`, the learning rate is scaled by `layer_decay ** (layers above)`:
    embeddings are below block 0, and a final norm and whatever is not an encoder (heads, decoders) have none above
    (BEiT, Bao et al. 2022, https://arxiv.org/abs/2106.08254). A layer is a block of a ViT, a stage of the others.
    A module's attribute `rate_scale`, where it has one, is a further factor on all that it holds.

    A group has the keys `params`, `lr`, `weight_decay`, and for schedules that write `lr` and `weight_decay` each
    step: `lr_scale`, `decays`.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = layer_decay ** _layers_above(module, name) * _rate_scale(module, name)
        decays = parameter.ndim > 1 and not _NO_DECAY.search(name)
        if (scale, decays) not in groups:
            groups[scale, decays] = {
                "params": [],
                "lr": lr * scale,
                "weight_decay": weight_decay if decays else 0.0,
                "lr_scale": scale,
                "decays": decays,
            }
        groups[scale, decays]["params"].append(parameter)
    return list(groups.values())


def _layers_above(module: nn.Module, name: str) -> int:
    """Layers between a parameter and the output of the innermost encoder that holds it; 0 outside encoders."""
    path = name.split(".")
    for depth in reversed(range(len(path))):
        owner = module.get_submodule(".".join(path[:depth]))
        if not isinstance(owner, Encoder):
            continue
        inner = ".".join(path[depth:])
        indices = [_layer(other) for other, _ in owner.named_parameters()]
        layers = 1 + max((index for index in indices if index is not None), default=-1)
        index = _layer(inner)
        if index is not None:
            return layers - index
        return 0 if inner.removeprefix("eva.").startswith("norm.") else layers + 1
    return 0


def _rate_scale(module: nn.Module, name: str) -> float:
    """Product of `rate_scale` of the modules that hold a parameter."""
    path = name.split(".")
    holders = (module.get_submodule(".".join(path[:depth])) for depth in range(len(path)))
    return math.prod(getattr(holder, "rate_scale", 1.0) for holder in holders)


def _layer(name: str) -> int | None:
    match = _LAYER.search(name)
    if match is None:
        return None
    return int(match.group(1)) if match.group(1) else int(match.group(2)) - 1
