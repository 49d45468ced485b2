"""Cross-stitch units: two networks that mix their features channel by channel.

Source: Misra et al. 2016, https://arxiv.org/abs/1604.03539; between registration and segmentation, Elmahdy et al. 2021,
doi:10.1109/ACCESS.2021.3091011, whose code (moelmahdy/JRS-MTL) shapes them for 2-D maps; these take maps of any size.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class CrossStitch(nn.Module):
    """Maps features (a, b) of two networks to alpha (a, b), with a 2 x 2 matrix alpha for each channel."""

    rate_scale = 10.0
    """Of the learning rate (`param_groups`). Misra et al. have 100 to 1000 with SGD; AdamW needs less, for a matrix's
    small gradients don't slow it. At 1 a run of some hundred steps moves an entry by 0.1 or so."""

    def __init__(self, channels: int, *, keep: float) -> None:
        """At first each network has `keep` of its own features and 1 - `keep` of the other's.

        Raises ValueError for `keep` outside [0, 1].
        """
        super().__init__()
        if not 0 <= keep <= 1:
            raise ValueError(f"a cross-stitch keeps {keep} of a network's own features, expected a share, 0 to 1")
        # Vectors, which optimizers don't decay: towards 0 both networks would fall silent.
        self.a_from_a, self.b_from_b = (nn.Parameter(torch.full((channels,), keep)) for _ in range(2))
        self.a_from_b, self.b_from_a = (nn.Parameter(torch.full((channels,), 1 - keep)) for _ in range(2))

    def forward(
        self, a: Float[Tensor, "b c z y x"], b: Float[Tensor, "b c z y x"]
    ) -> tuple[Float[Tensor, "b c z y x"], Float[Tensor, "b c z y x"]]:
        """Both networks' features, mixed."""
        shape = (1, -1, 1, 1, 1)
        mixed_a = self.a_from_a.view(shape).to(a.dtype) * a + self.a_from_b.view(shape).to(a.dtype) * b
        mixed_b = self.b_from_a.view(shape).to(a.dtype) * a + self.b_from_b.view(shape).to(a.dtype) * b
        return mixed_a, mixed_b

    def alpha(self) -> Float[Tensor, "c 2 2"]:
        """The matrices; rows are what a and b become."""
        return torch.stack([self.a_from_a, self.a_from_b, self.b_from_a, self.b_from_b], dim=1).unflatten(1, (2, 2))
