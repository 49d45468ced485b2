"""`train.shard: full`: each rank keeps a part of every weight, gradient and moment, by FSDP2 (`fully_shard`).

Zhao et al. 2023, https://arxiv.org/abs/2304.11277. The blocks of every encoder, teachers' too, are gathered one at a
time for their pass and let go; what is left (patch embedding, heads, decoders) is one group, gathered for the step.
Gradients come out as means over ranks, as DDP's. Outside of a pass parameters are DTensors: what goes over all of
them element by element (AdamW, the teacher's average) is right on the parts, and a norm needs all ranks.

FSDP2 is imported where a run is sharded, because that takes 0.8 s of CPU time; others know its things by their methods.
"""

import dataclasses
from typing import TYPE_CHECKING, TypeGuard

import torch
from lungssl_backbones import create_backbone
from lungssl_backbones.encoder import Encoder
from torch import Tensor, nn

from lungssl.errors import ConfigError
from lungssl.training.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def check_shardable(ranks: Ranks) -> None:
    """ConfigError where there is nobody to share weights with."""
    if ranks.size == 1:
        raise ConfigError(
            "train.shard: full shares the weights out among processes, and this is one; start several with torchrun, "
            "or set train.shard=none, which also resumes a run that was sharded"
        )


def blocks_of(encoder: nn.Module) -> list[nn.Module]:
    """An encoder's transformer blocks, first to last; empty for encoders of other kinds."""
    lists = [one for name, one in encoder.named_modules() if name.endswith("blocks") and isinstance(one, nn.ModuleList)]
    return [block for one in lists for block in one]


def sharded(method: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """`method` itself, its parameters now shared out over `ranks`. For all ranks, which must hold equal weights.

    Raises ConfigError on one process and for encoders without transformer blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    check_shardable(ranks)
    blocks = []
    for encoder in [one for one in method.modules() if isinstance(one, Encoder)]:
        blocks += (own := blocks_of(encoder))
        if not own:
            raise ConfigError(
                f"train.shard: full gathers transformer blocks one by one, and {encoder.name} has none; take a vit3d_* "
                f"or primus_* backbone, or set train.shard=none"
            )
    mesh = init_device_mesh(device.type, (ranks.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(method, mesh=mesh)  # pyright: ignore[reportReturnType] (an FSDPModule is an nn.Module)


def is_sharded(module: nn.Module) -> "TypeGuard[FSDPModule]":
    """Whether `sharded` made it, or gathers it by itself."""
    return hasattr(module, "reshard")


def let_go(module: nn.Module) -> None:
    """Free what a forward pass without a backward pass left gathered; nothing for modules that aren't sharded."""
    if is_sharded(module):
        module.reshard()


def is_shared_out(value: Tensor | None) -> "TypeGuard[DTensor]":
    """Whether ranks hold parts of it."""
    return hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """A tensor with all ranks' parts. For all ranks, where it is shared out."""
    return value.full_tensor() if is_shared_out(value) else value


def laid_out(value: Tensor, like: Tensor | None) -> Tensor:
    """This rank's part of a `value` that all ranks hold, as `like` is shared out; `value` where `like` is not."""
    if not is_shared_out(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_state(module: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """`module.state_dict()` as if it were not sharded. For all ranks; where sharded, only the first gets it, on the
    CPU, and the others an empty one."""
    state = module.state_dict()
    if not any(is_shared_out(value) for value in state.values()):
        return state
    found = {}
    for name, value in state.items():
        gathered = whole(value.detach())
        if ranks.first:
            found[name] = gathered.cpu()
    return found


def whole_encoder(encoder: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module | None:
    """An encoder as others use it: `encoder` itself, or on the first rank a copy of a sharded one, None on others.

    For all ranks.
    """
    if not any(is_sharded(one) for one in encoder.modules()):
        return encoder
    assert isinstance(encoder, Encoder)
    state = whole_state(encoder, ranks)
    if not ranks.first:
        return None
    with torch.random.fork_rng(devices=[]):
        plain = create_backbone(encoder.name, **dataclasses.asdict(encoder.config))
    plain.load_state_dict(state)
    return plain.to(device)
