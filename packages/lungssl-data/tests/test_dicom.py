"""DICOM series: order, geometry, rescaling, and the stacks that are refused. Patients' names never come out."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from lungssl_data.readers import VolumeError, read_labels, read_slices, read_volume, write_volume
from lungssl_data.volume import Geometry, Volume
from pydicom.uid import EnhancedCTImageStorage, SecondaryCaptureImageStorage

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
CANARY = "CanaryPatient"
SLICES = 6
ORIGIN = np.array([-20.0, 10.0, -300.0])
Edit = Callable[[int, pydicom.Dataset], None]
Write = Callable[..., np.ndarray]


def _error(path: Path) -> str:
    with pytest.raises(VolumeError) as error:
        read_volume(path)
    message = str(error.value)
    assert "\n" not in message and CANARY not in message and "1.2.826" not in message
    assert message == f"{path.name}: {error.value.problem}"
    return message


def _first(path: Path) -> Path:
    return path / "slice3.dcm"  # slice 0: 0 * 5 + 3


def test_slices_are_ordered_by_position_and_hu_are_rescaled(tmp_path: Path, write_series: Write) -> None:
    stored = write_series(tmp_path / "ct")
    (tmp_path / "ct" / "LICENSE").write_text("not an image")
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(volume.hu, stored - 1024)
    np.testing.assert_allclose(
        volume.geometry.index_to_mm(), [[0.7, 0, 0, -20], [0, 0.9, 0, 10], [0, 0, 2.5, -300]], atol=1e-9
    )
    assert read_volume(tmp_path / "ct" / "slice2.dcm").geometry.same_grid(volume.geometry)
    files = sorted((tmp_path / "ct").glob("*.dcm"))
    np.testing.assert_array_equal(read_slices(files[::-1]).hu, volume.hu)


@pytest.mark.parametrize(
    "axes",
    [
        np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]),  # coronal
        np.array([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),  # normal to the feet
        np.array([[0.8, 0.6, 0.0], [-0.6, 0.8, 0.0]]),
    ],
)
def test_oblique_series_keep_their_axes(tmp_path: Path, write_series: Write, axes: np.ndarray) -> None:
    stored = write_series(tmp_path / "ct", axes=axes)
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(volume.hu, stored - 1024)
    np.testing.assert_allclose(volume.geometry.direction[:, :2].T, axes, atol=1e-12)
    np.testing.assert_allclose(volume.geometry.direction[:, 2], np.cross(axes[0], axes[1]), atol=1e-12)
    np.testing.assert_allclose(volume.geometry.origin_mm, ORIGIN)


def test_each_slice_has_its_own_slope_and_fractions_are_rounded(tmp_path: Path, write_series: Write) -> None:
    def edit(i: int, data: pydicom.Dataset) -> None:
        data.RescaleSlope, data.RescaleIntercept = (1, -1024) if i == 0 else (1 + 0.13 * i, -1000 - i)

    stored = write_series(tmp_path / "ct", edit)
    index = np.arange(SLICES)[:, None, None]
    slope, intercept = 1 + 0.13 * index, np.where(index == 0, -1024, -1000 - index)
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").hu, np.rint(stored * slope + intercept))


def test_padding_and_its_range_become_one_value_before_anything_interpolates(
    tmp_path: Path, write_series: Write
) -> None:
    stored = np.random.default_rng(1).integers(0, 2500, (SLICES, 5, 7)).astype(np.int16)
    stored[:, 0], stored[:, 1] = -32768, -32700

    def edit(i: int, data: pydicom.Dataset) -> None:
        data.add_new("PixelPaddingValue", "US", 32768)  # as some scanners write it for signed pixels
        if i % 2:
            data.add_new("PixelPaddingRangeLimit", "SS", -32600)
        else:
            data.PixelData = np.where(stored[i] == -32700, -32768, stored[i]).astype(np.int16).tobytes()

    write_series(tmp_path / "ct", edit, stored=stored)
    volume = read_volume(tmp_path / "ct")
    assert (volume.hu[:, :2] == -2048).all() and not volume.valid()[:, :2].any()
    np.testing.assert_array_equal(volume.hu[:, 2:], stored[:, 2:] - 1024)
    write_series(tmp_path / "all", lambda _i, data: data.add_new("PixelPaddingValue", "SS", 7), stored=stored * 0 + 7)
    assert (read_volume(tmp_path / "all").hu == -2048).all()


def test_a_missing_slice_is_named_by_its_place_from_the_first_slice(tmp_path: Path, write_series: Write) -> None:
    write_series(tmp_path / "ct")
    (tmp_path / "ct" / "slice1.dcm").unlink()  # slice 2 of 0..5: 2 * 5 + 3 = 13, 13 mod 6 = 1
    message = _error(tmp_path / "ct")
    assert "2.50 mm apart, but not from 2.50 to 7.50 mm from the first slice" in message
    assert "1 slice is missing at 5.00 mm" in message and "300" not in message


def _at(i: int, data: pydicom.Dataset, along_mm: float, *, y_mm: float = 0.0) -> None:
    data.ImagePositionPatient = [float(v) for v in ORIGIN + np.array([0, y_mm, along_mm])]


def test_uneven_spacing_is_refused_without_inventing_missing_slices(tmp_path: Path, write_series: Write) -> None:
    write_series(tmp_path / "ct", lambda i, data: _at(i, data, 2.5 * i if i < 4 else 7.5 + 3.2 * (i - 3)))
    message = _error(tmp_path / "ct")
    assert "from 7.50 to 10.70, 10.70 to 13.90 mm" in message and "the spacing changes" in message


def test_a_spacing_that_creeps_is_refused_though_no_step_is_a_gap(tmp_path: Path, write_series: Write) -> None:
    stored = np.zeros((40, 5, 7), np.int16)
    steps = np.concatenate([[0], np.cumsum(np.where(np.arange(39) < 20, 2.44, 2.56))])
    write_series(tmp_path / "ct", lambda i, data: _at(i, data, float(steps[i])), stored=stored)
    assert "changes from 2.44 to 2.56 mm, which puts slices" in _error(tmp_path / "ct")


def test_a_slice_that_is_there_twice_is_dropped_and_another_one_in_its_place_refused(
    tmp_path: Path, write_series: Write
) -> None:
    stored = write_series(tmp_path / "ct")
    shutil.copy(tmp_path / "ct" / "slice2.dcm", tmp_path / "ct" / "copy.dcm")
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").hu, stored - 1024)
    write_series(tmp_path / "b", lambda i, data: _at(i, data, 5.0) if i == 3 else None)
    assert "1 slice shares its position with another that shows something else (at 5.00 mm" in _error(tmp_path / "b")


@pytest.mark.parametrize(("degrees", "refused"), [(0.05, False), (0.2, True), (2.5, True), (10.0, True)])
def test_gantry_tilt_over_a_tenth_of_a_degree_is_refused(
    tmp_path: Path, write_series: Write, degrees: float, refused: bool
) -> None:
    shift = np.tan(np.radians(degrees))
    stored = write_series(tmp_path / "ct", lambda i, data: _at(i, data, 2.5 * i, y_mm=2.5 * i * shift))
    if refused:
        assert f"the gantry was tilted by {degrees:.2f} degrees" in _error(tmp_path / "ct")
    else:
        np.testing.assert_array_equal(read_volume(tmp_path / "ct").hu, stored - 1024)


def test_two_series_in_a_folder_are_counted_and_one_file_chooses(tmp_path: Path, write_series: Write) -> None:
    write_series(tmp_path / "ct")
    write_series(tmp_path / "ct", stored=np.full((4, 5, 7), 7, np.int16), prefix="b")
    assert "holds 2 CT series (of 4, 6 slices); give one .dcm file" in _error(tmp_path / "ct")
    assert (read_volume(tmp_path / "ct" / "b0.dcm").hu == 7 - 1024).all()
    with pytest.raises(VolumeError, match="ct: these files are of more than one CT series"):
        read_slices(sorted((tmp_path / "ct").iterdir()))


@pytest.mark.parametrize(
    ("name", "kind", "values", "told_by"),
    [
        ("TemporalPositionIdentifier", "IS", (2, 1), "temporal position identifier"),
        ("TemporalPositionIndex", "UL", (2, 1), "temporal position index"),
        ("NominalPercentageOfRespiratoryPhase", "FL", (50, 0), "nominal percentage of respiratory phase"),
        ("SeriesDescription", "LO", (f"{CANARY}, Gated, 50.0%", f"{CANARY}, Gated, 0.0%"), "percentage in the series"),
        ("SeriesDescription", "LO", (f"{CANARY} EE", f"{CANARY} EI"), "word in the series description"),
    ],
)
def test_phases_of_one_series_are_told_apart_and_one_file_chooses(
    tmp_path: Path, write_series: Write, name: str, kind: str, values: tuple[object, object], told_by: str
) -> None:
    stored = np.random.default_rng(2).integers(0, 2500, (2 * SLICES, 5, 7)).astype(np.int16)

    def edit(i: int, data: pydicom.Dataset) -> None:
        data.add_new(name, kind, values[i % 2])
        _at(i, data, 2.5 * (i // 2))

    write_series(tmp_path / "ct", edit, stored=stored)
    assert f"holds 2 phases (of 6, 6 slices, told apart by {told_by}" in _error(tmp_path / "ct")
    for i in range(2):
        file = tmp_path / "ct" / f"slice{(i * 5 + 3) % (2 * SLICES)}.dcm"
        np.testing.assert_array_equal(read_volume(file).hu, stored[i::2] - 1024)


def test_two_phases_that_nothing_tells_apart_are_refused_with_their_place(tmp_path: Path, write_series: Write) -> None:
    stored = np.random.default_rng(2).integers(0, 2500, (2 * SLICES, 5, 7)).astype(np.int16)
    write_series(tmp_path / "ct", lambda i, data: _at(i, data, 2.5 * (i // 2)), stored=stored)
    assert "6 slices share their position" in _error(tmp_path / "ct")


def _with(where: tuple[int, ...] = (4,), **values: object) -> Edit:
    def edit(i: int, data: pydicom.Dataset) -> None:
        for name, value in values.items():
            if i not in where:
                continue
            if value is None:
                delattr(data, name)
            else:
                setattr(data, name, value)

    return edit


ALL = tuple(range(SLICES))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_with(ALL, Modality="MR"), "no CT slice found (6 other DICOM files)"),
        (_with(ALL, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "no CT slice found"),
        (_with(ALL, ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"]), "no CT slice found"),
        (_with(ALL, ImageType=["DERIVED", "SECONDARY", "AXIAL", "MIP"]), "no CT slice found"),
        (_with(ALL, SOPClassUID=SecondaryCaptureImageStorage), "no CT slice found"),
        (_with(SOPClassUID=EnhancedCTImageStorage), "multi-frame"),
        (_with(NumberOfFrames=3), "multi-frame"),
        (_with(BurnedInAnnotation="YES"), "text burned into its pixels"),
        (_with(RescaleSlope=None), "a slice lacks RescaleSlope"),
        (_with(RescaleSlope=0), "RescaleSlope is 0"),
        (_with(RescaleIntercept=90000), "do not fit int16 Hounsfield units"),
        (_with(ALL, RescaleType="Z_EFF"), "not Hounsfield units (RescaleType)"),
        (_with(ImagePositionPatient=None), "a slice lacks ImagePositionPatient"),
        (_with(ImageOrientationPatient=None, PixelSpacing=None), "a slice lacks PixelSpacing, ImageOrientationPatient"),
        (_with(PixelData=None), "a slice lacks PixelData"),
        (_with(PixelSpacing=[0.9, 0.0]), "PixelSpacing is not positive"),
        (_with(PixelSpacing=[0.8, 0.7]), "differ in pixel spacing"),
        (_with(ImageOrientationPatient=[2.0, 0.0, 0.0, 0.0, 1.0, 0.0]), "not two unit vectors at right angles"),
        (_with(ImageOrientationPatient=[0.0, 1.0, 0.0, -1.0, 0.0, 0.0]), "differ in orientation"),
        (_with(FrameOfReferenceUID="1.2.826.0.1.3680043.8.498.1"), "differ in frame of reference"),
        (_with(Rows=4, PixelData=bytes(4 * 7 * 2)), "differ in size"),
        (_with(Rows=4), "the pixels of its slices do not match their headers"),
        (_with(Rows=60000), "a slice claims 7 x 60000 pixels, 4096 a side"),
        (_with(SamplesPerPixel=3, PhotometricInterpretation="RGB"), "lacks grey values"),
        (_with(BitsAllocated=32), "a slice has pixels of 16 bits in 32"),
        (
            _with(tuple(range(1, SLICES)), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
            "has 1 slice, a volume needs 2",
        ),
        (_with(Modality="MR"), "1 files of the series are not marked CT"),
    ],
)
def test_what_is_not_one_plain_ct_stack_is_refused_with_its_cause(
    tmp_path: Path, write_series: Write, edit: Edit, message: str
) -> None:
    write_series(tmp_path / "ct", edit)
    assert message in _error(tmp_path / "ct")


def test_what_a_pacs_adds_to_a_series_is_passed_over(tmp_path: Path, write_series: Write) -> None:
    stored = np.zeros((SLICES + 3, 5, 7), np.int16)
    stored[:SLICES] = np.random.default_rng(3).integers(0, 2500, (SLICES, 5, 7))

    def edit(i: int, data: pydicom.Dataset) -> None:
        if i == SLICES:
            data.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        elif i == SLICES + 1:
            data.SOPClassUID = SecondaryCaptureImageStorage  # a dose sheet
        elif i == SLICES + 2:
            data.Modality, data.SeriesInstanceUID = "SR", "1.2.826.0.1.3680043.8.498.2"

    write_series(tmp_path / "ct", edit, stored=stored)
    (tmp_path / "ct" / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + b"\x04\0\0\x12US\2\0\0\0")
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").hu, stored[:SLICES] - 1024)


def test_damaged_files_are_told_by_their_place_not_their_name(tmp_path: Path, write_series: Write) -> None:
    write_series(tmp_path / "ct")
    file = tmp_path / "ct" / "slice2.dcm"
    whole = file.read_bytes()
    for damaged in (b"\0" * 400, b"", whole[:-20], whole[:700], whole[:200]):
        file.write_bytes(damaged)
        message = _error(tmp_path / "ct")
        assert (
            "ct: file 3 of 6 by name is a damaged DICOM file" in message or "lacks" in message or "missing" in message
        )


def test_values_that_are_no_numbers_are_not_quoted(tmp_path: Path, write_series: Write) -> None:
    write_series(tmp_path / "ct")
    for file in (tmp_path / "ct").iterdir():
        file.write_bytes(file.read_bytes().replace(b"-300.0", b"-3x0.0"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "ImagePositionPatient is not 3 numbers" in _error(tmp_path / "ct")


def test_an_empty_folder_labels_and_writing_say_what_to_do(tmp_path: Path) -> None:
    assert "no CT slice found (0 other DICOM files)" in _error(tmp_path)
    with pytest.raises(VolumeError, match="label maps are not read from DICOM"):
        read_labels(tmp_path)
    geometry = Geometry(shape=(2, 3, 4), spacing_mm=(1.0, 1.0, 1.0), origin_mm=(0.0, 0.0, 0.0), direction=np.eye(3))
    with pytest.raises(VolumeError, match=r"a\.dcm: cannot be written"):
        write_volume(tmp_path / "a.dcm", Volume(hu=np.zeros((2, 3, 4), np.int16), geometry=geometry))
    with pytest.raises(VolumeError, match="no files"):
        read_slices([])


@pytest.mark.realdata
def test_the_tcga_series_is_read_as_simpleitk_reads_it() -> None:
    folder = SHARED / "dicom_tcga_34_2605"
    if not folder.is_dir():
        pytest.skip("shared data are not here")
    volume = read_volume(folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    np.testing.assert_array_equal(volume.hu, np.rint(sitk.GetArrayFromImage(image)))
    matrix = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
    np.testing.assert_allclose(volume.geometry.index_to_mm()[:, :3], matrix, atol=1e-4)
    np.testing.assert_allclose(volume.geometry.origin_mm, image.GetOrigin(), atol=1e-3)
