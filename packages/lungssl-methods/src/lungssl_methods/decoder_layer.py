"""The transformer block of decoders and predictors."""

from jaxtyping import Float
from lungssl_ops.transformer import Affine, residual_attention, residual_mlp
from torch import Tensor, nn


class DecoderLayer(nn.TransformerEncoderLayer):
    """torch's pre-norm block with GELU and no dropout, by our ops: same weights, same names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)

    def forward(self, src: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Tokens after attention and MLP; all see all."""
        own, counts = self.self_attn, [src.shape[:2]]
        norm, out, again, widen, narrow = (
            Affine(part.weight, part.bias)
            for part in (self.norm1, own.out_proj, self.norm2, self.linear1, self.linear2)
        )
        joint = Affine(own.in_proj_weight, own.in_proj_bias)
        rows = src.flatten(0, 1)
        rows = residual_attention(rows, norm, joint, out, counts=counts, heads=own.num_heads, eps=self.norm1.eps)
        rows = residual_mlp(rows, again, widen, narrow, counts=counts, eps=self.norm2.eps)
        return rows.unflatten(0, src.shape[:2])
