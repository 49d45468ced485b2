from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from lungssl_data.batch import CropBatch
from lungssl_data.cache import PairCache, write_pair
from lungssl_data.crop_stream import CropStream
from lungssl_data.crops import CropConfig, PairCrops
from lungssl_data.hot import HotScans
from lungssl_data.pair import CacheError, Displacement, PhasePair
from torch.utils.data import DataLoader

MakePair = Callable[..., PhasePair]


@pytest.fixture
def cache(tmp_path: Path, make_pair: MakePair) -> PairCache:
    write_pair(make_pair("a"), tmp_path)
    write_pair(make_pair("b", split="val"), tmp_path)
    write_pair(make_pair("c", phases=("inhale",)), tmp_path)
    return PairCache(tmp_path)


def test_a_crop_is_the_block_its_affine_says(cache: PairCache) -> None:
    crops = PairCrops(cache, CropConfig(crop_vox=(12, 14, 16)), patients=["a"])
    sample = crops[7]
    for slot, phase in enumerate(("exhale", "inhale")):
        scan = cache["a"].scan(phase)
        affine = sample.voxel_to_mm[0, slot].numpy()
        start = np.rint((affine[:, 3] - scan.origin_mm) / scan.spacing_mm).astype(int)[::-1]
        box = tuple(slice(s, s + k) for s, k in zip(start, (12, 14, 16), strict=True))
        np.testing.assert_array_equal(sample.ct_hu[0, slot], scan.ct_hu[box])
        np.testing.assert_allclose(np.diag(affine[:, :3]), scan.spacing_mm)
    assert sample.slot_phase.tolist() == [[0, 1]]


def test_both_slots_look_at_the_same_place_within_the_jitter(cache: PairCache) -> None:
    config = CropConfig(crop_vox=(9, 9, 9), jitter_mm=4.0, min_overlap=0.0)
    crops = PairCrops(cache, config, patients=["a"])
    size = torch.tensor([9.0, 9, 9]) / 2
    for sample in (crops[i] for i in range(40)):
        centres = [sample.voxel_to_mm[0, s, :, :3] @ size + sample.voxel_to_mm[0, s, :, 3] for s in (0, 1)]
        link = sample.exhale_to_inhale[0]
        distance = (link[:, :3] @ centres[0] + link[:, 3] - centres[1]).abs()
        voxel = torch.tensor([1.5, 2.0, 2.5])  # starts are whole voxels
        assert (distance <= 4.0 + voxel).all() or _touches_border(cache, sample)


def _touches_border(cache: PairCache, sample: CropBatch) -> bool:
    scan = cache["a"].scan("inhale")
    start = (sample.voxel_to_mm[0, 1, :, 3].numpy() - scan.origin_mm) / scan.spacing_mm
    return bool((start < 0.5).any() or (start + 9 > np.array(scan.ct_hu.shape[::-1]) - 0.5).any())


def test_sample_i_is_a_function_of_the_seed_and_i(cache: PairCache) -> None:
    config = CropConfig(crop_vox=(12, 12, 12))
    first = PairCrops(cache, config, seed=1).batch(5, 3)
    again = PairCrops(PairCache(cache.folder), config, seed=1).batch(5, 3)
    other = PairCrops(cache, config, seed=2).batch(5, 3)
    assert torch.equal(first.ct_hu, again.ct_hu) and torch.equal(first.patient, again.patient)
    assert not torch.equal(first.ct_hu, other.ct_hu)


def test_each_pass_reads_every_patient_once(cache: PairCache) -> None:
    crops = PairCrops(cache, CropConfig(crop_vox=(8, 8, 8)))
    for epoch in range(4):
        assert sorted(int(crops[epoch * 3 + k].patient) for k in range(3)) == [0, 1, 2]


def test_a_patient_with_one_phase_fills_both_slots_from_it(cache: PairCache) -> None:
    sample = PairCrops(cache, CropConfig(crop_vox=(8, 8, 8)), patients=["c"])[0]
    assert sample.slot_phase.tolist() == [[1, 1]]


def test_one_phase_can_be_asked_for(cache: PairCache) -> None:
    exhale = PairCrops(cache, CropConfig(phases="exhale", crop_vox=(8, 8, 8)))
    assert exhale.patients == ["a", "b"]
    assert exhale.batch(0, 2).slot_phase.eq(0).all()


def test_crops_are_in_the_lung(cache: PairCache) -> None:
    crops = PairCrops(cache, CropConfig(crop_vox=(7, 7, 7)), patients=["a"])
    assert all(crops[i].lung[0, 0].any() for i in range(30))


def test_labels_come_along_and_only_from_scans_that_have_them(cache: PairCache) -> None:
    sample = PairCrops(cache, CropConfig(crop_vox=(20, 20, 20), labels="lobes"))[0]
    assert sample.labels is not None and sample.labels.max() == 2
    with pytest.raises(CacheError, match="with vessels"):
        PairCrops(cache, CropConfig(labels="vessels"))


def test_a_block_larger_than_the_scan_is_padded_and_marked(cache: PairCache) -> None:
    sample = PairCrops(cache, CropConfig(crop_vox=(64, 64, 64)), patients=["a"])[0]
    assert sample.valid[0, 0].sum() == 37 * 41 * 45
    assert (sample.ct_hu[~sample.valid] == -1000).all()


def test_jitter_yields_to_the_overlap(cache: PairCache) -> None:
    config = CropConfig(crop_vox=(8, 8, 8), jitter_mm=500.0, min_overlap=0.5)
    crops = PairCrops(cache, config, patients=["a"])
    centre = torch.tensor([4.0, 4, 4])
    for sample in (crops[i] for i in range(20)):
        link = sample.exhale_to_inhale[0]
        places = [a[:, :3] @ centre + a[:, 3] for a in sample.voxel_to_mm[0]]
        shift_vox = (link[:, :3] @ places[0] + link[:, 3] - places[1]).abs() / torch.tensor([1.5, 2.0, 2.5])
        assert (1 - shift_vox / 8).clamp(0).prod() >= 0.5 - 1e-4


def test_scans_that_cannot_be_matched_are_named_before_any_crop(tmp_path: Path, make_pair: MakePair) -> None:
    far = make_pair("far")
    far.exhale_to_inhale[:, 3] += 1000.0
    write_pair(far, tmp_path)
    with pytest.raises(CacheError, match=r"patient far: blocks of \(8, 8, 8\) voxels .* share at most 0%"):
        PairCrops(PairCache(tmp_path), CropConfig(crop_vox=(8, 8, 8)))


def test_an_empty_split_is_named(cache: PairCache) -> None:
    with pytest.raises(CacheError, match="in split test"):
        PairCrops(cache, CropConfig(), split="test")


def test_several_crops_of_a_patient_follow_each_other(cache: PairCache) -> None:
    crops = PairCrops(cache, CropConfig(crop_vox=(8, 8, 8), crops_per_patient=2))
    assert len(crops) == 6
    drawn = [int(crops[k].patient) for k in range(6)]
    assert drawn[::2] == drawn[1::2] and sorted(drawn[::2]) == [0, 1, 2]
    assert not torch.equal(crops[0].voxel_to_mm, crops[1].voxel_to_mm)


def test_weights_decide_how_often_a_patient_is_drawn(cache: PairCache) -> None:
    crops = PairCrops(cache, CropConfig(crop_vox=(4, 4, 4)), weights={"a": 3.0, "b": 1.0, "c": 0.0})
    drawn = [int(crops[k].patient) for k in range(300)]
    assert 2 not in drawn
    assert 0.65 < drawn.count(0) / 300 < 0.85  # 0.75 +- 4 standard errors of 0.025


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.0, "b": 0.0, "c": 0.0}, {"a": -1.0, "b": 1.0, "c": 1.0}])
def test_unusable_weights_are_refused(cache: PairCache, weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give every patient a finite weight"):
        PairCrops(cache, CropConfig(crop_vox=(4, 4, 4)), weights=weights)


@pytest.mark.parametrize("budget_bytes", [0, 80_000, 1 << 30])
def test_hot_scans_read_what_the_cache_reads(cache: PairCache, budget_bytes: int) -> None:
    hot = HotScans(cache, budget_bytes)
    rng = np.random.default_rng(0)
    for _ in range(30):
        start = tuple(int(i) for i in rng.integers(-6, 20, 3))
        for phase in ("exhale", "inhale"):
            for name in ("ct", "valid", "lung"):
                expected = cache.read("a", phase, name, start, (7, 9, 11))
                got = hot.read_into("a", phase, name, start, np.empty_like(expected))
                np.testing.assert_array_equal(got, expected)
    assert hot.used_bytes <= budget_bytes
    assert (hot.used_bytes > 0) == (budget_bytes > 0)


def test_hot_scans_are_not_read_again_and_not_shared(cache: PairCache, monkeypatch: pytest.MonkeyPatch) -> None:
    hot = HotScans(cache, 1 << 30)
    first = hot.read_into("a", "exhale", "ct", (0, 0, 0), np.empty((8, 8, 8), np.int16))
    first[:] = 0  # a caller's own copy
    monkeypatch.setattr(cache, "read_into", lambda *_: pytest.fail("read again"))
    assert hot.read_into("a", "exhale", "ct", (0, 0, 0), np.empty((8, 8, 8), np.int16)).any()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_where_it_stopped_for_any_number_of_workers(cache: PairCache, workers: int) -> None:
    crops = PairCrops(cache, CropConfig(crop_vox=(6, 6, 6)))
    whole = [crops.batch(k, 2) for k in range(7)]
    loader = DataLoader(
        CropStream(crops, 2, start=3, stop=7),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )
    resumed = list(loader)
    assert len(resumed) == 4
    for ours, theirs in zip(resumed, whole[3:], strict=True):
        assert torch.equal(ours.ct_hu, theirs.ct_hu) and torch.equal(ours.patient, theirs.patient)


def test_so_many_patients_are_a_nested_draw_of_all(tmp_path: Path, make_pair: MakePair) -> None:
    for name in "abcdef":
        write_pair(make_pair(name), tmp_path)
    cache = PairCache(tmp_path)
    drawn = [PairCrops(cache, CropConfig(crop_vox=(12, 12, 12), patients=n)).patients for n in (2, 4, 6)]
    assert [len(patients) for patients in drawn] == [2, 4, 6]
    assert set(drawn[0]) < set(drawn[1]) < set(drawn[2])
    for phases in ("exhale", "both"):  # the same people, whatever is read of them
        config = CropConfig(crop_vox=(12, 12, 12), patients=2, phases=phases)
        assert PairCrops(cache, config, seed=5).patients == drawn[0]
    with pytest.raises(ValueError, match="cannot draw 7 patients from 6"):
        PairCrops(cache, CropConfig(crop_vox=(12, 12, 12), patients=7))


def test_a_strangers_inhale_fills_slot_1_at_the_corresponding_place(tmp_path: Path, make_pair: MakePair) -> None:
    """All lungs of `make_pair` are alike, so a stranger's lung is at the place of the own one, with other voxels."""
    for name in "abcd":
        write_pair(make_pair(name), tmp_path)
    write_pair(make_pair("e", phases=("inhale",)), tmp_path)
    cache = PairCache(tmp_path)
    config = CropConfig(crop_vox=(12, 14, 16), jitter_mm=0.0, partner="stranger", correspondences=True)
    crops = PairCrops(cache, config)
    met: dict[str, set[str]] = {}
    for i in range(50):
        sample = crops[i]
        patient = cache.patients[int(sample.patient[0])]
        start = np.rint(
            (sample.voxel_to_mm[0, 1, :, 3].numpy() - cache[patient].scan("inhale").origin_mm) / [1.5, 2.0, 2.5]
        ).astype(int)[::-1]
        box = tuple(slice(s, s + k) for s, k in zip(start, (12, 14, 16), strict=True))
        same = {p for p in "abcde" if np.array_equal(cache[p].scan("inhale").ct_hu[box], sample.ct_hu[0, 1])}
        met.setdefault(patient, set()).update(same)
        if patient == "e":  # one phase: nobody else's
            continue
        assert sample.partner_mm is not None and bool(sample.partner_mm.isnan().all())
        own = np.asarray(cache.record(patient).exhale_to_inhale)
        np.testing.assert_allclose(sample.exhale_to_inhale[0], own, atol=2.0)
        assert sample.slot_phase.tolist() == [[0, 1]]
    assert met.pop("e") == {"e"}
    assert set(met) == set("abcd") == set().union(*met.values()) and all(len(names) == 1 for names in met.values())
    assert all(patient not in names for patient, names in met.items())
    again = PairCrops(PairCache(tmp_path), config)
    torch.testing.assert_close(again.batch(3, 4).ct_hu, crops.batch(3, 4).ct_hu)


def test_a_scan_beside_itself_shows_both_phases_and_compares_none(tmp_path: Path, make_pair: MakePair) -> None:
    for name in "ab":
        write_pair(make_pair(name), tmp_path)
    config = CropConfig(crop_vox=(12, 14, 16), jitter_mm=4.0, partner="itself", correspondences=True)
    crops = PairCrops(PairCache(tmp_path), config)
    phases = []
    for i in range(24):
        sample = crops[i]
        assert sample.partner_mm is not None
        phases.append(tuple(sample.slot_phase[0].tolist()))
        torch.testing.assert_close(sample.partner_mm[0, :, 0, 0, 0], sample.voxel_to_mm[0, 0, :, 3])
        torch.testing.assert_close(sample.exhale_to_inhale[0], torch.eye(3, 4))
    assert set(phases) == {(0, 0), (1, 1)} and 6 < phases.count((0, 0)) < 18
    torch.testing.assert_close(crops.batch(2, 3).ct_hu[1], crops[7].ct_hu[0])


@pytest.mark.parametrize("partner", ["own", "stranger"])
def test_places_matched_by_the_affine_alone(
    tmp_path: Path, make_pair: MakePair, partner: Literal["own", "stranger"]
) -> None:
    u = Displacement(
        u_mm=np.full((3, 12, 14, 16), 40, np.float32),
        spacing_mm=(8.0, 8.0, 8.0),
        origin_mm=(-50.0, 0.0, 0.0),
        provenance="elsewhere",
    )
    for name in "ab":
        write_pair(replace(make_pair(name), displacement=u), tmp_path)
    config = CropConfig(crop_vox=(12, 14, 16), partner=partner, correspondences=True, matched_by="affine")
    sample = PairCrops(PairCache(tmp_path), config)[0]
    assert sample.partner_mm is not None
    corner = torch.cat([sample.voxel_to_mm[0, 0, :, 3], torch.ones(1)])
    torch.testing.assert_close(sample.partner_mm[0, :, 0, 0, 0], sample.exhale_to_inhale[0] @ corner)


def test_one_pair_has_no_stranger(cache: PairCache) -> None:
    with pytest.raises(
        CacheError, match=r"data\.partner=stranger needs two patients with both phases, only a has them"
    ):
        PairCrops(cache, CropConfig(crop_vox=(12, 12, 12), partner="stranger"), patients=["a", "c"])
