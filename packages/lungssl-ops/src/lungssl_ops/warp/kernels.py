"""The Triton kernels of the warp; triton.py says what they compute and launches them."""

# ruff: noqa: ANN001, ANN201, ANN202
# Triton takes the annotations of a kernel's arguments for their types, and reads its source: `no_type_check` keeps the
# tests' shape checks from wrapping it, after which it would not find its helpers.

from typing import no_type_check

import triton
import triton.language as tl

SIZES = ("channels", "z", "y", "x")
"""Not specialised: sizes of 1 would become Python numbers, which have no `.to`."""


@triton.jit
@no_type_check
def _locate(u, v, size, BORDER: tl.constexpr):
    """Of v + u along one axis: the indices of the two taps, their weights, and the derivatives of these."""
    one, zero = tl.full(u.shape, 1.0, u.dtype), tl.zeros(u.shape, u.dtype)
    # Cell and fraction from u alone: v + u in float32 would round the fraction to 1e-5 voxel at v = 160.
    reach = zero + (size + 1)
    held = tl.where(u > -reach, tl.where(u < reach, u, reach), -reach)
    floor = tl.floor(held)
    f = held - floor
    cell = v + floor.to(tl.int32)
    if BORDER:
        low = 0
        high = size - 1
    else:
        low = -1
        high = size
    inside = (cell >= low) & (cell < high) & ((cell > low) | (f > 0))
    index = tl.minimum(tl.maximum(cell, low), high)
    f = tl.where(u == u, tl.where(inside, f, zero), u)
    in0, in1 = one, one
    if not BORDER:
        in0 = tl.where((index >= 0) & (index < size), one, zero)
        in1 = tl.where(index < size - 1, one, zero)
    i0 = tl.minimum(tl.maximum(index, 0), size - 1)
    i1 = tl.minimum(index + 1, size - 1)
    return i0, i1, (1.0 - f) * in0, f * in1, tl.where(inside, -in0, zero), tl.where(inside, in1, zero)


@triton.jit
@no_type_check
def _at(field, vz, vy, vx, y, x, inside):
    return tl.load(field + (vz * y + vy) * x + vx, mask=inside, other=0.0)


@triton.jit
@no_type_check
def _step(v, size, like):
    """1 / (distance of the neighbours of v), 0 along an axis of one voxel."""
    edge = tl.where((v == 0) | (v == size - 1), 1.0 + like * 0.0, 0.5)
    return tl.where(size == 1, 0.0, edge)


@triton.jit
@no_type_check
def _differences(field, vz, vy, vx, z, y, x, inside):
    """Derivatives along x, y and z, of `numpy.gradient`."""
    zm, ym, xm = tl.maximum(vz - 1, 0), tl.maximum(vy - 1, 0), tl.maximum(vx - 1, 0)
    zp, yp, xp = tl.minimum(vz + 1, z - 1), tl.minimum(vy + 1, y - 1), tl.minimum(vx + 1, x - 1)
    dx = _at(field, vz, vy, xp, y, x, inside) - _at(field, vz, vy, xm, y, x, inside)
    dy = _at(field, vz, yp, vx, y, x, inside) - _at(field, vz, ym, vx, y, x, inside)
    dz = _at(field, zp, vy, vx, y, x, inside) - _at(field, zm, vy, vx, y, x, inside)
    return dx * _step(vx, x, dx), dy * _step(vy, y, dx), dz * _step(vz, z, dx)


@triton.jit
@no_type_check
def _jacobian(u, volume, vz, vy, vx, z, y, x, inside):
    a, b, c = _differences(u, vz, vy, vx, z, y, x, inside)
    d, e, f = _differences(u + volume, vz, vy, vx, z, y, x, inside)
    p, q, r = _differences(u + 2 * volume, vz, vy, vx, z, y, x, inside)
    return a + 1.0, b, c, d, e + 1.0, f, p, q, r + 1.0


@triton.jit
@no_type_check
def _weight_at(weight, vz, vy, vx, y, x, inside, like, WEIGHTED: tl.constexpr):
    if WEIGHTED:
        w = _at(weight, vz, vy, vx, y, x, inside)
    else:
        w = tl.full(like.shape, 1.0, like.dtype)
    return w


@triton.jit
@no_type_check
def _square_corner(field, vz, vy, vx, sz, sy, sx, y, x, inside):
    """u - u_j - u_k + u_jk, where two of the neighbours (sz, sy, sx) differ from the voxel; third equal to it."""
    if sz is None:
        d = _at(field, vz, vy, vx, y, x, inside) - _at(field, vz, vy, sx, y, x, inside)
        d -= _at(field, vz, sy, vx, y, x, inside) - _at(field, vz, sy, sx, y, x, inside)
    elif sy is None:
        d = _at(field, vz, vy, vx, y, x, inside) - _at(field, vz, vy, sx, y, x, inside)
        d -= _at(field, sz, vy, vx, y, x, inside) - _at(field, sz, vy, sx, y, x, inside)
    else:
        d = _at(field, vz, vy, vx, y, x, inside) - _at(field, vz, sy, vx, y, x, inside)
        d -= _at(field, sz, vy, vx, y, x, inside) - _at(field, sz, sy, vx, y, x, inside)
    return d


@triton.jit
@no_type_check
def _corner_sum(weight, vz, vy, vx, sz, sy, sx, y, x, inside, like, WEIGHTED: tl.constexpr):
    """The four weights of such a square, added."""
    if not WEIGHTED:
        total = tl.full(like.shape, 4.0, like.dtype)
    elif sz is None:
        total = _at(weight, vz, vy, vx, y, x, inside) + _at(weight, vz, vy, sx, y, x, inside)
        total += _at(weight, vz, sy, vx, y, x, inside) + _at(weight, vz, sy, sx, y, x, inside)
    elif sy is None:
        total = _at(weight, vz, vy, vx, y, x, inside) + _at(weight, vz, vy, sx, y, x, inside)
        total += _at(weight, sz, vy, vx, y, x, inside) + _at(weight, sz, vy, sx, y, x, inside)
    else:
        total = _at(weight, vz, vy, vx, y, x, inside) + _at(weight, vz, sy, vx, y, x, inside)
        total += _at(weight, sz, vy, vx, y, x, inside) + _at(weight, sz, sy, vx, y, x, inside)
    return total


@triton.jit
@no_type_check
def _bend(field, v, size, pitch, here, inside):
    """u(v - 1) - 2 u(v) + u(v + 1) along the axis of `pitch`; 0 where a neighbour is missing."""
    inner = inside & (v > 0) & (v < size - 1)
    low, high = (
        tl.load(field + here - pitch, mask=inner, other=0.0),
        tl.load(field + here + pitch, mask=inner, other=0.0),
    )
    return low - 2.0 * tl.load(field + here, mask=inner, other=0.0) + high


@triton.jit
@no_type_check
def _weighted_bend(field, weight, v, size, pitch, here, inside, WEIGHTED: tl.constexpr):
    d = _bend(field, v, size, pitch, here, inside)
    if WEIGHTED:
        d *= tl.load(weight + here, mask=inside & (v >= 0) & (v < size), other=0.0)
    return d


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def warp_kernel(
    image,
    u,
    weight,
    warped,
    folded,
    partial,
    fill_high,
    fill_low,
    sx_high,
    sx_low,
    sy_high,
    sy_low,
    sz_high,
    sz_low,
    channels,
    z,
    y,
    x,
    BORDER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FIRST: tl.constexpr,
    BENDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Warped image; with FIRST also the partial sums [b, 3, programs] and where the map folds [b, z y x]."""
    sample = tl.program_id(1).to(tl.int64)
    volume = z.to(tl.int64) * y * x
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < volume
    vx, vy, vz = at % x, (at // x) % y, at // (x * y)
    u += sample * 3 * volume
    ux = tl.load(u + at, mask=inside, other=0.0)
    uy = tl.load(u + volume + at, mask=inside, other=0.0)
    uz = tl.load(u + 2 * volume + at, mask=inside, other=0.0)
    zero = tl.zeros([BLOCK], ux.dtype)
    fill = zero + fill_high + fill_low
    x0, x1, wx0, wx1, _dx0, _dx1 = _locate(ux, vx, x, BORDER)
    y0, y1, wy0, wy1, _dy0, _dy1 = _locate(uy, vy, y, BORDER)
    z0, z1, wz0, wz1, _dz0, _dz1 = _locate(uz, vz, z, BORDER)
    for channel in range(channels):
        here = (sample * channels + channel) * volume
        v = image + here
        a = wx0 * (_at(v, z0, y0, x0, y, x, inside) - fill) + wx1 * (_at(v, z0, y0, x1, y, x, inside) - fill)
        b = wx0 * (_at(v, z0, y1, x0, y, x, inside) - fill) + wx1 * (_at(v, z0, y1, x1, y, x, inside) - fill)
        c = wx0 * (_at(v, z1, y0, x0, y, x, inside) - fill) + wx1 * (_at(v, z1, y0, x1, y, x, inside) - fill)
        d = wx0 * (_at(v, z1, y1, x0, y, x, inside) - fill) + wx1 * (_at(v, z1, y1, x1, y, x, inside) - fill)
        out = wz0 * (wy0 * a + wy1 * b) + wz1 * (wy0 * c + wy1 * d) + fill
        tl.store(warped + here + at, out, mask=inside)
    if FIRST:
        weight += sample * volume
        w = _weight_at(weight, vz, vy, vx, y, x, inside, zero, WEIGHTED)
        j0, j1, j2, j3, j4, j5, j6, j7, j8 = _jacobian(u, volume, vz, vy, vx, z, y, x, inside)
        det = j0 * (j4 * j8 - j5 * j7) + j1 * (j5 * j6 - j3 * j8) + j2 * (j3 * j7 - j4 * j6)
        good = det >= 0.0
        tl.store(folded + sample * volume + at, tl.where(good, 0, 1).to(tl.uint8), mask=inside)
        folding = tl.where(good, zero, -det * w)
        xm, ym, zm = tl.maximum(vx - 1, 0), tl.maximum(vy - 1, 0), tl.maximum(vz - 1, 0)
        sx, sy, sz = zero + sx_high + sx_low, zero + sy_high + sy_low, zero + sz_high + sz_low
        wx = w + _weight_at(weight, vz, vy, xm, y, x, inside, zero, WEIGHTED)
        wy = w + _weight_at(weight, vz, ym, vx, y, x, inside, zero, WEIGHTED)
        wz = w + _weight_at(weight, zm, vy, vx, y, x, inside, zero, WEIGHTED)
        diffusion, bending = zero, zero
        for i in tl.static_range(3):
            field = u + i * volume
            scale = sx if i == 0 else (sy if i == 1 else sz)
            centre = _at(field, vz, vy, vx, y, x, inside)
            dx = (centre - _at(field, vz, vy, xm, y, x, inside)) * (scale / sx)
            dy = (centre - _at(field, vz, ym, vx, y, x, inside)) * (scale / sy)
            dz = (centre - _at(field, zm, vy, vx, y, x, inside)) * (scale / sz)
            diffusion += 0.5 * (wx * dx * dx + wy * dy * dy + wz * dz * dz)
            if BENDING:
                xx = _bend(field, vx, x, 1, at, inside) * (scale / (sx * sx))
                yy = _bend(field, vy, y, x, at, inside) * (scale / (sy * sy))
                zz = _bend(field, vz, z, x * y, at, inside) * (scale / (sz * sz))
                bending += w * (xx * xx + yy * yy + zz * zz)
                xy = _square_corner(field, vz, vy, vx, None, ym, xm, y, x, inside) * (scale / (sx * sy))
                xz = _square_corner(field, vz, vy, vx, zm, None, xm, y, x, inside) * (scale / (sx * sz))
                yz = _square_corner(field, vz, vy, vx, zm, ym, None, y, x, inside) * (scale / (sy * sz))
                bending += 0.5 * xy * xy * _corner_sum(weight, vz, vy, vx, None, ym, xm, y, x, inside, zero, WEIGHTED)
                bending += 0.5 * xz * xz * _corner_sum(weight, vz, vy, vx, zm, None, xm, y, x, inside, zero, WEIGHTED)
                bending += 0.5 * yz * yz * _corner_sum(weight, vz, vy, vx, zm, ym, None, y, x, inside, zero, WEIGHTED)
        programs = tl.num_programs(0)
        partial += sample * 3 * programs + tl.program_id(0)
        tl.store(partial, tl.sum(tl.where(inside, folding, zero)))
        tl.store(partial + programs, tl.sum(tl.where(inside, diffusion, zero)))
        tl.store(partial + 2 * programs, tl.sum(tl.where(inside, bending, zero)))


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def field_gradient_kernel(
    image,
    u,
    weight,
    folded,
    grad_warped,
    grad_sums,
    gradient,
    fill_high,
    fill_low,
    sx_high,
    sx_low,
    sy_high,
    sy_low,
    sz_high,
    sz_low,
    channels,
    z,
    y,
    x,
    BORDER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FIRST: tl.constexpr,
    BENDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient in u of the warp and of the three sums."""
    sample = tl.program_id(1).to(tl.int64)
    volume = z.to(tl.int64) * y * x
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < volume
    vx, vy, vz = at % x, (at // x) % y, at // (x * y)
    u += sample * 3 * volume
    ux = tl.load(u + at, mask=inside, other=0.0)
    uy = tl.load(u + volume + at, mask=inside, other=0.0)
    uz = tl.load(u + 2 * volume + at, mask=inside, other=0.0)
    zero = tl.zeros([BLOCK], ux.dtype)
    fill = zero + fill_high + fill_low
    x0, x1, wx0, wx1, dx0, dx1 = _locate(ux, vx, x, BORDER)
    y0, y1, wy0, wy1, dy0, dy1 = _locate(uy, vy, y, BORDER)
    z0, z1, wz0, wz1, dz0, dz1 = _locate(uz, vz, z, BORDER)
    gx, gy, gz = zero, zero, zero
    for channel in range(channels):
        here = (sample * channels + channel) * volume
        v = image + here
        grad = tl.load(grad_warped + here + at, mask=inside, other=0.0)
        al, ah = _at(v, z0, y0, x0, y, x, inside) - fill, _at(v, z0, y0, x1, y, x, inside) - fill
        bl, bh = _at(v, z0, y1, x0, y, x, inside) - fill, _at(v, z0, y1, x1, y, x, inside) - fill
        cl, ch = _at(v, z1, y0, x0, y, x, inside) - fill, _at(v, z1, y0, x1, y, x, inside) - fill
        dl, dh = _at(v, z1, y1, x0, y, x, inside) - fill, _at(v, z1, y1, x1, y, x, inside) - fill
        gx += grad * (
            wz0 * (wy0 * (dx0 * al + dx1 * ah) + wy1 * (dx0 * bl + dx1 * bh))
            + wz1 * (wy0 * (dx0 * cl + dx1 * ch) + wy1 * (dx0 * dl + dx1 * dh))
        )
        a, b, c, d = wx0 * al + wx1 * ah, wx0 * bl + wx1 * bh, wx0 * cl + wx1 * ch, wx0 * dl + wx1 * dh
        gy += grad * (dy0 * (wz0 * a + wz1 * c) + dy1 * (wz0 * b + wz1 * d))
        gz += grad * (dz0 * (wy0 * a + wy1 * b) + dz1 * (wy0 * c + wy1 * d))
    if FIRST:
        weight += sample * volume
        folded += sample * volume
        fold, diffuse, bend = (
            tl.load(grad_sums + 3 * sample),
            tl.load(grad_sums + 3 * sample + 1),
            tl.load(grad_sums + 3 * sample + 2),
        )
        w = _weight_at(weight, vz, vy, vx, y, x, inside, zero, WEIGHTED)
        xm, ym, zm = tl.maximum(vx - 1, 0), tl.maximum(vy - 1, 0), tl.maximum(vz - 1, 0)
        xp, yp, zp = tl.minimum(vx + 1, x - 1), tl.minimum(vy + 1, y - 1), tl.minimum(vz + 1, z - 1)
        sx, sy, sz = zero + sx_high + sx_low, zero + sy_high + sy_low, zero + sz_high + sz_low
        wxm = w + _weight_at(weight, vz, vy, xm, y, x, inside, zero, WEIGHTED)
        wxp = w + _weight_at(weight, vz, vy, xp, y, x, inside, zero, WEIGHTED)
        wym = w + _weight_at(weight, vz, ym, vx, y, x, inside, zero, WEIGHTED)
        wyp = w + _weight_at(weight, vz, yp, vx, y, x, inside, zero, WEIGHTED)
        wzm = w + _weight_at(weight, zm, vy, vx, y, x, inside, zero, WEIGHTED)
        wzp = w + _weight_at(weight, zp, vy, vx, y, x, inside, zero, WEIGHTED)
        # Not unrolled: three components' loads at once would spill.
        for i in range(3):
            field = u + i * volume
            scale = tl.where(i == 0, sx, tl.where(i == 1, sy, sz))
            c = _at(field, vz, vy, vx, y, x, inside)
            g = wxm * (c - _at(field, vz, vy, xm, y, x, inside)) + wxp * (c - _at(field, vz, vy, xp, y, x, inside))
            sum_i = g * (diffuse * (scale / sx) * (scale / sx))
            g = wym * (c - _at(field, vz, ym, vx, y, x, inside)) + wyp * (c - _at(field, vz, yp, vx, y, x, inside))
            sum_i += g * (diffuse * (scale / sy) * (scale / sy))
            g = wzm * (c - _at(field, zm, vy, vx, y, x, inside)) + wzp * (c - _at(field, zp, vy, vx, y, x, inside))
            sum_i += g * (diffuse * (scale / sz) * (scale / sz))
            if BENDING:
                for axis in range(3):
                    is_x, is_y = axis == 0, axis == 1
                    h = tl.where(is_x, sx, tl.where(is_y, sy, sz))
                    p = tl.where(is_x, vx, tl.where(is_y, vy, vz))
                    size = tl.where(is_x, x, tl.where(is_y, y, z))
                    pitch = tl.where(is_x, 1, tl.where(is_y, x, x * y))
                    g = _weighted_bend(field, weight, p - 1, size, pitch, at - pitch, inside, WEIGHTED)
                    g -= 2.0 * _weighted_bend(field, weight, p, size, pitch, at, inside, WEIGHTED)
                    g += _weighted_bend(field, weight, p + 1, size, pitch, at + pitch, inside, WEIGHTED)
                    sum_i += 2.0 * bend * (scale / (h * h)) * (scale / (h * h)) * g
                for side in range(4):
                    ox = tl.where(side % 2 == 1, xp, xm)
                    oy = tl.where(side // 2 == 1, yp, ym)
                    k = bend * (scale / (sx * sy)) * (scale / (sx * sy))
                    corners = _corner_sum(weight, vz, vy, vx, None, oy, ox, y, x, inside, zero, WEIGHTED)
                    sum_i += k * corners * _square_corner(field, vz, vy, vx, None, oy, ox, y, x, inside)
                    oz = tl.where(side // 2 == 1, zp, zm)
                    k = bend * (scale / (sx * sz)) * (scale / (sx * sz))
                    corners = _corner_sum(weight, vz, vy, vx, oz, None, ox, y, x, inside, zero, WEIGHTED)
                    sum_i += k * corners * _square_corner(field, vz, vy, vx, oz, None, ox, y, x, inside)
                    oy = tl.where(side % 2 == 1, yp, ym)
                    k = bend * (scale / (sy * sz)) * (scale / (sy * sz))
                    corners = _corner_sum(weight, vz, vy, vx, oz, oy, None, y, x, inside, zero, WEIGHTED)
                    sum_i += k * corners * _square_corner(field, vz, vy, vx, oz, oy, None, y, x, inside)
            gx += tl.where(i == 0, sum_i, zero)
            gy += tl.where(i == 1, sum_i, zero)
            gz += tl.where(i == 2, sum_i, zero)
        # A folded voxel pulls at its six neighbours; at the border it stands in for the missing one.
        for axis in tl.static_range(3):
            for side in tl.static_range(2):
                p = vx if axis == 0 else (vy if axis == 1 else vz)
                size = x if axis == 0 else (y if axis == 1 else z)
                there = tl.minimum(p + 1, size - 1) if side else tl.maximum(p - 1, 0)
                fx = there if axis == 0 else vx
                fy = there if axis == 1 else vy
                fz = there if axis == 2 else vz
                flag = inside & (tl.load(folded + (fz * y + fy) * x + fx, mask=inside, other=0) != 0)
                if tl.max(flag.to(tl.int32)) > 0:
                    j0, j1, j2, j3, j4, j5, j6, j7, j8 = _jacobian(u, volume, fz, fy, fx, z, y, x, flag)
                    s = fold * _weight_at(weight, fz, fy, fx, y, x, flag, zero, WEIGHTED) * _step(there, size, zero)
                    # d relu(-det) / d det is -1; the neighbour above enters its difference with a minus.
                    s = tl.where((p < size - 1) if side else (p == 0), s, -s)
                    s = tl.where(flag, s, zero)
                    if axis == 0:
                        gx += s * (j4 * j8 - j5 * j7)
                        gy += s * (j2 * j7 - j1 * j8)
                        gz += s * (j1 * j5 - j2 * j4)
                    elif axis == 1:
                        gx += s * (j5 * j6 - j3 * j8)
                        gy += s * (j0 * j8 - j2 * j6)
                        gz += s * (j2 * j3 - j0 * j5)
                    else:
                        gx += s * (j3 * j7 - j4 * j6)
                        gy += s * (j1 * j6 - j0 * j7)
                        gz += s * (j0 * j4 - j1 * j3)
    gradient += sample * 3 * volume + at
    tl.store(gradient, gx, mask=inside)
    tl.store(gradient + volume, gy, mask=inside)
    tl.store(gradient + 2 * volume, gz, mask=inside)


@triton.jit
@no_type_check
def _hat(u, d, v, size, BORDER: tl.constexpr):
    """Weight, at the voxel `d` before v, of what v + u takes there."""
    distance = u + d
    if BORDER:
        # v + u is held between 0 and size - 1, seen from the voxel v - d.
        distance = tl.maximum(tl.minimum(distance, (size - 1 - v + d).to(u.dtype)), (d - v).to(u.dtype))
    return tl.maximum(1.0 - tl.abs(distance), 0.0)


@triton.jit(do_not_specialize=("limit", *SIZES))
@no_type_check
def adjoint_kernel(
    u,
    grad_warped,
    gradient,
    reach,
    limit,
    channels,
    z,
    y,
    x,
    BORDER: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient in BLOCK voxels of CHANNELS channels of the image, gathered; zeros where `reach` is above `limit`."""
    sample = tl.program_id(1).to(tl.int64)
    volume = z.to(tl.int64) * y * x
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < volume
    ix, iy, iz = at % x, (at // x) % y, at // (x * y)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    u += sample * 3 * volume
    from_channel = (sample * channels + channel) * volume
    r = tl.load(reach + sample)
    width = 2 * r + 1
    steps = tl.where(r <= limit, width * width * width, 0)
    total = tl.zeros([CHANNELS, BLOCK], u.dtype.element_ty)
    for step in range(steps):
        dx, dy, dz = step % width - r, (step // width) % width - r, step // (width * width) - r
        vx, vy, vz = ix + dx, iy + dy, iz + dz
        there = inside & (vx >= 0) & (vx < x) & (vy >= 0) & (vy < y) & (vz >= 0) & (vz < z)
        v = (vz * y + vy) * x + vx
        w = _hat(tl.load(u + v, mask=there, other=0.0), dx, vx, x, BORDER)
        w *= _hat(tl.load(u + volume + v, mask=there, other=0.0), dy, vy, y, BORDER)
        w *= _hat(tl.load(u + 2 * volume + v, mask=there, other=0.0), dz, vz, z, BORDER)
        touched = there & (w > 0)
        grad = tl.load(
            grad_warped + from_channel[:, None] + v[None, :],
            mask=(channel < channels)[:, None] & touched[None, :],
            other=0.0,
        )
        total += grad * tl.where(touched, w, 0.0)[None, :]
    tl.store(
        gradient + from_channel[:, None] + at[None, :], total, mask=(channel < channels)[:, None] & inside[None, :]
    )


@triton.jit(do_not_specialize=("limit", *SIZES))
@no_type_check
def scatter_kernel(
    u,
    grad_warped,
    gradient,
    reach,
    limit,
    channels,
    z,
    y,
    x,
    BORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the gradient in the image where `reach` is above `limit`."""
    sample = tl.program_id(1).to(tl.int64)
    if tl.load(reach + sample) > limit:
        volume = z.to(tl.int64) * y * x
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < volume
        vx, vy, vz = at % x, (at // x) % y, at // (x * y)
        u += sample * 3 * volume
        x0, x1, wx0, wx1, _dx0, _dx1 = _locate(tl.load(u + at, mask=inside, other=0.0), vx, x, BORDER)
        y0, y1, wy0, wy1, _dy0, _dy1 = _locate(tl.load(u + volume + at, mask=inside, other=0.0), vy, y, BORDER)
        z0, z1, wz0, wz1, _dz0, _dz1 = _locate(tl.load(u + 2 * volume + at, mask=inside, other=0.0), vz, z, BORDER)
        for channel in range(channels):
            here = (sample * channels + channel) * volume
            grad = tl.load(grad_warped + here + at, mask=inside, other=0.0)
            for side in tl.static_range(4):
                tz = z1 if side // 2 else z0
                ty = y1 if side % 2 else y0
                part = grad * (wz1 if side // 2 else wz0) * (wy1 if side % 2 else wy0)
                row = gradient + here + (tz * y + ty) * x
                tl.atomic_add(row + x0, part * wx0, mask=inside, sem="relaxed")
                tl.atomic_add(row + x1, part * wx1, mask=inside, sem="relaxed")
