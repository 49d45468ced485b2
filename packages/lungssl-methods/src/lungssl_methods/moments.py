"""Mean and spread of embeddings over the crops of recent steps."""

import torch
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor, nn

from lungssl_methods.method import Gather


class RunningMoments(nn.Module):
    """Standardises embeddings by the exponential average of their mean and variance, per channel.

    Crops of one organ look alike to a new encoder: without this, the constant part of its embedding is some 30 times
    what differs between crops, and L2 normalisation hands the prototypes that constant. Batch norm in DINO's head for
    convolutional students (`use_bn_in_head`, Caron et al. 2021) serves the same end; averages over steps do it without
    coupling the samples of a batch, so micro-batches and ranks stay separable. Start-up bias is removed as in Adam
    (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980). Before the first update it changes nothing.
    """

    total: Float64[Tensor, "3 d"]
    _pending: Float64[Tensor, "3 d"]

    def __init__(self, dim: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("total", torch.zeros(3, dim, dtype=torch.float64))  # averages of 1, x, x^2, from 0
        self.register_buffer("_pending", torch.zeros(3, dim, dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def collect(self, x: Float[Tensor, "*rows d"], counted: Bool[Tensor, "*rows"] | None = None) -> None:
        """Count rows towards the next update: all, or those `counted`."""
        rows = x.detach().double().flatten(0, -2)  # float32 loses a spread of 1e-3 of the mean in E[x^2] - E[x]^2
        number = torch.full_like(rows[0], len(rows))
        if counted is not None:  # by zeros and not by an index, for which the host would wait for the device
            rows, number = torch.where(counted.flatten()[:, None], rows, 0.0), number * counted.double().mean()
        self._pending += torch.stack([number, rows.sum(0), rows.square().sum(0)])

    @torch.no_grad()
    def update(self, gather: Gather) -> None:
        """Once per optimizer step: move by the rows collected since the last one, over all ranks; without one, stay."""
        pending = gather.sum(self._pending)
        share = (1.0 - self.momentum) * (pending[0] > 0).to(pending)
        self.total.lerp_(pending / pending[0].clamp_min(1.0), share)
        self.forget()

    def forget(self) -> None:
        """Drop the rows collected since the last update."""
        self._pending.zero_()

    def weight(self) -> Float64[Tensor, ""]:
        """1 - momentum^updates: what an average of ones has reached, and what unbiased averages are divided by."""
        return self.total[0, 0]

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float32[Tensor, "*rows d"]:
        """(x - mean) / standard deviation; x itself before the first update."""
        _, mean, square = self.total / self.weight().clamp_min(1e-6)
        scale = torch.rsqrt((square - mean.square()).clamp_min(0) + 1e-6)
        standardised = (x.float() - mean.float()) * scale.float()
        return torch.where(self.weight() > 0, standardised, x.float())
