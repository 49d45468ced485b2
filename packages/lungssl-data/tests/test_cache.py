from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401  (registers the filter, as any reader of the files must)
import numpy as np
import pytest
from lungssl_data.cache import PairCache, lung_points_vox, write_pair
from lungssl_data.pair import CacheError, Displacement, PhasePair

MakePair = Callable[..., PhasePair]


@pytest.mark.parametrize("compression", ["lz4", "gzip"])
def test_a_written_pair_reads_back_equal(tmp_path: Path, make_pair: MakePair, compression: str) -> None:
    u = np.random.default_rng(0).standard_normal((3, 9, 11, 10)).astype(np.float32)
    field = Displacement(u_mm=u, spacing_mm=(4.0, 5.0, 6.0), origin_mm=(1.0, 2.0, 3.0), provenance="test")
    pair = replace(make_pair(), displacement=field)
    write_pair(pair, tmp_path, compression=compression)
    back = PairCache(tmp_path)["p01"]
    for phase in ("exhale", "inhale"):
        for name in ("ct_hu", "valid", "lung", "lobes"):
            np.testing.assert_array_equal(getattr(back.scan(phase), name), getattr(pair.scan(phase), name))
        assert back.scan(phase).spacing_mm == (1.5, 2.0, 2.5)
        assert back.scan(phase).origin_mm == pair.scan(phase).origin_mm
    assert back.displacement is not None
    np.testing.assert_array_equal(back.displacement.u_mm, u)
    np.testing.assert_array_equal(back.exhale_to_inhale, pair.exhale_to_inhale)
    assert (back.split, back.key) == ("train", "key-p01")


def test_the_file_is_plain_hdf5_in_chunks_of_32(tmp_path: Path, make_pair: MakePair) -> None:
    path = write_pair(make_pair(), tmp_path)
    with h5py.File(path) as file:
        assert file["exhale/ct"].chunks == (32, 32, 32)
        assert file["inhale/ct"].dtype == np.int16
        assert list(file["inhale"].attrs["origin_mm"]) == [-35.0, 12.0, -9.0]


def test_a_box_across_the_border_is_air_outside(tmp_path: Path, make_pair: MakePair) -> None:
    pair = make_pair()
    write_pair(pair, tmp_path)
    cache = PairCache(tmp_path)
    box = cache.read("p01", "exhale", "ct", (-2, 30, 40), (5, 20, 10))
    assert (box[:2] == -1000).all() and (box[:, 11:] == -1000).all() and (box[:, :, 5:] == -1000).all()
    np.testing.assert_array_equal(box[2:, :11, :5], pair.scan("exhale").ct_hu[:3, 30:, 40:])
    assert (cache.read("p01", "exhale", "lung", (100, 0, 0), (2, 2, 2)) == 0).all()


def test_one_phase_alone_is_a_patient(tmp_path: Path, make_pair: MakePair) -> None:
    write_pair(make_pair(phases=("inhale",)), tmp_path)
    cache = PairCache(tmp_path)
    assert cache[0].phases() == ("inhale",)
    with pytest.raises(CacheError, match="p01 has no exhale scan, only inhale"):
        cache.phase_record("p01", "exhale")


def test_verify_names_the_data_set_whose_bytes_changed(tmp_path: Path, make_pair: MakePair) -> None:
    path = write_pair(make_pair(), tmp_path)
    assert dict(PairCache(tmp_path).verify()) == {"p01": []}
    with h5py.File(path, "r+") as file:
        file["inhale/lung"][3, 4, 5] += 1
    assert dict(PairCache(tmp_path).verify()) == {"p01": ["/inhale/lung: checksum differs"]}


def test_a_truncated_file_is_named_with_the_next_step(tmp_path: Path, make_pair: MakePair) -> None:
    path = write_pair(make_pair(), tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CacheError, match=r"p01\.h5: not a readable HDF5 file; delete it and rerun"):
        PairCache(tmp_path)


def test_another_format_is_refused(tmp_path: Path, make_pair: MakePair) -> None:
    path = write_pair(make_pair(), tmp_path)
    with h5py.File(path, "r+") as file:
        file.attrs["format"] = 99
    with pytest.raises(CacheError, match="cache format 99, this lungssl reads 1"):
        PairCache(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(make_pair(), tmp_path)

    def disk_full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", disk_full)
    with pytest.raises(OSError, match="no space left"):
        write_pair(replace(make_pair(), key="new"), tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["p01.h5"]
    assert PairCache(tmp_path)["p01"].key == "key-p01"


def test_the_index_follows_the_files(tmp_path: Path, make_pair: MakePair) -> None:
    write_pair(make_pair("a"), tmp_path)
    assert PairCache(tmp_path).patients == ["a"]
    write_pair(make_pair("b", split="val"), tmp_path)
    assert PairCache(tmp_path).split("val") == ["b"]
    (tmp_path / "a.h5").unlink()
    assert PairCache(tmp_path).patients == ["b"]
    (tmp_path / "index.json").unlink()
    assert PairCache(tmp_path).patients == ["b"]


def test_names_that_could_be_patients_or_paths_are_refused(tmp_path: Path, make_pair: MakePair) -> None:
    for name in ("Jane Doe", "../x", "", "a" * 65):
        with pytest.raises(CacheError, match="de-identified"):
            write_pair(make_pair(name), tmp_path)


def test_an_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="lungssl cache build"):
        PairCache(tmp_path)
    with pytest.raises(CacheError, match="no such cache folder"):
        PairCache(tmp_path / "nowhere")


def test_lung_points_are_lung_voxels_and_repeatable(make_pair: MakePair) -> None:
    lung = make_pair().scan("exhale").lung
    points = lung_points_vox(lung, count=100)
    assert points.shape == (100, 3)
    assert (lung[tuple(points.T.astype(int))] > 0).all()
    np.testing.assert_array_equal(points, lung_points_vox(lung, count=100))
