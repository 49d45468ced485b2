"""MIND-SSC in Triton: two launches over the same program, nothing stored in between but one sum per program.

One program computes the twelve distances of BLOCK consecutive voxels of a sample: for each voxel of the (2r+1)^3 window
it loads six neighbours and adds twelve squared differences. The first launch writes the sum of the variances,
one number per program; torch adds them in float64, on the device; the second computes the distances again, which costs
less than to write and read twelve volumes, and writes the similarities.
Bytes per voxel in main memory: 4 read in each launch (neighbours are shared through the caches), 12 x the size of the
result's type written. Loads from the L1 cache: 6 (2r+1)^3 per launch, the bound at radius 1 and more so at 2.
Numerics: float32 sums of squares in the order of the window, no running sums; float64 for float64 images.
"""

# ruff: noqa: ANN001, ANN202
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# Triton takes the annotations of a kernel's arguments for their types; its language is not quite Python's.

import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor

from lungssl_ops.gate import GateCase
from lungssl_ops.mind.reference import LEAST_VARIANCE, MOST_VARIANCE
from lungssl_ops.tuning import Config, pick

CANDIDATES = (
    Config(blocks={"BLOCK": 256}, num_warps=4),
    Config(blocks={"BLOCK": 128}, num_warps=4),
    Config(blocks={"BLOCK": 512}, num_warps=8),
    Config(blocks={"BLOCK": 256}, num_warps=8),
)
_SUM_BLOCK = 256
"""Voxels per partial sum: fixed, so that the result doesn't depend on the tuned launch."""


def mind_ssc_triton(
    image: Float[Tensor, "b 1 z y x"], *, radius: int, dilation: int, dtype: torch.dtype
) -> Float[Tensor, "b 12 z y x"] | UInt8[Tensor, "b 12 z y x"]:
    """`mind_ssc_reference` without a gradient."""
    return _mind_ssc(image, radius, dilation, dtype)


@torch.library.custom_op("lungssl_ops::mind_ssc_triton", mutates_args=())
def _mind_ssc(image: Tensor, radius: int, dilation: int, dtype: torch.dtype) -> Tensor:
    image = image.contiguous()
    b, _, z, y, x = image.shape
    size = z * y * x
    work = torch.promote_types(image.dtype, torch.float32)
    out = torch.empty((b, 12, z, y, x), dtype=dtype, device=image.device)
    partial = torch.empty((b, triton.cdiv(size, _SUM_BLOCK)), dtype=work, device=image.device)
    constants = {
        "RADIUS": radius,
        "WORK": tl.float64 if work == torch.float64 else tl.float32,
        "BYTES": dtype == torch.uint8,
    }
    bounds = partial.new_empty((b, 2))

    def launch(config: Config, write: bool) -> None:
        block = config.blocks["BLOCK"]
        _mind_kernel[(triton.cdiv(size, block), b)](
            image,
            out,
            partial,
            bounds,
            z,
            y,
            x,
            dilation,
            WRITE=write,
            BLOCK=block,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
            **constants,
        )

    launch(Config(blocks={"BLOCK": _SUM_BLOCK}, num_warps=4), False)
    overall = partial.double().sum(dim=1) / size
    # In a constant image all distances and the variance are 0, and 0 / tiny is the 0 that is meant.
    bounds[:, 0] = (LEAST_VARIANCE * overall).clamp_min(torch.finfo(work).tiny)
    bounds[:, 1] = MOST_VARIANCE * overall
    launch(pick("mind_ssc", f"radius{radius}", CANDIDATES, lambda config: launch(config, True)), True)
    return out


@_mind_ssc.register_fake
def _(image: Tensor, radius: int, dilation: int, dtype: torch.dtype) -> Tensor:
    b, _, z, y, x = image.shape
    return image.new_empty((b, 12, z, y, x), dtype=dtype)


# Not specialised: sizes of 1 would become Python numbers, which have no `.to`.
@triton.jit(do_not_specialize=("z", "y", "x", "dilation"))
def _mind_kernel(
    image,
    out,
    partial,
    bounds,
    z,
    y,
    x,
    dilation,
    RADIUS: tl.constexpr,
    WORK: tl.constexpr,
    BYTES: tl.constexpr,
    WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    size = z * y * x
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    vx, vy, vz = at % x, (at // x) % y, at // (x * y)
    image += sample * size
    zero = tl.zeros([BLOCK], dtype=WORK)
    d0, d1, d2, d3, d4, d5, d6, d7, d8, d9, d10, d11 = (
        zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero,
    )  # fmt: skip
    for k in range((2 * RADIUS + 1) * (2 * RADIUS + 1)):
        wz = tl.minimum(tl.maximum(vz + k // (2 * RADIUS + 1) - RADIUS, 0), z - 1)
        wy = tl.minimum(tl.maximum(vy + k % (2 * RADIUS + 1) - RADIUS, 0), y - 1)
        below = (tl.maximum(wz - dilation, 0) * y + wy) * x
        above = (tl.minimum(wz + dilation, z - 1) * y + wy) * x
        before = (wz * y + tl.maximum(wy - dilation, 0)) * x
        behind = (wz * y + tl.minimum(wy + dilation, y - 1)) * x
        here = (wz * y + wy) * x
        for i in tl.static_range(2 * RADIUS + 1):
            wx = tl.minimum(tl.maximum(vx + i - RADIUS, 0), x - 1)
            # -z, +z, -y, +y, -x, +x: the order of NEIGHBOURS in reference.py.
            n0 = tl.load(image + below + wx, mask=inside, other=0.0).to(WORK)
            n1 = tl.load(image + above + wx, mask=inside, other=0.0).to(WORK)
            n2 = tl.load(image + before + wx, mask=inside, other=0.0).to(WORK)
            n3 = tl.load(image + behind + wx, mask=inside, other=0.0).to(WORK)
            n4 = tl.load(image + here + tl.maximum(wx - dilation, 0), mask=inside, other=0.0).to(WORK)
            n5 = tl.load(image + here + tl.minimum(wx + dilation, x - 1), mask=inside, other=0.0).to(WORK)
            # The order of PAIRS in reference.py.
            d0 += (n1 - n2) * (n1 - n2)
            d1 += (n3 - n0) * (n3 - n0)
            d2 += (n2 - n0) * (n2 - n0)
            d3 += (n3 - n1) * (n3 - n1)
            d4 += (n2 - n4) * (n2 - n4)
            d5 += (n3 - n5) * (n3 - n5)
            d6 += (n4 - n0) * (n4 - n0)
            d7 += (n1 - n5) * (n1 - n5)
            d8 += (n3 - n4) * (n3 - n4)
            d9 += (n5 - n2) * (n5 - n2)
            d10 += (n1 - n4) * (n1 - n4)
            d11 += (n5 - n0) * (n5 - n0)
    minimum = tl.minimum(tl.minimum(tl.minimum(d0, d1), tl.minimum(d2, d3)), tl.minimum(d4, d5))
    minimum = tl.minimum(minimum, tl.minimum(tl.minimum(tl.minimum(d6, d7), tl.minimum(d8, d9)), tl.minimum(d10, d11)))
    d0, d1, d2, d3 = d0 - minimum, d1 - minimum, d2 - minimum, d3 - minimum
    d4, d5, d6, d7 = d4 - minimum, d5 - minimum, d6 - minimum, d7 - minimum
    d8, d9, d10, d11 = d8 - minimum, d9 - minimum, d10 - minimum, d11 - minimum
    total = d0 + d1 + d2 + d3 + d4 + d5 + d6 + d7 + d8 + d9 + d10 + d11
    # Whole numbers only: Triton rounds a constant to float32 even beside float64.
    n_box = (2 * RADIUS + 1) * (2 * RADIUS + 1) * (2 * RADIUS + 1)
    variance = total / (12.0 * n_box)
    if WRITE:
        least, most = tl.load(bounds + 2 * sample), tl.load(bounds + 2 * sample + 1)
        # (least - least) is 0, or NaN where a voxel anywhere is NaN: the definition makes the whole sample NaN.
        variance = tl.maximum(tl.minimum(variance, most), least) + (least - least)
        factor = -1.0 / (variance * (1.0 * n_box))
        channel = size.to(tl.int64)
        out += sample * 12 * channel + at
        distances = (d0, d1, d2, d3, d4, d5, d6, d7, d8, d9, d10, d11)
        for p in tl.static_range(12):
            similarity = tl.exp(distances[p] * factor)
            if BYTES:
                # Halves go up here and to even in the definition.
                similarity = tl.floor(similarity * 255.0 + 0.5)
            tl.store(out + p * channel, similarity.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(partial + sample * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(inside, variance, 0.0)))


def gate_cases() -> list[GateCase]:
    """Both launches at radius 1 and 2, float32 to float16 and uint8."""
    cases = []
    for radius in (1, 2):
        for write, result in ((False, "fp16"), (True, "fp16"), (True, "u8")):
            cases.append(
                GateCase(
                    name=f"mind_ssc_{'write_' + result if write else 'sum'}_radius{radius}",
                    kernel=_mind_kernel,
                    signature=dict.fromkeys(("image", "out", "partial", "bounds"), "*fp32")
                    | {"out": f"*{result}"}
                    | dict.fromkeys(("z", "y", "x", "dilation"), "i32")
                    | dict.fromkeys(("RADIUS", "WORK", "BYTES", "WRITE", "BLOCK"), "constexpr"),
                    constants={
                        "RADIUS": radius,
                        "WORK": tl.float32,
                        "BYTES": result == "u8",
                        "WRITE": write,
                        "BLOCK": 256,
                    },
                    num_warps=4,
                    divisible_by_16=("image", "out", "partial"),
                )
            )
    return cases
