"""The pixels of DICOM slices as Hounsfield units.

Uncompressed pixels are read where they lie in the file; compressed ones are decoded by GDCM, which SimpleITK brings
along (RLE, JPEG, JPEG lossless, JPEG-LS, JPEG 2000).
"""

import threading
from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk
from jaxtyping import Bool, Int16, Shaped
from numpy import ndarray

from lungssl_data.readers.checks import INT16, PADDING_HU, VolumeError, native
from lungssl_data.readers.dicom_elements import DamagedError, inflated_file
from lungssl_data.readers.dicom_slice import Slice
from lungssl_data.readers.threads import each

_JPEG = "1.2.840.10008.1.2.4."
_DECODED = {"1.2.840.10008.1.2.5"} | {f"{_JPEG}{n}" for n in (50, 51, 57, 70, 80, 81, 90, 91)}
_KINDS = {
    "1.2.840.10008.1.2.1.98": "encapsulated",
    f"{_JPEG}9": "JPEG 2000 multi-component",
    f"{_JPEG}10": "MPEG",
    f"{_JPEG}11": "JPEG XL",
    f"{_JPEG}20": "high-throughput JPEG 2000",
}
_gdcm = threading.Lock()


def read_hu(slices: Sequence[Slice]) -> Int16[ndarray, "z y x"]:
    """The slices in their order; what is padding by the header is -2048. VolumeError without a name."""
    try:
        hu = np.empty((len(slices), slices[0].rows, slices[0].columns), np.int16)
    except MemoryError as error:
        raise VolumeError(f"there is no memory for its {len(slices)} slices; close other programs") from error
    each(lambda z: _read_into(slices[z], hu[z]), range(len(slices)))
    return hu


def _read_into(one: Slice, out: Int16[ndarray, "y x"]) -> None:
    words = _uncompressed(one, out) if one.pixel_bytes is not None else _decompressed(one)
    words = words.reshape(one.rows, one.columns)
    padded = _padded(words, one)
    if one.bits < 8 * words.dtype.itemsize:
        words = _significant(words, one)
    if padded is not None:
        if padded.all():
            out[:] = PADDING_HU
            return
        words = np.where(padded, words[~padded][0], words)  # out of the way of the checks below
    lowest, highest = (float(value) * one.slope + one.intercept for value in (words.min(), words.max()))
    if not (INT16.min <= round(min(lowest, highest)) and round(max(lowest, highest)) <= INT16.max):
        raise VolumeError(
            f"values from {min(lowest, highest):g} to {max(lowest, highest):g} do not fit int16 Hounsfield units; "
            "is this a CT, and is its rescale slope right?"
        )
    if one.slope == 1 and one.intercept.is_integer():
        # Modulo 2**16; the check above tells that the sum itself fits.
        offset = np.array(int(one.intercept)).astype(np.int16)
        np.add(words.view(np.int16) if words.dtype.itemsize == 2 else words.astype(np.int16), offset, out=out)
    else:
        np.rint(words * one.slope + one.intercept, out=out, casting="unsafe")
    if padded is not None:
        out[padded] = PADDING_HU


def _padded(words: Shaped[ndarray, "y x"], one: Slice) -> Bool[ndarray, "y x"] | None:
    """Where the stored word is padding; compared before masking, as padding may lie outside the bits that count."""
    if one.padding is None:
        return None
    first, last = one.padding
    padded = words == first if first == last else (words >= first) & (words <= last)
    return padded if padded.any() else None


def _significant(words: Shaped[ndarray, "y x"], one: Slice) -> Shaped[ndarray, "y x"]:
    """The bits that count: retired overlays lie in the others (PS3.5 section 8.1.1)."""
    unsigned = words.astype(words.dtype.str.replace("i", "u"))
    values = (unsigned >> (one.high_bit - one.bits + 1)).astype(np.int32) & ((1 << one.bits) - 1)
    if words.dtype.kind == "i":
        sign = 1 << (one.bits - 1)
        values = (values ^ sign) - sign
    return values


def _uncompressed(one: Slice, out: Int16[ndarray, "y x"]) -> Shaped[ndarray, " pixels"]:
    """Stored values in the machine's byte order, in the memory of `out` where they fit."""
    dtype = np.dtype(one.word)
    words = (out if dtype.itemsize == 2 else np.empty(out.shape, dtype)).reshape(-1).view(dtype)
    try:
        if one.inflated:
            words[:] = np.frombuffer(inflated_file(one.path), dtype, len(words), one.pixel_offset)
        else:
            with one.path.open("rb", buffering=0) as file:
                file.seek(one.pixel_offset)
                if file.readinto(words.data) != words.nbytes:
                    raise _undecodable()
    except (DamagedError, OSError) as error:
        raise _undecodable() from error
    return native(words)


def _decompressed(one: Slice) -> Shaped[ndarray, "y x"]:
    """Stored values of a compressed slice; GDCM gives them rescaled, which is undone exactly."""
    if one.syntax not in _DECODED:
        kind = next((kind for start, kind in _KINDS.items() if one.syntax.startswith(start)), "unknown")
        raise VolumeError(
            f"its pixels are compressed in a way that is not decoded here ({kind}); export it uncompressed"
        )
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(one.path))
    with _gdcm:  # its warnings, which may quote the file, are switched off for the whole process
        shown = sitk.ProcessObject.GetGlobalWarningDisplay()
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        try:
            image = reader.Execute()
        except RuntimeError as error:
            raise _undecodable() from error
        finally:
            sitk.ProcessObject.SetGlobalWarningDisplay(shown)
    if image.GetNumberOfComponentsPerPixel() != 1 or image.GetSize()[:2] != (one.columns, one.rows):
        raise VolumeError("the pixels of its slices do not match their headers; export the series again")
    stored = np.rint((sitk.GetArrayFromImage(image).astype(float) - one.intercept) / one.slope)
    limits = np.iinfo(one.word)
    if stored.size != one.rows * one.columns or stored.min() < limits.min or stored.max() > limits.max:
        raise VolumeError("the pixels of its slices do not match their headers; export the series again")
    return stored.reshape(one.rows, one.columns).astype(np.dtype(one.word).newbyteorder("="))


def _undecodable() -> VolumeError:
    return VolumeError("a slice's pixels cannot be decoded; export the series uncompressed")
