"""Plain DICOM series: order, geometry, rescaling, and the stacks that are refused. Patients' names never come out."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from lungssl_data.readers import VolumeError, read_labels, read_volume, write_volume
from lungssl_data.volume import Geometry, Volume
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
CANARY = "CanaryPatient"
ROWS, COLUMNS, SLICES = 5, 7, 6
STORED = np.random.default_rng(0).integers(0, 2500, (SLICES, ROWS, COLUMNS)).astype(np.int16)
Edit = Callable[[int, pydicom.Dataset], None]


def _write_series(folder: Path, edit: Edit = lambda _i, _d: None, *, axes: np.ndarray | None = None) -> None:
    """Slices 2.5 mm apart, written in a shuffled order of names and InstanceNumbers."""
    folder.mkdir(exist_ok=True)
    axes = np.eye(3)[:2] if axes is None else axes
    normal = np.cross(axes[0], axes[1])
    series = generate_uid()
    for i in range(SLICES):
        data = pydicom.Dataset()
        data.PatientName = data.PatientID = data.StudyDescription = CANARY
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, generate_uid()
        data.StudyInstanceUID, data.SeriesInstanceUID = generate_uid(), series
        data.Modality, data.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.InstanceNumber = (i * 5) % SLICES
        data.Rows, data.Columns, data.SamplesPerPixel = ROWS, COLUMNS, 1
        data.PhotometricInterpretation = "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.PixelSpacing = [0.9, 0.7]  # between rows (y), between columns (x)
        data.ImageOrientationPatient = [float(v) for v in axes.ravel()]
        data.ImagePositionPatient = [float(v) for v in np.array([-20.0, 10.0, -300.0]) + 2.5 * i * normal]
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.PixelData = STORED[i].tobytes()
        edit(i, data)
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        data.save_as(folder / f"slice{(i * 5 + 3) % SLICES}.dcm", enforce_file_format=True)


def _error(path: Path) -> str:
    with pytest.raises(VolumeError) as error:
        read_volume(path)
    message = str(error.value)
    assert "\n" not in message and CANARY not in message and "1.2.826" not in message
    return message


def test_slices_are_ordered_by_position_and_hu_are_rescaled(tmp_path: Path) -> None:
    _write_series(tmp_path / "ct")
    (tmp_path / "ct" / "LICENSE").write_text("not an image")
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(volume.hu, STORED - 1024)
    np.testing.assert_allclose(
        volume.geometry.index_to_mm(), [[0.7, 0, 0, -20], [0, 0.9, 0, 10], [0, 0, 2.5, -300]], atol=1e-9
    )
    assert read_volume(tmp_path / "ct" / "slice2.dcm").geometry.same_grid(volume.geometry)


@pytest.mark.parametrize(
    "axes",
    [
        np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]),  # coronal
        np.array([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),  # normal to the feet
        np.array([[0.8, 0.6, 0.0], [-0.6, 0.8, 0.0]]),
    ],
)
def test_oblique_series_keep_their_axes(tmp_path: Path, axes: np.ndarray) -> None:
    _write_series(tmp_path / "ct", axes=axes)
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(volume.hu, STORED - 1024)
    np.testing.assert_allclose(volume.geometry.direction[:, :2].T, axes, atol=1e-12)
    np.testing.assert_allclose(volume.geometry.direction[:, 2], np.cross(axes[0], axes[1]), atol=1e-12)
    np.testing.assert_allclose(volume.geometry.origin_mm, [-20, 10, -300])


def test_each_slice_has_its_own_slope_and_fractions_are_rounded(tmp_path: Path) -> None:
    def edit(i: int, data: pydicom.Dataset) -> None:
        data.RescaleSlope, data.RescaleIntercept = (1, -1024) if i == 0 else (1 + 0.13 * i, -1000 - i)

    _write_series(tmp_path / "ct", edit)
    index = np.arange(SLICES)[:, None, None]
    slope, intercept = 1 + 0.13 * index, np.where(index == 0, -1024, -1000 - index)
    np.testing.assert_allclose(read_volume(tmp_path / "ct").hu, STORED * slope + intercept, atol=0.501)


def test_padding_outside_the_circle_is_kept(tmp_path: Path) -> None:
    def edit(_i: int, data: pydicom.Dataset) -> None:
        data.PixelPaddingValue = -2000
        data.PixelData = np.full((ROWS, COLUMNS), -2000, np.int16).tobytes()

    _write_series(tmp_path / "ct", edit)
    volume = read_volume(tmp_path / "ct")
    assert (volume.hu == -3024).all() and not volume.valid().any()


def test_a_missing_slice_is_named_by_its_neighbours(tmp_path: Path) -> None:
    _write_series(tmp_path / "ct")
    (tmp_path / "ct" / "slice1.dcm").unlink()  # slice 2 of 0..5: 2 * 5 + 3 = 13, 13 mod 6 = 1
    assert "2.50 mm apart, but not from -297.50 to -292.50 mm" in _error(tmp_path / "ct")


def test_a_duplicated_position_is_refused(tmp_path: Path) -> None:
    def edit(i: int, data: pydicom.Dataset) -> None:
        if i == 3:
            data.ImagePositionPatient = [-20.0, 10.0, -295.0]

    _write_series(tmp_path / "ct", edit)
    assert "1 slices share their position with another (the first at -295.00 mm" in _error(tmp_path / "ct")


@pytest.mark.parametrize(("degrees", "refused"), [(0.05, False), (0.2, True), (10.0, True)])
def test_gantry_tilt_over_a_tenth_of_a_degree_is_refused(tmp_path: Path, degrees: float, refused: bool) -> None:
    def edit(i: int, data: pydicom.Dataset) -> None:
        data.ImagePositionPatient = [-20.0, 10.0 + 2.5 * i * np.tan(np.radians(degrees)), -300.0 + 2.5 * i]

    _write_series(tmp_path / "ct", edit)
    if refused:
        assert f"the gantry was tilted by {degrees:.2f} degrees" in _error(tmp_path / "ct")
    else:
        np.testing.assert_array_equal(read_volume(tmp_path / "ct").hu, STORED - 1024)


def test_two_series_in_a_folder_are_counted_and_one_file_chooses(tmp_path: Path) -> None:
    _write_series(tmp_path / "ct")

    def edit(_i: int, data: pydicom.Dataset) -> None:
        data.PixelData = (STORED[0] * 0 + 7).tobytes()

    _write_series(tmp_path / "other", edit)
    for file in (tmp_path / "other").iterdir():
        shutil.copy(file, tmp_path / "ct" / f"b{file.name}")
    assert "holds 2 CT series (of 6, 6 slices); give one .dcm file" in _error(tmp_path / "ct")
    assert (read_volume(tmp_path / "ct" / "bslice0.dcm").hu == 7 - 1024).all()


def _with(**values: object) -> Edit:
    def edit(i: int, data: pydicom.Dataset) -> None:
        for name, value in values.items():
            if value is None:
                delattr(data, name)
            elif i == 4 or name in ("Modality", "ImageType"):
                setattr(data, name, value)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_with(Modality="MR"), "no CT slice found (6 other DICOM files)"),
        (_with(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "no CT slice found"),
        (_with(RescaleSlope=None), "a slice lacks RescaleSlope"),
        (_with(ImagePositionPatient=None), "a slice lacks ImagePositionPatient"),
        (_with(NumberOfFrames=3), "multi-frame"),
        (_with(BurnedInAnnotation="YES"), "text burned into its pixels"),
        (_with(PixelSpacing=[0.8, 0.7]), "differ in pixel spacing"),
        (_with(ImageOrientationPatient=[0.0, 1.0, 0.0, -1.0, 0.0, 0.0]), "differ in orientation"),
        (_with(Rows=4), "differ in size"),
    ],
)
def test_what_is_not_one_plain_ct_stack_is_refused_with_its_cause(tmp_path: Path, edit: Edit, message: str) -> None:
    _write_series(tmp_path / "ct", edit)
    assert message in _error(tmp_path / "ct")


def test_damaged_files_are_told_by_their_place_not_their_name(tmp_path: Path) -> None:
    _write_series(tmp_path / "ct")
    file = tmp_path / "ct" / "slice2.dcm"
    whole = file.read_bytes()
    file.write_bytes(b"\0" * 400)
    assert "ct: file 3 of 6 by name is a damaged DICOM file" in _error(tmp_path / "ct")
    file.write_bytes(whole[:-20])
    assert "pixels" in _error(tmp_path / "ct")


def test_values_that_pydicom_warns_about_are_not_quoted(tmp_path: Path) -> None:
    _write_series(tmp_path / "ct")
    file = tmp_path / "ct" / "slice2.dcm"
    file.write_bytes(file.read_bytes().replace(b"-300.0", b"-3x0.0"))
    for other in (tmp_path / "ct").iterdir():
        other.write_bytes(other.read_bytes().replace(b"-292.5", b"-29x.5"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _error(tmp_path / "ct")


def test_an_empty_folder_labels_and_writing_say_what_to_do(tmp_path: Path) -> None:
    assert "no CT slice found (0 other DICOM files)" in _error(tmp_path)
    with pytest.raises(VolumeError, match="label maps are not read from DICOM"):
        read_labels(tmp_path)
    geometry = Geometry(shape=(2, 3, 4), spacing_mm=(1.0, 1.0, 1.0), origin_mm=(0.0, 0.0, 0.0), direction=np.eye(3))
    with pytest.raises(VolumeError, match=r"a\.dcm: cannot be written"):
        write_volume(tmp_path / "a.dcm", Volume(hu=np.zeros((2, 3, 4), np.int16), geometry=geometry))


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
