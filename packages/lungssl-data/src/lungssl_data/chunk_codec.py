"""Chunks of a cached volume to bytes and back: byte planes, each an LZ4 block or raw, without the GIL.

A chunk is what HDF5's filters `shuffle` and LZ4 (32004) make of it when the LZ4 block is one byte plane, so any HDF5
with hdf5plugin reads it. All numbers are big-endian:

    uint64 bytes of the decoded chunk; uint32 bytes of a plane; then per plane, low bytes first:
    uint32 bytes stored; the plane raw where these are all of it, else as an LZ4 block

Of a CT the low bytes are noise that LZ4 can't shrink: stored raw, they are read in place (`io.md` section 1).
LZ4 block format: https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md. The kernels are all in this file because
numba's cache on disk watches a kernel's own file only.
"""

from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

RAW_ABOVE = 0.9
"""A plane is stored raw unless LZ4 saves a tenth: raw planes cost no decoding."""
SLACK_BYTES = 64
"""Free bytes behind each decoded plane: copies go in steps of 16 and 64."""
DAMAGED_ENTRY, DAMAGED_HEADER, DAMAGED_PLANE = 1, 2, 3
"""What `read_box` found: a place outside the file, sizes that aren't this volume's, bytes that aren't LZ4's."""
_HEADER_BYTES = 12
_DEPTH = 32  # earlier places compared for a match
_MIN_MATCH = 8  # LZ4 allows 4; fewer steps for the reader, in no more bytes (decision 0005)
_END_LITERALS, _LAST_MATCH = 5, 12  # the format's rules for a block's end
_HASH_BITS = 14
_LEAST_BACK = 32  # LZ4 allows 1; a shorter pattern can't be repeated in copies of 32 bytes


@intrinsic
@no_type_check
def _byte(typing: Any, address: Any) -> Any:
    """The byte at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
        return builder.zext(value, ir.IntType(64))

    return types.int64(types.int64), codegen


def _copy(count: int) -> Any:
    @intrinsic
    @no_type_check
    def copy(typing: Any, to: Any, source: Any) -> Any:
        """`count` bytes, unaligned, read before they are written."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = ir.VectorType(ir.IntType(8), count).as_pointer()
            value = builder.load(builder.inttoptr(args[1], pointer), align=1)
            builder.store(value, builder.inttoptr(args[0], pointer), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return copy


def _join(count: int) -> Any:
    @intrinsic
    @no_type_check
    def join(typing: Any, to: Any, low: Any, high: Any) -> Any:
        """`count` int16 from their low and high bytes, as one vector operation."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            narrow, wide = (ir.VectorType(ir.IntType(bits), count) for bits in (8, 16))
            low, high = (
                builder.zext(builder.load(builder.inttoptr(arg, narrow.as_pointer()), align=1), wide)
                for arg in args[1:]
            )
            shift = ir.Constant(wide, [8] * count)
            value = builder.or_(low, builder.shl(high, shift))
            builder.store(value, builder.inttoptr(args[0], wide.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return join


_copy_byte, _copy_16, _copy_32, _copy_64 = _copy(1), _copy(16), _copy(32), _copy(64)
_join_32, _join_8, _join_1 = _join(32), _join(8), _join(1)


@njit(nogil=True)
@no_type_check
def _number(address: int, count: int) -> int:
    """`count` bytes as a big-endian number; negative where it exceeds 2**63."""
    value = np.int64(0)
    for k in range(count):
        value = (value << 8) | _byte(address + k)
    return value


@njit(nogil=True)
@no_type_check
def _lz4_decode(source: int, end: int, readable: int, to: int, size: int, need: int) -> int:
    """Decode the LZ4 block at addresses `source` to `end` to `to`; bytes written, or -1 for a damaged block.

    Stops once `need` bytes are there. Writes within `size` + SLACK_BYTES and reads below `readable`.
    """
    done = np.int64(0)
    while source < end:
        token = _byte(source)
        source += 1
        count = token >> 4
        # Most literals are at most 32, with at most one byte of length behind the token: no branch on either.
        longer = np.int64(count == 15)
        more = _byte(source) * longer if end - source > 33 else np.int64(255)
        if count + more <= 32 and count + more <= size - done:
            source += longer
            count += more
            _copy_32(to + done, source)
        else:
            if count == 15:
                more = np.int64(255)
                while more == 255 and source < end:
                    more = _byte(source)
                    source += 1
                    count += more
                if more == 255:
                    return -1
            if count > end - source or count > size - done:
                return -1
            if source + count + 16 <= readable:
                for k in range(0, count, 16):
                    _copy_16(to + done + k, source + k)
            else:
                for k in range(count):
                    _copy_byte(to + done + k, source + k)
        source += count
        done += count
        if source == end or done >= need:
            return done
        if end - source < 2:
            return -1
        back = _byte(source) | (_byte(source + 1) << 8)
        source += 2
        count = (token & 15) + 4
        at = to + done
        longer = np.int64(count == 19)
        more = _byte(source) * longer if end - source > 1 else np.int64(255)
        if count + more <= 64 and back >= 32 and back <= done and count + more <= size - done:
            source += longer
            count += more
            _copy_32(at, at - back)
            _copy_32(at + 32, at + 32 - back)
            done += count
        else:
            if count == 19:
                more = np.int64(255)
                while more == 255 and source < end:
                    more = _byte(source)
                    source += 1
                    count += more
                if more == 255:
                    return -1
            if back == 0 or back > done or count > size - done:
                return -1
            done += count
            if back < 16:
                # A pattern shorter than a copy: repeat it byte by byte until it is at least one copy long.
                long = back * ((15 + back) // back)
                for k in range(min(long, count)):
                    _copy_byte(at + k, at + k - back)
                at += long
                count -= long
                back = long
            if back < 64 and count > 64:
                # The same for long runs: a copy waits for the one that it reads from.
                long = back * ((63 + back) // back)
                for k in range(0, min(long, count), 16):
                    _copy_16(at + k, at + k - back)
                at += long
                count -= long
                back = long
            if back >= 64:
                for k in range(0, count, 64):
                    _copy_64(at + k, at + k - back)
            else:
                for k in range(0, count, 16):
                    _copy_16(at + k, at + k - back)
        if done >= need:
            return done
    return -1


@njit(nogil=True, cache=True)
@no_type_check
def read_box(file: Any, table: Any, chunk: Any, shape: Any, start: Any, out: Any, scratch: Any) -> Any:
    """Decode a box that starts at voxel `start` into `out`; voxels outside the volume stay as they are.

    `file` uint8 [bytes], `table` int64 [z, y, x, 2] with each chunk's place and size, `chunk`, `shape` and `start`
    triples, `out` int16 or uint8 [z, y, x] C-contiguous, `scratch` uint8 from `scratch_for`. Returns what is wrong
    (0: nothing) and the chunk (z, y, x). Every place and length is checked before it is used.
    """
    planes = np.int64(out.itemsize)
    length = np.int64(len(file))
    base, into, work = np.int64(file.ctypes.data), np.int64(out.ctypes.data), np.int64(scratch.ctypes.data)
    cz, cy, cx = chunk
    size = cz * cy * cx
    low_z, high_z = max(start[0], 0), min(start[0] + out.shape[0], shape[0])
    low_y, high_y = max(start[1], 0), min(start[1] + out.shape[1], shape[1])
    low_x, high_x = max(start[2], 0), min(start[2] + out.shape[2], shape[2])
    if low_z >= high_z or low_y >= high_y or low_x >= high_x:
        return 0, 0, 0, 0
    for i in range(low_z // cz, (high_z - 1) // cz + 1):
        for j in range(low_y // cy, (high_y - 1) // cy + 1):
            for k in range(low_x // cx, (high_x - 1) // cx + 1):
                place, stored = table[i, j, k, 0], table[i, j, k, 1]
                if place < 0 or stored < _HEADER_BYTES or stored > length or place > length - stored:
                    return DAMAGED_ENTRY, i, j, k
                at, end = base + place, base + place + stored
                if _number(at, 8) != planes * size or _number(at + 8, 4) != size:
                    return DAMAGED_HEADER, i, j, k
                at += _HEADER_BYTES
                z0, z1 = max(low_z, i * cz), min(high_z, (i + 1) * cz)
                y0, y1 = max(low_y, j * cy), min(high_y, (j + 1) * cy)
                x0, x1 = max(low_x, k * cx), min(high_x, (k + 1) * cx)
                need = ((z1 - 1 - i * cz) * cy + y1 - 1 - j * cy) * cx + x1 - k * cx
                low = high = np.int64(0)
                for plane in range(planes):
                    if end - at < 4:
                        return DAMAGED_HEADER, i, j, k
                    count = _number(at, 4)
                    at += 4
                    if count > end - at:
                        return DAMAGED_HEADER, i, j, k
                    here = at
                    if count != size:
                        here = work + plane * (size + SLACK_BYTES)
                        if _lz4_decode(at, at + count, base + length, here, size, need) < need:
                            return DAMAGED_PLANE, i, j, k
                    at += count
                    low, high = high, here
                if at != end:
                    return DAMAGED_HEADER, i, j, k
                width = x1 - x0
                for z in range(z0, z1):
                    for y in range(y0, y1):
                        row = ((z - i * cz) * cy + y - j * cy) * cx + x0 - k * cx
                        to = ((z - start[0]) * out.shape[1] + y - start[1]) * out.shape[2] + x0 - start[2]
                        if planes == 2:
                            _join_row(into + 2 * to, low + row, high + row, width)
                        else:
                            _copy_row(into + to, high + row, width)
    return 0, 0, 0, 0


@njit(nogil=True)
@no_type_check
def _join_row(to: int, low: int, high: int, width: int) -> None:
    done = np.int64(0)
    while width - done >= 32:
        _join_32(to + 2 * done, low + done, high + done)
        done += 32
    while width - done >= 8:
        _join_8(to + 2 * done, low + done, high + done)
        done += 8
    if width >= 8 and done < width:  # the last 8 once more rather than up to 7 alone
        _join_8(to + 2 * (width - 8), low + width - 8, high + width - 8)
        return
    for k in range(done, width):
        _join_1(to + 2 * k, low + k, high + k)


@njit(nogil=True)
@no_type_check
def _copy_row(to: int, source: int, width: int) -> None:
    done = np.int64(0)
    while width - done >= 16:
        _copy_16(to + done, source + done)
        done += 16
    if width >= 16 and done < width:
        _copy_16(to + width - 16, source + width - 16)
        return
    for k in range(done, width):
        _copy_byte(to + k, source + k)


def scratch_for(size: int, planes: int) -> Any:
    """Working memory of one `read_box` for chunks of `size` voxels; one per thread."""
    return np.empty(planes * (size + SLACK_BYTES), np.uint8)


@njit(nogil=True, cache=True)
@no_type_check
def encode_chunk(volume: Any, chunk: Any, place: Any, out: Any) -> int:
    """Write the chunk at grid place (z, y, x) to `out` (uint8, at least `encoded_bound` long); bytes written.

    `volume` is int16 or uint8 [z, y, x]. A chunk across the border is filled with the nearest voxels.
    """
    planes = volume.itemsize
    cz, cy, cx = chunk
    size = cz * cy * cx
    plane = np.empty((planes, size), np.uint8)
    n = 0
    for z in range(place[0] * cz, (place[0] + 1) * cz):
        for y in range(place[1] * cy, (place[1] + 1) * cy):
            row = volume[min(z, volume.shape[0] - 1), min(y, volume.shape[1] - 1)]
            for x in range(place[2] * cx, (place[2] + 1) * cx):
                value = np.int64(row[min(x, len(row) - 1)])
                for p in range(planes):
                    plane[p, n] = (value >> (8 * p)) & 255
                n += 1
    _put_number(out, 0, planes * size, 8)
    _put_number(out, 8, size, 4)
    at = _HEADER_BYTES
    for p in range(planes):
        count = _lz4_encode(plane[p], out, at + 4, int(RAW_ABOVE * size))
        if count == 0:
            count = size
            out[at + 4 : at + 4 + size] = plane[p]
        _put_number(out, at, count, 4)
        at += 4 + count
    return at


def encoded_bound(size: int, planes: int) -> int:
    """Most bytes that a chunk of `size` voxels takes."""
    return _HEADER_BYTES + planes * (4 + size)


@njit(nogil=True)
@no_type_check
def _put_number(out: Any, at: int, value: int, count: int) -> None:
    for k in range(count):
        out[at + k] = (value >> (8 * (count - 1 - k))) & 255


@njit(nogil=True)
@no_type_check
def _hash(data: Any, at: int) -> int:
    word = np.uint64(0)
    for k in range(_MIN_MATCH):
        word = word << np.uint64(8) | np.uint64(data[np.uint64(at + k)])
    # Fibonacci hashing: 2**64 over the golden ratio.
    return np.int64(word * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(64 - _HASH_BITS))


@njit(nogil=True)
@no_type_check
def _longest(data: Any, at: int, last: int, heads: Any, chain: Any) -> tuple[int, int]:
    """Length and earlier place of the longest match of `at` that ends by `last`, among _DEPTH places."""
    best, found = _MIN_MATCH - 1, -1
    place = heads[_hash(data, at)]
    for _ in range(_DEPTH):
        if place < 0 or at - place > 65535:
            break
        if at - place >= _LEAST_BACK and at + best < last and data[place + best] == data[at + best]:
            count = 0
            while at + count < last and data[place + count] == data[at + count]:
                count += 1
            if count > best:
                best, found = count, place
        place = chain[place]
    return (best, found) if found >= 0 else (0, -1)


@njit(nogil=True)
@no_type_check
def _lz4_encode(data: Any, out: Any, start: int, limit: int) -> int:
    """LZ4 block of `data` to `out[start:]`; its length, or 0 where it would exceed `limit`.

    Hash chains with one step of lazy matching. Matches shorter than _MIN_MATCH stay literals.
    """
    size = len(data)
    heads = np.full(1 << _HASH_BITS, -1, np.int32)
    chain = np.full(size, -1, np.int32)
    at, put, literals, misses = 0, start, 0, 0
    while at < size - _LAST_MATCH:
        count, place = _longest(data, at, size - _END_LITERALS, heads, chain)
        _remember(data, at, heads, chain)
        if count == 0:
            misses += 1
            at += 1 + (misses >> 6)  # noise: look at fewer and fewer places
            continue
        misses = 0
        if count < 64 and at + 1 < size - _LAST_MATCH:
            later, other = _longest(data, at + 1, size - _END_LITERALS, heads, chain)
            if later > count:
                at, count, place = at + 1, later, other
                _remember(data, at, heads, chain)
        put = _put_sequence(data, literals, at, at - place, count, out, put, start + limit)
        if put == 0:
            return 0
        for k in range(at + 1, min(at + count, size - _MIN_MATCH)):
            _remember(data, k, heads, chain)
        at += count
        literals = at
    put = _put_sequence(data, literals, size, 0, 0, out, put, start + limit)
    return max(put - start, 0)


@njit(nogil=True)
@no_type_check
def _remember(data: Any, at: int, heads: Any, chain: Any) -> None:
    key = _hash(data, at)
    chain[at] = heads[key]
    heads[key] = at


@njit(nogil=True)
@no_type_check
def _put_sequence(data: Any, first: int, last: int, back: int, count: int, out: Any, put: int, limit: int) -> int:
    """Literals data[first:last] and a match of `count` bytes (0: none, the block's end); the next place, 0: no room."""
    literals = last - first
    if put + 8 + literals + literals // 255 + count // 255 > limit:
        return 0
    token = put
    put += 1
    out[token] = min(literals, 15) << 4
    if literals >= 15:
        put = _put_length(out, put, literals - 15)
    out[put : put + literals] = data[first:last]
    put += literals
    if count:
        out[put], out[put + 1] = back & 255, back >> 8
        put += 2
        out[token] |= min(count - 4, 15)
        if count - 4 >= 15:
            put = _put_length(out, put, count - 19)
    return put


@njit(nogil=True)
@no_type_check
def _put_length(out: Any, put: int, rest: int) -> int:
    while rest >= 255:
        out[put] = 255
        put += 1
        rest -= 255
    out[put] = rest
    return put + 1
