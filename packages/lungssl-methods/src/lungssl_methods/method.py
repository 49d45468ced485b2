"""What every self-supervised method offers the training loop, and how it meets other ranks."""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from lungssl_backbones.encoder import Encoder
from lungssl_data.batch import PairBatch, StepOutput
from torch import Tensor, nn

from lungssl_methods.auto import BaseRate

__all__ = [
    "Gather",
    "LocalGather",
    "Method",
    "StepOutput",
    "ViewCounts",
    "checked_encoder",
    "mean_over_ranks",
    "own_rows",
    "rank_part",
]


@runtime_checkable
class Gather(Protocol):
    """A method's only view of the other ranks; the training loop injects it."""

    @property
    def rank(self) -> int:
        """Which of the `ranks` this one is, from 0."""
        ...

    @property
    def ranks(self) -> int:
        """How many there are."""
        ...

    def sum(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The sum of `value` over all ranks, the same on each. No gradient. Every rank must call it."""
        ...

    def rows(self, value: Shaped[Tensor, "n *row"]) -> Shaped[Tensor, "m *row"]:
        """The rows of all ranks, one rank after the other; with gradient. As many on each, and every rank must call it.

        Each rank then has the loss of the whole batch, and the ranks' mean gradient, as DDP takes it, is that of one
        process with all samples.
        """
        ...


class LocalGather:
    """One process: its own values are all there is."""

    rank, ranks = 0, 1

    def sum(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`value` itself."""
        return value

    def rows(self, value: Shaped[Tensor, "n *row"]) -> Shaped[Tensor, "n *row"]:
        """`value` itself."""
        return value


def mean_over_ranks(value: Float[Tensor, "*shape"], gather: Gather) -> Float[Tensor, "*shape"]:
    """The mean of all ranks' values, without gradient; every rank must call it.

    A weighted mean divided by this mean of the ranks' weights, and not by its own weight, is right once DDP takes the
    ranks' mean: a rank with more lung counts more.
    """
    total = gather.sum(torch.cat([value.detach().flatten(), value.new_ones(1)]))
    return (total[:-1] / total[-1]).reshape(value.shape)


def rank_part(mean: Float[Tensor, ""], weight: Shaped[Tensor, "*shape"], gather: Gather) -> Float[Tensor, ""]:
    """A weighted mean over this rank's rows, as its part of that over all ranks' rows, to which the ranks' mean leads.

    `weight`: of this rank's rows. Every rank must call it; on one it is `mean` itself.
    """
    if gather.ranks == 1:
        return mean
    own = weight.detach().sum(dtype=torch.float64)
    whole = mean_over_ranks(own, gather).clamp_min(torch.finfo(torch.float32).tiny)
    return mean * (own / whole).to(mean.dtype)


def own_rows(drawn: Shaped[Tensor, "n *row"], gather: Gather, *, views: int = 1) -> Shaped[Tensor, "m *row"]:
    """This rank's rows of what was drawn for all ranks: `views` one after the other, in each the ranks' samples.

    Each rank draws for all of them from a generator in one state, so that a sample's draw is the same on any number of
    ranks. On one rank, all rows.
    """
    if gather.ranks == 1:
        return drawn
    return drawn.unflatten(0, (views, gather.ranks, -1))[:, gather.rank].flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class ViewCounts:
    """Views per slot and sample; the arguments of `check_views`."""

    globals_per_slot: int
    locals_per_slot: int


@runtime_checkable
class Method(Protocol):
    """An `nn.Module` that turns a batch into a loss.

    Built by `Config.build(encoder, total_steps=..., effective_batch=..., gather=...)`. It never sees the optimizer or
    the file system. `train()` and `eval()` tell it whether a batch is trained on or held out; in `eval()` nothing that
    `state_dict()` holds changes, and losses of different steps are comparable.
    """

    typical_views: ClassVar[ViewCounts]
    """Views that the method's source has, or the fewest that it works with."""
    base_rate: ClassVar[BaseRate]
    """What `train.lr: auto` is made of."""
    needs_correspondences: ClassVar[bool]
    """Whether crops must say where points of slot 0 are in slot 1 (`CropConfig.correspondences`)."""
    may_collapse: ClassVar[bool]
    """Whether features are compared with features, which an encoder that says one thing of all crops could satisfy;
    not where voxels are predicted."""
    batch_separable: bool
    """Whether the loss of a batch is the mean of its samples' losses, so that accumulated micro-batches give the
    gradient of one batch (where as much of each is measured, and is lung). Methods that compare samples with each other
    say False: with them accumulation would be a smaller batch. On several ranks they are right, through `gather`."""
    encoder: nn.Module
    """The encoder being trained."""

    def check_views(self, *, globals_per_slot: int, locals_per_slot: int) -> None:
        """Raises ValueError where the method cannot work with so many views per slot, saying what it needs."""
        ...

    def forward(self, batch: PairBatch, step: int) -> StepOutput:
        """The loss of a batch; `step` counts optimizer steps from 0."""
        ...

    def after_optimizer_step(self, step: int) -> None:
        """To be called after the optimizer's step `step`, on every rank: moves teachers and centres."""
        ...

    def export_encoder(self) -> nn.Module:
        """The encoder to use downstream."""
        ...


def checked_encoder(encoder: nn.Module) -> Encoder:
    """The same object, known to be an Encoder.

    Raises ValueError for any other module.
    """
    if not isinstance(encoder, Encoder):
        raise ValueError(
            f"{type(encoder).__name__} is not an Encoder (lungssl_backbones.encoder); "
            f"build one with lungssl_backbones.create_backbone(name)"
        )
    return encoder
