"""LNCC in C++: one sweep along z gives the loss and both gradients, and nothing of the volume's size is stored.

Per plane, z sums of the five products slide by one plane in and one out, sums of rows slide along y, and sums along x
double. LNCC and its adjoints of that plane go into a ring of `window` planes, whose sums slide alike and `window // 2`
planes later give the gradients. All in float64.

Sums along z start afresh every max(16, 2 window) planes, where a thread's slab may begin: any number of threads gives
the same bits. Memory besides the gradients, per thread: planes of float64, 6 for the sums and, for one gradient or
both, 3 or 5 (window + 1).
"""

import ctypes

import torch
from jaxtyping import Float
from torch import Tensor

from lungssl_ops.cpp import library, pointer, threads
from lungssl_ops.lncc import SOURCE
from lungssl_ops.lncc.operators import operators


def _sweep(
    fixed: Float[Tensor, "b 1 z y x"],
    moving: Float[Tensor, "b 1 z y x"],
    mask: Float[Tensor, "b 1 z y x"] | None,
    upstream: Float[Tensor, "b 1 z y x"] | None,
    *,
    window: int,
    eps: float,
    zeros: bool,
    with_map: bool = False,
    grad_fixed: bool = False,
    grad_moving: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if grad_fixed and not grad_moving:  # LNCC is symmetric, and C++ knows moving or both
        mean, found, to_moving, to_fixed = _sweep(
            moving, fixed, mask, upstream, window=window, eps=eps, zeros=zeros, with_map=with_map, grad_moving=True
        )
        return mean, found, to_fixed, to_moving
    inputs = [None if t is None else t.contiguous() for t in (fixed, moving, mask, upstream)]
    outputs = [
        torch.empty(fixed.shape if wanted else 0, dtype=fixed.dtype) for wanted in (with_map, grad_fixed, grad_moving)
    ]
    code = library(SOURCE)
    b, _, *shape = fixed.shape
    sizes = [ctypes.c_int64(n) for n in (*shape, window)]
    code.lncc_scratch.restype = ctypes.c_int64
    scratch_size = code.lncc_scratch(*sizes, ctypes.c_int(grad_fixed + grad_moving))
    scratch = torch.empty(threads().value * scratch_size, dtype=torch.float64)
    partial = torch.empty(4 * b * shape[0], dtype=torch.float64)
    mean = torch.empty(b, dtype=torch.float64)
    function = code.lncc_float if fixed.dtype == torch.float32 else code.lncc_double
    function(
        *(pointer(t) for t in inputs),
        *(pointer(t if t.numel() else None) for t in outputs),
        *(pointer(t) for t in (mean, partial, scratch)),
        ctypes.c_int64(b),
        *sizes,
        ctypes.c_double(eps),
        ctypes.c_int(zeros),
        threads(),
    )
    return mean.to(fixed.dtype), outputs[0], outputs[1], outputs[2]


lncc_cpp = operators("cpp", _sweep)
