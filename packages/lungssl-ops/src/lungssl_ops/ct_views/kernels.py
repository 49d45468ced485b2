"""The Triton kernels of the views; see triton.py."""

# ruff: noqa: ANN001, ANN201, ANN202
# Triton takes the annotations of a kernel's arguments for their types, and reads its source: `no_type_check` keeps the
# tests' shape checks from wrapping it, after which it would not find its helpers.

from typing import no_type_check

import triton
import triton.language as tl

# Columns of the table of whole numbers, one row a view: address, z, y, x, seed, samples along x, y, z.
N_WHOLE = tl.constexpr(8)
N_NUMBERS = tl.constexpr(17)


@triton.jit
@no_type_check
def _positions(numbers, rows, view, x, y, z, size_z, size_y, size_x, NODES: tl.constexpr):
    """Where voxels lie in the volume: A v + e(v)."""
    fx, fy, fz = x.to(tl.float32), y.to(tl.float32), z.to(tl.float32)
    a = numbers + view * N_NUMBERS
    px = tl.load(a) * fx + tl.load(a + 1) * fy + tl.load(a + 2) * fz + tl.load(a + 3)
    py = tl.load(a + 4) * fx + tl.load(a + 5) * fy + tl.load(a + 6) * fz + tl.load(a + 7)
    pz = tl.load(a + 8) * fx + tl.load(a + 9) * fy + tl.load(a + 10) * fz + tl.load(a + 11)
    if NODES > 0:
        last = tl.maximum(size_x - 1, 1)
        cell = tl.minimum(x * (NODES - 1) // last, NODES - 2)
        part = (x * (NODES - 1) - cell * last).to(tl.float32) / last.to(tl.float32)
        # Voxels behind the view's last are computed, too: their row is held inside.
        row = (view * size_z + tl.minimum(z, size_z - 1)) * size_y + y
        at = rows + (row * NODES + cell) * 3
        low, high = tl.load(at), tl.load(at + 3)
        px += low + part * (high - low)
        low, high = tl.load(at + 1), tl.load(at + 4)
        py += low + part * (high - low)
        low, high = tl.load(at + 2), tl.load(at + 5)
        pz += low + part * (high - low)
    return px, py, pz


@triton.jit
@no_type_check
def _held(p, side, EDGE: tl.constexpr):
    """A position on or one voxel around the volume; a comparison with NaN is false, so that it, too, lies outside."""
    if EDGE:
        return tl.minimum(tl.where(p > 0.0, p, 0.0), (side - 1).to(tl.float32))
    else:
        return tl.minimum(tl.where(p > -1.0, p, -1.0), side.to(tl.float32))


@triton.jit
@no_type_check
def _tap(source, z, y, x, depth, height, width, fill, mask, EDGE: tl.constexpr, ONES: tl.constexpr):
    """A voxel of the volume, or `fill` outside; with ONES, 1 where it isn't 0."""
    inside = mask
    if not EDGE:
        inside = mask & (z >= 0) & (z < depth) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    tap = tl.load(source + (z * height + y) * width + x, mask=inside, other=0)
    value = (tap != 0).to(tl.float32) if ONES else tap.to(tl.float32)
    return value if EDGE else tl.where(inside, value, fill)


@triton.jit
@no_type_check
def _trilinear(
    source, px, py, pz, depth, height, width, fill, mask, EDGE: tl.constexpr, ONES: tl.constexpr, INDEX: tl.constexpr
):
    px, py, pz = _held(px, width, EDGE), _held(py, height, EDGE), _held(pz, depth, EDGE)
    x0, y0, z0 = tl.floor(px), tl.floor(py), tl.floor(pz)
    fx, fy, fz = px - x0, py - y0, pz - z0
    x0, y0, z0 = x0.to(INDEX), y0.to(INDEX), z0.to(INDEX)
    x1, y1, z1 = x0 + 1, y0 + 1, z0 + 1
    if EDGE:
        x1, y1, z1 = tl.minimum(x1, width - 1), tl.minimum(y1, height - 1), tl.minimum(z1, depth - 1)
    first = _tap(source, z0, y0, x0, depth, height, width, fill, mask, EDGE, ONES)
    second = _tap(source, z0, y0, x1, depth, height, width, fill, mask, EDGE, ONES)
    row_below = first + fx * (second - first)
    first = _tap(source, z0, y1, x0, depth, height, width, fill, mask, EDGE, ONES)
    second = _tap(source, z0, y1, x1, depth, height, width, fill, mask, EDGE, ONES)
    below = row_below + fy * (first + fx * (second - first) - row_below)
    first = _tap(source, z1, y0, x0, depth, height, width, fill, mask, EDGE, ONES)
    second = _tap(source, z1, y0, x1, depth, height, width, fill, mask, EDGE, ONES)
    row_below = first + fx * (second - first)
    first = _tap(source, z1, y1, x0, depth, height, width, fill, mask, EDGE, ONES)
    second = _tap(source, z1, y1, x1, depth, height, width, fill, mask, EDGE, ONES)
    above = row_below + fy * (first + fx * (second - first) - row_below)
    return below + fz * (above - below)


@triton.jit
@no_type_check
def _average(
    source,
    whole,
    numbers,
    view,
    px,
    py,
    pz,
    fill,
    mask,
    SAMPLES: tl.constexpr,
    EDGE: tl.constexpr,
    ONES: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Mean of a voxel's samples; without SAMPLES all voxels have one."""
    whole += view * N_WHOLE
    depth, height, width = tl.load(whole + 1).to(INDEX), tl.load(whole + 2).to(INDEX), tl.load(whole + 3).to(INDEX)
    if not SAMPLES:
        return _trilinear(source, px, py, pz, depth, height, width, fill, mask, EDGE, ONES, INDEX)
    else:
        nx, ny, nz = (
            tl.load(whole + 5).to(tl.int32),
            tl.load(whole + 6).to(tl.int32),
            tl.load(whole + 7).to(tl.int32),
        )
        a = numbers + view * N_NUMBERS
        total = tl.zeros_like(px)
        for k in range(nx * ny * nz):
            ox = ((k % nx).to(tl.float32) + 0.5) / nx.to(tl.float32) - 0.5
            oy = ((k // nx % ny).to(tl.float32) + 0.5) / ny.to(tl.float32) - 0.5
            oz = ((k // (nx * ny)).to(tl.float32) + 0.5) / nz.to(tl.float32) - 0.5
            sx = tl.load(a) * ox + tl.load(a + 1) * oy + tl.load(a + 2) * oz
            sy = tl.load(a + 4) * ox + tl.load(a + 5) * oy + tl.load(a + 6) * oz
            sz = tl.load(a + 8) * ox + tl.load(a + 9) * oy + tl.load(a + 10) * oz
            total += _trilinear(source, px + sx, py + sy, pz + sz, depth, height, width, fill, mask, EDGE, ONES, INDEX)
        return total / (nx * ny * nz).to(tl.float32)


@triton.jit
@no_type_check
def _pair(word0, word1):
    """Two normal numbers from two random words, as in philox.py."""
    missing = (word0.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * (1.0 / 16777216.0)  # 1 - u
    turn = (word1.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * (1.0 / 16777216.0)
    # Near 1 a GPU's fast logarithm is off by 1e-7 of 1, not of itself: there the series, to 3e-9.
    series = missing * (1.0 + missing * (0.5 + missing * (1.0 / 3 + missing * (0.25 + missing * 0.2))))
    radius = tl.sqrt(2.0 * tl.where(missing < 0.03125, series, -tl.log(1.0 - missing)))
    # A quarter turn is taken off, exactly; the rest is at most pi / 4, where the series end below 3e-9. tl.cos would
    # bring a path for large angles, with its memory.
    quarter = tl.floor(4.0 * turn + 0.5)
    angle = (turn - 0.25 * quarter) * 6.283185307179586
    q = angle * angle
    sine = angle * (1.0 + q * (-1.0 / 6 + q * (1.0 / 120 + q * (-1.0 / 5040 + q * (1.0 / 362880)))))
    cosine = 1.0 + q * (-0.5 + q * (1.0 / 24 + q * (-1.0 / 720 + q * (1.0 / 40320 + q * (-1.0 / 3628800)))))
    whole = quarter.to(tl.int32)
    odd = (whole & 1) != 0
    radius = tl.where((whole & 2) != 0, -radius, radius)
    return radius * tl.where(odd, -sine, cosine), radius * tl.where(odd, cosine, sine)


@triton.jit
@no_type_check
def normals(seed, quarter, QUARTERS: tl.constexpr):
    """The numbers of voxels 4 quarter .. 4 quarter + 3, one voxel after the other."""
    word0, word1, word2, word3 = tl.randint4x(seed, quarter)
    n0, n1 = _pair(word0, word1)
    n2, n3 = _pair(word2, word3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [4 * QUARTERS])


@triton.jit(do_not_specialize=("size_z", "size_y", "size_x", "patch_z", "patch_y", "patch_x"))
@no_type_check
def views_kernel(
    whole,
    numbers,
    rows,
    out,
    size_z,
    size_y,
    size_x,
    patch_z,
    patch_y,
    patch_x,
    fill,
    NODES: tl.constexpr,
    SAMPLES: tl.constexpr,
    EDGE: tl.constexpr,
    NOISE: tl.constexpr,
    GAMMA: tl.constexpr,
    PATCHES: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    size = size_z * size_y * size_x
    blocks = (size + BLOCK - 1) // BLOCK
    view, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    x, y, z = at % size_x, (at // size_x) % size_y, at // (size_x * size_y)
    px, py, pz = _positions(numbers, rows, view, x, y, z, size_z, size_y, size_x, NODES)
    source = tl.load(whole + view * N_WHOLE).to(tl.pointer_type(tl.int16))
    hu = _average(source, whole, numbers, view, px, py, pz, fill, mask, SAMPLES, EDGE, False, INDEX)
    intensity = numbers + view * N_NUMBERS + 12
    low, high = tl.load(intensity), tl.load(intensity + 1)
    if NOISE:
        quarter = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        hu += tl.load(intensity + 4) * normals(tl.load(whole + view * N_WHOLE + 4), quarter, BLOCK // 4)
    value = (hu + tl.load(intensity + 2) - low) / (high - low)
    value = tl.minimum(tl.maximum(value, 0.0), 1.0)
    if GAMMA:
        # Where the logarithm has no value, 0 ^ gamma is 0.
        power = tl.exp(tl.load(intensity + 3) * tl.log(tl.where(value > 0.0, value, 1.0)))
        value = tl.where(value > 0.0, power, 0.0)
    if PATCHES:
        patch = (z // patch_z * (size_y // patch_y) + y // patch_y) * (size_x // patch_x) + x // patch_x
        within = (z % patch_z * patch_y + y % patch_y) * patch_x + x % patch_x
        at = patch * (patch_z * patch_y * patch_x) + within
    tl.store(out + view * size + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("size_z", "size_y", "size_x"))
@no_type_check
def masks_kernel(
    whole,
    numbers,
    rows,
    out,
    size_z,
    size_y,
    size_x,
    NODES: tl.constexpr,
    SAMPLES: tl.constexpr,
    WHOLLY: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    size = size_z * size_y * size_x
    blocks = (size + BLOCK - 1) // BLOCK
    view, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    x, y, z = at % size_x, (at // size_x) % size_y, at // (size_x * size_y)
    px, py, pz = _positions(numbers, rows, view, x, y, z, size_z, size_y, size_x, NODES)
    own = whole + view * N_WHOLE
    source = tl.load(own).to(tl.pointer_type(tl.uint8))
    if WHOLLY:
        share = _average(source, whole, numbers, view, px, py, pz, 0.0, mask, SAMPLES, False, True, INDEX)
        value = (share > 0.999).to(tl.uint8)
    else:
        depth, height, width = tl.load(own + 1).to(INDEX), tl.load(own + 2).to(INDEX), tl.load(own + 3).to(INDEX)
        nx = tl.floor(_held(px + 0.5, width, False)).to(INDEX)
        ny = tl.floor(_held(py + 0.5, height, False)).to(INDEX)
        nz = tl.floor(_held(pz + 0.5, depth, False)).to(INDEX)
        inside = mask & (nz >= 0) & (nz < depth) & (ny >= 0) & (ny < height) & (nx >= 0) & (nx < width)
        value = tl.load(source + (nz * height + ny) * width + nx, mask=inside, other=0)
    tl.store(out + view * size + at, value, mask=mask)


@triton.jit(do_not_specialize=("size_z", "size_y", "size_x"))
@no_type_check
def coords_kernel(numbers, rows, to_mm, out, size_z, size_y, size_x, NODES: tl.constexpr, BLOCK: tl.constexpr):
    size = size_z * size_y * size_x
    blocks = (size + BLOCK - 1) // BLOCK
    view, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    x, y, z = at % size_x, (at // size_x) % size_y, at // (size_x * size_y)
    px, py, pz = _positions(numbers, rows, view, x, y, z, size_z, size_y, size_x, NODES)
    for c in tl.static_range(3):
        m = to_mm + (view * 3 + c) * 4
        mm = tl.load(m) * px + tl.load(m + 1) * py + tl.load(m + 2) * pz + tl.load(m + 3)
        tl.store(out + (view * 3 + c) * size + at, mm, mask=mask)
