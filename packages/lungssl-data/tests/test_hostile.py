"""Corrupted, truncated and crafted files of every format: refused in one line, never believed, never a crash.

LUNGSSL_FUZZ_CASES sets the number of random cases.
"""

import gzip
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from lungssl_data.readers import VolumeError, dicom_elements, files_of, read_volume, streams, write_volume
from lungssl_data.readers.dicom_slice import Refused, read_slice
from lungssl_data.readers.dicom_tree import find_series
from lungssl_data.volume import Geometry, Volume

CASES = int(os.environ.get("LUNGSSL_FUZZ_CASES", "150"))
MEMORY_BYTES = 2 << 30
FORMATS = ("a.nii", "a.nii.gz", "a.mha", "raw.mha", "a.mhd", "a.nrrd", "raw.nrrd", "a.nhdr", "ct")
Write = Callable[..., np.ndarray]


def _scan() -> Volume:
    hu = np.random.default_rng(0).integers(-1000, 1000, (6, 11, 13)).astype(np.int16)
    geometry = Geometry(
        shape=hu.shape, spacing_mm=(0.7, 0.9, 2.5), origin_mm=(-20.0, 10.0, -300.0), direction=np.eye(3)
    )
    return Volume(hu=hu, geometry=geometry)


def _write_all(folder: Path, write_series: Write) -> None:
    scan = _scan()
    for name in ("a.nii", "a.nii.gz", "a.mha", "a.nrrd"):
        write_volume(folder / name, scan)
    image = sitk.ReadImage(str(folder / "a.mha"))
    for name in ("raw.mha", "raw.nrrd", "a.mhd", "a.nhdr"):
        sitk.WriteImage(image, str(folder / name), useCompression=False)
    write_series(folder / "ct", stored=(scan.hu + 1024).astype(np.int16))


def _damage(whole: bytes, rng: np.random.Generator) -> bytes:
    """One of: cut short, grown, bytes flipped anywhere, bytes of the header flipped, two stretches swapped."""
    data = bytearray(whole)
    kind = rng.integers(6)
    if kind == 0:
        return bytes(data[: rng.integers(len(data))])
    if kind == 1:
        return bytes(data) + rng.bytes(int(rng.integers(1, 400)))
    if kind in (2, 3):
        reach = len(data) if kind == 2 else min(400, len(data))
        for place in rng.integers(0, reach, int(rng.integers(1, 9))):
            data[place] = rng.integers(256)
    elif kind == 4:
        for place in rng.integers(0, min(400, len(data)), 2):
            data[place] ^= 1 << int(rng.integers(8))
    else:
        length = int(rng.integers(1, 9))
        first, second = sorted(rng.integers(0, max(1, min(400, len(data)) - length), 2))
        data[first : first + length], data[second : second + length] = (
            data[second : second + length],
            data[first : first + length],
        )
    return bytes(data)


def _cases(folder: Path, count: int) -> Iterator[tuple[str, Path, bytes]]:
    """The path to read, the damaged file and its content before."""
    rng = np.random.default_rng(20240531)
    for i in range(count):
        name = FORMATS[i % len(FORMATS)]
        path = folder / name
        file = path
        if path.is_dir():
            file = sorted(path.iterdir())[rng.integers(6)]
        elif path.suffix in (".mhd", ".nhdr"):
            file = files_of(path)[rng.integers(2)]
        whole = file.read_bytes()
        file.write_bytes(_damage(whole, rng))
        yield name, file, whole
        file.write_bytes(whole)


def _check(folder: Path, count: int) -> dict[str, int]:
    """Outcomes; AssertionError where a damaged file is believed to be another scan."""
    outcomes = {"refused": 0, "read": 0}
    truth = _scan()
    for name, file, whole in _cases(folder, count):
        try:
            volume = read_volume(folder / name)
        except VolumeError as error:
            message = str(error)
            assert message.startswith(f"{name}: ") and "\n" not in message and str(folder) not in message, message
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        # What was read is what the file says: as many voxels as it holds, and in a format with a sum all of them right.
        assert volume.hu.size == truth.hu.size, (name, file.name, volume.hu.shape)
        if name in ("a.nii.gz", "a.nrrd", "a.mha"):
            np.testing.assert_array_equal(volume.hu.ravel(), truth.hu.ravel(), err_msg=name)
        assert np.isfinite(volume.geometry.index_to_mm()).all() and min(volume.geometry.spacing_mm) > 0
        assert len(file.read_bytes()) >= len(whole) - 400, "a cut file was read"
    return outcomes


_CHILD = """
import importlib.util, json, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[3]), int(sys.argv[3])))
spec = importlib.util.spec_from_file_location("hostile", sys.argv[1])
hostile = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hostile)
print(json.dumps(hostile._check(Path(sys.argv[2]), hostile.CASES)))
"""


@pytest.mark.skipif(os.name != "posix", reason="limits on memory")
def test_damaged_files_of_every_format_are_refused_or_read_as_they_say(tmp_path: Path, write_series: Write) -> None:
    _write_all(tmp_path, write_series)
    for name in FORMATS:
        np.testing.assert_array_equal(read_volume(tmp_path / name).hu, _scan().hu, err_msg=name)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _CHILD, __file__, str(tmp_path), str(MEMORY_BYTES)],
        capture_output=True,
        text=True,
        timeout=60 + CASES,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout)
    assert sum(outcomes.values()) == CASES and outcomes["refused"] > CASES * 0.4


def _refused(path: Path, text: str) -> None:
    with pytest.raises(VolumeError) as error:
        read_volume(path)
    assert text in str(error.value) and "\n" not in str(error.value)


def _nifti(folder: Path) -> tuple[Path, bytearray, bytes]:
    """Where a .nii.gz goes, and its header and voxels."""
    write_volume(folder / "a.nii", _scan())
    whole = (folder / "a.nii").read_bytes()
    return folder / "a.nii.gz", bytearray(whole[:352]), whole[352:]


@pytest.mark.parametrize("library", ["as installed", "zlib"])
def test_a_gzip_stream_is_read_to_its_end_and_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    if library == "zlib":
        monkeypatch.setattr(streams, "_zlib", zlib)
    path, header, voxels = _nifti(tmp_path)
    packed = gzip.compress(bytes(header) + voxels)
    for harmless in (
        packed,
        packed + bytes(512),
        gzip.compress(bytes(header)) + gzip.compress(voxels) + gzip.compress(b""),
    ):
        path.write_bytes(harmless)
        np.testing.assert_array_equal(read_volume(path).hu, _scan().hu)
    bomb = zlib.compressobj(9, zlib.DEFLATED, 31)
    endless = bomb.compress(bytes(header) + voxels) + b"".join(bomb.compress(bytes(1 << 20)) for _ in range(40))
    for data, text in (
        (endless + bomb.flush(), "goes on after the voxels"),
        (packed + gzip.compress(b"x"), "goes on after the voxels"),
        (packed + b"garbage", "goes on after the voxels"),
        (packed[:-9], "breaks off"),
        (packed[:-4], "breaks off"),
        (packed[:-8] + b"\0\0\0\0" + packed[-4:], "damaged"),
        (packed[:-4] + b"\0\0\0\1", "damaged"),
    ):
        path.write_bytes(data)
        _refused(path, text)


@pytest.mark.parametrize(
    ("offset", "form", "values", "text"),
    [
        (40, "<4h", (3, -13, 11, 6), "has dimensions (-13, 11, 6)"),
        (40, "<4h", (3, 32767, 32767, 32767), "more than the limit of 4 GiB"),
        (40, "<h", (0,), "has dimensions ()"),
        (40, "<h", (9,), ""),
        (42, "<3h", (26, 11, 3), ""),  # as many voxels: read
        (42, "<3h", (13, 11, 5), "goes on after the voxels"),
        (42, "<3h", (13, 11, 7), "breaks off"),
        (70, "<h", (1 << 12,), ""),
        (72, "<h", (8,), "damaged"),
        (108, "<f", (np.nan,), "damaged"),
        (108, "<f", (3e9,), "damaged"),
        (108, "<f", (348.0,), "damaged"),
        (112, "<2f", (np.inf, 0.0), "scl_slope or scl_inter is not finite"),
        (280, "<f", (np.nan,), "not finite"),
        (280, "<4f", (0, 0, 0, 0), "singular"),
        (280, "<f", (3e5,), "beyond 100000 mm"),
        (280, "<f", (500.0,), "0.01 to 100 mm are possible"),
        (344, "4s", (b"ni1\0",), ".hdr and .img are not read"),
        (344, "4s", (b"\0\0\0\0",), "is not a NIfTI file"),
    ],
)
def test_nifti_headers_that_cannot_be_are_refused(
    tmp_path: Path, offset: int, form: str, values: tuple, text: str
) -> None:
    path, header, voxels = _nifti(tmp_path)
    struct.pack_into(form, header, offset, *values)
    path.write_bytes(gzip.compress(bytes(header) + voxels))
    (tmp_path / "a.nii").write_bytes(bytes(header) + voxels)
    for file in (path, tmp_path / "a.nii"):
        if values == (26, 11, 3):
            assert read_volume(file).hu.shape == (3, 11, 26)
        else:
            _refused(file, text)


def test_a_qform_needs_voxels_of_a_size(tmp_path: Path) -> None:
    _, header, voxels = _nifti(tmp_path)
    struct.pack_into("<h", header, 254, 0)  # sform_code
    for size in (0.0, -1.0, np.nan):
        struct.pack_into("<f", header, 84, size)
        (tmp_path / "a.nii").write_bytes(bytes(header) + voxels)
        _refused(tmp_path / "a.nii", "voxel size is not positive")


_MHA = "ObjectType = Image\nNDims = 3\nDimSize = 2 3 4\nElementType = MET_SHORT\n{}ElementDataFile = {}\n"
_NRRD = "NRRD0004\ntype: short\ndimension: 3\nspace: LPS\nsizes: 2 3 4\nencoding: raw\nendian: little\n{}\n"


@pytest.mark.parametrize(
    ("lines", "payload", "text"),
    [
        ("ElementSpacing = 0 1 1\n", 48, ""),
        ("ElementSpacing = nan 1 1\n", 48, ""),
        ("ElementSpacing = 1e9 1 1\n", 48, ""),
        ("TransformMatrix = 1 0 0 1 0 0 0 0 1\n", 48, ""),
        ("Offset = inf 0 0\n", 48, "Offset is not 3 numbers"),
        ("ElementSpacing = 1 x7 1\n", 48, "ElementSpacing is not 3 numbers"),
        ("ElementSpacing = 1 1\n", 48, "ElementSpacing is not 3 numbers"),
        ("DimSize = 2 3 5\n", 48, "states something twice"),
        ("HeaderSize = x\n", 48, "damaged"),
        ("BinaryData = False\n", 48, "voxels as text"),
        ("", 47, "breaks off"),
        ("", 49, "goes on after the voxels"),
        ("CompressedData = True\n", 48, "compressed data are damaged"),
    ],
)
def test_metaimage_headers_that_cannot_be_are_refused(tmp_path: Path, lines: str, payload: int, text: str) -> None:
    (tmp_path / "a.mha").write_bytes(_MHA.format(lines, "LOCAL").encode() + bytes(range(payload)))
    _refused(tmp_path / "a.mha", text)


@pytest.mark.parametrize(
    ("lines", "payload", "text"),
    [
        ("space directions: (0,0,0) (0,1,0) (0,0,1)\nspace dimension: 3\n", 48, ""),
        ("space: left-posterior-superior\nspace directions: (nan,0,0) (0,1,0) (0,0,1)\n", 48, ""),
        ("space: left-posterior-superior\nspace directions: (1,0,0) (1,0,0) (0,0,1)\n", 48, ""),
        ("space: left-posterior-superior\nspace origin: (inf,0,0)\n", 48, ""),
        ("sizes: 2 3 5\n", 48, "states something twice"),
        ("byte skip: 10\n", 58, "skips lines or bytes"),
        ("line skip: 1\n", 58, "skips lines or bytes"),
        ("", 47, "breaks off"),
        ("", 49, "goes on after the voxels"),
    ],
)
def test_nrrd_headers_that_cannot_be_are_refused(tmp_path: Path, lines: str, payload: int, text: str) -> None:
    (tmp_path / "a.nrrd").write_bytes(_NRRD.format(lines).encode() + bytes(range(payload)))
    _refused(tmp_path / "a.nrrd", text)


@pytest.mark.parametrize("byte_order", ["little", "big"])
def test_nrrd_and_metaimage_are_read_in_either_byte_order(tmp_path: Path, byte_order: str) -> None:
    values = np.arange(24).reshape(4, 3, 2) - 12
    payload = values.astype("<i2" if byte_order == "little" else ">i2").tobytes()
    (tmp_path / "a.nrrd").write_bytes(_NRRD.format("").replace("little", byte_order).encode() + payload)
    big = f"BinaryDataByteOrderMSB = {byte_order == 'big'}\n"
    (tmp_path / "a.mha").write_bytes(_MHA.format(big, "LOCAL").encode() + payload)
    (tmp_path / "a.mhd").write_text(_MHA.format(big + "HeaderSize = -1\n", "a.raw"))
    (tmp_path / "a.raw").write_bytes(b"some header" + payload)
    for name in ("a.nrrd", "a.mha", "a.mhd"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).hu, values)


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_data_file_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scan").mkdir()
    (tmp_path / "secret.raw").write_bytes(bytes(48))
    (tmp_path / "scan" / "a.raw").symlink_to(tmp_path / "secret.raw")
    (tmp_path / "scan" / "a.mhd").write_text(_MHA.format("", "a.raw"))
    (tmp_path / "scan" / "a.nhdr").write_text(_NRRD.format("data file: a.raw\n"))
    for name in ("a.mhd", "a.nhdr"):
        _refused(tmp_path / "scan" / name, "its data file must be one file in the header's own folder")
    # A line end that only some parsers see must not hide another data file.
    hidden = _MHA.format("Comment = x\x85ElementDataFile = LOCAL\n", tmp_path / "secret.raw").encode("latin-1")
    (tmp_path / "scan" / "b.mha").write_bytes(hidden + bytes(48))
    _refused(tmp_path / "scan" / "b.mha", "its data file must be one file in the header's own folder")


def test_a_slice_cut_anywhere_is_never_passed_over_as_something_else(tmp_path: Path, write_series: Write) -> None:
    write_series(tmp_path / "ct")
    file = tmp_path / "ct" / "slice2.dcm"
    whole = file.read_bytes()
    for length in range(132, len(whole)):
        file.write_bytes(whole[:length])
        try:
            assert isinstance(read_slice(file), Refused), length
        except VolumeError as error:
            assert error.problem == "is a damaged DICOM file; export the series again"


def test_dicom_structures_that_never_end_are_refused(
    tmp_path: Path, write_series: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicom_elements, "MOST_ELEMENTS", 2_500)
    write_series(tmp_path / "ct")
    file = tmp_path / "ct" / "slice2.dcm"
    whole = file.read_bytes()
    pixels = whole.index(struct.pack("<HH2s", 0x7FE0, 0x0010, b"OW"))
    begin = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    for inserted in (
        (begin + item) * 3_000,  # nested
        begin + struct.pack("<HHI", 0xFFFE, 0xE000, 0) * 3_000,  # items without end
        struct.pack("<HH2sH", 0x0009, 0x0010, b"LO", 0) * 3_000,
        struct.pack("<HH2sHI", 0x0009, 0x1010, b"UN", 0, 0xFFFFFFF0),  # longer than the file
        struct.pack("<HH2sHI", 0x0020, 0x000E, b"UT", 0, 1 << 20) + bytes(1 << 20),
    ):
        file.write_bytes(whole[:pixels] + inserted + whole[pixels:])
        _refused(tmp_path / "ct", "is a damaged DICOM file")
        assert any(entry.problem for entry in find_series(tmp_path, key=bytes(32)))
