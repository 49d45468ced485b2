import json
import multiprocessing
import os
import pickle
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401  (registers the filter, as any reader of the files must)
import numpy as np
import pytest
from lungssl_data.building.plan import patient_in
from lungssl_data.cache import PairCache, write_pair
from lungssl_data.cache_file import lung_points_vox
from lungssl_data.pair import CacheError, Displacement, Landmarks, PhasePair
from numpy import ndarray

MakePair = Callable[..., PhasePair]


@pytest.mark.parametrize("compression", ["lz4", "gzip"])
def test_a_written_pair_reads_back_equal(tmp_path: Path, make_pair: MakePair, compression: str) -> None:
    u = np.random.default_rng(0).standard_normal((3, 9, 11, 10)).astype(np.float32)
    field = Displacement(u_mm=u, spacing_mm=(4.0, 5.0, 6.0), origin_mm=(1.0, 2.0, 3.0), provenance="test")
    points = np.random.default_rng(1).standard_normal((2, 7, 3))
    pair = make_pair()
    assert pair.exhale is not None
    pair = replace(
        pair,
        displacement=field,
        exhale=replace(
            pair.exhale,
            lesion=(pair.exhale.lung > 1).astype(np.uint8),
            vessels=3 * (pair.exhale.lung > 0).astype(np.uint8),
        ),
        landmarks={"expert": Landmarks(exhale_mm=points[0], inhale_mm=points[1])},
        person="someone",
    )
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
    np.testing.assert_array_equal(back.scan("exhale").lesion, pair.scan("exhale").lesion)
    np.testing.assert_array_equal(back.scan("exhale").vessels, pair.scan("exhale").vessels)
    assert back.scan("inhale").lesion is None and back.scan("inhale").vessels is None
    assert (back.split, back.key, back.person) == ("train", "key-p01", "someone")
    assert dict(PairCache(tmp_path).verify()) == {"p01": []}


def test_expert_and_automatic_landmarks_stay_apart(tmp_path: Path, make_pair: MakePair) -> None:
    points = np.random.default_rng(1).standard_normal((4, 7, 3))
    given = {
        "automatic": Landmarks(exhale_mm=points[0], inhale_mm=points[1]),
        "expert": Landmarks(exhale_mm=points[2], inhale_mm=points[3]),
    }
    write_pair(replace(make_pair(), landmarks=given, exhale_to_inhale=None, affine_provenance=""), tmp_path)
    write_pair(make_pair("none"), tmp_path)
    cache = PairCache(tmp_path)
    assert cache.record("p01").landmarks == ("expert", "automatic")
    for kind, points_mm in cache.landmarks("p01").items():
        np.testing.assert_array_equal(points_mm.exhale_mm, given[kind].exhale_mm)
        np.testing.assert_array_equal(points_mm.inhale_mm, given[kind].inhale_mm)
    assert cache.landmarks("none") == {} and cache["none"].landmarks == {}


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


@pytest.mark.parametrize(("compression", "kind"), [("lz4", "direct"), ("gzip", "hdf5")])
def test_both_compressions_read_the_same_boxes(
    tmp_path: Path, make_pair: MakePair, compression: str, kind: str
) -> None:
    pair = make_pair()
    write_pair(pair, tmp_path, compression=compression)
    cache = PairCache(tmp_path)
    assert cache.reader_kind("p01") == kind
    out = np.empty((10, 50, 20), np.int16)
    assert cache.read_into("p01", "inhale", "ct", (30, -5, 7), out) is out
    padded = np.pad(pair.scan("inhale").ct_hu, ((0, 0), (5, 9), (0, 0)), constant_values=-1000)
    np.testing.assert_array_equal(out, padded[30:40, :50, 7:27])


def test_a_damaged_chunk_names_patient_and_chunk_and_verify_finds_it(tmp_path: Path, make_pair: MakePair) -> None:
    path = write_pair(make_pair(), tmp_path)
    with h5py.File(path) as file:
        place = int(file["chunks/inhale"][0, 0, 1, 1, 0])
    cache = PairCache(tmp_path)
    with open(path, "rb+") as handle:
        handle.seek(place)
        handle.write(b"\xff\xff")
    with pytest.raises(CacheError, match=r"patient p01: /inhale/ct is damaged in chunk \(0, 1, 1\)"):
        cache.read("p01", "inhale", "ct", (0, 0, 0), (40, 40, 40))
    assert dict(cache.verify()) == {
        "p01": ["/inhale/ct: damaged in chunk (0, 1, 1) (z, y, x): its header is not this volume's"]
    }


def test_verify_finds_one_changed_bit_of_a_plane_that_is_stored_raw(tmp_path: Path, make_pair: MakePair) -> None:
    path = write_pair(make_pair(), tmp_path)
    with h5py.File(path) as file:
        place = int(file["chunks/exhale"][0, 0, 0, 0, 0])
    with open(path, "rb+") as handle:
        handle.seek(place + 5000)
        value = handle.read(1)[0]
        handle.seek(place + 5000)
        handle.write(bytes([value ^ 1]))
    assert dict(PairCache(tmp_path).verify()) == {"p01": ["/exhale/ct: checksum differs"]}


def test_a_damaged_gzip_file_is_an_error_too(tmp_path: Path, make_pair: MakePair) -> None:
    path = write_pair(make_pair(), tmp_path, compression="gzip")
    with h5py.File(path) as file:
        place = file["exhale/lung"].id.get_chunk_info_by_coord((0, 0, 0)).byte_offset
    with open(path, "rb+") as handle:
        handle.seek(place)
        handle.write(b"\x00" * 20)
    with pytest.raises(CacheError, match="patient p01: /exhale/lung is damaged in a chunk"):
        PairCache(tmp_path).read("p01", "exhale", "lung", (0, 0, 0), (8, 8, 8))


def _total(cache: PairCache, patient: str, queue: multiprocessing.Queue) -> None:
    queue.put(int(cache.read(patient, "exhale", "ct", (0, 0, 0), (37, 41, 45)).sum()))


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_process_reads_what_its_parent_opened(tmp_path: Path, make_pair: MakePair) -> None:
    totals = {}
    for name in ("a", "b"):
        write_pair(make_pair(name), tmp_path)
        totals[name] = int(make_pair(name).scan("exhale").ct_hu.sum())
    cache = PairCache(tmp_path)
    cache.read("a", "exhale", "ct", (0, 0, 0), (8, 8, 8))
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) == 0  # HDF5 has nothing open to be forked
    fork = multiprocessing.get_context("fork")
    for name in ("a", "b"):
        queue = fork.Queue()
        child = fork.Process(target=_total, args=(cache, name, queue))
        child.start()
        assert queue.get(timeout=60) == totals[name]
        child.join()
        assert int(cache.read(name, "exhale", "ct", (0, 0, 0), (37, 41, 45)).sum()) == totals[name]


def test_a_used_cache_can_be_pickled(tmp_path: Path, make_pair: MakePair) -> None:
    write_pair(make_pair(), tmp_path)
    cache = PairCache(tmp_path)
    box = cache.read("p01", "exhale", "lung", (9, 9, 9), (8, 8, 8))
    again: PairCache = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(again.read("p01", "exhale", "lung", (9, 9, 9), (8, 8, 8)), box)


def test_only_so_many_files_are_open_at_once(
    tmp_path: Path, make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lungssl_data.cache._OPEN_FILES", 2)
    boxes: dict[str, ndarray] = {}
    for name in "abcd":
        write_pair(make_pair(name), tmp_path)
    cache = PairCache(tmp_path)
    for name in "abcdabcd":
        box = cache.read(name, "exhale", "ct", (5, 5, 5), (8, 8, 8))
        np.testing.assert_array_equal(box, boxes.setdefault(name, box))
        assert list(cache._open)[-1] == name and len(cache._open) <= 2
    cache.close()
    assert not cache._open


def test_a_file_that_was_rebuilt_on_another_grid_asks_for_a_new_look(tmp_path: Path, make_pair: MakePair) -> None:
    write_pair(make_pair(), tmp_path)
    cache = PairCache(tmp_path)
    pair = make_pair()
    write_pair(replace(pair, exhale=pair.inhale), tmp_path)
    with pytest.raises(CacheError, match="changed since the cache was opened"):
        cache.read("p01", "exhale", "ct", (0, 0, 0), (8, 8, 8))


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


@pytest.mark.parametrize("damage", ["origin", "lobes", "affine", "split", "landmarks"])
def test_verify_finds_what_no_data_sets_checksum_covers(tmp_path: Path, make_pair: MakePair, damage: str) -> None:
    path = write_pair(make_pair(), tmp_path)
    with h5py.File(path, "r+") as file:
        if damage == "origin":
            file["exhale"].attrs["origin_mm"] = (-39.5, 12.0, 5.0)
        elif damage == "affine":
            file["exhale_to_inhale"].attrs["affine"] = np.eye(3, 4)
        elif damage == "split":
            file.attrs["split"] = "test"
        elif damage == "lobes":
            del file["exhale/valid"]
        else:
            file["exhale_to_inhale/landmarks_expert"] = np.zeros((1, 2, 3))
            file["exhale_to_inhale/landmarks_expert"].attrs["crc32"] = zlib.crc32(bytes(48))
    problems = dict(PairCache(tmp_path).verify())["p01"]
    assert problems == ["/: an attribute changed, or a data set was added or taken away"]


def test_a_truncated_file_is_named_with_the_next_step(tmp_path: Path, make_pair: MakePair) -> None:
    path = write_pair(make_pair(), tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CacheError, match=r"p01\.h5: not a readable HDF5 file; delete it and rerun"):
        PairCache(tmp_path)


def test_another_format_is_refused(tmp_path: Path, make_pair: MakePair) -> None:
    path = write_pair(make_pair(), tmp_path)
    with h5py.File(path, "r+") as file:
        file.attrs["format"] = 99
    with pytest.raises(CacheError, match="cache format 99, this lungssl reads 3"):
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
    for other in ('{"b": {"stamp": [1, 2]}}', "{", "[]", json.dumps({"format": 1, "patients": {"b": {}}})):
        (tmp_path / "index.json").write_text(other)
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


def test_a_copied_file_and_a_pipe_are_named_and_no_patients(tmp_path: Path, make_pair: MakePair) -> None:
    path = write_pair(make_pair(), tmp_path)
    (tmp_path / "p02.h5").write_bytes(path.read_bytes())
    with pytest.raises(CacheError, match=r"p02\.h5: holds patient p01, so it was renamed or copied; delete it"):
        PairCache(tmp_path)
    assert patient_in(tmp_path, "p02") is None and patient_in(tmp_path, "p01") is not None
    (tmp_path / "p02.h5").unlink()
    os.mkfifo(tmp_path / "p03.h5")
    with pytest.raises(CacheError, match=r"p03\.h5: is neither a file nor a link to one; take it out"):
        PairCache(tmp_path)
    assert patient_in(tmp_path, "p03") is None
