"""Optimizer parameter groups: which parameters decay, and how fast each layer learns."""

import re
from typing import Any

from torch import nn

from lungssl_backbones.encoder import Encoder

_NO_DECAY = re.compile(r"(_tokens?|pos_embed|mask_value)$")
_LAYER = re.compile(r"(?:blocks|stages)\.(\d+)\.")


def param_groups(
    module: nn.Module, *, lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, in the module's own order, each trainable parameter in exactly one.

    No weight decay on norms, biases and other vectors, nor on class, register, mask and position tokens (the rule of
    DINO and MAE). In every encoder within `module`, the learning rate is scaled by `layer_decay ** (layers above)`:
    embeddings are below block 0, and a final norm and whatever is not an encoder (heads, decoders) have none above
    (BEiT, Bao et al. 2022, https://arxiv.org/abs/2106.08254). A layer is a block of a ViT, a stage of a ResEnc.

    A group has the keys `params`, `lr`, `weight_decay`, and for schedules that write `lr` and `weight_decay` each
    step: `lr_scale`, `decays`.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = layer_decay ** _layers_above(module, name)
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
        layers = len(getattr(owner, "blocks", getattr(owner, "stages", ())))
        if match := _LAYER.match(inner):
            return layers - int(match.group(1))
        return 0 if inner.startswith("norm.") else layers + 1
    return 0
