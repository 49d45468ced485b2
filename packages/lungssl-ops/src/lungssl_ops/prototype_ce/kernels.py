"""The Triton kernels of `triton.py`, which says what each does and what it costs.

Softmaxes are online (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867): a running maximum m, the sum of
exp(z - m) and, for the entropy, the sum of (z - m) exp(z - m), all rescaled when m moves. m starts at -1e30 and not at
-inf, whose difference to itself is NaN. `scale` is 1 / temperature in a tensor: a number would come as float32.
"""

# ruff: noqa: ANN001, ANN201, ANN202
# Triton takes annotations for its own types and reads the source: `no_type_check` keeps the tests' shape checks from
# wrapping a kernel, which then would not find its helpers.

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def row_kernel(
    logits, bias, scale, lse, entropy, k,
    HAS_BIAS: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    inverse = tl.load(scale)
    dtype = inverse.dtype
    lanes = tl.arange(0, BLOCK)
    # Each lane has its own running softmax; they meet at the end.
    top = tl.full([BLOCK], -1e30, dtype)
    total = tl.zeros([BLOCK], dtype)
    slope = tl.zeros([BLOCK], dtype)
    for start in range(0, k, BLOCK):
        at = start + lanes
        valid = at < k
        z = tl.load(logits + row * k + at, mask=valid, other=0.0) * inverse
        if HAS_BIAS:
            z += tl.load(bias + at, mask=valid, other=0.0)
        z = tl.where(valid, z, -1e30)
        highest = tl.maximum(top, z)
        shrink = tl.exp(top - highest)
        e = tl.where(valid, tl.exp(z - highest), 0.0)
        if ENTROPY:
            slope = shrink * (slope + total * (top - highest)) + e * (z - highest)
        total = shrink * total + e
        top = highest
    highest = tl.max(top, axis=0)
    shrink = tl.exp(top - highest)
    if ENTROPY:
        slope = shrink * (slope + total * (top - highest))
    all_of_it = tl.sum(total * shrink, axis=0)
    tl.store(lse + row, highest + tl.log(all_of_it))
    if ENTROPY:
        tl.store(entropy + row, tl.log(all_of_it) - tl.sum(slope, axis=0) / all_of_it)


@triton.jit
@no_type_check
def fuse_kernel(
    student, teacher, weight, bias, scales, student_lse, teacher_lse, partial, gradient, s, t, k,
    HAS_BIAS: tl.constexpr, GRADIENT: tl.constexpr, TEACHERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = at < k
    student_scale = tl.load(scales)
    view = tl.arange(0, TEACHERS)
    there = view < t
    z = tl.load(
        teacher + (sample * t + view[:, None]) * k + at[None, :], mask=there[:, None] & valid[None, :], other=0.0
    )
    z = z * tl.load(scales + 1)
    if HAS_BIAS:
        z += tl.load(bias + at, mask=valid, other=0.0)[None, :]
    z -= tl.load(teacher_lse + sample * t + view, mask=there, other=0.0)[:, None]
    p = tl.where(there[:, None] & valid[None, :], tl.exp(z), 0.0)
    loss = tl.zeros([BLOCK], p.dtype)
    for i in range(0, s):
        w = tl.load(weight + (sample * s + i) * t + view, mask=there, other=0.0)
        row = (sample * s + i) * k + at
        log_q = tl.load(student + row, mask=valid, other=0.0) * student_scale
        log_q = tl.where(valid, log_q - tl.load(student_lse + sample * s + i), 0.0)
        target = tl.sum(p * w[:, None], axis=0)
        loss -= target * log_q
        if GRADIENT:
            found = (tl.sum(w, axis=0) * tl.exp(log_q) - target) * student_scale
            tl.store(gradient + row, found.to(gradient.dtype.element_ty), mask=valid)
    tl.store(partial + sample * tl.num_programs(1) + tl.program_id(1), tl.sum(loss, axis=0))


@triton.jit
@no_type_check
def attend_kernel(
    rows, keys, values, bias, scale, tops, totals, slopes, sums, n, k, d, per_split,
    HAS_BIAS: tl.constexpr, ENTROPY: tl.constexpr, VALUES: tl.constexpr, SAME: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    there = row < n
    inverse = tl.load(scale)
    dtype = inverse.dtype
    inside = there[:, None] & (dim < d)[None, :]
    x = tl.load(rows + row.to(tl.int64)[:, None] * d + dim[None, :], mask=inside, other=0.0)
    top = tl.full([ROWS], -1e30, dtype)
    total = tl.zeros([ROWS], dtype)
    slope = tl.zeros([ROWS], dtype)
    found = tl.zeros([ROWS, DIM], dtype)
    last = tl.minimum((split + 1) * per_split, k)
    for start in range(split * per_split, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        valid = column < last
        where = column.to(tl.int64)[:, None] * d + dim[None, :]
        taken = valid[:, None] & (dim < d)[None, :]
        w = tl.load(keys + where, mask=taken, other=0.0)
        z = tl.dot(x, tl.trans(w), input_precision=PRECISION, out_dtype=dtype) * inverse
        if HAS_BIAS:
            z += tl.load(bias + column, mask=valid, other=0.0)[None, :]
        z = tl.where(valid[None, :], z, -1e30)
        highest = tl.maximum(top, tl.max(z, axis=1))
        shrink = tl.exp(top - highest)
        z -= highest[:, None]
        e = tl.where(valid[None, :], tl.exp(z), 0.0)
        if ENTROPY:
            slope = shrink * (slope + total * (top - highest)) + tl.sum(tl.where(valid[None, :], e * z, 0.0), axis=1)
        total = shrink * total + tl.sum(e, axis=1)
        top = highest
        if VALUES:
            v = w
            if not SAME:
                v = tl.load(values + where, mask=taken, other=0.0)
            found = found * shrink[:, None]
            found = tl.dot(e.to(v.dtype), v, found, input_precision=PRECISION, out_dtype=dtype)
    place = split.to(tl.int64) * n + row
    tl.store(tops + place, top, mask=there)
    tl.store(totals + place, total, mask=there)
    if ENTROPY:
        tl.store(slopes + place, slope, mask=there)
    if VALUES:
        tl.store(sums + place[:, None] * d + dim[None, :], found, mask=there[:, None] & (dim < d)[None, :])


@triton.jit
@no_type_check
def merge_kernel(
    tops, totals, slopes, sums, lse, entropy, means, n, d, splits,
    ENTROPY: tl.constexpr, VALUES: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < n
    dim = tl.arange(0, DIM)
    inside = there[:, None] & (dim < d)[None, :]
    dtype = tops.dtype.element_ty
    highest = tl.full([ROWS], -1e30, dtype)
    for split in range(0, splits):
        highest = tl.maximum(highest, tl.load(tops + row + split * n, mask=there, other=-1e30))
    total = tl.zeros([ROWS], dtype)
    slope = tl.zeros([ROWS], dtype)
    found = tl.zeros([ROWS, DIM], dtype)
    for split in range(0, splits):
        place = row + split * n
        lower = tl.where(there, tl.load(tops + place, mask=there, other=0.0) - highest, 0.0)
        shrink = tl.exp(lower)
        part = tl.load(totals + place, mask=there, other=1.0)
        total += shrink * part
        if ENTROPY:
            slope += shrink * (tl.load(slopes + place, mask=there, other=0.0) + part * lower)
        if VALUES:
            found += shrink[:, None] * tl.load(sums + place[:, None] * d + dim[None, :], mask=inside, other=0.0)
    tl.store(lse + row, highest + tl.log(total), mask=there)
    if ENTROPY:
        tl.store(entropy + row, tl.log(total) - slope / total, mask=there)
    if VALUES:
        tl.store(means + row[:, None] * d + dim[None, :], found / total[:, None], mask=inside)


@triton.jit
@no_type_check
def _add_rows(
    found, w, z_bias, queries, values, factor, lse, inverse, n, d,
    SAME: tl.constexpr, PRECISION: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """found += exp(logits - lse) values, where `values` are the queries times `factor` if SAME."""
    dim = tl.arange(0, DIM)
    for start in range(0, n, ROWS):
        row = start + tl.arange(0, ROWS)
        there = row < n
        where = row.to(tl.int64)[:, None] * d + dim[None, :]
        inside = there[:, None] & (dim < d)[None, :]
        q = tl.load(queries + where, mask=inside, other=0.0)
        z = tl.dot(w, tl.trans(q), input_precision=PRECISION, out_dtype=inverse.dtype) * inverse + z_bias[:, None]
        p = tl.exp(z - tl.load(lse + row, mask=there, other=1e30)[None, :])
        v = q
        if SAME:
            p = p * tl.load(factor + row, mask=there, other=0.0)[None, :]
        else:
            v = tl.load(values + where, mask=inside, other=0.0)
        found = tl.dot(p.to(v.dtype), v, found, input_precision=PRECISION, out_dtype=inverse.dtype)
    return found


@triton.jit
@no_type_check
def prototype_gradient_kernel(
    student, factor, student_lse, student_prototypes, teacher, values, teacher_lse, teacher_prototypes, bias, scales,
    gradient, student_rows, teacher_rows, k, d,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    dim = tl.arange(0, DIM)
    valid = column < k
    where = column.to(tl.int64)[:, None] * d + dim[None, :]
    inside = valid[:, None] & (dim < d)[None, :]
    student_scale = tl.load(scales)
    found = tl.zeros([COLUMNS, DIM], student_scale.dtype)
    added = tl.zeros([COLUMNS], student_scale.dtype)
    w = tl.load(student_prototypes + where, mask=inside, other=0.0)
    found = _add_rows(
        found, w, added, student, student, factor, student_lse, student_scale, student_rows, d,
        True, PRECISION, DIM, ROWS,
    )  # fmt: skip
    if HAS_BIAS:
        added = tl.load(bias + column, mask=valid, other=0.0)
    w = tl.load(teacher_prototypes + where, mask=inside, other=0.0)
    found = _add_rows(
        found, w, added, teacher, values, factor, teacher_lse, tl.load(scales + 1), teacher_rows, d,
        False, PRECISION, DIM, ROWS,
    )  # fmt: skip
    tl.store(gradient + where, found, mask=inside)
