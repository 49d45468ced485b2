from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from lungssl_data.field import read_field, write_field
from lungssl_data.readers.checks import damaged
from lungssl_data.volume import Geometry

GRID = Geometry(shape=(3, 4, 5), spacing_mm=(1.0, 2.0, 3.0), origin_mm=(-7.0, 5.0, 11.0), direction=np.eye(3))


def _field() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, *GRID.shape)).astype(np.float32)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_a_field_moves_a_point_as_simpleitk_moves_it(tmp_path: Path, suffix: str) -> None:
    u_mm = _field()
    write_field(tmp_path / f"u{suffix}", u_mm, GRID)
    back, grid = read_field(tmp_path / f"u{suffix}")
    np.testing.assert_array_equal(back, u_mm)
    assert grid.same_grid(GRID)
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(tmp_path / f"u{suffix}"), sitk.sitkVectorFloat64))
    point = (-7.0 + 2 * 1.0, 5.0 + 1 * 2.0, 11.0 + 1 * 3.0)  # voxel z 1, y 1, x 2
    np.testing.assert_allclose(transform.TransformPoint(point), np.add(point, u_mm[:, 1, 1, 2]), atol=1e-6)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".h5"])
def test_simpleitk_moves_a_point_of_an_oblique_grid_by_any_file(tmp_path: Path, suffix: str) -> None:
    c, s = np.cos(0.3), np.sin(0.3)
    turned = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    grid = Geometry(shape=GRID.shape, spacing_mm=GRID.spacing_mm, origin_mm=GRID.origin_mm, direction=turned)
    u_mm, path = _field(), tmp_path / f"u{suffix}"
    write_field(path, u_mm, grid)
    if suffix == ".h5":
        transform = sitk.ReadTransform(str(path))
    else:
        transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
        stored = nibabel.load(path)
        assert stored.header["intent_code"] == 1007 and stored.shape == (5, 4, 3, 1, 3)  # pyright: ignore
        np.testing.assert_array_equal(np.asarray(stored.dataobj)[2, 1, 1, 0], u_mm[:, 1, 1, 2])  # LPS as they are
    point = grid.index_to_mm() @ [2, 1, 1, 1]
    np.testing.assert_allclose(transform.TransformPoint(point), point + u_mm[:, 1, 1, 2], atol=1e-5)


def test_an_oblique_field_is_read_where_it_may_be(tmp_path: Path) -> None:
    turned = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    grid = Geometry(shape=GRID.shape, spacing_mm=GRID.spacing_mm, origin_mm=GRID.origin_mm, direction=turned)
    write_field(tmp_path / "u.mha", _field(), grid)
    with pytest.raises(ValueError, match="not axis-aligned"):
        read_field(tmp_path / "u.mha")
    assert read_field(tmp_path / "u.mha", oblique=True)[1].same_grid(grid)


def test_a_header_that_claims_more_than_its_file_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    write_field(tmp_path / "u.nrrd", _field(), GRID)
    text = (tmp_path / "u.nrrd").read_bytes().replace(b"sizes: 3 5 4 3", b"sizes: 3 900 900 900")
    (tmp_path / "u.nrrd").write_bytes(text)
    with pytest.raises(ValueError, match=r"GiB of voxels|the file can hold"):
        read_field(tmp_path / "u.nrrd")


def test_a_data_file_elsewhere_is_refused(tmp_path: Path) -> None:
    write_field(tmp_path / "u.nrrd", _field(), GRID)
    text = (tmp_path / "u.nrrd").read_bytes().replace(b"encoding: gzip", b"encoding: gzip\ndata file: /etc/passwd")
    (tmp_path / "u.nrrd").write_bytes(text)
    with pytest.raises(ValueError, match="its data file must be one file in the header's own folder"):
        read_field(tmp_path / "u.nrrd")


def test_truncated_and_infinite_fields_are_refused(tmp_path: Path) -> None:
    write_field(tmp_path / "u.mha", _field(), GRID)
    whole = (tmp_path / "u.mha").read_bytes()
    (tmp_path / "u.mha").write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"u\.mha"):
        read_field(tmp_path / "u.mha")
    u_mm = _field()
    u_mm[0, 0, 0, 0] = np.inf
    write_field(tmp_path / "v.mha", u_mm, GRID)
    with pytest.raises(ValueError, match="infinite displacements"):
        read_field(tmp_path / "v.mha")


@pytest.mark.parametrize(
    "lines",
    [
        "elementdatafile = LOCAL\nElementDataFile = secret.raw\n",
        "ElementDataFile : secret.raw\nElementDataFile = LOCAL\n",
    ],
)
def test_voxels_of_another_file_are_never_taken(tmp_path: Path, lines: str) -> None:
    (tmp_path / "secret.raw").write_bytes(np.full(3 * 60, 7, "<f4").tobytes())
    header = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nDimSize = 5 4 3\n"
        "ElementSpacing = 1 1 1\nElementNumberOfChannels = 3\nElementType = MET_FLOAT\n"
    )
    path = tmp_path / "in" / "u.mha"
    path.parent.mkdir()
    lines = lines.replace("secret.raw", str(tmp_path / "secret.raw"))
    path.write_bytes((header + lines).encode() + np.zeros(3 * 60, "<f4").tobytes())
    with pytest.raises(ValueError, match="header is not spelled as MetaImage's are"):
        read_field(path)


def test_a_file_that_cant_be_read_for_want_of_memory_isnt_called_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    assert "damaged" in str(damaged("u.mha"))
    monkeypatch.setattr("lungssl_data.readers.checks.mmap.mmap", none)
    with pytest.raises(MemoryError):
        damaged("u.mha")
