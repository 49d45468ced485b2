import math
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest
from lungssl_data.cache_index import FORMAT_VERSION
from lungssl_data.chunk_codec import RAW_ABOVE
from lungssl_data.direct_chunks import PatientChunks, chunk_table, decode_into, direct_volume, write_volumes
from lungssl_data.pair import CacheError
from numpy import ndarray

NAMES = {np.dtype(np.int16): "ct", np.dtype(np.uint8): "lung"}


def _content(kind: str, shape: tuple[int, int, int]) -> ndarray:
    """Volumes that meet each way a plane is stored: raw, LZ4 with long, short and no matches."""
    rng = np.random.default_rng(math.prod(shape))
    _, y, x = np.indices(shape)
    body = np.where((y - shape[1] / 2) ** 2 + (x - shape[2] / 2) ** 2 < (shape[1] / 3) ** 2, 40, -1000)
    return {
        "ct": (body + rng.normal(0, 18, shape)).astype(np.int16),
        "noise": rng.integers(-(2**15), 2**15, shape).astype(np.int16),
        "flat": np.full(shape, -1000, np.int16),
        "stripes": ((x * 977 + y) % 3000 - 1000).astype(np.int16),
        "mask": ((body > 0) * (1 + (x > shape[2] // 2))).astype(np.uint8),
        "mask noise": rng.integers(0, 256, shape).astype(np.uint8),
        "empty": np.zeros(shape, np.uint8),
    }[kind]


def _write(path: Path, data: ndarray) -> Path:
    with h5py.File(path, "w") as file:
        file.attrs["format"] = FORMAT_VERSION
        write_volumes(file, "exhale", {"ct": np.zeros(data.shape, np.int16), NAMES[data.dtype]: data})
    return path


def _read(path: Path, start: tuple[int, int, int], size: tuple[int, int, int], dtype: np.dtype) -> ndarray:
    """A box by the direct reader, from 7 outside the volume; guards around it must stay."""
    around = np.full((size[0] + 2, *size[1:]), 7, dtype)
    PatientChunks(path).read_into(f"exhale/{NAMES[dtype]}", start, around[1:-1])
    assert (around[[0, -1]] == 7).all()
    return around[1:-1]


@pytest.mark.parametrize("shape", [(37, 41, 45), (32, 64, 96), (5, 33, 70), (1, 1, 1), (65, 7, 31)])
@pytest.mark.parametrize("kind", ["ct", "noise", "flat", "stripes", "mask", "mask noise", "empty"])
def test_any_box_equals_what_plain_hdf5_reads(tmp_path: Path, kind: str, shape: tuple[int, int, int]) -> None:
    data = _content(kind, shape)
    path = _write(tmp_path / "p.h5", data)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file[f"exhale/{NAMES[data.dtype]}"][()], data)
    rng = np.random.default_rng(0)
    padded = np.pad(data, 12, constant_values=7)
    for _ in range(20):
        low = [int(rng.integers(0, n + 23)) for n in shape]
        high = [int(rng.integers(a + 1, n + 25)) for a, n in zip(low, shape, strict=True)]
        start = tuple(a - 12 for a in low)
        box = _read(path, start, tuple(b - a for a, b in zip(low, high, strict=True)), data.dtype)
        np.testing.assert_array_equal(box, padded[tuple(map(slice, low, high))])
    np.testing.assert_array_equal(_read(path, (500, 0, 0), (2, 3, 4), data.dtype), 7)


@pytest.mark.parametrize("kind", ["ct", "stripes", "flat", "mask"])
def test_chunks_that_the_filters_of_hdf5_made_decode_alike(tmp_path: Path, kind: str) -> None:
    # LZ4's own encoder makes matches from 1 byte back and 4 bytes long, which ours leaves out.
    data = _content(kind, (40, 50, 60))
    with h5py.File(tmp_path / "p.h5", "w") as file:
        shuffle = data.dtype == np.int16
        file.create_dataset("v", data=data, chunks=(32,) * 3, shuffle=shuffle, **hdf5plugin.LZ4(nbytes=32**3))
        volume = direct_volume(file["v"], chunk_table(file["v"]))
    out = np.empty_like(data)
    assert decode_into(np.fromfile(tmp_path / "p.h5", np.uint8), volume, (0, 0, 0), out) == ""
    np.testing.assert_array_equal(out, data)


def test_low_bytes_of_noise_are_stored_raw_and_the_file_is_small(tmp_path: Path) -> None:
    path = _write(tmp_path / "p.h5", _content("ct", (64, 64, 64)))
    with h5py.File(path) as file:
        table = file["chunks/exhale"][0]
        _, header = file["exhale/ct"].id.read_direct_chunk((0, 0, 0))
    assert struct.unpack(">QII", header[:16]) == (2 * 32**3, 32**3, 32**3)
    assert table[..., 1].sum() < 0.6 * 2 * 64**3
    (high,) = struct.unpack(">I", header[16 + 32**3 : 20 + 32**3])
    assert high < RAW_ABOVE * 32**3


def test_threads_can_read_at_once(tmp_path: Path) -> None:
    data = _content("ct", (64, 64, 64))
    chunks = PatientChunks(_write(tmp_path / "p.h5", data))

    def read(k: int) -> ndarray:
        out = np.empty((32, 40, 48), np.int16)
        chunks.read_into("exhale/ct", (k, k, 8), out)
        return out

    with ThreadPoolExecutor(4) as pool:
        for k, box in enumerate(pool.map(read, range(24))):
            np.testing.assert_array_equal(box, data[k : k + 32, k : k + 40, 8:56])


def test_an_array_of_another_kind_is_refused(tmp_path: Path) -> None:
    chunks = PatientChunks(_write(tmp_path / "p.h5", _content("ct", (40, 40, 40))))
    for out in (
        np.empty((8, 8, 8), np.uint8),
        np.empty((8, 8, 8), np.int16).T[::2],
        np.empty((8, 8, 16), np.int16)[..., ::2],
    ):
        with pytest.raises(ValueError, match="exhale/ct needs a C-contiguous int16 array"):
            chunks.read_into("exhale/ct", (0, 0, 0), out)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, b"\xff" * 8),  # decoded bytes
        (7, b"\x01"),
        (8, b"\x00\x00\x00\x00"),  # bytes of a plane
        (8, b"\x7f\xff\xff\xff"),
        (12, b"\xff\xff\xff\xff"),  # bytes stored of the low plane
        (12, b"\x00\x00\x00\x00"),
        (12, b"\x00\x00\x7f\xff"),
        (16 + 32**3, b"\xff\xff\xff\xff"),  # bytes stored of the high plane
        (16 + 32**3, b"\x00\x00\x00\x03"),
        (20 + 32**3, b"\xff" * 300),  # the high plane: literals without end
        (20 + 32**3, b"\x0f\x00\x00" + b"\xff" * 300),  # a match before the first byte
        (20 + 32**3, b"\x1f\x00\x01\x00" + b"\xff" * 200),  # a match beyond the plane
        (20 + 32**3, b"\x10\x00\x02\x00"),  # a match from before the first byte
    ],
)
def test_a_damaged_chunk_is_named(tmp_path: Path, at: int, value: bytes) -> None:
    data = _content("ct", (40, 70, 100))
    path = _write(tmp_path / "p07.h5", data)
    with h5py.File(path) as file:
        place = int(file["chunks/exhale"][0, 0, 1, 2, 0])
    with open(path, "rb+") as handle:
        handle.seek(place + at)
        handle.write(value)
    with pytest.raises(CacheError, match=r"patient p07: /exhale/ct is damaged in chunk \(0, 1, 2\) .*cache build"):
        _read(path, (0, 0, 0), (40, 70, 100), data.dtype)
    np.testing.assert_array_equal(_read(path, (0, 0, 0), (40, 70, 64), data.dtype), data[..., :64])


@pytest.mark.parametrize(
    "entry", [(-1, -1), (-5, 40000), (10**6, 40000), (2**62, 2**62), (0, -(2**63)), (2**63 - 1, 2**63 - 1), (0, 11)]
)
def test_a_place_outside_the_file_is_never_followed(tmp_path: Path, entry: tuple[int, int]) -> None:
    path = _write(tmp_path / "p.h5", _content("ct", (32, 32, 32)))
    with h5py.File(path) as file:
        volume = direct_volume(file["exhale/ct"], np.full((1, 1, 1, 2), entry, np.int64))
    problem = decode_into(np.fromfile(path, np.uint8), volume, (0, 0, 0), np.empty((32, 32, 32), np.int16))
    assert problem == "damaged in chunk (0, 0, 0) (z, y, x): its place is outside the file"


@pytest.mark.parametrize("kind", ["ct", "stripes", "mask"])
def test_random_damage_never_reads_or_writes_elsewhere(tmp_path: Path, kind: str) -> None:
    data = _content(kind, (40, 33, 35))
    path = _write(tmp_path / "p.h5", data)
    with h5py.File(path) as file:
        dataset = file[f"exhale/{NAMES[data.dtype]}"]
        volume = direct_volume(dataset, chunk_table(dataset))
    sound = np.fromfile(path, np.uint8)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(400):
        file, around = sound.copy(), np.full((42, 33, 35), 7, data.dtype)
        place, size = volume.table.reshape(-1, 2)[rng.integers(volume.table.size // 2)]
        # Damage to raw low bytes is for `verify`; here the header and the LZ4 block behind them.
        first = 0 if rng.random() < 0.5 else max(size - 400, 0)
        at = place + first + rng.integers(0, min(size - first, 400), rng.integers(1, 6))
        file[at] = rng.integers(0, 256, len(at))
        refused += decode_into(file, volume, (0, 0, 0), around[1:-1]) != ""
        assert (around[[0, -1]] == 7).all()
    assert refused > 100


def test_a_file_that_shrinks_while_open_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = _write(tmp_path / "p.h5", _content("noise", (64, 64, 64)))
    chunks = PatientChunks(path)
    with open(path, "rb+") as handle:
        handle.truncate(5000)
    with pytest.raises(CacheError, match="changed its size while open"):
        chunks.read_into("exhale/ct", (0, 0, 0), np.empty((64, 64, 64), np.int16))


def test_an_absent_and_an_empty_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"p\.h5: can't be read"):
        PatientChunks(tmp_path / "p.h5")
    (tmp_path / "p.h5").touch()
    with pytest.raises(CacheError, match=r"p\.h5: not a readable HDF5 file"):
        PatientChunks(tmp_path / "p.h5")


def test_a_table_that_is_not_the_files_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "p.h5", _content("ct", (40, 40, 40)))
    with h5py.File(path, "r+") as file:
        file["chunks/exhale"][0, 0, 0, 0, 0] += 8
    with pytest.raises(CacheError, match=r"p\.h5: /chunks/exhale doesn't match the file"):
        PatientChunks(path)
    with h5py.File(path, "r+") as file:
        del file["chunks"]
    with pytest.raises(CacheError, match="another program may have rewritten"):
        PatientChunks(path)
