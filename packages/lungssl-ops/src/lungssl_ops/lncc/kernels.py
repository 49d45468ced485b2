"""The Triton kernels of `triton.py`, which says what each does and what it costs.

`total` is the number of voxels of the batch; fields lie one after the other, `total` apart. The batch is seen as
[outer, high, wide], see `_block`.
"""

# ruff: noqa: ANN001, ANN201, ANN202
# Triton takes annotations for its own types and reads the source: `no_type_check` keeps the tests' shape checks from
# wrapping a kernel, which then would not find its helpers.

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _block(high, wide, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Of a volume seen as [outer, high, wide]: outer, rows, lanes, which exist, where they are. int64 throughout."""
    blocks_wide = tl.cdiv(wide, LANES)
    blocks = tl.cdiv(high, ROWS) * blocks_wide
    program = tl.program_id(0).to(tl.int64)
    row = program % blocks // blocks_wide * ROWS + tl.arange(0, ROWS)[:, None]
    lane = program % blocks_wide * LANES + tl.arange(0, LANES)[None, :]
    outer = program // blocks
    return outer, row, lane, (row < high) & (lane < wide), (outer * high + row) * wide + lane


@triton.jit
@no_type_check
def _neighbours(at, length, HALF: tl.constexpr):
    return tl.minimum(at + HALF, length - 1) - tl.maximum(at - HALF, 0) + 1


@triton.jit
@no_type_check
def _means(numbers, item):
    return tl.load(numbers + 4 * item), tl.load(numbers + 4 * item + 1)


@triton.jit
@no_type_check
def _voxel(fixed, moving, mask, means, at, valid, MASKED: tl.constexpr):
    """Weight, and both images less their means; 0 where they don't count and may be NaN."""
    f = tl.load(fixed + at, mask=valid, other=0.0) - means[0]
    m = tl.load(moving + at, mask=valid, other=0.0) - means[1]
    w = valid.to(f.dtype)
    if MASKED:
        w = tl.load(mask + at, mask=valid, other=0.0)
        f = tl.where(w > 0, f, 0.0)
        m = tl.where(w > 0, m, 0.0)
    return w, f, m


@triton.jit
@no_type_check
def _window(
    fixed, moving, mask, source, means, at, size, position, length, stride, inside,
    IMAGES: tl.constexpr, HALF: tl.constexpr, ZEROS: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Weight, means and (co)variances of a window's parts along one axis: voxels of the IMAGES, or sums in `source`.

    All are of differences to the first part that counts. Without a mask the weight is the number of parts.
    """
    dtype = source.dtype.element_ty
    n = tl.zeros([ROWS, LANES], dtype)
    f_first = n
    m_first = n
    f_sum = n
    m_sum = n
    ff_sum = n
    mm_sum = n
    fm_sum = n
    for k in range(-HALF, HALF + 1):
        valid = inside & (position + k >= 0) & (position + k < length)
        tap = at + k * stride
        w = valid.to(dtype)
        if IMAGES:
            f = tl.load(fixed + tap, mask=valid, other=0.0) - means[0]
            m = tl.load(moving + tap, mask=valid, other=0.0) - means[1]
            if MASKED:
                w = tl.load(mask + tap, mask=valid, other=0.0)
                f = tl.where(w > 0, f, 0.0)
                m = tl.where(w > 0, m, 0.0)
        else:
            f = tl.load(source + tap, mask=valid, other=0.0)
            m = tl.load(source + tap + size, mask=valid, other=0.0)
            if MASKED:
                w = tl.load(source + tap + 5 * size, mask=valid, other=0.0)
        if ZEROS:
            w = tl.full([ROWS, LANES], 1, dtype)
            f = tl.where(valid, f, -means[0])
            m = tl.where(valid, m, -means[1])
        f_first = tl.where(n > 0, f_first, f)
        m_first = tl.where(n > 0, m_first, m)
        f -= f_first
        m -= m_first
        n += w
        f_sum += w * f
        m_sum += w * m
        ff = f * f
        mm = m * m
        fm = f * m
        if not IMAGES:
            ff += tl.load(source + tap + 2 * size, mask=valid, other=0.0)
            mm += tl.load(source + tap + 3 * size, mask=valid, other=0.0)
            fm += tl.load(source + tap + 4 * size, mask=valid, other=0.0)
        ff_sum += w * ff
        mm_sum += w * mm
        fm_sum += w * fm
    one = 1 / tl.where(n > 0, n, 1.0)
    f = f_sum * one
    m = m_sum * one
    ff = tl.maximum(ff_sum * one - f * f, 0.0)
    mm = tl.maximum(mm_sum * one - m * m, 0.0)
    return n, f_first + f, m_first + m, ff, mm, fm_sum * one - f * m


@triton.jit
@no_type_check
def _store(target, at, size, inside, found, MASKED: tl.constexpr):
    n, f, m, ff, mm, fm = found
    tl.store(target + at, f, mask=inside)
    tl.store(target + at + size, m, mask=inside)
    tl.store(target + at + 2 * size, ff, mask=inside)
    tl.store(target + at + 3 * size, mm, mask=inside)
    tl.store(target + at + 4 * size, fm, mask=inside)
    if MASKED:
        tl.store(target + at + 5 * size, n, mask=inside)


@triton.jit
@no_type_check
def rows_kernel(
    fixed, moving, mask, numbers, target, total, high, wide, per_item,
    HALF: tl.constexpr, ZEROS: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    _, row, lane, inside, at = _block(high, wide, ROWS, LANES)
    means = _means(numbers, tl.minimum(row, high - 1) // per_item)
    size = at * 0 + total  # int64: six fields may have more than 2^31 elements where one has not
    found = _window(
        fixed, moving, mask, target, means, at, size, lane, wide, 1, inside, True, HALF, ZEROS, MASKED, ROWS, LANES
    )
    _store(target, at, size, inside, found, MASKED)


@triton.jit
@no_type_check
def merge_kernel(
    source, numbers, target, total, high, wide, per_item,
    HALF: tl.constexpr, ZEROS: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    outer, row, _, inside, at = _block(high, wide, ROWS, LANES)
    means = _means(numbers, outer // per_item)
    size = at * 0 + total
    found = _window(
        source, source, source, source, means, at, size, row, high, wide, inside,
        False, HALF, ZEROS, MASKED, ROWS, LANES,
    )  # fmt: skip
    _store(target, at, size, inside, found, MASKED)


@triton.jit
@no_type_check
def compare_kernel(
    source, fixed, moving, mask, upstream, numbers, partial, map, adjoints, total, high, wide, width,
    HALF: tl.constexpr, ZEROS: tl.constexpr, MASKED: tl.constexpr,
    UPSTREAM: tl.constexpr, MAP: tl.constexpr, SIDES: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    item, row, lane, inside, at = _block(high, wide, ROWS, LANES)
    size = at * 0 + total
    means = _means(numbers, item)
    n, f_mean, m_mean, ff, mm, fm = _window(
        source, source, source, source, means, at, size, row, high, wide, inside,
        False, HALF, ZEROS, MASKED, ROWS, LANES,
    )  # fmt: skip
    dtype = n.dtype
    share = tl.load(numbers + 4 * item + 2)
    eps = tl.load(numbers + 4 * item + 3)
    w, f, m = _voxel(fixed, moving, mask, means, at, inside, MASKED)
    if MASKED:
        n = tl.where(n > 0, n, 1.0)
    elif ZEROS:
        n = tl.full([ROWS, LANES], (2 * HALF + 1) * (2 * HALF + 1) * (2 * HALF + 1), dtype)
    else:
        height = wide // width
        n = (
            _neighbours(row, high, HALF)
            * _neighbours(lane // width, height, HALF)
            * _neighbours(lane % width, width, HALF)
        )
        n = tl.where(inside, n, 1).to(dtype)
    if ZEROS:
        f_one = 1 / tl.maximum(ff, eps / n)
        m_one = 1 / tl.maximum(mm, eps / n)
    else:
        f_one = 1 / (ff + eps)
        m_one = 1 / (mm + eps)
    found = (fm * f_one) * (fm * m_one)
    found = tl.where(w > 0, found, 0.0)
    tl.store(partial + tl.program_id(0), tl.sum(w * found))
    if MAP:
        tl.store(map + at, found, mask=inside)
    if SIDES > 0:
        g = share * w
        if UPSTREAM:
            g = tl.load(upstream + at, mask=inside, other=0.0)
        g = tl.where(w > 0, g / n, 0.0)
        c = 2 * fm * f_one * m_one * g
        b_m = -found * m_one * g
        b_f = -found * f_one * g
        if ZEROS:
            b_m = tl.where(mm > eps / n, b_m, 0.0)
            b_f = tl.where(ff > eps / n, b_f, 0.0)
        f_mean -= f
        m_mean -= m
        tl.store(adjoints + at, c, mask=inside)
        tl.store(adjoints + at + size, -(c * f_mean + 2 * b_m * m_mean), mask=inside)
        tl.store(adjoints + at + 2 * size, b_m, mask=inside)
        if SIDES == 2:
            tl.store(adjoints + at + 3 * size, -(c * m_mean + 2 * b_f * f_mean), mask=inside)
            tl.store(adjoints + at + 4 * size, b_f, mask=inside)


@triton.jit
@no_type_check
def _summed(
    source, fixed, moving, mask, means, at, size, position, length, stride, inside,
    HALF: tl.constexpr, MASKED: tl.constexpr, SIDES: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Adjoint fields summed along one axis, and moved from each tap's voxel to this one."""
    _, f, m = _voxel(fixed, moving, mask, means, at, inside, MASKED)
    c = tl.zeros([ROWS, LANES], source.dtype.element_ty)
    a_m = tl.zeros([ROWS, LANES], source.dtype.element_ty)
    b_m = tl.zeros([ROWS, LANES], source.dtype.element_ty)
    a_f = tl.zeros([ROWS, LANES], source.dtype.element_ty)
    b_f = tl.zeros([ROWS, LANES], source.dtype.element_ty)
    for k in range(-HALF, HALF + 1):
        valid = inside & (position + k >= 0) & (position + k < length)
        tap = at + k * stride
        f_tap = tl.load(fixed + tap, mask=valid, other=0.0) - means[0]
        m_tap = tl.load(moving + tap, mask=valid, other=0.0) - means[1]
        if MASKED:
            w = tl.load(mask + tap, mask=valid, other=0.0)
            f_tap = tl.where(w > 0, f_tap, 0.0)
            m_tap = tl.where(w > 0, m_tap, 0.0)
        c_tap = tl.load(source + tap, mask=valid, other=0.0)
        b_tap = tl.load(source + tap + 2 * size, mask=valid, other=0.0)
        c += c_tap
        b_m += b_tap
        moved = 2 * b_tap * (m - m_tap) + c_tap * (f - f_tap)
        a_m += tl.load(source + tap + size, mask=valid, other=0.0) + moved
        if SIDES == 2:
            b_tap = tl.load(source + tap + 4 * size, mask=valid, other=0.0)
            b_f += b_tap
            moved = 2 * b_tap * (f - f_tap) + c_tap * (m - m_tap)
            a_f += tl.load(source + tap + 3 * size, mask=valid, other=0.0) + moved
    return c, a_m, b_m, a_f, b_f


@triton.jit
@no_type_check
def sum_kernel(
    source, fixed, moving, mask, numbers, target, total, high, wide, per_item,
    HALF: tl.constexpr, MASKED: tl.constexpr, SIDES: tl.constexpr, ALONG_ROWS: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    outer, row, lane, inside, at = _block(high, wide, ROWS, LANES)
    size = at * 0 + total
    if ALONG_ROWS:
        means = _means(numbers, outer // per_item)
        c, a_m, b_m, a_f, b_f = _summed(
            source, fixed, moving, mask, means, at, size, row, high, wide, inside, HALF, MASKED, SIDES, ROWS, LANES
        )
    else:
        means = _means(numbers, tl.minimum(row, high - 1) // per_item)
        c, a_m, b_m, a_f, b_f = _summed(
            source, fixed, moving, mask, means, at, size, lane, wide, 1, inside, HALF, MASKED, SIDES, ROWS, LANES
        )
    tl.store(target + at, c, mask=inside)
    tl.store(target + at + size, a_m, mask=inside)
    tl.store(target + at + 2 * size, b_m, mask=inside)
    if SIDES == 2:
        tl.store(target + at + 3 * size, a_f, mask=inside)
        tl.store(target + at + 4 * size, b_f, mask=inside)


@triton.jit
@no_type_check
def gradient_kernel(
    source, fixed, moving, mask, numbers, grad_fixed, grad_moving, total, high, wide,
    HALF: tl.constexpr, MASKED: tl.constexpr, SIDES: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    item, row, _, inside, at = _block(high, wide, ROWS, LANES)
    means = _means(numbers, item)
    size = at * 0 + total
    _, a_m, _, a_f, _ = _summed(
        source, fixed, moving, mask, means, at, size, row, high, wide, inside, HALF, MASKED, SIDES, ROWS, LANES
    )
    w, _, _ = _voxel(fixed, moving, mask, means, at, inside, MASKED)
    tl.store(grad_moving + at, w * a_m, mask=inside)
    if SIDES == 2:
        tl.store(grad_fixed + at, w * a_f, mask=inside)
