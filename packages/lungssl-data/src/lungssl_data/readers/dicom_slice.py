"""One DICOM CT slice: the allowlisted elements, checked, and where its pixels lie (`domain.md` G1).

Of identifying elements only those that tell slices and people apart are read (patient id, name, birth date and sex, and
the UIDs of study, series and frame of reference). They never enter a message, and leave the readers as keyed ids only.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from lungssl_data.readers.checks import VolumeError
from lungssl_data.readers.dicom_elements import MEDIA_SOP_CLASS, DamagedError, Elements, read_elements
from lungssl_data.readers.dicom_phase import PhaseMark, phase_mark

LARGEST_MATRIX = 4096
"""Rows and columns; the finest CT has 2048."""
UNIT_TOLERANCE = 1e-3
"""Of the lengths and the product of the row and column directions, written with 4 digits or more."""
_IMAGE_TYPE, _SOP_CLASS, _MODALITY, _DESCRIPTION = 0x00080008, 0x00080016, 0x00080060, 0x0008103E
_PATIENT, _STUDY, _SERIES, _FRAME = 0x00100020, 0x0020000D, 0x0020000E, 0x00200052
_NAME, _BORN, _SEX = 0x00100010, 0x00100030, 0x00100040
_POSITION_IDENTIFIER, _POSITION_INDEX, _PERCENTAGE = 0x00200100, 0x00209128, 0x00209245
_SAMPLES, _PHOTOMETRIC, _FRAMES, _ROWS, _COLUMNS = 0x00280002, 0x00280004, 0x00280008, 0x00280010, 0x00280011
_ALLOCATED, _STORED, _HIGH_BIT, _SIGNED = 0x00280100, 0x00280101, 0x00280102, 0x00280103
_PADDING, _PADDING_LIMIT, _BURNED_IN, _RESCALE_TYPE = 0x00280120, 0x00280121, 0x00280301, 0x00281054
_REQUIRED = {
    "Modality": _MODALITY,
    "SeriesInstanceUID": _SERIES,
    "Rows": _ROWS,
    "Columns": _COLUMNS,
    "PixelSpacing": 0x00280030,
    "ImageOrientationPatient": 0x00200037,
    "ImagePositionPatient": 0x00200032,
    "BitsAllocated": _ALLOCATED,
    "BitsStored": _STORED,
    "PixelRepresentation": _SIGNED,
    "RescaleSlope": 0x00281053,
    "RescaleIntercept": 0x00281052,
}
WANTED = frozenset(
    {
        MEDIA_SOP_CLASS,
        _IMAGE_TYPE,
        _SOP_CLASS,
        _MODALITY,
        _DESCRIPTION,
        _PATIENT,
        _NAME,
        _BORN,
        _SEX,
        _STUDY,
        _FRAME,
        _SAMPLES,
        _PHOTOMETRIC,
        _FRAMES,
    }
    | {_POSITION_IDENTIFIER, _POSITION_INDEX, _PERCENTAGE, _HIGH_BIT, _PADDING, _PADDING_LIMIT, _BURNED_IN}
    | {_RESCALE_TYPE, *_REQUIRED.values()}
)
_MULTI_FRAME = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
_CT = "1.2.840.10008.5.1.4.1.1.2"
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_PROJECTIONS = {"LOCALIZER", "MIP", "MINIP", "MAX_IP", "MIN_IP", "MAXIMUM", "MINIMUM", "AVERAGE", "AVG", "MEAN"}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Slice:
    """A CT slice, its pixels still in its file."""

    path: Path
    series: str
    study: str
    patient: str
    person: tuple[str, str, str]
    """Name, birth date and sex, in one spelling; empty where not given."""
    frame: str
    mark: PhaseMark
    rows: int
    columns: int
    pixel_mm: Float[ndarray, "2"]
    """Distance between rows, between columns."""
    axes: Float[ndarray, "2 3"]
    """Unit LPS directions along a row (index x) and along a column (index y)."""
    position_mm: Float[ndarray, "3"]
    slope: float
    intercept: float
    word: str
    """Numpy's type of a stored pixel, byte order included."""
    bits: int
    high_bit: int
    padding: tuple[int, int] | None
    """First and last stored value that is padding."""
    syntax: str
    pixel_offset: int
    pixel_bytes: int | None
    """None: compressed."""
    inflated: bool


@dataclass(frozen=True, kw_only=True, repr=False)
class Refused:
    """A CT image that can't be part of a volume."""

    path: Path
    series: str
    study: str
    patient: str
    person: tuple[str, str, str]
    frame: str
    problem: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Other:
    """DICOM that is no axial CT: a localizer, secondary capture, projection or dose sheet, or another modality."""

    series: str
    ct: bool
    """Whether its modality is CT."""


def read_slice(path: Path) -> Slice | Refused | Other | None:
    """A slice, a refused CT image, another DICOM file, or None for what is no DICOM.

    Raises VolumeError (without a name) for a damaged file.
    """
    try:
        elements = read_elements(path, WANTED)
    except DamagedError as error:
        raise VolumeError("is a damaged DICOM file; export the series again") from error
    except OSError as error:
        raise VolumeError("can't be read; check its permissions and the disk") from error
    if elements is None:
        return None
    if _is_other(elements):
        return Other(series=_text(elements, _SERIES), ct=_text(elements, _MODALITY) == "CT")
    try:
        return _slice(path, elements)
    except VolumeError as error:
        return Refused(path=path, problem=error.problem, person=_person(elements), **_ids(elements))


def check_modality(series: str, others: Sequence[Other]) -> None:
    """A series has one modality (PS3.3 C.7.3.1): VolumeError where another one shares the UID of a CT series."""
    strange = sum(not other.ct and other.series == series for other in others)
    if strange:
        raise VolumeError(f"{strange} files of the series are not marked CT, others are; export the series again")


def _ids(elements: Elements) -> dict[str, str]:
    tags = {"series": _SERIES, "study": _STUDY, "patient": _PATIENT, "frame": _FRAME}
    return {key: _text(elements, tag) for key, tag in tags.items()}


def _person(elements: Elements) -> tuple[str, str, str]:
    """Archives differ in case, blanks and empty parts of a name, as in `DOE^JANE^^` (PS3.5 6.2, PN)."""
    name = " ".join(_text(elements, _NAME).casefold().replace("^", " ").split())
    return name, _text(elements, _BORN), _text(elements, _SEX).upper()


def _is_other(elements: Elements) -> bool:
    kinds = [kind.strip().upper() for kind in _text(elements, _IMAGE_TYPE).split("\\")]
    # Scanners and archives also call re-exported axial slices secondary; screen shots are not axial.
    secondary = "SECONDARY" in kinds and "AXIAL" not in kinds
    capture = _text(elements, _SOP_CLASS).startswith(_SECONDARY_CAPTURE)
    modality = _text(elements, _MODALITY)
    if not modality and _CT in (_text(elements, _SOP_CLASS), _text(elements, MEDIA_SOP_CLASS)):
        return False  # a CT slice that is broken off, or lacks what it must have
    return modality != "CT" or secondary or capture or not _PROJECTIONS.isdisjoint(kinds)


def _slice(path: Path, elements: Elements) -> Slice:
    frames = _text(elements, _FRAMES)
    if _text(elements, _SOP_CLASS) in _MULTI_FRAME or frames not in ("", "1"):
        raise VolumeError("holds a multi-frame image; export it as a classic CT series, one file a slice")
    if _text(elements, _BURNED_IN).upper() == "YES":
        raise VolumeError("has text burned into its pixels; use the original CT series")
    missing = [name for name, tag in _REQUIRED.items() if not elements.values.get(tag, b"").strip(b" ")]
    if elements.pixel_offset is None:
        missing.append("PixelData")
    if missing:
        raise VolumeError(f"a slice lacks {', '.join(missing)}; use the original axial CT series")
    if _whole(elements, _SAMPLES, 1) != 1 or not _text(elements, _PHOTOMETRIC).startswith("MONOCHROME"):
        raise VolumeError("a slice lacks grey values; use the original axial CT series")
    if _text(elements, _RESCALE_TYPE).upper() not in ("", "HU", "US"):
        raise VolumeError("its rescaled values are not Hounsfield units (RescaleType); use the original CT series")
    rows, columns = _whole(elements, _ROWS), _whole(elements, _COLUMNS)
    if not (1 <= rows <= LARGEST_MATRIX and 1 <= columns <= LARGEST_MATRIX):
        raise VolumeError(
            f"a slice claims {columns} x {rows} pixels, {LARGEST_MATRIX} a side are possible; it is damaged"
        )
    word, bits, high_bit = _word(elements)
    count = rows * columns * np.dtype(word).itemsize
    if elements.pixel_bytes is not None and elements.pixel_bytes not in (count, count + count % 2):
        raise VolumeError("the pixels of its slices do not match their headers; export the series again")
    slope, intercept = _numbers(elements, "RescaleSlope", 1)[0], _numbers(elements, "RescaleIntercept", 1)[0]
    if slope == 0:
        raise VolumeError("a slice's RescaleSlope is 0, so its values are lost; export the series again")
    pixel_mm = np.array(_numbers(elements, "PixelSpacing", 2))
    if pixel_mm.min() <= 0:
        raise VolumeError("a slice's PixelSpacing is not positive; export the series again")
    assert elements.pixel_offset is not None
    return Slice(
        path=path,
        **_ids(elements),
        person=_person(elements),
        mark=_mark(elements),
        rows=rows,
        columns=columns,
        pixel_mm=pixel_mm,
        axes=_axes(elements),
        position_mm=np.array(_numbers(elements, "ImagePositionPatient", 3)),
        slope=slope,
        intercept=intercept,
        word=word,
        bits=bits,
        high_bit=high_bit,
        padding=_padding(elements, word),
        syntax=elements.syntax,
        pixel_offset=elements.pixel_offset,
        pixel_bytes=elements.pixel_bytes,
        inflated=elements.inflated,
    )


def _axes(elements: Elements) -> Float[ndarray, "2 3"]:
    axes = np.array(_numbers(elements, "ImageOrientationPatient", 6)).reshape(2, 3)
    if np.abs(axes @ axes.T - np.eye(2)).max() > UNIT_TOLERANCE:
        raise VolumeError(
            "a slice's ImageOrientationPatient is not two unit vectors at right angles; export the series again"
        )
    return axes / np.linalg.norm(axes, axis=1, keepdims=True)


def _word(elements: Elements) -> tuple[str, int, int]:
    """Numpy's type of a stored pixel, the bits that count, and the highest of them."""
    allocated, bits, signed = (_whole(elements, tag) for tag in (_ALLOCATED, _STORED, _SIGNED))
    high_bit = _whole(elements, _HIGH_BIT, bits - 1)
    if allocated not in (8, 16) or signed not in (0, 1) or not 1 <= bits <= high_bit + 1 <= allocated:
        raise VolumeError(
            f"a slice has pixels of {bits} bits in {allocated}, the highest {high_bit}; CT has 8 or 16 allocated"
        )
    return f"{elements.order}{'i' if signed else 'u'}{allocated // 8}", bits, high_bit


def _padding(elements: Elements, word: str) -> tuple[int, int] | None:
    """The range of PixelPaddingValue and, where given, PixelPaddingRangeLimit, read in the pixels' own type."""
    ends = []
    for tag in (_PADDING, _PADDING_LIMIT):
        value = elements.values.get(tag, b"")
        if len(value) == 2:
            ends.append(int(np.frombuffer(value, f"{elements.order}{word[1]}2")[0]))
    return (min(ends), max(ends)) if ends and elements.values.get(_PADDING) else None


def _mark(elements: Elements) -> PhaseMark:
    identifier = _text(elements, _POSITION_IDENTIFIER)
    index, percentage = elements.values.get(_POSITION_INDEX, b""), elements.values.get(_PERCENTAGE, b"")
    percent = struct.unpack(f"{elements.order}f", percentage)[0] if len(percentage) == 4 else None
    return phase_mark(
        position_identifier=float(identifier) if identifier.isdecimal() and len(identifier) < 13 else None,
        position_index=float(struct.unpack(f"{elements.order}I", index)[0]) if len(index) == 4 else None,
        percentage=percent if percent is not None and 0 <= percent <= 100 else None,
        description=_text(elements, _DESCRIPTION),
    )


def _text(elements: Elements, tag: int) -> str:
    return elements.values.get(tag, b"").decode("latin-1").strip(" \0")


def _whole(elements: Elements, tag: int, default: int | None = None) -> int:
    """A number of 2 bytes."""
    value = elements.values.get(tag, b"")
    if len(value) != 2:
        if not value and default is not None:
            return default
        raise VolumeError("a slice's size or type of pixels is not a number; export the series again")
    return struct.unpack(f"{elements.order}H", value)[0]


def _numbers(elements: Elements, name: str, count: int) -> list[float]:
    """Decimal numbers separated by backslashes."""
    try:
        numbers = [float(part) for part in _text(elements, _REQUIRED[name]).split("\\")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise VolumeError(f"a slice's {name} is not {count} numbers; export the series again")
    return numbers
