"""Files as streams of which just what was asked for is read: raw, gzip, zlib and bare deflate.

Nothing inflates one byte more than was asked for, and the end is checked: the sums are right and nothing follows.
Inflation by ISA-L where it is there (2.4 times nibabel's rate on a whole volume, `io.md` section 3), else by zlib; both
give the same bytes and check the same sums.
"""

import os
import zlib
from collections.abc import Callable
from io import BufferedReader, BytesIO
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

try:
    from isal import isal_zlib

    _zlib: Any = isal_zlib
    _ERRORS: Any = (zlib.error, isal_zlib.IsalError)
except ImportError:  # no wheel for this machine
    _zlib = zlib
    _ERRORS = (zlib.error,)

_READ = 1 << 18
_BLOCK = 1 << 20
_GZIP, _ZLIB, _BARE = 31, 15, -15
_MAGIC = b"\x1f\x8b"


class StreamError(Exception):
    """A stream that is broken off, damaged, or not as long as its header claims."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem
        """What is wrong, to follow a file's name."""


TRUNCATED = "the file breaks off before the end of its voxels; it is truncated, copy it again"
DAMAGED = "its compressed data are damaged; copy or export it again"
TOO_LONG = "the file goes on after the voxels that its header claims; the header is damaged, export it again"


class RawStream:
    """The bytes of a file from where it stands."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file

    def take(self, count: int) -> bytes:
        """The next `count` bytes; StreamError."""
        taken = self._file.read(count)
        if len(taken) < count:
            raise StreamError(TRUNCATED)
        return taken

    def skip(self, count: int) -> None:
        """Pass over `count` bytes."""
        self._file.seek(count, os.SEEK_CUR)

    def fill(self, out: UInt8[ndarray, " bytes"]) -> None:
        """The next bytes into all of `out`; StreamError."""
        if self._file.readinto(out.data) != len(out):
            raise StreamError(TRUNCATED)

    def finish(self) -> None:
        """StreamError unless the file ends here."""
        if self._file.read(1):
            raise StreamError(TOO_LONG)


class InflatedStream:
    """Reads one stream, gzip (of one or more members) or zlib by its first bytes, from where `file` stands."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self._pending = file.read(_READ)
        self._gzip = self._pending[:2] == _MAGIC
        self._decoder = self._new()

    def take(self, count: int) -> bytes:
        """The next `count` bytes; StreamError."""
        taken = np.empty(count, np.uint8)
        self.fill(taken)
        return taken.tobytes()

    def skip(self, count: int) -> None:
        """Pass over `count` bytes; StreamError."""
        for start in range(0, count, _BLOCK):
            self.take(min(_BLOCK, count - start))

    def fill(self, out: UInt8[ndarray, " bytes"]) -> None:
        """The next bytes into all of `out`; StreamError."""
        filled, size = 0, len(out)
        view = out.data
        while filled < size:
            block = self._next(min(size - filled, _BLOCK))
            if not block:
                raise StreamError(TRUNCATED)
            view[filled : filled + len(block)] = block
            filled += len(block)

    def finish(self) -> None:
        """StreamError unless the stream ends here, its sums are right and only zeros follow it."""
        if self._next(1):
            raise StreamError(TOO_LONG)
        while self._pending:
            if self._pending.strip(b"\0"):
                raise StreamError(TOO_LONG)
            self._pending = self._file.read(_READ)

    def _next(self, largest: int) -> bytes:
        """Up to `largest` bytes, none at the stream's end."""
        while True:
            if self._decoder.eof:
                if not self._gzip or not self._another_member():
                    return b""
                self._decoder = self._new()
            if not self._pending:
                self._pending = self._file.read(_READ)
                if not self._pending:
                    # What the decoder still holds comes without further input.
                    if block := _guarded(lambda: self._decoder.decompress(b"", largest)):
                        return block
                    if self._decoder.eof:
                        continue
                    raise StreamError(TRUNCATED)
            pending = self._pending
            block = _guarded(lambda: self._decoder.decompress(pending, largest))  # noqa: B023
            self._pending = self._decoder.unused_data if self._decoder.eof else self._decoder.unconsumed_tail
            if block:
                return block

    def _another_member(self) -> bool:
        while len(self._pending) < 2 and (more := self._file.read(_READ)):
            self._pending += more
        return self._pending[:2] == _MAGIC

    def _new(self) -> Any:
        return _zlib.decompressobj(_GZIP if self._gzip else _ZLIB)


def inflate_all(file: BufferedReader | BytesIO, *, largest: int) -> bytes:
    """The rest of `file`, a bare deflate stream as DICOM's deflated transfer syntax has it; StreamError."""
    decoder = _zlib.decompressobj(_BARE)
    data = file.read(largest)
    inflated = _guarded(lambda: decoder.decompress(data, largest))
    if not decoder.eof:
        raise StreamError(TRUNCATED if len(inflated) < largest else TOO_LONG)
    return inflated


def _guarded(decode: Callable[[], bytes]) -> bytes:
    try:
        return decode()
    except _ERRORS as error:
        raise StreamError(DAMAGED) from error
