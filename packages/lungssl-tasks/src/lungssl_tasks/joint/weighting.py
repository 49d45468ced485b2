"""How the losses of several tasks become one.

equal           their sum
homoscedastic   sum of L / sigma^2 + ln sigma, sigma learned for each (Kendall et al. 2018, https://arxiv.org/abs/1705.07115,
                with the factor of Elmahdy et al. 2021, doi:10.1109/ACCESS.2021.3091011)
dwa             weights n softmax(r / T), r a loss's mean over the last window of steps by that over the one before
                (Liu et al. 2019, https://arxiv.org/abs/1803.10704, which has epochs for windows; T = 2 as there)
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Weighting = Literal["equal", "homoscedastic", "dwa"]
TEMPERATURE = 2.0
"""Of `dwa`."""


class LossWeights(nn.Module):
    """Weighs named losses. A step may lack some (nobody drew its pairs' lobes): these count neither then nor later."""

    rate_scale = 10.0
    """Of the learning rate (`param_groups`): at 1 a variance hardly moves in some hundred steps. Ours."""

    def __init__(self, names: tuple[str, ...], how: Weighting, *, window: int = 20) -> None:
        """`window`: steps of `dwa`'s means; those that bring a loss. Ours, not tuned."""
        super().__init__()
        self.names, self.how, self.window = names, how, window
        if how == "homoscedastic":
            self.log_variance = nn.Parameter(torch.zeros(len(names)))
        if how == "dwa":
            self.sums: Tensor
            self.means: Tensor
            self.register_buffer("sums", torch.zeros(2, len(names)))
            """Of the window that is going on: of losses, and their number."""
            self.register_buffer("means", torch.ones(2, len(names)))
            """Of the last window and the one before; 1 until there are two, which makes all weights 1."""
            self.windows: Tensor
            self.register_buffer("windows", torch.zeros(len(names)))
            """Finished, for each loss."""

    def forward(self, losses: Mapping[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """The weighted sum; in training mode `dwa` takes note of the losses. Raises ValueError for none."""
        if not losses:
            raise ValueError(f"there is no loss to weigh, expected some of {', '.join(self.names)}")
        weights = self.weights()
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        if self.how == "homoscedastic":
            total = total + torch.stack([self.log_variance[self.names.index(name)] for name in losses]).sum() / 2
        if self.how == "dwa" and self.training:
            self._note({name: loss.detach() for name, loss in losses.items()})
        return total

    def weights(self) -> dict[str, Float[Tensor, ""]]:
        """What each loss is multiplied by now."""
        if self.how == "homoscedastic":
            values = (-self.log_variance).exp()
        elif self.how == "dwa":
            rates = self.means[0] / self.means[1].clamp_min(1e-12)
            values = len(self.names) * (rates / TEMPERATURE).softmax(dim=0)
        else:
            values = torch.ones(len(self.names))
        return dict(zip(self.names, values.unbind(), strict=True))

    @torch.no_grad()
    def _note(self, losses: Mapping[str, Float[Tensor, ""]]) -> None:
        for name, loss in losses.items():
            k = self.names.index(name)
            self.sums[:, k] += torch.stack([loss.float(), torch.ones_like(loss, dtype=torch.float32)])
            if self.sums[1, k] < self.window:
                continue
            mean = self.sums[0, k] / self.sums[1, k]
            # The first window is compared with itself.
            self.means[1, k] = mean if self.windows[k] == 0 else self.means[0, k]
            self.means[0, k] = mean
            self.windows[k] += 1
            self.sums[:, k] = 0
