import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lungssl_data.build import build_cache, pair_from_source
from lungssl_data.building import hashes
from lungssl_data.building.duplicates import voxels_sha256
from lungssl_data.building.hashes import HashStore
from lungssl_data.building.locks import Locks, sweep
from lungssl_data.building.plan import decide_splits, shard_of
from lungssl_data.building.workers import Workers
from lungssl_data.cache import PairCache
from lungssl_data.cache_index import this_machine
from lungssl_data.field import read_field, write_field
from lungssl_data.ids import ids_of
from lungssl_data.layouts import read_layout
from lungssl_data.layouts.source import PairSource, ScanSource
from lungssl_data.pair import CacheError, Landmarks
from lungssl_data.prepare import PrepareConfig
from lungssl_data.readers import write_labels, write_volume
from lungssl_data.splits import assign_splits
from lungssl_data.volume import Geometry, LabelMap, Volume

Thorax = Callable[..., Volume]
CONFIG = PrepareConfig(spacing_mm=6.0)


@pytest.fixture
def cohort(tmp_path: Path, thorax: Thorax) -> Path:
    root = tmp_path / "raw"
    for patient, inflation in (("p1", 0.8), ("p2", 0.9)):
        (root / patient).mkdir(parents=True)
        write_volume(root / patient / "exhale.nii.gz", thorax(inflation=inflation))
        write_volume(root / patient / "inhale.mha", thorax(inflation=1.1))
    lungs = thorax(inflation=0.8)
    z, _, x = np.indices(lungs.hu.shape)
    third, left = z * 3 // len(z), x >= lungs.hu.shape[2] // 2
    lobes = np.where(left, 5 - np.minimum(third, 1), 3 - third) * (lungs.hu == -700)
    labels = LabelMap(labels=lobes.astype(np.uint8), geometry=lungs.geometry)
    write_labels(root / "p1" / "exhale_lobes.nrrd", labels)
    return root


def outcomes(cohort: Path, cache: Path, **changes: object) -> dict[str, tuple[str, str]]:
    config = replace(CONFIG, **changes) if changes else CONFIG
    return {b.patient: (b.outcome, b.message) for b in build_cache(read_layout("folder", cohort), cache, config=config)}


def test_a_cohort_becomes_a_cache_that_verifies(cohort: Path, tmp_path: Path) -> None:
    built = outcomes(cohort, tmp_path / "cache")
    assert {outcome for outcome, _ in built.values()} == {"built"}
    cache = PairCache(tmp_path / "cache")
    assert cache.patients == ["p1", "p2"]
    assert all(not problems for _, problems in cache.verify())
    pair = cache["p1"]
    assert pair.scan("exhale").lobes is not None and pair.scan("inhale").lobes is None
    assert set(np.unique(pair.scan("exhale").lung)) == {0, 1, 2}
    litres = [cache.phase_record("p1", phase).lung_ml / 1000 for phase in ("exhale", "inhale")]
    ellipsoids = [2 * 4 / 3 * np.pi * 48 * 75 * 110 * f / 1e6 for f in (0.8, 1.1)]
    assert litres == pytest.approx(ellipsoids, rel=0.05)


def test_a_second_build_changes_nothing_and_a_changed_file_only_its_patient(
    cohort: Path, tmp_path: Path, thorax: Thorax
) -> None:
    outcomes(cohort, tmp_path / "cache")
    splits = {patient: record.split for patient, record in PairCache(tmp_path / "cache").records.items()}
    assert [outcome for outcome, _ in outcomes(cohort, tmp_path / "cache").values()] == ["unchanged", "unchanged"]
    write_volume(cohort / "p2" / "exhale.nii.gz", thorax(inflation=0.7))
    again = outcomes(cohort, tmp_path / "cache")
    assert [again[p][0] for p in ("p1", "p2")] == ["unchanged", "built"]
    assert {patient: record.split for patient, record in PairCache(tmp_path / "cache").records.items()} == splits
    assert {outcome for outcome, _ in outcomes(cohort, tmp_path / "cache", spacing_mm=7.0).values()} == {"built"}


def test_a_changed_data_file_behind_a_header_rebuilds_its_patient(tmp_path: Path, thorax: Thorax) -> None:
    folder = tmp_path / "raw" / "p1"
    folder.mkdir(parents=True)
    volume = thorax()
    x, y, z = volume.geometry.spacing_mm
    (folder / "inhale.mhd").write_text(
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nDimSize = 80 46 58\n"
        f"ElementSpacing = {x} {y} {z}\nElementType = MET_SHORT\nElementDataFile = inhale.raw\n"
    )
    (folder / "inhale.raw").write_bytes(volume.hu.tobytes())
    assert outcomes(tmp_path / "raw", tmp_path / "cache")["p1"][0] == "built"
    assert outcomes(tmp_path / "raw", tmp_path / "cache")["p1"][0] == "unchanged"
    (folder / "inhale.raw").write_bytes(thorax(inflation=0.9).hu.tobytes())
    assert outcomes(tmp_path / "raw", tmp_path / "cache")["p1"][0] == "built"


def test_a_mask_that_changes_its_role_rebuilds_its_patient(tmp_path: Path, thorax: Thorax) -> None:
    volume = thorax()
    write_volume(tmp_path / "ct.nii.gz", volume)
    x = np.indices(volume.hu.shape)[2]
    labels = np.where(volume.hu == -700, 1 + (x > 40), 0).astype(np.uint8)
    write_labels(tmp_path / "mask.nii.gz", LabelMap(labels=labels, geometry=volume.geometry))
    for column, outcome in (("lobes", "built"), ("lung", "built"), ("lung", "unchanged")):
        manifest = tmp_path / "cohort.csv"
        manifest.write_text(f"patient_id,phase,image,{column}\np1,inhale,ct.nii.gz,mask.nii.gz\n")
        built = list(build_cache(read_layout("manifest", manifest), tmp_path / "cache", config=CONFIG))
        assert built[0].outcome == outcome


def test_a_bad_file_fails_its_patient_in_one_line_and_no_other(cohort: Path, tmp_path: Path) -> None:
    path = cohort / "p1" / "exhale.nii.gz"
    path.write_bytes(path.read_bytes()[:1000])
    built = outcomes(cohort, tmp_path / "cache")
    assert built["p1"][0] == "failed" and built["p2"][0] == "built"
    assert "exhale image (.nii.gz)" in built["p1"][1] and "\n" not in built["p1"][1]
    assert PairCache(tmp_path / "cache").patients == ["p2"]


def test_a_patient_with_a_problem_fails_with_it_and_changes_no_others_split(cohort: Path, tmp_path: Path) -> None:
    for jobs in (0, 1):
        cache = tmp_path / f"cache{jobs}"
        good = read_layout("folder", cohort)
        sources = [PairSource(patient="p0", person="p1", problem="two exhale volumes"), *good]
        built = {one.patient: one for one in build_cache(sources, cache, config=CONFIG, jobs=jobs)}
        assert {patient: one.outcome for patient, one in built.items()} == {
            "p0": "failed",
            "p1": "built",
            "p2": "built",
        }
        assert built["p0"].message == "two exhale volumes"
        splits = json.loads((cache / ".splits.json").read_text(encoding="utf-8"))
        assert splits == assign_splits(["p1", "p2"], {}) and not list(cache.glob("*.lock"))
        lines = [json.loads(line) for line in (cache / "build.jsonl").read_text(encoding="utf-8").splitlines()]
        assert {line["patient"]: line["message"] for line in lines}["p0"] == "two exhale volumes"
        # Mended, it gets its split beside the others; failing again, it says that its file is left.
        mended = [replace(good[0], patient="p0"), *good]
        assert [one.outcome for one in build_cache(mended, cache, config=CONFIG, jobs=jobs)][1:] == ["unchanged"] * 2
        again = next(iter(build_cache(sources, cache, config=CONFIG, jobs=jobs)))
        assert "two exhale volumes; the cache keeps its file" in again.message


def test_shards_report_each_patient_with_a_problem_once(tmp_path: Path) -> None:
    sources = [PairSource(patient=f"p{i}", problem="damaged") for i in range(12)]
    reported = [
        one.patient for part in (1, 2, 3) for one in build_cache(sources, tmp_path, config=CONFIG, shard=(part, 3))
    ]
    assert sorted(reported) == sorted(source.patient for source in sources)
    assert not list(tmp_path.glob(".*.lock"))


def test_a_pipe_as_a_scan_fails_its_patient_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "scan.nii.gz")
    image = ScanSource(image=tmp_path / "scan.nii.gz")
    sources = [
        PairSource(patient="a", scans={"inhale": image}),
        PairSource(patient="b", scans={"inhale": ScanSource(image=tmp_path, lung=tmp_path / "scan.nii.gz")}),
        PairSource(patient="c", scans={"inhale": image}, displacement=tmp_path / "scan.nii.gz"),
    ]
    built = list(build_cache(sources, tmp_path / "cache", config=CONFIG, jobs=1, time_limit_s=60.0))
    assert [one.outcome for one in built] == ["failed"] * 3
    assert all("is neither a file nor a folder" in one.message for one in built)


def test_a_scan_without_lungs_is_refused(tmp_path: Path, thorax: Thorax) -> None:
    volume = thorax()
    (tmp_path / "raw" / "p1").mkdir(parents=True)
    solid = replace(volume, hu=np.where(volume.hu == -700, 40, volume.hu).astype(np.int16))
    write_volume(tmp_path / "raw" / "p1" / "inhale.nii.gz", solid)
    assert outcomes(tmp_path / "raw", tmp_path / "cache")["p1"][0] == "failed"


def test_lobes_in_the_wrong_codes_are_refused(cohort: Path, tmp_path: Path, thorax: Thorax) -> None:
    volume = thorax(inflation=0.8)
    labels = LabelMap(labels=np.where(volume.hu == -700, 77, 0).astype(np.uint8), geometry=volume.geometry)
    write_labels(cohort / "p1" / "exhale_lobes.nrrd", labels)
    outcome, message = outcomes(cohort, tmp_path / "cache")["p1"]
    assert outcome == "failed" and "none of its labels is a lobe in the codes 'lungssl'" in message


def test_a_known_displacement_is_kept(cohort: Path, tmp_path: Path) -> None:
    grid = Geometry(
        shape=(7, 8, 9), spacing_mm=(30.0, 25.0, 35.0), origin_mm=(-140.0, -100.0, -280.0), direction=np.eye(3)
    )
    u = np.random.default_rng(0).standard_normal((3, 7, 8, 9)).astype(np.float32)
    write_field(cohort / "p1" / "exhale_to_inhale.nrrd", u, grid)
    outcomes(cohort, tmp_path / "cache")
    field = PairCache(tmp_path / "cache").displacement("p1")
    assert field is not None and field.provenance == "given field"
    np.testing.assert_array_equal(field.u_mm, u)
    assert field.spacing_mm == grid.spacing_mm and field.origin_mm == grid.origin_mm


def test_repeated_patient_ids_are_refused(cohort: Path, tmp_path: Path) -> None:
    sources = read_layout("folder", cohort)
    with pytest.raises(CacheError, match=r"patient ids repeat: 'p1' \(folder 1 of 2 by name\), 'p1' "):
        list(build_cache([*sources, sources[0]], tmp_path / "cache", config=CONFIG))


def test_a_field_moves_points_as_simpleitk_moves_them(tmp_path: Path) -> None:
    import SimpleITK as sitk

    rng = np.random.default_rng(1)
    grid = Geometry(shape=(6, 7, 8), spacing_mm=(3.0, 4.0, 5.0), origin_mm=(-9.0, 4.0, 30.0), direction=np.eye(3))
    u = rng.standard_normal((3, 6, 7, 8)).astype(np.float32)
    write_field(tmp_path / "u.nrrd", u, grid)
    transform = sitk.DisplacementFieldTransform(
        sitk.Cast(sitk.ReadImage(str(tmp_path / "u.nrrd")), sitk.sitkVectorFloat64)
    )
    back, _ = read_field(tmp_path / "u.nrrd")
    for z, y, x in ((0, 0, 0), (3, 5, 2), (5, 6, 7)):
        point = np.array([x, y, z]) * grid.spacing_mm + grid.origin_mm
        np.testing.assert_allclose(transform.TransformPoint(point.tolist()), point + back[:, z, y, x], atol=1e-5)


def test_nifti_fields_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"u.nii.gz: displacement fields are read from .nrrd or .mha"):
        read_field(tmp_path / "u.nii.gz")


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_worker_that_is_killed_costs_its_patient_and_no_other(cohort: Path, tmp_path: Path) -> None:
    def kill_the_first() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.01)
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    sources = read_layout("folder", cohort)
    built = {b.patient: b for b in build_cache(sources, tmp_path / "cache", config=CONFIG, jobs=1)}
    killer.join()
    assert built["p1"].outcome == "failed" and "(signal 9)" in built["p1"].message
    assert built["p2"].outcome == "built"
    assert PairCache(tmp_path / "cache").patients == ["p2"]
    again = {b.patient: b.outcome for b in build_cache(sources, tmp_path / "cache", config=CONFIG)}
    assert again == {"p1": "built", "p2": "unchanged"}
    assert not list((tmp_path / "cache").glob(".*.lock")) and not list((tmp_path / "cache").glob(".*.tmp"))


def test_a_worker_that_dies_at_its_start_costs_its_patient_and_says_so(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn = Workers._spawn

    def stillborn(self: Workers) -> object:
        with monkeypatch.context() as patch:
            patch.setattr("lungssl_data.building.workers._work", os._exit)
            worker = spawn(self)
        worker.process.join()
        return worker

    monkeypatch.setattr(Workers, "_spawn", stillborn)
    built = list(build_cache(read_layout("folder", cohort), tmp_path / "cache", config=CONFIG, jobs=1))
    assert [b.outcome for b in built] == ["failed", "failed"]
    assert all("was killed or crashed (exit code 1)" in b.message for b in built)


def test_one_scan_under_two_names_is_told_and_the_same_person_is_not(cohort: Path, tmp_path: Path) -> None:
    shutil.copytree(cohort / "p1", cohort / "p3")
    shutil.copy(cohort / "p2" / "exhale.nii.gz", cohort / "p2" / "inhale.nii.gz")
    (cohort / "p2" / "inhale.mha").unlink()
    sources = read_layout("folder", cohort)
    built = {b.patient: b for b in build_cache(sources, tmp_path / "cache", config=CONFIG, phase_check="warn")}
    assert built["p1"].warnings == ()
    assert [text.split(",")[0] for text in built["p3"].warnings] == [
        "exhale: the same scan as of p1",
        "inhale: the same scan as of p1",
    ]
    assert "exhale and inhale are the same scan" in " ".join(built["p2"].warnings)
    again = [replace(source, person="one") for source in sources if source.patient != "p2"]
    rebuilt = list(build_cache(again, tmp_path / "anew", config=CONFIG))
    assert [b.warnings for b in rebuilt] == [(), ()]


def test_a_folder_keeps_to_one_kind_of_ids(cohort: Path, tmp_path: Path) -> None:
    sources = read_layout("folder", cohort)[:1]
    first, other = ids_of(b"1" * 32), ids_of(b"2" * 32)
    assert first != other and "1" * 8 not in first
    for _ in range(2):
        list(build_cache(sources, tmp_path / "cache", config=CONFIG, ids=first))
    for ids in ("as given", other):
        with pytest.raises(CacheError, match=f"has patient ids {first}, and this build's are {ids}: one patient"):
            list(build_cache(sources, tmp_path / "cache", config=CONFIG, ids=ids))


def test_a_patient_that_fails_now_keeps_its_earlier_file_and_says_so(cohort: Path, tmp_path: Path) -> None:
    outcomes(cohort, tmp_path / "cache")
    (cohort / "p1" / "exhale.nii.gz").write_bytes(b"damaged")
    outcome, message = outcomes(cohort, tmp_path / "cache")["p1"]
    assert outcome == "failed" and "the cache keeps its file of an earlier build" in message
    assert PairCache(tmp_path / "cache").patients == ["p1", "p2"]


def test_a_patient_over_its_limits_fails_alone(cohort: Path, tmp_path: Path) -> None:
    (cohort / "p2" / "exhale.nii.gz").unlink()
    sources = read_layout("folder", cohort)[1:]
    slow = list(build_cache(sources, tmp_path / "cache", config=CONFIG, jobs=1, time_limit_s=0.05))
    assert slow[0].outcome == "failed" and "longer than the limit of 0.05 s" in slow[0].message
    large = list(build_cache(sources, tmp_path / "cache", config=CONFIG, jobs=1, memory_limit_gib=0.001))
    assert large[0].outcome == "failed" and "memory" in large[0].message
    with pytest.raises(ValueError, match="build with jobs=1 or more"):
        list(build_cache(sources, tmp_path / "cache", config=CONFIG, time_limit_s=1.0))


def test_a_patient_that_another_builder_holds_comes_last(cohort: Path, tmp_path: Path) -> None:
    other = Locks(tmp_path)
    assert other.acquire("p1") and not Locks(tmp_path).acquire("p1")
    building = build_cache(read_layout("folder", cohort), tmp_path, config=CONFIG)
    assert next(building).patient == "p2"
    threading.Timer(0.2, other.close).start()
    assert [b.patient for b in building] == ["p1"]


def test_two_builders_of_one_folder_make_each_patient_once(cohort: Path, tmp_path: Path) -> None:
    code = f"""if True:
        from pathlib import Path
        from lungssl_data.build import build_cache
        from lungssl_data.layouts import read_layout
        from lungssl_data.prepare import PrepareConfig
        sources = read_layout("folder", Path({str(cohort)!r}))
        for b in build_cache(sources, Path({str(tmp_path / "cache")!r}), config=PrepareConfig(spacing_mm=6.0)):
            print(b.patient, b.outcome)
    """
    builders = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    seen = [line for builder in builders for line in builder.communicate()[0].splitlines()]
    assert sorted(seen) == ["p1 built", "p1 unchanged", "p2 built", "p2 unchanged"]
    assert all(not problems for _, problems in PairCache(tmp_path / "cache").verify())


@pytest.mark.parametrize(
    ("content", "age_s", "ours"),
    [
        ({"machine": this_machine(), "pid": "dead", "started": ""}, 1, True),
        ({"machine": this_machine(), "pid": os.getpid(), "started": "1"}, 1, True),  # the pid is another's now
        ({"machine": f"{socket.gethostname()}-0", "pid": "dead", "started": "1"}, 60, False),  # another container
        ({"machine": "elsewhere", "pid": 1, "started": "1"}, 60, False),
        ({"machine": "elsewhere", "pid": 1, "started": "1"}, 700, True),
        (None, 1, False),
        (None, 30, True),
    ],
)
def test_a_lock_of_the_dead_is_taken_over_and_one_of_the_living_is_not(
    content: dict | None, age_s: float, ours: bool, tmp_path: Path
) -> None:
    lock = tmp_path / ".p1.lock"
    if content is not None:
        content = content | {"pid": dead_pid() if content["pid"] == "dead" else content["pid"]}
    lock.write_text(json.dumps(content) if content else "")
    os.utime(lock, (time.time() - age_s,) * 2)
    locks = Locks(tmp_path)
    assert locks.acquire("p1") is ours
    locks.close()
    assert lock.exists() is not ours


def test_what_dead_writers_left_is_swept_and_what_living_ones_write_is_not(tmp_path: Path) -> None:
    dead = tmp_path / f".p1.{this_machine()}.{dead_pid()}-0a.tmp"
    alive = tmp_path / f".p1.{this_machine()}.{os.getpid()}-0a.tmp"
    elsewhere = tmp_path / f".p1.{socket.gethostname()}-0.{dead_pid()}-0a.tmp"
    for path in (dead, alive, elsewhere):
        path.write_text("")
    sweep(tmp_path)
    assert not dead.exists() and alive.exists() and elsewhere.exists()


def test_a_remembered_hash_is_taken_until_a_byte_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "scan.raw"
    file.write_bytes(b"a" * 1000)
    first = HashStore(tmp_path).of([file])
    assert not (tmp_path / ".hashes.jsonl").exists()  # too young: a change within its time stamp would go unseen
    monkeypatch.setattr(hashes, "SETTLED_S", -10.0)
    assert HashStore(tmp_path).of([file]) == first
    moved = file.rename(tmp_path / "moved.raw")
    stat = moved.stat()
    remembered = HashStore(tmp_path).of([moved])
    assert remembered == first
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
        assert HashStore(tmp_path).of([moved]) == first
    with open(moved, "r+b") as handle:
        handle.write(b"b")
    os.utime(moved, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size and mtime: the change time gives it away
    assert HashStore(tmp_path).of([moved]) != first


def test_a_torn_line_of_remembered_hashes_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "scan.raw"
    file.write_bytes(b"a")
    (tmp_path / ".hashes.jsonl").write_text('{"stamp": "1", "sha')
    assert len(HashStore(tmp_path).of([file])) == 64


def listed(count: int) -> list[PairSource]:
    scans = {"inhale": ScanSource(image=Path("unread.nii.gz"))}
    return [
        PairSource(patient=f"p{i}", scans=scans, person="one" if i in (3, 4, 8) else "")  # pyright: ignore
        for i in range(count)
    ]


def test_shards_share_the_patients_and_agree_on_splits(tmp_path: Path) -> None:
    sources = listed(40)
    shards = [shard_of(sources, (i, 3)) for i in (1, 2, 3)]
    assert sorted(s.patient for shard in shards for s in shard) == sorted(s.patient for s in sources)
    assert min(map(len, shards)) > 5
    splits = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        splits.append(decide_splits(sources, tmp_path / name, {}, Locks(tmp_path / name)))
    assert splits[0] == splits[1] and len({splits[0][p] for p in ("p3", "p4", "p8")}) == 1
    # The list grows: folders that hold different parts of it still agree, and nobody moves.
    grown = [decide_splits(listed(60), tmp_path / name, {}, Locks(tmp_path / name)) for name in ("a", "b")]
    assert grown[0] == grown[1] and grown[0] == grown[0] | splits[0]
    with pytest.raises(CacheError, match="shard 4/3"):
        shard_of(sources, (4, 3))


def test_swapped_phases_fail_with_both_gas_volumes_or_warn(tmp_path: Path, thorax: Thorax) -> None:
    folder = tmp_path / "raw" / "p1"
    folder.mkdir(parents=True)
    write_volume(folder / "exhale.nii.gz", thorax(inflation=1.1))
    write_volume(folder / "inhale.nii.gz", thorax(inflation=0.8))
    outcome, message = outcomes(tmp_path / "raw", tmp_path / "cache")["p1"]
    assert outcome == "failed" and "exchange the phases" in message
    litres = [2 * 4 / 3 * np.pi * 48 * 75 * 110 * f * 0.7 / 1e6 for f in (0.8, 1.1)]
    assert [float(word) for word in message.split() if word[0].isdigit()] == pytest.approx(litres, rel=0.05)
    sources = read_layout("folder", tmp_path / "raw")
    built = list(build_cache(sources, tmp_path / "cache", config=CONFIG, phase_check="warn"))
    assert built[0].outcome == "built" and "inhale should hold more" in built[0].warnings[0]
    one_phase = [replace(source, dual_phase=False) for source in sources]
    built = list(build_cache(one_phase, tmp_path / "other", config=CONFIG))
    assert built[0].outcome == "built" and "of one phase" in built[0].warnings[0]


def test_file_names_reach_neither_the_outcome_nor_the_report(tmp_path: Path, thorax: Thorax) -> None:
    write_volume(tmp_path / "Mustermann_Max.nii.gz", thorax())
    (tmp_path / "Musterfrau.nii.gz").write_bytes(b"no scan")
    (tmp_path / "list.csv").write_text(
        "patient_id,phase,image,lung\np1,inhale,Musterfrau.nii.gz,\np2,inhale,Mustermann_Max.nii.gz,Musterfrau.nii.gz\n"
    )
    built = list(build_cache(read_layout("manifest", tmp_path / "list.csv"), tmp_path / "cache", config=CONFIG))
    assert [b.outcome for b in built] == ["failed", "failed"]
    assert "inhale image (.nii.gz)" in built[0].message and "inhale lung (.nii.gz)" in built[1].message
    report = (tmp_path / "cache" / "build.jsonl").read_text(encoding="utf-8")
    assert "uster" not in report and str(tmp_path) not in report
    assert [json.loads(line)["patient"] for line in report.splitlines()] == ["p1", "p2"]


def test_landmarks_are_kept_and_those_outside_of_their_scan_refused_with_the_count(
    cohort: Path, tmp_path: Path, thorax: Thorax
) -> None:
    source = read_layout("folder", cohort)[0]
    points = np.array([[0.0, 0.0, -150.0], [10.0, 5.5, -120.25], [-140.0, 0.0, -100.0]])
    kept = replace(source, landmarks={"expert": Landmarks(exhale_mm=points, inhale_mm=points + 1.5)}, person="somebody")
    pair = pair_from_source(kept, config=CONFIG, split="val")
    np.testing.assert_array_equal(pair.landmarks["expert"].inhale_mm, points + 1.5)
    assert pair.person == "somebody"
    bad = points.copy()
    bad[0, 1], bad[2, 2] = np.nan, 900.0
    for exhale, inhale, phase in ((bad, points, "exhale"), (points, bad, "inhale")):
        given = replace(source, landmarks={"automatic": Landmarks(exhale_mm=exhale, inhale_mm=inhale)})
        with pytest.raises(CacheError, match=f"2 of 3 automatic landmarks of {phase} are not finite or outside"):
            pair_from_source(given, config=CONFIG, split="val")


def test_masks_of_other_conventions_are_recoded_and_sides_found(tmp_path: Path, thorax: Thorax) -> None:
    volume = thorax()
    write_volume(tmp_path / "ct.nii.gz", replace(volume, hu=(volume.hu + 1024).astype(np.int16)))
    x = np.indices(volume.hu.shape)[2]
    air = volume.hu == -700
    sided = np.where(air, 3 + (x < 40), 5).astype(np.uint8)  # LUNA16: 3 left, 4 right, 5 trachea
    write_labels(tmp_path / "luna.nii.gz", LabelMap(labels=sided, geometry=volume.geometry))
    inverted = LabelMap(labels=np.where(air, 0, 2).astype(np.uint8), geometry=volume.geometry)
    write_labels(tmp_path / "popi.nii.gz", inverted)
    write_labels(tmp_path / "lesion.nii.gz", LabelMap(labels=air.astype(np.uint8), geometry=volume.geometry))
    lungs = []
    for name, codes in (("luna", "luna16"), ("popi", "popi")):
        scan = ScanSource(
            image=tmp_path / "ct.nii.gz",
            offset_hu=-1024,
            lung=tmp_path / f"{name}.nii.gz",
            lung_codes=codes,
            lesion=tmp_path / "lesion.nii.gz",
            lesion_codes="any",
            vessels=tmp_path / "lesion.nii.gz",
            vessel_codes="vessels",
        )
        source = PairSource(patient="p1", scans={"inhale": scan})
        prepared = pair_from_source(source, config=CONFIG, split="train").scan("inhale")
        lungs.append(prepared.lung)
        assert prepared.lesion is not None and set(np.unique(prepared.lesion)) == {0, 3}
        assert prepared.vessels is not None and set(np.unique(prepared.vessels)) == {0, 4}
        assert -705 < prepared.ct_hu[prepared.lung > 0].mean() < -600
    np.testing.assert_array_equal(lungs[0], lungs[1])
    assert set(np.unique(lungs[0])) == {0, 1, 2}
    wrong = ScanSource(image=tmp_path / "ct.nii.gz", offset_hu=-1024, lung=tmp_path / "luna.nii.gz", lung_codes="both")
    with pytest.raises(CacheError, match="none of its labels is a lung in the codes 'both'"):
        pair_from_source(PairSource(patient="p1", scans={"inhale": wrong}), config=CONFIG, split="train")


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"p1": "later"}', b'{"p1": ["train"]}', b"\xff\x00"])
def test_damaged_decisions_on_splits_stop_a_build_with_the_next_step(
    cohort: Path, tmp_path: Path, content: bytes
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / ".splits.json").write_bytes(content)
    with pytest.raises(CacheError, match=r"\.splits\.json: .*damaged; delete it"):
        list(build_cache(read_layout("folder", cohort), cache, config=CONFIG))


def test_a_damaged_note_on_ids_and_a_file_in_the_caches_place_are_named(cohort: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / ".ids").mkdir(parents=True)
    with pytest.raises(CacheError, match=r"\.ids: can't be read, or is damaged; delete it if"):
        list(build_cache(read_layout("folder", cohort), cache, config=CONFIG))
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheError, match="file: is a file; name a folder for the cache"):
        list(build_cache(read_layout("folder", cohort), tmp_path / "file", config=CONFIG))


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
from lungssl_data.building import workers
from lungssl_data.building.patient import Recipe
from lungssl_data.layouts.source import PairSource, ScanSource
from lungssl_data.prepare import PrepareConfig

# At work, as an idle worker ends when its pipe closes.
workers.build_patient = lambda *_, **__: (print(os.getpid(), flush=True), time.sleep(60))
if __name__ == "__main__":
    recipe = Recipe(folder=Path(sys.argv[1]), config=PrepareConfig())
    pool = workers.Workers(1, recipe, time_limit_s=None, memory_limit_gib=None)
    pool.start(PairSource(patient="p", scans={"exhale": ScanSource(image=Path("no.nii"))}), "train")
    time.sleep(60)
"""
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.1)


def test_the_same_voxels_in_another_format_and_other_axes_are_the_same_scan(thorax: Thorax, tmp_path: Path) -> None:
    volume = thorax()
    other = replace(volume.geometry, direction=volume.geometry.direction @ np.diag([-1.0, 1.0, -1.0]))
    last = volume.geometry.index_to_mm() @ [volume.hu.shape[2] - 1, 0, volume.hu.shape[0] - 1, 1]
    other = replace(other, origin_mm=tuple(float(v) for v in last))
    turned = Volume(hu=np.flip(volume.hu, (0, 2)).copy(), geometry=other)
    permuted = Volume(
        hu=volume.hu.transpose(1, 0, 2).copy(),
        geometry=replace(
            volume.geometry,
            shape=tuple(np.array(volume.hu.shape)[[1, 0, 2]].tolist()),
            spacing_mm=tuple(np.array(volume.geometry.spacing_mm)[[0, 2, 1]].tolist()),
            direction=volume.geometry.direction[:, [0, 2, 1]],
        ),
    )
    padded = np.where(volume.hu <= -1000, -2048, volume.hu).astype(np.int16)
    same = {voxels_sha256(v) for v in (volume, turned, permuted, replace(volume, hu=padded))}
    assert len(same) == 1
    changed = volume.hu.copy()
    changed[20, 20, 20] += 1
    assert voxels_sha256(replace(volume, hu=changed)) not in same
    for patient, write in (("p1", "inhale.nii.gz"), ("p2", "inhale.mha")):
        (tmp_path / "raw" / patient).mkdir(parents=True)
        write_volume(tmp_path / "raw" / patient / write, volume if patient == "p1" else turned)
    built = {b.patient: b for b in build_cache(read_layout("folder", tmp_path / "raw"), tmp_path / "c", config=CONFIG)}
    assert built["p1"].warnings == ()
    assert [text.split(",")[0] for text in built["p2"].warnings] == ["inhale: the same scan as of p1"]


def test_an_id_that_differs_in_case_from_one_in_the_cache_is_refused(cohort: Path, tmp_path: Path) -> None:
    list(build_cache(read_layout("folder", cohort)[:1], tmp_path / "cache", config=CONFIG))
    (cohort / "p1").rename(cohort / "P1")
    with pytest.raises(CacheError, match=r"patient P1 \(folder 1 of 2 by name\) is p1 in the cache; write it alike"):
        list(build_cache(read_layout("folder", cohort), tmp_path / "cache", config=CONFIG))
