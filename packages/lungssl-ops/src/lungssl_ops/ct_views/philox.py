"""The random stream of the views: Philox4x32-10, so that a voxel's noise depends on its view's seed and its place only.

Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3, https://doi.org/10.1145/2063384.2063405. The key is the
64-bit seed, the counter a quarter of the voxel's index in the view (z, y, x with x fastest); the four 32-bit words
belong to four voxels in a row. They are those of Triton's `tl.randint4x(seed, index // 4)`.

From words to normal numbers (Box and Muller 1958): with h = word >> 8, words 0 and 1 (2 and 3) give
u = 1 - h_0 / 2^24 in (0, 1], v = h_1 / 2^24 in [0, 1), both exact in float32, and

    sqrt(-2 ln u) cos(2 pi v)  for voxel 0 (2),      sqrt(-2 ln u) sin(2 pi v)  for voxel 1 (3).

None is above 5.77 standard deviations.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds; words are int64 tensors from 0 to 2^32 - 1 whose shapes broadcast."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        # The product's low 64 bits, which is all of it, in an int64 that may have turned negative.
        low, high = _ROUND_A * c0, _ROUND_B * c2
        c0, c1, c2, c3 = (
            ((high >> 32) & _WORD) ^ c1 ^ k0,
            high & _WORD,
            ((low >> 32) & _WORD) ^ c3 ^ k1,
            low & _WORD,
        )
        k0, k1 = (k0 + _KEY_A) & _WORD, (k1 + _KEY_B) & _WORD
    return c0, c1, c2, c3


def normals(seed: Int64[Tensor, " v"], count: int, dtype: torch.dtype) -> Float[Tensor, "v _count"]:
    """Normal numbers for the first `count` voxels of views; see the head of this file."""
    quarter = torch.arange(-(-count // 4), device=seed.device)
    zero = torch.zeros_like(quarter)
    key = (seed[:, None] & _WORD, (seed[:, None] >> 32) & _WORD)
    words = torch.stack(philox4x32((quarter & _WORD, quarter >> 32, zero, zero), key), -1)
    uniform = (words >> 8).to(dtype) * 2.0**-24
    radius = (-2 * (1 - uniform[..., 0::2]).log()).sqrt()
    angle = 2 * math.pi * uniform[..., 1::2]
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    return pairs.flatten(1)[:, :count]
