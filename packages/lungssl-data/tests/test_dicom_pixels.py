"""The same slices in every transfer syntax and pixel layout that scanners and archives write."""

import locale
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from lungssl_data.readers import VolumeError, read_volume
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

Write = Callable[..., np.ndarray]


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.uint8])
def test_every_uncompressed_syntax_gives_the_same_values(
    tmp_path: Path, write_series: Write, syntax: str, dtype: type
) -> None:
    stored = np.random.default_rng(0).integers(0, 250, (6, 4, 8)).astype(dtype)
    write_series(tmp_path / "ct", stored=stored, syntax=syntax)
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").hu, stored.astype(np.int16) - 1024)


def test_sequences_of_undefined_length_before_the_pixels_are_passed_over(tmp_path: Path, write_series: Write) -> None:
    def edit(i: int, data: pydicom.Dataset) -> None:
        inner = pydicom.Dataset()
        inner.CodeValue = "x"
        inner.Rows = 3  # of an icon, say: not the slice's
        outer = pydicom.Dataset()
        outer.PurposeOfReferenceCodeSequence = [inner]
        data.ReferencedImageSequence = [outer, outer]
        data["ReferencedImageSequence"].is_undefined_length = True
        outer.is_undefined_length_sequence_item = True

    for syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        stored = write_series(tmp_path / syntax, edit, syntax=syntax)
        np.testing.assert_array_equal(read_volume(tmp_path / syntax).hu, stored - 1024)


def test_files_without_a_preamble_are_read(tmp_path: Path, write_series: Write) -> None:
    stored = write_series(tmp_path / "ct", syntax=ImplicitVRLittleEndian)
    for file in (tmp_path / "ct").iterdir():
        data = pydicom.dcmread(file)
        bare = pydicom.filebase.DicomBytesIO()
        bare.is_implicit_VR, bare.is_little_endian = True, True
        pydicom.filewriter.write_dataset(bare, data)
        file.write_bytes(bare.getvalue())
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").hu, stored - 1024)


def test_only_the_bits_that_count_count_but_padding_is_told_before(tmp_path: Path, write_series: Write) -> None:
    true = np.random.default_rng(1).integers(0, 4096, (6, 5, 7)).astype(np.uint16)
    words = true | np.uint16(0x4000)  # a retired overlay
    words[:, 0] = 63536  # -2000 in 16 bits

    def edit(_i: int, data: pydicom.Dataset) -> None:
        data.BitsStored, data.HighBit = 12, 11
        data.add_new("PixelPaddingValue", "US", 63536)

    write_series(tmp_path / "ct", edit, stored=words)
    hu = read_volume(tmp_path / "ct").hu
    np.testing.assert_array_equal(hu[:, 1:], true[:, 1:].astype(np.int16) - 1024)
    assert (hu[:, 0] == -2048).all()

    def shifted(_i: int, data: pydicom.Dataset) -> None:
        data.BitsStored, data.HighBit = 12, 15

    signed = np.random.default_rng(2).integers(-1000, 1000, (6, 5, 7)).astype(np.int16)
    write_series(tmp_path / "high", shifted, stored=signed * 16)
    np.testing.assert_array_equal(read_volume(tmp_path / "high").hu, signed - 1024)


def test_an_inverted_display_inverts_no_hounsfield_units(tmp_path: Path, write_series: Write) -> None:
    stored = write_series(tmp_path / "ct", lambda _i, data: setattr(data, "PhotometricInterpretation", "MONOCHROME1"))
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").hu, stored - 1024)


@pytest.mark.parametrize("slope", [1.0, 0.37])
def test_run_length_compressed_slices_are_decoded_exactly(tmp_path: Path, write_series: Write, slope: float) -> None:
    stored = np.random.default_rng(4).integers(-500, 2500, (6, 21, 34)).astype(np.int16)
    stored[:, 0] = -2000

    def edit(_i: int, data: pydicom.Dataset) -> None:
        data.RescaleSlope = slope
        data.add_new("PixelPaddingValue", "SS", -2000)

    write_series(tmp_path / "ct", edit, stored=stored)
    for file in (tmp_path / "ct").iterdir():
        data = pydicom.dcmread(file)
        data.compress(RLELossless, generate_instance_uid=False)
        data.save_as(file)
    hu = read_volume(tmp_path / "ct").hu
    np.testing.assert_array_equal(hu[:, 1:], np.rint(stored * slope - 1024)[:, 1:])
    assert (hu[:, 0] == -2048).all()


@pytest.mark.parametrize("compressor", ["JPEG2000", "JPEGLS", "JPEG"])
def test_slices_compressed_by_itk_equal_the_uncompressed_ones(
    tmp_path: Path, write_series: Write, compressor: str
) -> None:
    stored = np.random.default_rng(5).integers(0, 3000, (6, 32, 40)).astype(np.int16)
    write_series(tmp_path / "ct", stored=stored)
    (tmp_path / "packed").mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    for file in (tmp_path / "ct").iterdir():
        header = pydicom.dcmread(file)
        image = sitk.GetImageFromArray(np.frombuffer(header.PixelData, np.int16).reshape(1, 32, 40))
        for name in ("SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID", "Modality"):
            element = header[name]
            image.SetMetaData(f"{element.tag.group:04x}|{element.tag.element:04x}", str(element.value))
        for tag, value in (
            ("0008|0016", "1.2.840.10008.5.1.4.1.1.2"),
            ("0008|0008", "ORIGINAL\\PRIMARY\\AXIAL"),
            ("0020|0032", "\\".join(str(v) for v in header.ImagePositionPatient)),
            ("0020|0037", "1\\0\\0\\0\\1\\0"),
        ):
            image.SetMetaData(tag, value)
        image.SetSpacing([0.7, 0.9, 2.5])
        image.SetOrigin([float(v) for v in header.ImagePositionPatient])
        writer.SetFileName(str(tmp_path / "packed" / file.name))
        before = locale.setlocale(locale.LC_CTYPE)
        writer.Execute(image)
        locale.setlocale(locale.LC_CTYPE, before)  # GDCM's JPEG 2000 writer leaves "C" behind
        written = pydicom.dcmread(tmp_path / "packed" / file.name)
        assert written.file_meta.TransferSyntaxUID.is_compressed
        written.RescaleSlope, written.RescaleIntercept = 1, -1024
        written.save_as(tmp_path / "packed" / file.name)
    np.testing.assert_array_equal(read_volume(tmp_path / "packed").hu, stored - 1024)


def test_what_is_not_decoded_is_named_by_its_kind(tmp_path: Path, write_series: Write) -> None:
    write_series(tmp_path / "ct")
    for file in (tmp_path / "ct").iterdir():
        data = pydicom.dcmread(file)
        data.compress(RLELossless, generate_instance_uid=False)
        data.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2KLossless
        data.save_as(file)
    with pytest.raises(
        VolumeError, match=r"compressed in a way that is not decoded here \(high-throughput JPEG 2000\)"
    ):
        read_volume(tmp_path / "ct")


def test_a_deflated_file_that_grows_without_end_is_refused(tmp_path: Path, write_series: Write) -> None:
    def edit(_i: int, data: pydicom.Dataset) -> None:
        data.add_new(0x00091001, "OB", bytes(100 << 20))

    write_series(tmp_path / "ct", edit, stored=np.zeros((1, 5, 7), np.int16), syntax=DeflatedExplicitVRLittleEndian)
    with pytest.raises(VolumeError, match="is a damaged DICOM file"):
        read_volume(tmp_path / "ct")
