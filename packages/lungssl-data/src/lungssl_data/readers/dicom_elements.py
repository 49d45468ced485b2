"""The few elements of a DICOM file that lungssl looks at, found without decoding any other.

A walk over tags and lengths: no recursion, nothing is read beyond the file, the values of other elements are skipped
unread. Transfer syntaxes: explicit and implicit little endian, explicit big endian, deflated, and the header of every
compressed one. Elements: PS3.5 section 7.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path

from lungssl_data.readers.streams import StreamError, inflate_all

BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
LARGEST_DEFLATED = 64 << 20
"""A slice of 4096 x 4096 has 32 MiB; a deflated file that grows beyond is refused."""
LARGEST_VALUE = 1 << 12
MOST_ELEMENTS = 200_000
MEDIA_SOP_CLASS, TRANSFER_SYNTAX, PIXEL_DATA = 0x00020002, 0x00020010, 0x7FE00010
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_SHORT = {b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL"}
_SHORT |= {b"SS", b"ST", b"TM", b"UI", b"UL", b"US"}


class DamagedError(Exception):
    """Claims to be DICOM, and is not; never with a text of the file."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Elements:
    """What was looked for, as bytes."""

    values: dict[int, bytes]
    syntax: str
    """UID of the transfer syntax; empty in files without file meta information."""
    order: str
    """Of bytes: "<" or ">"."""
    pixel_offset: int | None
    """First byte of the pixel data's value in the file, or in `inflated`; None without pixel data."""
    pixel_bytes: int | None
    """None for encapsulated (compressed) pixels."""
    inflated: bool


def read_elements(path: Path, wanted: frozenset[int]) -> Elements | None:
    """The wanted elements before the pixel data; None for a file that does not claim to be DICOM.

    Raises DamagedError for one that does, and breaks off, contradicts itself or is larger than the limits; OSError.
    """
    with path.open("rb") as file:
        window = _Window(file, os.fstat(file.fileno()).st_size)
        start = window.at(0, min(132, window.size))
        claims = start[128:132] == b"DICM"
        if not claims and start[:2] not in (b"\x08\x00", b"\x02\x00"):
            return None
        try:
            elements = _read(window, 132 if claims else 0, wanted)
        except DamagedError:
            if claims:
                raise
            return None
        return elements if claims or elements.values else None


def inflated_file(path: Path) -> bytes:
    """The elements of a file of the deflated transfer syntax, to which its `pixel_offset` refers; DamagedError."""
    with path.open("rb") as file:
        window = _Window(file, os.fstat(file.fileno()).st_size)
        return _inflated(window, _file_meta(window, 132)[1])


class _Window:
    """A file, or bytes, of which a part is held."""

    def __init__(self, file: BufferedReader | BytesIO, size: int) -> None:
        self.file, self.size = file, size
        self.start, self.held = 0, b""

    def at(self, offset: int, count: int) -> bytes:
        begin = offset - self.start
        if begin < 0 or begin + count > len(self.held):
            if offset + count > self.size:
                raise DamagedError
            self.file.seek(offset)
            self.start, self.held, begin = offset, self.file.read(max(count, 1 << 14)), 0
            if len(self.held) < count:
                raise DamagedError
        return self.held[begin : begin + count]


def _read(window: _Window, offset: int, wanted: frozenset[int]) -> Elements:
    meta, offset = _file_meta(window, offset)
    syntax = meta.get(TRANSFER_SYNTAX, b"").decode("latin-1").strip(" \0")
    inflated = syntax == DEFLATED
    if inflated:
        data = _inflated(window, offset)
        window, offset = _Window(BytesIO(data), len(data)), 0
    order = ">" if syntax == BIG_ENDIAN else "<"
    # Some writers name the wrong syntax: the first element shows whether types are written out.
    explicit = window.size - offset >= 8 and window.at(offset + 4, 2) in _LONG | _SHORT
    values = {tag: value for tag, value in meta.items() if tag in wanted}
    if window.size - offset < 8:
        raise DamagedError  # broken off before the first element
    for tag, place, length in _elements(window, offset, explicit, order):
        if tag == PIXEL_DATA:
            encapsulated = length == _UNDEFINED
            end = _end_of_undefined(window, place, explicit, order) if encapsulated else place + length
            if end > window.size:
                raise DamagedError
            return Elements(
                values=values,
                syntax=syntax,
                order=order,
                pixel_offset=place,
                pixel_bytes=None if encapsulated else length,
                inflated=inflated,
            )
        if tag in wanted and length != _UNDEFINED:
            if length > LARGEST_VALUE:
                raise DamagedError
            values[tag] = window.at(place, length)
    return Elements(values=values, syntax=syntax, order=order, pixel_offset=None, pixel_bytes=None, inflated=inflated)


def _file_meta(window: _Window, offset: int) -> tuple[dict[int, bytes], int]:
    """The SOP class and the transfer syntax of group 2, and where its elements end."""
    values: dict[int, bytes] = {}
    for _ in range(MOST_ELEMENTS):
        if window.size - offset < 8 or window.at(offset, 2) != b"\x02\x00":
            break
        tag, place, length = _element(window, offset, True, "<")
        if length == _UNDEFINED:
            raise DamagedError
        if tag in (MEDIA_SOP_CLASS, TRANSFER_SYNTAX):
            values[tag] = window.at(place, min(length, 64))
        offset = place + length
    return values, offset


def _inflated(window: _Window, offset: int) -> bytes:
    window.file.seek(offset)
    try:
        return inflate_all(window.file, largest=LARGEST_DEFLATED)
    except StreamError as error:
        raise DamagedError from error


def _elements(window: _Window, offset: int, explicit: bool, order: str) -> Iterator[tuple[int, int, int]]:
    """Tag, place and length of each element outside sequences, in the order of the file."""
    for _ in range(MOST_ELEMENTS):
        if window.size - offset < 8:
            return  # a rest shorter than an element is a file's even padding
        tag, place, length = _element(window, offset, explicit, order)
        yield tag, place, length
        offset = _end_of_undefined(window, place, explicit, order) if length == _UNDEFINED else place + length
        if offset > window.size:
            raise DamagedError
    raise DamagedError


def _element(window: _Window, offset: int, explicit: bool, order: str) -> tuple[int, int, int]:
    head = window.at(offset, 8)
    group, element, length = struct.unpack(f"{order}HHI", head)
    tag, kind = group << 16 | element, head[4:6]
    if explicit and group != 0xFFFE:
        if kind in _LONG:
            return tag, offset + 12, struct.unpack(f"{order}I", window.at(offset + 8, 4))[0]
        if kind in _SHORT:
            return tag, offset + 8, struct.unpack(f"{order}H", head[6:])[0]
    return tag, offset + 8, length


def _end_of_undefined(window: _Window, offset: int, explicit: bool, order: str) -> int:
    """Where a sequence, or encapsulated pixels, of undefined length end; sequences in it are walked, not entered."""
    depth = 1
    for _ in range(MOST_ELEMENTS):
        tag, offset, length = _element(window, offset, explicit, order)
        if tag in (_ITEM_END, _SEQUENCE_END):
            depth -= 1
            if depth == 0:
                return offset
        elif length == _UNDEFINED:
            depth += 1
        else:
            offset += length
    raise DamagedError
