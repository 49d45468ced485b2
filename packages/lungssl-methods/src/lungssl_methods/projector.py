"""The MLP between embeddings and a contrastive loss; thrown away after pretraining."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn


class Projector(nn.Module):
    """Linear, batch norm, ReLU for each hidden width, then linear to the last one.

    Batch norm as in SimCLR, VICReg and vox2vec: crops of one organ look alike to a new encoder, and without it the
    part that all have in common is nearly all that an L2 normalisation leaves. It couples rows no more than these
    losses do. Statistics are those of one forward; in `eval()` the running ones.
    """

    def __init__(self, dim: int, widths: Sequence[int]) -> None:
        """Raises ValueError without a width."""
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"a projector needs widths of at least 1, hidden ones then the output's, got {widths}")
        *hidden, last = widths
        layers: list[nn.Module] = []
        for width in hidden:
            # No bias before batch norm, which would take it away again.
            layers += [nn.Linear(dim, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
            dim = width
        self.net = nn.Sequential(*layers, nn.Linear(dim, last))

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows e"]:
        """All rows are one batch to the norms, whatever their leading axes."""
        return self.net(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
