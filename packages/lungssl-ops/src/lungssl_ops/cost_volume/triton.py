"""Cost volume and coupled-convex labelling in Triton.

Correlation: one program multiplies a row of BLOCK_X fixed voxels with the row of moving voxels at one displacement
along z and y, on the matrix units, in steps of BLOCK_C channels, and writes the band of the product whose columns are
within reach; the norms |f|^2 and |m|^2 are summed from the same values. Only (2 reach + 1) / BLOCK_M of the product is
used: the matrix units have that to spare. Moving rows are read (2 reach + 1)^2 times, from the L2 cache.
Box: one program sums the (2r+1)^3 windows of BLOCK voxels, of one label or several, read through the caches.
Displacements along z are taken in chunks, so that the unsmoothed costs take at most _CHUNK_BYTES twice.
Labelling: one program takes BLOCK_V voxels through all labels, BLOCK_L at a time; penalties are computed, not read.
Bytes in main memory: per label and voxel 4 written by the correlation, 8 for a pass but the last, 4 + the size of the
result's type for the last; the labelling reads each cost once.
Numerics: float32 products in three TF32 ones (ieee for float64); float16 and bfloat16 features are centred in float32
and rounded again, which costs 2^-11 and 2^-8 of their spread; sums in float32. The labelling rounds every operation,
nothing is fused: the same label wins as in the definition.
"""

# ruff: noqa: ANN001, ANN202
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# Triton takes the annotations of a kernel's arguments for their types; its language is not quite Python's.

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from lungssl_ops.cost_volume.fakes import argmin_fake, costs_fake
from lungssl_ops.cost_volume.reference import Padding, mean_features, side_of
from lungssl_ops.gate import GateCase
from lungssl_ops.tuning import Config, pick

_CHUNK_BYTES = 2**28
_BOX_BLOCK = 256
CORRELATE_CANDIDATES = (
    Config(blocks={"BLOCK_X": 32, "BLOCK_C": 32}, num_warps=4, num_stages=2),
    Config(blocks={"BLOCK_X": 16, "BLOCK_C": 32}, num_warps=4, num_stages=2),
    Config(blocks={"BLOCK_X": 64, "BLOCK_C": 32}, num_warps=4, num_stages=2),
    Config(blocks={"BLOCK_X": 32, "BLOCK_C": 64}, num_warps=4, num_stages=3),
    Config(blocks={"BLOCK_X": 32, "BLOCK_C": 16}, num_warps=2, num_stages=3),
)
ARGMIN_CANDIDATES = (
    Config(blocks={"BLOCK_L": 64, "BLOCK_V": 32}, num_warps=4),
    Config(blocks={"BLOCK_L": 32, "BLOCK_V": 64}, num_warps=4),
    Config(blocks={"BLOCK_L": 128, "BLOCK_V": 32}, num_warps=8),
    Config(blocks={"BLOCK_L": 16, "BLOCK_V": 64}, num_warps=2),
)


def cost_volume_triton(
    fixed: Float[Tensor, "b c z y x"],
    moving: Float[Tensor, "b c z y x"],
    *,
    reach: int,
    smoothing: int,
    passes: int,
    padding: Padding,
    mean: bool,
    dtype: torch.dtype,
) -> Float[Tensor, "b l z y x"]:
    """`cost_volume_reference` without a gradient."""
    return _cost_volume(fixed, moving, reach, smoothing, passes if smoothing else 0, padding == "zero", mean, dtype)


def coupled_argmin_triton(
    cost: Float[Tensor, "b l z y x"], smooth: Float[Tensor, "b 3 z y x"], *, weight: float
) -> Float[Tensor, "b 3 z y x"]:
    """`coupled_argmin_reference`, in one read of the cost."""
    return _argmin(cost, smooth, weight)


@torch.library.custom_op("lungssl_ops::cost_volume_triton", mutates_args=())
def _cost_volume(
    fixed: Tensor,
    moving: Tensor,
    reach: int,
    smoothing: int,
    passes: int,
    zero: bool,
    mean: bool,
    dtype: torch.dtype,
) -> Tensor:
    b, c, z, y, x = fixed.shape
    side, size = 2 * reach + 1, z * y * x
    work = torch.promote_types(fixed.dtype, torch.float32)
    centre = mean_features(fixed.to(work))
    # What is beyond the border in the moving volume: 0, around the mean.
    outside = (-centre).to(fixed.dtype).reshape(b, c).contiguous()
    fixed, moving = ((t.to(work) - centre).to(t.dtype).contiguous() for t in (fixed, moving))
    out = torch.empty((b, side**3, z, y, x), dtype=dtype, device=fixed.device)
    planes = max(1, min(side, _CHUNK_BYTES // max(1, side**2 * size * work.itemsize)))
    raw = torch.empty((planes * side**2, z, y, x), dtype=work, device=fixed.device) if passes else None
    other = torch.empty_like(raw) if raw is not None and passes > 1 else None
    for sample in range(b):
        for first in range(0, side, planes):
            number = min(planes, side - first)
            target = out[sample, first * side**2 : (first + number) * side**2]
            source = target if raw is None else raw[: number * side**2]
            _correlate(fixed[sample], moving[sample], outside[sample], source, first, number, reach, zero, mean)
            for at in range(passes):
                assert raw is not None
                spare = (other if at % 2 == 0 else raw) if other is not None else raw
                result = target if at == passes - 1 else spare[: number * side**2]
                _box(source, result, smoothing, zero)
                source = result
    return out


_cost_volume.register_fake(costs_fake)


def _correlate(
    fixed: Float[Tensor, "c z y x"],
    moving: Float[Tensor, "c z y x"],
    outside: Float[Tensor, "c"],
    out: Float[Tensor, "l z y x"],
    first: int,
    number: int,
    reach: int,
    zero: bool,
    mean: bool,
) -> None:
    """Costs at `number` displacements along z from the one of index `first`."""
    c, z, y, x = fixed.shape
    side = 2 * reach + 1
    double = fixed.dtype == torch.float64

    def launch(config: Config) -> None:
        block_x = min(config.blocks["BLOCK_X"], max(16, triton.next_power_of_2(x)))
        _correlate_kernel[(z * y * triton.cdiv(x, block_x), number * side)](
            fixed,
            moving,
            outside,
            out,
            c,
            z,
            y,
            x,
            first,
            c if mean else 1,
            REACH=reach,
            ZERO=zero,
            WORK=tl.float64 if double else tl.float32,
            PRECISION="ieee" if double else "tf32x3",
            BLOCK_X=block_x,
            BLOCK_M=triton.next_power_of_2(block_x + 2 * reach),
            BLOCK_C=min(config.blocks["BLOCK_C"], max(16, triton.next_power_of_2(c))),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )

    key = f"{fixed.dtype}_reach{reach}_x{triton.next_power_of_2(x)}_c{triton.next_power_of_2(c)}".replace("torch.", "")
    launch(pick("cost_volume", key, CORRELATE_CANDIDATES, launch))


def _box(source: Float[Tensor, "l z y x"], out: Float[Tensor, "l z y x"], radius: int, zero: bool) -> None:
    """Mean over (2 radius + 1)^3 voxels of each volume."""
    labels, z, y, x = source.shape
    _box_kernel[(triton.cdiv(source.numel(), _BOX_BLOCK),)](
        source, out, z, y, x, labels, RADIUS=radius, ZERO=zero, BLOCK=_BOX_BLOCK, num_warps=4, enable_fp_fusion=True
    )


@torch.library.custom_op("lungssl_ops::coupled_argmin_triton", mutates_args=())
def _argmin(cost: Tensor, smooth: Tensor, weight: float) -> Tensor:
    b, labels, z, y, x = cost.shape
    side = side_of(labels)
    cost, smooth = cost.contiguous(), smooth.contiguous()
    out = torch.empty_like(smooth)
    # As a tensor: a Python number would reach the kernel in float32, also beside float64.
    weights = torch.full((1,), weight, dtype=smooth.dtype, device=smooth.device)

    def launch(config: Config) -> None:
        _argmin_kernel[(triton.cdiv(z * y * x, config.blocks["BLOCK_V"]), b)](
            cost,
            smooth,
            weights,
            out,
            z * y * x,
            SIDE=side,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
            **config.blocks,
        )

    launch(pick("coupled_argmin", f"{cost.dtype}_side{side}".replace("torch.", ""), ARGMIN_CANDIDATES, launch))
    return out


_argmin.register_fake(argmin_fake)


# Not specialised: sizes of 1 would become Python numbers, which have no `.to`.
@triton.jit(do_not_specialize=("c", "z", "y", "x", "first", "divisor"))
def _correlate_kernel(
    fixed,
    moving,
    outside,
    out,
    c,
    z,
    y,
    x,
    first,
    divisor,
    REACH: tl.constexpr,
    ZERO: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    SIDE: tl.constexpr = 2 * REACH + 1
    tiles = tl.cdiv(x, BLOCK_X)
    tile, row = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    iy, iz = row % y, row // y
    jy, jz = tl.program_id(1) % SIDE, tl.program_id(1) // SIDE
    my, mz = iy + jy - REACH, iz + jz + first - REACH
    row_inside = (my >= 0) & (my < y) & (mz >= 0) & (mz < z)
    my, mz = tl.minimum(tl.maximum(my, 0), y - 1), tl.minimum(tl.maximum(mz, 0), z - 1)
    fx = tile * BLOCK_X + tl.arange(0, BLOCK_X)
    column = tl.arange(0, BLOCK_M)
    mx = tile * BLOCK_X - REACH + column
    inside = (mx >= 0) & (mx < x) & row_inside
    mx = tl.minimum(tl.maximum(mx, 0), x - 1)
    size = z.to(tl.int64) * y * x
    products = tl.zeros([BLOCK_X, BLOCK_M], dtype=WORK)
    f_norm, m_norm = tl.zeros([BLOCK_X], dtype=WORK), tl.zeros([BLOCK_M], dtype=WORK)
    for start in range(0, c, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        exists = channel < c
        f = tl.load(
            fixed + channel[None, :] * size + (row * x + fx)[:, None],
            mask=exists[None, :] & (fx < x)[:, None],
            other=0.0,
        )
        m = tl.load(
            moving + channel[:, None] * size + ((mz * y + my) * x + mx)[None, :], mask=exists[:, None], other=0.0
        )
        if ZERO:
            beyond = tl.load(outside + channel, mask=exists, other=0.0)
            m = tl.where(inside[None, :], m, beyond[:, None])
        products = tl.dot(f, m, products, input_precision=PRECISION, out_dtype=WORK)
        f_norm += tl.sum(f.to(WORK) * f.to(WORK), axis=1)
        m_norm += tl.sum(m.to(WORK) * m.to(WORK), axis=0)
    cost = tl.maximum(f_norm[:, None] + m_norm[None, :] - 2.0 * products, 0.0) / divisor.to(WORK)
    jx = column[None, :] - tl.arange(0, BLOCK_X)[:, None]
    label = tl.program_id(1) * SIDE + jx
    to = out + label * size + (row * x + fx)[:, None]
    tl.store(to, cost.to(out.dtype.element_ty), mask=(jx >= 0) & (jx < SIDE) & (fx < x)[:, None])


@triton.jit(do_not_specialize=("z", "y", "x", "labels"))
def _box_kernel(source, out, z, y, x, labels, RADIUS: tl.constexpr, ZERO: tl.constexpr, BLOCK: tl.constexpr):
    size = z * y * x
    first = tl.program_id(0).to(tl.int64) * BLOCK
    label = first // size
    place = (first - label * size).to(tl.int32) + tl.arange(0, BLOCK)
    label += place // size
    at = place % size
    exists = label < labels
    vx, vy, vz = at % x, (at // x) % y, at // (x * y)
    source += label * size
    total = tl.zeros([BLOCK], dtype=source.dtype.element_ty)
    for k in range((2 * RADIUS + 1) * (2 * RADIUS + 1)):
        wz, wy = vz + k // (2 * RADIUS + 1) - RADIUS, vy + k % (2 * RADIUS + 1) - RADIUS
        inside = (wz >= 0) & (wz < z) & (wy >= 0) & (wy < y)
        row = (tl.minimum(tl.maximum(wz, 0), z - 1) * y + tl.minimum(tl.maximum(wy, 0), y - 1)) * x
        for i in tl.static_range(2 * RADIUS + 1):
            wx = vx + i - RADIUS
            value = tl.load(source + row + tl.minimum(tl.maximum(wx, 0), x - 1), mask=exists, other=0.0)
            if ZERO:
                value = tl.where(inside & (wx >= 0) & (wx < x), value, 0.0)
            total += value
    n_box = (2 * RADIUS + 1) * (2 * RADIUS + 1) * (2 * RADIUS + 1)
    # A whole number: Triton rounds a constant to float32 even beside float64.
    tl.store(out + label * size + at, (total / (1.0 * n_box)).to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=("size",))
def _argmin_kernel(cost, smooth, weights, out, size, SIDE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_V: tl.constexpr):
    WORK: tl.constexpr = smooth.dtype.element_ty
    sample = tl.program_id(1).to(tl.int64)
    volume = size.to(tl.int64)
    voxel = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    exists = voxel < size
    cost += sample * SIDE * SIDE * SIDE * volume
    smooth += sample * 3 * volume
    weight = tl.load(weights)
    sx = tl.load(smooth + voxel, mask=exists, other=0.0)[None, :]
    sy = tl.load(smooth + volume + voxel, mask=exists, other=0.0)[None, :]
    sz = tl.load(smooth + 2 * volume + voxel, mask=exists, other=0.0)[None, :]
    best = tl.full([BLOCK_L, BLOCK_V], float("inf"), dtype=WORK)
    chosen = tl.zeros([BLOCK_L, BLOCK_V], dtype=tl.int32)
    for first in range(0, SIDE * SIDE * SIDE, BLOCK_L):
        label = first + tl.arange(0, BLOCK_L)
        dx = (label % SIDE - SIDE // 2).to(WORK)[:, None] - sx
        dy = (label // SIDE % SIDE - SIDE // 2).to(WORK)[:, None] - sy
        dz = (label // (SIDE * SIDE) - SIDE // 2).to(WORK)[:, None] - sz
        known = (label < SIDE * SIDE * SIDE)[:, None] & exists[None, :]
        value = tl.load(cost + label[:, None] * volume + voxel[None, :], mask=known, other=float("inf")).to(WORK)
        value = value + ((weight * (dz * dz) + weight * (dy * dy)) + weight * (dx * dx))
        less = value < best
        best = tl.where(less, value, best)
        chosen = tl.where(less, label[:, None], chosen)
    least = tl.min(best, axis=0)
    # Each lane holds its own lowest label; among lanes of equal cost the lowest wins.
    label = tl.min(tl.where(best == least[None, :], chosen, SIDE * SIDE * SIDE), axis=0)
    out += sample * 3 * volume + voxel
    tl.store(out, (label % SIDE - SIDE // 2).to(WORK), mask=exists)
    tl.store(out + volume, (label // SIDE % SIDE - SIDE // 2).to(WORK), mask=exists)
    tl.store(out + 2 * volume, (label // (SIDE * SIDE) - SIDE // 2).to(WORK), mask=exists)


def gate_cases() -> list[GateCase]:
    """Correlation per feature type, box, labelling; at reach 6."""
    integers = dict.fromkeys(("c", "z", "y", "x", "first", "divisor"), "i32")
    blocks = ("REACH", "ZERO", "WORK", "PRECISION", "BLOCK_X", "BLOCK_M", "BLOCK_C")
    cases = []
    for features, work in (("fp32", "fp32"), ("fp16", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")):
        constants = {"REACH": 6, "ZERO": True, "WORK": tl.float64 if work == "fp64" else tl.float32}
        constants |= {"PRECISION": "ieee" if work == "fp64" else "tf32x3"}
        cases.append(
            GateCase(
                name=f"cost_volume_correlate_{features}",
                kernel=_correlate_kernel,
                signature=dict.fromkeys(("fixed", "moving", "outside"), f"*{features}")
                | {"out": f"*{work}"}
                | integers
                | dict.fromkeys(blocks, "constexpr"),
                constants=constants | {"BLOCK_X": 32, "BLOCK_M": 64, "BLOCK_C": 32},
                matrix_units=work == "fp32",
                divisible_by_16=("fixed", "moving", "outside", "out"),
            )
        )
    cases.append(
        GateCase(
            name="cost_volume_box_fp16",
            kernel=_box_kernel,
            signature={"source": "*fp32", "out": "*fp16"}
            | dict.fromkeys(("z", "y", "x", "labels"), "i32")
            | dict.fromkeys(("RADIUS", "ZERO", "BLOCK"), "constexpr"),
            constants={"RADIUS": 1, "ZERO": False, "BLOCK": _BOX_BLOCK},
            divisible_by_16=("source", "out"),
        )
    )
    for kind in ("fp16", "fp32"):
        cases.append(
            GateCase(
                name=f"coupled_argmin_{kind}",
                kernel=_argmin_kernel,
                signature={"cost": f"*{kind}", "smooth": "*fp32", "weights": "*fp32", "out": "*fp32", "size": "i32"}
                | dict.fromkeys(("SIDE", "BLOCK_L", "BLOCK_V"), "constexpr"),
                constants={"SIDE": 13, "BLOCK_L": 64, "BLOCK_V": 32},
                divisible_by_16=("cost", "smooth", "out"),
            )
        )
    return cases
