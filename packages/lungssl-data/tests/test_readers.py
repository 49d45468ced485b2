"""Round trips, agreement with SimpleITK, and what is refused."""

import gzip
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from lungssl_data.readers import VolumeError, read_labels, read_volume, write_labels, write_volume
from lungssl_data.volume import Geometry, LabelMap, Volume

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
FORMATS = ["a.nii", "a.nii.gz", "a.mha", "a.nrrd"]


def _rotation(degrees: tuple[float, float, float]) -> np.ndarray:
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


DIRECTIONS = {
    "identity": np.eye(3),
    "flipped": np.diag([1.0, -1.0, -1.0]),
    "sagittal": np.array([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]),
    "left-handed": np.diag([-1.0, 1.0, 1.0]),
    "oblique": _rotation((11.0, -17.0, 31.0)),
    "oblique and flipped": _rotation((11.0, -17.0, 31.0)) @ np.diag([-1.0, 1.0, 1.0]),
}


def _geometry(direction: np.ndarray) -> Geometry:
    return Geometry(
        shape=(4, 6, 5), spacing_mm=(0.712345, 0.9, 2.5), origin_mm=(-153.812, 146.437, -1434.512), direction=direction
    )


def _volume(direction: np.ndarray | None = None) -> Volume:
    geometry = _geometry(np.eye(3) if direction is None else direction)
    hu = np.random.default_rng(0).integers(-1024, 1500, geometry.shape).astype(np.int16)
    return Volume(hu=hu, geometry=geometry)


def _affine_ras(geometry: Geometry) -> np.ndarray:
    return np.vstack([np.diag([-1.0, -1.0, 1.0]) @ geometry.index_to_mm(), [0, 0, 0, 1]])


def _itk_to_mm(image: sitk.Image) -> np.ndarray:
    matrix = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
    return np.column_stack([matrix, image.GetOrigin()])


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_round_trip_keeps_voxel_order_and_places_corners_within_a_ten_thousandth_mm(
    tmp_path: Path, name: str, direction: np.ndarray
) -> None:
    volume = _volume(direction)
    labels = LabelMap(labels=(volume.hu % 6).astype(np.uint8), geometry=volume.geometry)
    write_volume(tmp_path / name, volume)
    write_labels(tmp_path / f"m{name}", labels)
    read, read_mask = read_volume(tmp_path / name), read_labels(tmp_path / f"m{name}")
    assert read.geometry.same_grid(volume.geometry, tolerance_mm=1e-4)
    assert read_mask.geometry.same_grid(volume.geometry, tolerance_mm=1e-4)
    np.testing.assert_array_equal(read.hu, volume.hu)
    np.testing.assert_array_equal(read_mask.labels, labels.labels)


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_simpleitk_sees_the_same_voxels_in_the_same_place(tmp_path: Path, name: str, direction: np.ndarray) -> None:
    volume = _volume(direction)
    write_volume(tmp_path / name, volume)
    image = sitk.ReadImage(str(tmp_path / name))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), volume.hu)
    np.testing.assert_allclose(_itk_to_mm(image), volume.geometry.index_to_mm(), atol=1e-4)


def test_a_large_oblique_scan_far_from_the_origin_keeps_its_far_corner(tmp_path: Path) -> None:
    geometry = Geometry(
        shape=(2, 3, 512),
        spacing_mm=(0.7123456789, 0.9, 2.5),
        origin_mm=(-253.8123456, 146.4371234, -1034.5123456),
        direction=DIRECTIONS["oblique"],
    )
    for name in FORMATS:
        write_labels(tmp_path / name, LabelMap(labels=np.zeros(geometry.shape, np.uint8), geometry=geometry))
        assert read_labels(tmp_path / name).geometry.same_grid(geometry, tolerance_mm=1e-4), name


@pytest.mark.parametrize("header", ["a.mhd", "a.nhdr"])
def test_a_header_with_its_data_file_beside_it_is_read(tmp_path: Path, header: str) -> None:
    volume = _volume()
    image = sitk.GetImageFromArray(volume.hu)
    image.SetOrigin(volume.geometry.origin_mm)
    image.SetSpacing(volume.geometry.spacing_mm)
    sitk.WriteImage(image, str(tmp_path / header))
    np.testing.assert_array_equal(read_volume(tmp_path / header).hu, volume.hu)
    assert read_volume(str(tmp_path / header)).geometry.same_grid(volume.geometry, tolerance_mm=1e-4)


def test_an_nrrd_in_ras_arrives_in_lps(tmp_path: Path) -> None:
    (tmp_path / "a.nrrd").write_bytes(
        b"NRRD0004\ntype: short\ndimension: 3\nspace: right-anterior-superior\nsizes: 2 3 4\n"
        b"space directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (10,20,30)\nencoding: raw\nendian: little\n\n"
        + np.arange(24, dtype="<i2").tobytes()
    )
    volume = read_volume(tmp_path / "a.nrrd")
    np.testing.assert_allclose(volume.geometry.index_to_mm()[:, 3], [-10, -20, 30])
    np.testing.assert_allclose(volume.geometry.index_to_mm()[:, :3], np.diag([-2, -3, 4]))
    assert volume.hu[3, 2, 1] == 23


def test_nifti_slope_and_intercept_are_applied_and_rounded(tmp_path: Path) -> None:
    stored = np.arange(24, dtype=np.uint16).reshape(2, 3, 4, order="F") * 100
    image = nibabel.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(1.5, -1024.25)
    nibabel.save(image, tmp_path / "a.nii.gz")
    header = bytearray(gzip.decompress((tmp_path / "a.nii.gz").read_bytes()))
    assert struct.unpack_from("<2f", header, 112) == (1.5, -1024.25)  # scl_slope, scl_inter
    saved = np.frombuffer(bytes(header[352:]), np.uint16).reshape(4, 3, 2)  # z, y, x
    expected = np.rint(saved * 1.5 - 1024.25)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").hu, expected)


def test_float_voxels_are_rounded_to_the_nearest_hu(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.full((2, 3, 4), -850.6, np.float32), np.eye(4))
    nibabel.save(image, tmp_path / "a.nii")
    assert (read_volume(tmp_path / "a.nii").hu == -851).all()


def test_padding_is_kept_and_told_by_valid(tmp_path: Path) -> None:
    volume = _volume()
    volume.hu[0], volume.hu[1] = -2048, -3024
    write_volume(tmp_path / "a.nrrd", volume)
    read = read_volume(tmp_path / "a.nrrd")
    assert (read.hu[0] == -2048).all() and (read.hu[1] == -3024).all()
    assert not read.valid()[:2].any() and read.valid()[2:].all()


def test_sform_and_qform_must_agree_and_either_serves_alone(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((2, 3, 4), np.int16), np.eye(4))
    sform, qform = np.diag([2.0, 2.0, 2.0, 1.0]), np.diag([2.0, 2.0, 2.0, 1.0])
    sform[0, 3], qform[0, 3] = 5.0, 9.0
    for codes, x_mm in (((1, 0), -5.0), ((0, 2), -9.0)):
        image.set_qform(qform, code=codes[1])
        image.set_sform(sform, code=codes[0])
        nibabel.save(image, tmp_path / "a.nii")
        assert read_volume(tmp_path / "a.nii").geometry.origin_mm[0] == x_mm
    image.set_qform(qform, code=2)
    image.set_sform(sform, code=1)
    nibabel.save(image, tmp_path / "a.nii")
    with pytest.raises(VolumeError, match=r"sform and qform put a corner 4\.0 mm apart.*set both"):
        read_volume(tmp_path / "a.nii")
    qform[0, 3] = 5.5  # a quarter of a voxel
    image.set_qform(qform, code=2)
    nibabel.save(image, tmp_path / "a.nii")
    assert read_volume(tmp_path / "a.nii").geometry.origin_mm[0] == -5.0


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "its space is not one of"),
        ("space: scanner-xyz\n", "its space is not one of"),
        ('space: LPS\nspace units: "m" "m" "m"\n', "its space units is not mm"),
    ],
)
def test_an_nrrd_without_orientation_or_in_other_units_is_refused(tmp_path: Path, line: str, problem: str) -> None:
    header = f"NRRD0004\ntype: short\ndimension: 3\nsizes: 2 3 4\n{line}encoding: raw\nendian: little\n\n"
    (tmp_path / "a.nrrd").write_bytes(header.encode() + b"\0" * 48)
    with pytest.raises(VolumeError, match=problem):
        read_volume(tmp_path / "a.nrrd")


def test_a_metaimage_in_other_units_is_refused(tmp_path: Path) -> None:
    header = "ObjectType = Image\nNDims = 3\nDimSize = 2 3 4\nDistanceUnits = um\nElementType = MET_SHORT\n"
    (tmp_path / "a.mha").write_bytes((header + "ElementDataFile = LOCAL\n").encode() + b"\0" * 48)
    with pytest.raises(VolumeError, match="DistanceUnits is not mm; export it in millimetres"):
        read_volume(tmp_path / "a.mha")


def test_one_frame_of_a_4d_nifti_passes_and_two_do_not(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 3, 4, 1), np.int16), np.eye(4)), tmp_path / "a.nii")
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 3, 4, 2), np.int16), np.eye(4)), tmp_path / "b.nii")
    assert read_volume(tmp_path / "a.nii").hu.shape == (4, 3, 2)
    with pytest.raises(VolumeError, match=r"b\.nii: has dimensions \(2, 3, 4, 2\), one 3-D frame"):
        read_volume(tmp_path / "b.nii")


def test_nifti_without_orientation_is_refused(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((2, 3, 4), np.int16), np.eye(4))
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    nibabel.save(image, tmp_path / "a.nii")
    with pytest.raises(VolumeError, match="neither sform nor qform is set"):
        read_volume(tmp_path / "a.nii")


def test_a_sheared_affine_is_refused_with_its_angle(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[1, 2] = np.tan(np.radians(5.0))
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 3, 4), np.int16), affine), tmp_path / "a.nii")
    with pytest.raises(VolumeError, match=r"sheared by 5\.00 degrees"):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "holds NaN"), (40000.0, "do not fit int16"), (-40000.0, "do not fit int16")]
)
def test_values_that_are_no_hounsfield_units_are_refused(tmp_path: Path, value: float, message: str) -> None:
    data = np.zeros((2, 3, 4), np.float32)
    data[1, 2, 3] = value
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii.gz")
    sitk.WriteImage(sitk.GetImageFromArray(data), str(tmp_path / "a.nrrd"))
    for name in ("a.nii.gz", "a.nrrd"):
        with pytest.raises(VolumeError, match=f"{name}: .*{message}"):
            read_volume(tmp_path / name)


@pytest.mark.parametrize("value", [0.5, -1.0, 256.0, np.nan])
def test_labels_must_be_whole_numbers_up_to_255(tmp_path: Path, value: float) -> None:
    nibabel.save(nibabel.Nifti1Image(np.full((2, 3, 4), value, np.float32), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(VolumeError, match="a label map holds whole numbers"):
        read_labels(tmp_path / "a.nii")


@pytest.mark.parametrize("keep", [0, 10, 200, 0.6, 0.95])
@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_file_is_one_line_that_names_it(
    tmp_path: Path, capfd: pytest.CaptureFixture, name: str, keep: float
) -> None:
    hu = np.random.default_rng(1).integers(-1024, 1500, (11, 17, 13)).astype(np.int16)
    geometry = Geometry(shape=hu.shape, spacing_mm=(1.0, 1.0, 2.0), origin_mm=(0.0, 0.0, 0.0), direction=np.eye(3))
    write_volume(tmp_path / name, Volume(hu=hu, geometry=geometry))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(VolumeError) as error:
        read_volume(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value) and str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_other_content_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no image " * 999)
    with pytest.raises(VolumeError, match=name):
        read_volume(tmp_path / name)


def test_a_header_that_claims_gigabytes_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape((2000, 2000, 2000))
    header.set_data_dtype(np.int16)
    header.set_sform(np.eye(4), code=1)
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(header.binaryblock + b"\0" * 1000))
    with pytest.raises(VolumeError, match=r"claims 14\.9 GiB"):
        read_volume(tmp_path / "bomb.nii.gz")
    header.set_data_shape((500, 500, 500))
    (tmp_path / "short.nii.gz").write_bytes(gzip.compress(header.binaryblock + b"\0" * 1000))
    with pytest.raises(VolumeError, match=r"short\.nii\.gz: its header claims 250000000 bytes .* truncated"):
        read_volume(tmp_path / "short.nii.gz")
    (tmp_path / "bomb.nrrd").write_text(
        "NRRD0004\ntype: short\ndimension: 3\nspace: LPS\nsizes: 2000 2000 2000\nencoding: gzip\nendian: little\n\nx"
    )
    with pytest.raises(VolumeError, match=r"claims 14\.9 GiB"):
        read_volume(tmp_path / "bomb.nrrd")


@pytest.mark.parametrize("target", ["../secret.raw", "/etc/passwd", "LIST", "a%03d.raw 1 4 1", "gone.raw"])
def test_a_header_cannot_reach_outside_its_folder(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "scan"
    folder.mkdir()
    (tmp_path / "secret.raw").write_bytes(b"\0" * 48)
    (folder / "LIST").write_bytes(b"\0" * 48)
    (folder / "a.mhd").write_text(
        f"ObjectType = Image\nNDims = 3\nDimSize = 2 3 4\nElementType = MET_SHORT\nElementDataFile = {target}\n"
    )
    (folder / "a.nhdr").write_text(
        "NRRD0004\ntype: short\ndimension: 3\nspace: LPS\nsizes: 2 3 4\nencoding: raw\nendian: little\n"
        f"data file: {target}\n"
    )
    for name in ("a.mhd", "a.nhdr"):
        with pytest.raises(VolumeError, match=f"{name}: its data file must be one file in the header's own folder"):
            read_volume(folder / name)


@pytest.mark.parametrize("line", ["transformmatrix = 1 0 0 0 1 0 0 0 -1", "elementdatafile = b.raw", "Offset : 1 2 3"])
def test_a_metaimage_header_is_spelled_as_simpleitk_reads_it(tmp_path: Path, line: str) -> None:
    header = (
        f"ObjectType = Image\nNDims = 3\nDimSize = 2 3 4\nElementType = MET_SHORT\n{line}\nElementDataFile = LOCAL\n"
    )
    (tmp_path / "a.mha").write_bytes(header.encode() + b"\0" * 48)
    (tmp_path / "b.raw").write_bytes(b"\0" * 48)
    with pytest.raises(VolumeError, match="header is not spelled as MetaImage's are; export it again"):
        read_volume(tmp_path / "a.mha")


@pytest.mark.parametrize("word", ["True", "T", "t", "1", "False", "F", "0"])
def test_a_metaimage_s_truth_is_told_by_its_first_letter_as_simpleitk_does(tmp_path: Path, word: str) -> None:
    header = "ObjectType = Image\nNDims = 3\nDimSize = 2 3 4\nElementType = MET_SHORT\nBinaryData = True\n"
    header += f"BinaryDataByteOrderMSB = {word}\nElementDataFile = LOCAL\n"
    voxels = np.arange(24, dtype=">i2" if word[0] in "Tt1" else "<i2")
    (tmp_path / "a.mha").write_bytes(header.encode() + voxels.tobytes())
    found = read_volume(tmp_path / "a.mha").hu
    np.testing.assert_array_equal(found, sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.mha"))))
    assert found.ravel().tolist() == list(range(24))
    both = header.replace("BinaryDataByteOrderMSB", "ElementByteOrderMSB = True\nBinaryDataByteOrderMSB")
    (tmp_path / "b.mha").write_bytes(both.encode() + voxels.tobytes())
    if word[0] not in "Tt1":
        with pytest.raises(VolumeError, match="states two byte orders; export it again"):
            read_volume(tmp_path / "b.mha")
    (tmp_path / "c.mha").write_bytes(header.replace("BinaryData = True", "BinaryData = F").encode() + voxels.tobytes())
    with pytest.raises(VolumeError, match="holds its voxels as text"):
        read_volume(tmp_path / "c.mha")


def test_a_nrrd_of_text_is_refused(tmp_path: Path) -> None:
    header = "NRRD0004\ntype: short\ndimension: 3\nsizes: 1 1 2\nencoding: ascii\n\n1 2\n"
    (tmp_path / "a.nrrd").write_text(header)
    with pytest.raises(VolumeError, match="its voxels are neither raw nor gzip; export it as one of them"):
        read_volume(tmp_path / "a.nrrd")


def test_unknown_missing_and_unwritable_paths_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"a\.png: not a known format; known are \.nii"):
        read_volume(tmp_path / "a.png")
    for name in ["a.nii.gz", "a.mha", "a.dcm"]:
        with pytest.raises(VolumeError, match=f"{name}: no such file"):
            read_volume(tmp_path / name)
    with pytest.raises(VolumeError, match=r"a\.mhd: cannot be written; name the file \.nii"):
        write_volume(tmp_path / "a.mhd", _volume())
    with pytest.raises(VolumeError, match="the folder to write to does not exist"):
        write_volume(tmp_path / "gone" / "a.nii", _volume())


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.nii.gz"
    write_volume(target, _volume())
    before = target.read_bytes()

    def fail(_image: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(nibabel, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_volume(target, _volume())
    assert target.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]


def test_nifti_headers_carry_no_text_and_scanner_codes(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.nii", _volume(DIRECTIONS["oblique"]))
    header = nibabel.load(tmp_path / "a.nii").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    assert header.get_data_dtype() == np.int16
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        assert header[field].item() == b""
    np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=1e-3)


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name", ["elastix_lung/3DCT_lung_baseline.mha", "lidc_idri_0001/ct.nii.gz", "cip_ct64/ct-64.nrrd"]
)
def test_real_scans_are_read_as_simpleitk_reads_them(name: str) -> None:
    if not (SHARED / name).exists():
        pytest.skip("shared data are not here")
    volume, image = read_volume(SHARED / name), sitk.ReadImage(str(SHARED / name))
    np.testing.assert_array_equal(volume.hu, sitk.GetArrayFromImage(image))
    np.testing.assert_allclose(volume.geometry.index_to_mm(), _itk_to_mm(image), atol=1e-4)
