"""Co-segmentation: diameters, GrabCut against brute force, lesions and their partners, co-attention, learning."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_data.cache import PairCache, write_pair
from lungssl_data.pair import Displacement, PhasePair, PhaseScan
from lungssl_data.volume import Geometry
from lungssl_tasks.cosegmentation.diameters import Diameters, lesions_of, measured, told_of
from lungssl_tasks.cosegmentation.diameters_file import check_places, read_diameters, write_diameters
from lungssl_tasks.cosegmentation.grabcut import GrabCutConfig, log_density, minimum_cut, mixture, pseudo_mask
from lungssl_tasks.cosegmentation.lesion_pairs import LesionPairs
from lungssl_tasks.cosegmentation.lesions import PHASES, Match, moved_mm
from lungssl_tasks.cosegmentation.model import CoAttention, CosegmentationModel
from lungssl_tasks.cosegmentation.task import CosegmentationTask
from lungssl_tasks.metrics import dice
from lungssl_tasks.model_folder import ModelFolderError, load_cosegmentation, load_model, save_cosegmentation
from lungssl_tasks.segmentation import IGNORE_LABEL, SegmentationModel
from scipy.stats import norm

SEGMENT = SegmentationModel.Config(base_width=8, max_width=16)


def grid_of(shape: tuple[int, int, int], spacing: tuple[float, float, float] = (4.0, 4.0, 4.0)) -> Geometry:
    return Geometry(shape=shape, spacing_mm=spacing, origin_mm=(10.0, -20.0, 5.0), direction=np.eye(3))


def test_diameters_of_a_rectangle_are_its_diagonal_and_the_chord_across() -> None:
    grid = grid_of((4, 9, 12), (2.0, 1.0, 3.0))
    mask = np.zeros(grid.shape, bool)
    mask[2, 3, 2:9] = True  # 7 pixels of 2 mm along x
    mask[2, 2:5, 5] = True  # 3 of 1 mm along y
    mask[1, 3, 3:5] = True
    found = measured(mask, grid)
    # Along x from edge to edge, in units of the smaller pixel: 6 * 2 + 1; along y 3; on slice 2.
    np.testing.assert_allclose(sorted(found.long_mm[:, 0]), [10 + 4 - 0.5, 10 + 16 + 0.5])
    np.testing.assert_allclose(found.long_mm[:, 1:], [[-17, 11], [-17, 11]])
    np.testing.assert_allclose(sorted(found.short_mm[:, 1]), [-20 + 2 - 0.5, -20 + 4 + 0.5])
    np.testing.assert_allclose(found.short_mm[:, 0], 10 + 10)
    assert found.half_axes_mm() == pytest.approx((6.5, 1.5, 1.5))
    with pytest.raises(ValueError, match="empty mask"):
        measured(np.zeros(grid.shape, bool), grid)


def turned(degrees: float, a: float = 20.0, b: float = 10.0) -> Diameters:
    along = np.array([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees)), 0])
    across = np.array([-along[1], along[0], 0])
    centre = np.array([50.0, 20.0, 45.0])
    return Diameters(
        long_mm=np.stack([centre - a * along, centre + a * along]),
        short_mm=np.stack([centre - b * across, centre + b * across]),
    )


def test_the_ellipsoid_is_known_at_its_ends_and_by_its_volume() -> None:
    lesion, grid = turned(30.0), grid_of((40, 40, 40), (2.0, 2.0, 2.0))
    above = lesion.centre_mm() + np.array([0.0, 0.0, 5.0])
    ends = np.stack([lesion.long_mm[1], lesion.short_mm[0], above])
    np.testing.assert_allclose(lesion.axes_of(ends), [[1, 0, 0], [0, -1, 0], [0, 0, 0.5]], atol=1e-12)
    assert lesion.ellipsoid(grid).sum() * 8 == pytest.approx(4 / 3 * np.pi * 20 * 10 * 10, rel=0.03)
    assert lesion.box(grid, 1.3).sum() * 8 == pytest.approx(40 * 20 * 20 * 1.3**3, rel=0.05)
    told = told_of([lesion, lesion.moved(np.array([200.0, 0, 0]))], grid)  # the second one's is 0 here
    assert np.array_equal(told >= 0.5, lesion.ellipsoid(grid)) and 0.9 < told.max() <= 1
    assert np.array_equal(told > 0, lesion.ellipsoid(grid, 2.0))
    again = measured(lesion.ellipsoid(grid), grid)
    assert again.half_axes_mm()[:2] == pytest.approx((20, 10), abs=1.5)
    assert np.linalg.norm(again.centre_mm() - lesion.centre_mm()) < 1.5


def test_a_file_of_diameters_comes_back_and_mistakes_are_named(tmp_path: Path) -> None:
    write_diameters(
        tmp_path / "d.csv", {("p1", "exhale"): [turned(30.0), turned(75.0)], ("p2", "inhale"): [turned(0.0)]}
    )
    text = (tmp_path / "d.csv").read_text()
    (tmp_path / "e.csv").write_text("\ufeff" + text, encoding="utf-8")  # as spreadsheets save UTF-8
    for name in ("d.csv", "e.csv"):
        found = read_diameters(tmp_path / name)
        assert {key: len(some) for key, some in found.items()} == {("p1", "exhale"): 2, ("p2", "inhale"): 1}
        np.testing.assert_allclose(found["p1", "exhale"][1].short_mm, turned(75.0).short_mm, atol=1e-3)
        assert found["p2", "inhale"][0].source == f"{tmp_path / name}, line 4"
    header, row = text.splitlines()[:2]

    def line(long_mm: list[list[float]], short_mm: list[list[float]]) -> str:
        return f"{header}\np1,exhale," + ",".join(f"{v:g}" for end in (*long_mm, *short_mm) for v in end) + "\n"

    flat = [[0.0, 0.0, 5.0], [20.0, 0.0, 5.0]]
    for content, message in (
        (text.replace("p2,inhale", "p2,ei"), "line 4: phase 'ei', expected exhale or inhale"),
        (text.replace("45.0000\n", "46.0000\n"), "line 2: both diameters lie on one axial slice"),
        (text.replace("p1,exhale,", "p1,exhale,x"), "line 2: could not convert"),
        (text.replace("p1,exhale", ",exhale"), "line 2: patient is empty"),
        (text.replace(row, row[: row.rindex(",")]), "line 2: short_b_z_mm is empty; give numbers"),
        (text.replace("long_a_x_mm", "long_a_x"), "line 1: column long_a_x_mm is missing"),
        (header + "\n", "no line after the names of the columns"),
        (line(flat, [[10, -11, 5], [10, 11, 5]]), "the short diameter has 22.0 mm, the long one 20.0; swap them"),
        (line(flat, [[8, -4, 5], [12, 4, 5]]), "the diameters are 27 degrees off a right angle"),
        (line(flat, [[10, 12, 5], [10, 18, 5]]), "the diameters are 12.0 mm apart; give two that cross"),
        (line(flat, [[45, -3, 5], [45, 3, 5]]), "the diameters are 25.0 mm apart; give two that cross"),
        (text.replace("p1,exhale", '"p1' + "x" * 200_000), "field larger than field limit.*save it as CSV"),
    ):
        (tmp_path / "e.csv").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_diameters(tmp_path / "e.csv")
    (tmp_path / "e.csv").write_bytes(text.encode().replace(b"p1", b"p\xfc"))
    with pytest.raises(ValueError, match=r"e\.csv.*save it as CSV in UTF-8"):
        read_diameters(tmp_path / "e.csv")


def test_diameters_that_are_not_of_a_scan_are_noticed() -> None:
    scan = dataclasses.replace(patient(1).scan("exhale"), origin_mm=(20.0, -150.0, -60.0))  # to 124, -54, 36
    scan.lung[:, 10:] = 0  # y above -110

    def check(middle: tuple[float, float, float], found: PhaseScan = scan) -> None:
        move = np.array(middle) - turned(20).centre_mm()
        held = turned(20)
        one = dataclasses.replace(held, long_mm=held.long_mm + move, short_mm=held.short_mm + move, source="d, line 2")
        check_places({("p", "exhale"): [one]}, "p", "exhale", found)

    check((70, -130, 0))
    check((70, -100, 0))  # beside the lung
    with pytest.raises(ValueError, match=r"d, line 2: end .* outside of the exhale scan.*as RAS it would"):
        check((-70, 130, 0))
    with pytest.raises(ValueError, match="as z, y, x it would lie inside"):
        check((0, -125, 70))
    with pytest.raises(ValueError, match=r"there is no lung about .*of exhale; look whether"):
        check((70, -75, 0))
    check((70, -75, 0), dataclasses.replace(scan, lung=np.zeros_like(scan.lung)))  # nobody knows where it is


def test_the_cut_is_the_least_of_all_labellings() -> None:
    random = np.random.default_rng(0)
    pairs = np.array([[i, j] for i, j in itertools.combinations(range(9), 2) if (j - i) in (1, 3)])
    for _ in range(8):
        cost_out, cost_in = random.normal(0, 2, 9), random.normal(0, 2, 9)
        weights = random.uniform(0, 1.5, len(pairs))

        def energy(inside: np.ndarray, out: Any = cost_out, within: Any = cost_in, w: Any = weights) -> float:
            return float(np.where(inside, within, out).sum() + w[inside[pairs[:, 0]] != inside[pairs[:, 1]]].sum())

        least = min(energy(np.array(labels)) for labels in itertools.product([False, True], repeat=9))
        assert energy(minimum_cut(cost_out, cost_in, pairs, weights)) == pytest.approx(least, abs=0.05)


def test_a_mixture_finds_what_values_were_drawn_from() -> None:
    random = np.random.default_rng(0)
    values = np.concatenate([random.normal(-850, 40, 3000), random.normal(-300, 80, 1000)])
    weights, means, sds = mixture(values, 2)
    np.testing.assert_allclose(weights, [0.75, 0.25], atol=0.03)
    np.testing.assert_allclose(means, [-850, -300], atol=10)
    np.testing.assert_allclose(sds, [40, 80], atol=8)
    expected = np.log(weights[0] * norm.pdf(-500, means[0], sds[0]) + weights[1] * norm.pdf(-500, means[1], sds[1]))
    assert log_density(np.array([-500.0]), weights, means, sds)[0] == pytest.approx(expected)
    assert len(mixture(np.full(9, -800.0), 5)[0]) == 1


def test_diameters_become_the_lesion_not_the_ellipsoid() -> None:
    """Half of an ellipsoid, beside tissue as bright that isn't lung: what the diameters overstate is cut off."""
    grid = grid_of((22, 22, 22))
    lesion = Diameters(
        long_mm=np.array([[26.0, 20.0, 49.0], [74.0, 20.0, 49.0]]),
        short_mm=np.array([[50.0, 4.0, 49.0], [50.0, 36.0, 49.0]]),
    )
    truth = lesion.ellipsoid(grid) & (np.arange(22)[:, None, None] <= 11)
    lung = np.ones(grid.shape, bool)
    lung[:, 14:] = False
    truth &= lung
    hu = np.random.default_rng(0).normal(np.where(truth, -250.0, -820.0), 60.0)
    hu[~lung] = -200
    found = pseudo_mask(hu, grid, lesion, within=lung)
    assert dice(found, truth) > 0.9 > 0.8 > dice(lesion.ellipsoid(grid), truth)
    solid = pseudo_mask(hu, grid, lesion, GrabCutConfig(least_hu=-700.0), within=lung)
    assert dice(solid, truth) > 0.9
    with pytest.raises(ValueError, match="their middle lies beyond the crop"):
        pseudo_mask(hu, dataclasses.replace(grid, origin_mm=(500.0, 0.0, 0.0)), lesion)
    speck = dataclasses.replace(lesion, long_mm=49 + lesion.long_mm / 50, short_mm=49 + lesion.short_mm / 50)
    assert not speck.ellipsoid(grid).any()
    found = pseudo_mask(hu, grid, speck)  # smaller than a voxel: the nearest one at least
    middle = np.rint((speck.centre_mm() - grid.origin_mm) / 4).astype(int)[::-1]
    assert found[tuple(middle)] and found.sum() < 8


SHIFT = (8.0, -4.0, 4.0)
"""Exhale to inhale, mm; voxels of 4."""


def scan_of(lesion: np.ndarray, seed: int) -> PhaseScan:
    hu = np.random.default_rng(seed).normal(np.array([-850.0, -300.0, -50.0])[lesion], 30.0)
    return PhaseScan(
        ct_hu=hu.astype(np.int16),
        valid=np.ones(lesion.shape, np.uint8),
        lung=np.ones(lesion.shape, np.uint8),
        lesion=lesion,
        spacing_mm=(4.0, 4.0, 4.0),
        origin_mm=(0.0, 10.0, -5.0),
    )


def ball(shape: tuple[int, int, int], centre: tuple[int, int, int], radius: float) -> np.ndarray:
    apart = np.indices(shape) - np.array(centre).reshape(3, 1, 1, 1)
    return np.asarray((apart**2).sum(axis=0) <= radius**2)


def patient(seed: int) -> PhasePair:
    """A ball that stays, a smaller one that inhale lacks."""
    shape = (24, 24, 26)
    exhale, inhale = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    exhale[ball(shape, (8, 9, 8), 3.2)] = 1
    exhale[ball(shape, (15, 15, 17), 2.4)] = 2
    inhale[ball(shape, (9, 8, 10), 3.2)] = 1
    scans = [scan_of(one, seed + k) for k, one in enumerate((exhale, inhale))]
    u_mm = np.tile(np.array(SHIFT, np.float32).reshape(3, 1, 1, 1), (1, *shape))
    return PhasePair(
        patient=f"p{seed}",
        exhale=scans[0],
        inhale=scans[1],
        exhale_to_inhale=np.eye(3, 4),
        affine_provenance="none",
        displacement=Displacement(
            u_mm=u_mm, spacing_mm=scans[0].spacing_mm, origin_mm=scans[0].origin_mm, provenance="made"
        ),
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> PairCache:
    folder = tmp_path_factory.mktemp("lesions") / "cache"
    folder.mkdir()
    for seed in (10, 20):
        write_pair(patient(seed), folder)
    return PairCache(folder)


def lesion_pairs(cache: PairCache, **more: Any) -> LesionPairs:
    given: dict[str, Any] = {"supervision": "masks", "seed": 0, "side_vox": 16, "grabcut": GrabCutConfig()}
    return LesionPairs(cache, list(cache.patients), **(given | more))


def test_lesions_find_their_partners_and_crops_their_middles(cache: PairCache) -> None:
    pairs = lesion_pairs(cache)
    assert pairs.matches == [
        match
        for p in ("p10", "p20")
        for match in (Match(patient=p, exhale=(0,), inhale=(0,)), Match(patient=p, exhale=(1,), inhale=()))
    ]
    by_size = sorted((pairs.pair(index) for index in range(4)), key=lambda pair: -int((pair.exhale_labels == 1).sum()))
    for pair in by_size[:2]:
        for labels in (pair.exhale_labels, pair.inhale_labels):
            assert (labels == 1).sum() == ball((24, 24, 26), (8, 9, 8), 3.2).sum() and labels[0, 8, 8, 8] == 1
        assert (pair.exhale_labels == IGNORE_LABEL).any()  # another lesion's part, and beyond the scan
    for pair in by_size[2:]:
        assert (pair.exhale_labels == 1).sum() == ball((24, 24, 26), (15, 15, 17), 2.4).sum()
        assert not (pair.inhale_labels == 1).any() and (pair.inhale_labels == 0).any()
        assert pair.inhale_truth is not None and not (pair.inhale_truth == 1).any()
        hu = pair.exhale_hu[0, 0][pair.exhale_labels[0] == 1]
        assert abs(float(hu.mean()) + 50) < 10
    np.testing.assert_allclose(moved_mm(cache["p10"], np.array([[40.0, 40, 40]])), [[48, 36, 44]])
    np.testing.assert_allclose(moved_mm(cache["p10"], np.array([[48.0, 36, 44]]), back=True), [[40, 40, 40]])
    np.testing.assert_allclose(moved_mm(cache["p10"], np.array([[400.0, 40, 40]])), [[400, 40, 40]])  # the affine


def test_lesions_that_touch_in_one_phase_are_one_and_specks_are_unknown() -> None:
    """Two balls and a speck of exhale are one part in inhale; a small lesion is a speck in inhale."""
    pair = patient(30)
    lesion = {phase: np.zeros((24, 24, 26), np.uint8) for phase in ("exhale", "inhale")}
    for centre in ((8, 8, 7), (8, 8, 13)):
        lesion["exhale"][ball((24, 24, 26), centre, 2.4)] = 1
    lesion["inhale"][ball((24, 24, 26), (9, 7, 9), 2.4)] = lesion["inhale"][ball((24, 24, 26), (9, 7, 15), 2.4)] = 1
    lesion["inhale"][9, 7, 9:16] = 1
    lesion["exhale"][8, 8, 17] = 1  # becomes the end of inhale's
    lesion["exhale"][ball((24, 24, 26), (17, 17, 8), 1.8)] = 2
    lesion["inhale"][18, 16, 10:14] = 2
    scans = {phase: dataclasses.replace(pair.scan(phase), lesion=lesion[phase]) for phase in PHASES}
    pair = dataclasses.replace(pair, exhale=scans["exhale"], inhale=scans["inhale"])
    for supervision in ("masks", "diameters"):
        pairs = LesionPairs(
            {"p30": pair}, ["p30"], side_vox=16, supervision=supervision, seed=0, grabcut=GrabCutConfig()
        )
        assert [(len(match.exhale), len(match.inhale)) for match in pairs.matches] == [(2, 1), (1, 1)]
        both, little = pairs.matches
        crops = pairs.crops(both)
        truths = {phase: crop.truth for phase, crop in crops.items()}
        assert truths["exhale"] is not None and truths["inhale"] is not None
        assert (truths["exhale"] == 1).sum() == 2 * ball((24, 24, 26), (8, 8, 8), 2.4).sum()
        assert (truths["inhale"] == 1).sum() == (lesion["inhale"] == 1).sum()
        crops = pairs.crops(little)
        assert crops["exhale"].truth is not None and (crops["exhale"].truth == 1).sum() == (lesion["exhale"] == 2).sum()
        assert crops["inhale"].truth is None and not (crops["inhale"].labels == 1).any()
        unknown = crops["inhale"].labels == IGNORE_LABEL
        assert (unknown & (crops["inhale"].hu > -400)).sum() >= 4  # where the speck is


def test_many_specks_take_no_grid_each() -> None:
    types = np.zeros((60, 60, 60), np.uint8)
    types[::4, ::4, ::4] = 1
    types[30:35, 30:34, 30:33] = 2
    parts = lesions_of(types)
    assert len(parts) > 3000 and parts[0].voxels == 60 and parts[0].corner == (30, 30, 30)
    assert sum(part.mask.nbytes for part in parts) < types.nbytes
    grid = grid_of(types.shape)
    assert parts[0].holds(parts[0].points_mm(grid), grid).all()
    np.testing.assert_allclose(parts[0].diameters(grid).centre_mm()[2], 5 + 4 * 30)


def test_a_sample_is_a_function_of_its_index_and_both_scans_are_mirrored_alike(cache: PairCache) -> None:
    pairs = lesion_pairs(cache, shift_vox=2, flips=True)
    again = lesion_pairs(cache, shift_vox=2, flips=True)
    for index in (5, 0, 7):
        one, other = pairs.pair(index), again.pair(index)
        assert torch.equal(one.exhale_hu, other.exhale_hu) and torch.equal(one.inhale_labels, other.inhale_labels)
        for phase in ("exhale", "inhale"):
            hu, labels = getattr(one, f"{phase}_hu")[0, 0], getattr(one, f"{phase}_labels")[0]
            assert ((hu > -600) & (labels == 0)).float().mean() < 1e-3  # labels go with their image
            told = getattr(one, f"{phase}_told")[0, 0]
            assert ((told >= 0.45) | (labels != 1)).float().mean() > 0.99 and told.max() > 0.9  # and what is told
    places = [torch.argwhere(pairs.pair(index).exhale_labels[0] == 1).float().mean(0) for index in range(8)]
    assert len({tuple(place.tolist()) for place in places}) > 4


def test_pseudo_masks_stand_in_for_masks(cache: PairCache) -> None:
    pairs = lesion_pairs(cache, supervision="diameters")
    for index in range(4):
        pair = pairs.pair(index)
        assert pair.exhale_truth is not None
        known = (pair.exhale_labels != IGNORE_LABEL) & (pair.exhale_truth != IGNORE_LABEL)
        found, truth = (((v == 1) & known)[0].numpy() for v in (pair.exhale_labels, pair.exhale_truth))
        assert dice(found, truth) > 0.85
    lesion = pairs.lesion("p10", "exhale", 0).diameters
    given = {("p10", "exhale"): [lesion]}
    alone = lesion_pairs(cache, supervision="diameters", diameters=given)
    assert alone.matches == [Match(patient="p10", exhale=(0,), inhale=())]
    assert alone.patients == ["p10"]
    unknown = alone.pair(0)  # nobody looked at inhale: no label, and nothing to be judged by
    assert (unknown.inhale_labels == IGNORE_LABEL).all() and unknown.inhale_truth is None
    assert (
        lesion_pairs(cache, supervision="diameters", diameters=given | {("p10", "inhale"): []}).pair(0).inhale_labels
        == 0
    ).any()
    above = np.array([0.0, 0.0, 60.0])
    far = Diameters(long_mm=lesion.long_mm + above, short_mm=lesion.short_mm + above)
    with pytest.raises(ValueError, match="masks needs a mask of every lesion"):
        lesion_pairs(cache, diameters={("p10", "exhale"): [far]})
    with pytest.raises(ValueError, match="no patient with both phases has a lesion"):
        lesion_pairs(cache, diameters={})
    with_mask = alone.pair(0).exhale_truth  # the file says which, the mask how far it goes
    assert with_mask is not None and (with_mask == 1).sum() == ball((24, 24, 26), (8, 9, 8), 3.2).sum()


def test_attention_gates_channels_by_the_other_scan_and_places_by_itself() -> None:
    torch.manual_seed(0)
    gate = CoAttention(4)
    features, other = torch.randn(1, 4, 2, 3, 2), torch.randn(1, 4, 2, 3, 2)
    assert torch.equal(gate(features, other), features)  # at first nothing changes
    linear = gate.channels[-1]
    assert isinstance(linear, torch.nn.Linear)
    with torch.no_grad():
        linear.weight.normal_()
        gate.places.weight[0, 1, 1, 1, 1] = 0.5  # half of the largest channel, at its place
    hidden = torch.nn.functional.leaky_relu(gate.channels[0](other.mean(dim=(2, 3, 4))), 0.01)
    channels = 1 + torch.tanh(hidden @ linear.weight.T)
    gated = features * channels.reshape(1, 4, 1, 1, 1)
    expected = gated * (1 + torch.tanh(0.5 * gated.amax(dim=1, keepdim=True)))
    torch.testing.assert_close(gate(features, other), expected)


def task(**more: Any) -> CosegmentationTask:
    torch.manual_seed(0)
    encoder: Any = create_backbone("resenc_tiny", widths=(8, 16, 16), depths=(1, 1, 1), spacing_mm=4.0)
    parts = {name: more.pop(name) for name in ("attention", "told") if name in more}
    config = CosegmentationModel.Config(segment=SEGMENT, **parts)
    return CosegmentationTask.Config(model=config, side_vox=16, **more).build(encoder)


@pytest.mark.parametrize(("attention", "meets"), [("co", True), ("own", False), ("none", False)])
def test_scans_meet_where_they_should_and_are_treated_alike(attention: str, meets: bool) -> None:
    model = task(attention=attention).model.eval()
    if model.attend is not None:
        torch.nn.init.normal_(model.attend.channels[-1].weight)  # pyright: ignore[reportArgumentType]
    one, two, three = (torch.rand(1, 1, 16, 16, 16) * 1000 - 900 for _ in range(3))
    told, there = torch.rand(1, 1, 16, 16, 16), torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        exhale, inhale = model(one, two, told, there)
        swapped = model(two, one, there, told)
        changed, _ = model(one, three, told, there)
    torch.testing.assert_close((exhale, inhale), swapped[::-1])
    assert torch.allclose(exhale, changed) is not meets


def test_a_network_is_told_where_the_lesion_is_and_need_not_listen() -> None:
    crops = [torch.rand(1, 1, 16, 16, 16) * 1000 - 900 for _ in range(2)]
    here, elsewhere = torch.rand(1, 1, 16, 16, 16), torch.rand(1, 1, 16, 16, 16)
    torch.manual_seed(3)
    for told in (True, False):
        model = task(told=told).model.eval()
        with torch.no_grad():
            first = model(*crops, here, here)
            torch.testing.assert_close(model(*crops, elsewhere, here), first)  # at first nothing comes of it
            assert len(model.told) == (3 if told else 0)
            for one in model.told:
                torch.nn.init.ones_(one.weight)  # pyright: ignore[reportArgumentType]
            exhale, inhale = model(*crops, elsewhere, here)
        assert torch.equal(exhale, first[0]) is not told
        if not told:
            assert torch.equal(inhale, first[1])


def test_it_learns_from_diameters_and_leaves_empty_what_vanished(cache: PairCache) -> None:
    built = task(supervision="diameters").train()
    pairs = lesion_pairs(cache, supervision="diameters", shift_vox=1, flips=True)
    adam = torch.optim.Adam(built.parameters(), lr=1e-2)
    figures = {}
    for step in range(30):
        output = built(pairs.batch(step, 2), step)
        adam.zero_grad()
        output.loss.backward()
        adam.step()
        figures = output.metrics
    assert float(figures["truth_dice"]) > 0.8
    judged = lesion_pairs(cache)
    built.eval()
    for index in range(4):
        pair = judged.pair(index)
        with torch.no_grad():
            found = built.model(pair.exhale_hu, pair.inhale_hu, pair.exhale_told, pair.inhale_told)
            exhale, inhale = (logits.argmax(dim=1) == 1 for logits in found)
        known = pair.exhale_labels != IGNORE_LABEL
        assert dice((exhale & known)[0].numpy(), (pair.exhale_labels == 1)[0].numpy()) > 0.7
        if not (pair.inhale_labels == 1).any():  # per-phase masks: nothing is forced to agree
            where_it_was = pair.exhale_labels == 1
            assert int((inhale & where_it_was).sum()) < 0.1 * int((exhale & where_it_was).sum())


def test_crops_that_do_not_fit_are_refused() -> None:
    encoder = task().export_encoder()
    with pytest.raises(ValueError, match="side_vox 18 must be a multiple of the token stride, 4"):
        CosegmentationTask.Config(side_vox=18).build(encoder)
    with pytest.raises(ValueError, match="shift_vox 8: the lesion's middle would leave the crop; take 0 to 7"):
        CosegmentationTask.Config(side_vox=16, shift_vox=8).build(encoder)


def test_a_folder_holds_the_whole_network(tmp_path: Path) -> None:
    model = task(attention="own").model.eval()
    save_cosegmentation(tmp_path / "model", model, side_vox=16)
    again, side_vox = load_cosegmentation(tmp_path / "model")
    crops = [torch.rand(1, 1, 16, 16, 16) * 1000 - 900 for _ in range(2)] + [torch.rand(1, 1, 16, 16, 16)] * 2
    with torch.no_grad():
        torch.testing.assert_close(model(*crops), again(*crops), rtol=0, atol=0)
    assert side_vox == 16 and again.config == model.config
    untold = task(told=False).model
    save_cosegmentation(tmp_path / "older", untold, side_vox=16)
    card = json.loads((tmp_path / "older" / "model.json").read_text())
    del card["cosegmentation"]["told"]  # as networks were written before they could be told
    (tmp_path / "older" / "model.json").write_text(json.dumps(card))
    assert load_cosegmentation(tmp_path / "older")[0].config == untold.config
    with pytest.raises(ModelFolderError, match="give a model that was fine-tuned for this"):
        load_model(tmp_path / "model")
