"""The processes that `torchrun` started for one run: which this is, and what they must agree on.

All ranks draw, decide and count alike; the first one alone writes files. The folder of the run and the cache are on
a file system that all ranks see.
"""

import inspect
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lungssl_methods.method import LocalGather
from lungssl_methods.ranks import RanksGather
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from lungssl.errors import ConfigError, OtherRankError
from lungssl.training.precision import pick_device

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of a run; alone without arguments. What is said to be for all ranks each must call."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the ranks on this machine: which of its accelerators is ours."""

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def gather(self) -> LocalGather | RanksGather:
        """What a method is built with."""
        return RanksGather() if self.size > 1 else LocalGather()

    def device(self, name: str) -> torch.device:
        """As `pick_device`, with an accelerator of its own for each rank of a machine; makes it the current one."""
        device = pick_device(name)
        if self.size > 1 and device.type == "cuda" and device.index is None:
            if self.local_rank >= torch.cuda.device_count():
                raise ConfigError(
                    f"{torch.cuda.device_count()} GPUs, and this is process {self.local_rank + 1} of this machine; "
                    f"give torchrun as many --nproc-per-node, or train on --device cpu"
                )
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        return device

    def all(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks. For all ranks; small picklable values."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank's `make` returns, on each. For all ranks; where it raises, the others OtherRankError."""
        if self.size == 1:
            return make()
        box: list[Any] = [None]
        if self.first:
            try:
                box = [(True, make())]
                pickle.dumps(box)
            except BaseException as error:
                dist.broadcast_object_list([(False, f"{type(error).__name__}: {error}")], src=0)
                raise
        dist.broadcast_object_list(box, src=0)
        done, value = box[0]
        if not done:
            raise OtherRankError(value)
        return value

    def mean(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Each figure's mean over the ranks that have it, in the order of ranks. For all ranks."""
        if self.size == 1:
            return dict(figures)
        every = self.all(dict(figures))
        names = dict.fromkeys(name for one in every for name in one)
        found = {name: [one[name] for one in every if name in one] for name in names}
        return {name: sum(values) / len(values) for name, values in found.items()}

    def agreed(self, reason: str | None) -> str | None:
        """The first reason that any rank has to stop, None where none has one. For all ranks."""
        return next((each for each in self.all(reason) if each is not None), None)

    def replica(self, module: nn.Module, device: torch.device) -> nn.Module:
        """`module`, its gradients averaged over ranks by backward passes; `module` itself alone. For all ranks.

        Buffers are not sent: they move alike on every rank, and those that count over micro-steps differ on purpose.
        Looking for unused parameters keeps torch from sorting its buckets anew after the first step, after which sums
        over more than two ranks would round otherwise, and a resumed run would not equal one that was not.
        """
        if self.size == 1:
            return module
        # torch 2.15 deprecates the older name.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        devices = [device] if device.type == "cuda" else None
        options: dict[str, Any] = {buffers: False}
        return DistributedDataParallel(module, device_ids=devices, find_unused_parameters=True, **options)

    def synchronised(self, encoder: nn.Module, device: torch.device) -> nn.Module:
        """The encoder with batch norms that see the samples of all ranks.

        Raises ConfigError on CPUs, where torch has none.
        """
        norms = [one for one in encoder.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
        if self.size == 1 or not norms:
            return encoder
        if device.type != "cuda":
            raise ConfigError(
                f"this backbone has {len(norms)} batch norms, which several ranks can only share on GPUs; train on one "
                f"process, or take a backbone without batch norm (lungssl list backbones)"
            )
        return nn.SyncBatchNorm.convert_sync_batchnorm(encoder)


ALONE = Ranks()


def launched() -> int:
    """How many processes `torchrun` started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def restarted() -> bool:
    """Whether `torchrun` has started this run before: one of its processes died (`--max-restarts`)."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def joined() -> Iterator[Ranks]:
    """Meet the other processes of `torchrun`, by its environment variables, for the time of the `with` block."""
    if launched() == 1:
        yield ALONE
        return
    # Of parameters with sides of length 1, which autograd and torch's buckets lay out differently: of no consequence.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # torchrun keeps its store when it starts processes again: there they would find the addresses of those that died.
    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(f"start_{_restarts()}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield Ranks(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()


def check_alone(what: str) -> None:
    """ConfigError where `torchrun` started several processes for what one does."""
    if launched() > 1:
        raise ConfigError(f"{what} is for one process, but torchrun started {launched()}; start it without torchrun")
