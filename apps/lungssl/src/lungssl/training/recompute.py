"""`train.recompute`: keep only what goes into each transformer block, and make the rest again in the backward pass.

Chen et al. 2016, https://arxiv.org/abs/1604.06174, by torch.utils.checkpoint. The numbers stay the same to the last
bit: dropped branches are drawn again from the same state.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lungssl.errors import ConfigError
from lungssl.training.sharding import blocks_of


def recompute_blocks(encoder: nn.Module) -> None:
    """Change an encoder's transformer blocks in place; names of weights stay, and (pickled) copies of it do the same.

    Call it before `sharded`, and after teachers were copied, which keep nothing anyway. Raises ConfigError for encoders
    without transformer blocks.
    """
    blocks = blocks_of(encoder)
    if not blocks:
        raise ConfigError(
            f"train.recompute: true makes transformer blocks again, and {getattr(encoder, 'name', 'this encoder')} has "
            f"none; take a vit3d_* or primus_* backbone, or set train.recompute=false and lower train.batch"
        )
    for block in blocks:
        block.forward = functools.partial(_again, block.forward)  # a module around it would rename its weights


def _again(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    if torch.is_grad_enabled():
        return checkpoint(forward, *arguments, use_reentrant=False, **named)
    return forward(*arguments, **named)
