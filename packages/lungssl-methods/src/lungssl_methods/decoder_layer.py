"""The transformer block of decoders and predictors."""

from jaxtyping import Float
from lungssl_backbones.attention import attend
from torch import Tensor, nn
from torch.nn import functional as F


class DecoderLayer(nn.TransformerEncoderLayer):
    """torch's pre-norm block with GELU and no dropout, its attention by `attend`: same weights, same names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)

    def forward(self, src: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Tokens after attention and MLP; all see all."""
        own, tokens = self.self_attn, src
        joint = F.linear(self.norm1(tokens), own.in_proj_weight, own.in_proj_bias)
        q, k, v = joint.unflatten(-1, (3, own.num_heads, -1)).permute(2, 0, 3, 1, 4)
        tokens = tokens + own.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return tokens + self.linear2(F.gelu(self.linear1(self.norm2(tokens))))
