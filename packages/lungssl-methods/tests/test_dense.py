from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_backbones.encoder import Features
from lungssl_data.batch import PairBatch, View
from lungssl_methods.contrast import dense_infonce, far_or_strangers, soft_positives, twin_contrast
from lungssl_methods.method import Method
from lungssl_methods.paired_dense import PairedDense, match_metrics
from lungssl_methods.points import PointPairs, neighbours, point_pairs, pyramid_at, slot_pairs
from lungssl_methods.vox2vec import Vox2Vec
from torch import nn

MakeBatch = Callable[..., PairBatch]
SIZE = (8, 12, 16)


class PyramidEncoder(nn.Module):
    """Two levels, of strides 1 and 4, each a linear map of its cells."""

    name = "pyramid"
    config = None
    dim = 6
    supports_keep = False
    token_stride_vox = 4
    pyramid_channels: tuple[int, ...] = (4, 6)
    pyramid_strides_vox: tuple[int, ...] = (1, 4)
    spacing_mm = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList([nn.Conv3d(1, 4, 3, 1, padding=1), nn.Conv3d(1, 6, 4, 4)])

    def forward(
        self, x: torch.Tensor, *, mask: object = None, keep: object = None, coords_mm: object = None
    ) -> Features:
        pyramid = tuple(level(x) for level in self.levels)
        z, y, x_tokens = pyramid[1].shape[2:]
        tokens = pyramid[1].flatten(2).mT
        return Features(cls=None, tokens=tokens, pyramid=pyramid, grid=(z, y, x_tokens), stride_mm=8.0)


class WhereEncoder(PyramidEncoder):
    """Its fine level is sines and cosines of the image: a code of the place where the image tells it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(
        self, x: torch.Tensor, *, mask: object = None, keep: object = None, coords_mm: object = None
    ) -> Features:
        angle = x * torch.arange(1, 5)[:, None, None, None]
        fine = torch.cat([angle.sin(), angle.cos()], dim=1) * self.scale
        pyramid = (fine[:, :4], torch.zeros(len(x), 6, *(side // 4 for side in x.shape[2:])))
        return Features(cls=None, tokens=pyramid[1].flatten(2).mT, pyramid=pyramid, grid=(1, 1, 1), stride_mm=8.0)


@pytest.fixture
def pyramid_encoder() -> PyramidEncoder:
    return PyramidEncoder()


def _vox2vec(encoder: nn.Module, **changes: object) -> Vox2Vec:
    sizes = {"points": 16, "hidden": 16, "out": 8}
    return Vox2Vec.Config(**(sizes | changes)).build(encoder, total_steps=10)  # pyright: ignore


def _paired(encoder: nn.Module, **changes: object) -> PairedDense:
    return PairedDense.Config(**({"points": 16} | changes)).build(encoder, total_steps=10)  # pyright: ignore


def _batch(make_batch: MakeBatch, b: int = 3, globals_per_slot: int = 2) -> PairBatch:
    return make_batch(b, globals_per_slot=globals_per_slot, locals_per_slot=0, global_size=SIZE)


def _unmatched(batch: PairBatch) -> PairBatch:
    def unknown(view: View) -> View:
        return replace(view, partner_mm=None if view.partner_mm is None else torch.full_like(view.coords_mm, torch.nan))

    return replace(batch, views=tuple(unknown(view) for view in batch.views))


def _pairs(batch: PairBatch, i: int = 0, j: int = 1, count: int = 40) -> PointPairs:
    views, encoder = batch.views, PyramidEncoder()
    features = encoder(views[i].image), encoder(views[j].image)
    return point_pairs((views[i], views[j]), features, (1, 4), count)


# Points


def test_the_pyramid_is_read_at_each_levels_own_stride() -> None:
    z, y, x = torch.meshgrid(*(torch.arange(float(side)) for side in SIZE), indexing="ij")
    fine = torch.stack([x, y, z])[None]  # each voxel holds its own index
    coarse = nn.functional.avg_pool3d(fine, 4)
    features = Features(cls=None, tokens=torch.zeros(1, 1, 3), pyramid=(fine, coarse), grid=(2, 3, 4), stride_mm=8.0)
    vox = torch.tensor([[[5.25, 6.5, 3.0], [2.0, 3.75, 4.5]]])
    found = pyramid_at(features, (1, 4), vox)
    torch.testing.assert_close(found, torch.cat([vox, vox], dim=-1))


def test_distances_are_between_places_of_one_sample_in_the_second_views_scan(make_batch: MakeBatch) -> None:
    batch = _batch(make_batch, b=2)
    # slot 1's scan is twice as large: distances of slot 0's points are doubled there
    first = replace(batch.views[0], partner_mm=2.0 * batch.views[0].coords_mm)
    second = replace(batch.views[1], coords_mm=2.0 * batch.views[0].coords_mm)
    points = _pairs(replace(batch, views=(first, second)))
    assert points.valid.any() and points.first.shape == (80, 10)
    assert points.distance_mm[:40, 40:].isnan().all()
    assert points.distance_mm[~points.valid].isnan().all()
    known = points.valid.nonzero()[:, 0]
    assert (points.distance_mm[known, known] == 0).all()
    block = points.distance_mm[:40, :40]
    block = block[~block.isnan()]
    steps = (block / 4.0).square()  # voxels of 2 mm, twice that: squares of distances in voxels are whole
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)


def test_views_are_paired_by_slot(make_batch: MakeBatch) -> None:
    views = _batch(make_batch, b=1, globals_per_slot=3).views
    assert [view.slot for view in views] == [0, 1, 0, 1, 0, 1]
    assert neighbours(views) == [(0, 2), (2, 4), (1, 3), (3, 5)]
    assert slot_pairs(views) == [(0, 1), (2, 3), (4, 5)]


# Both methods


@pytest.mark.parametrize("build", [_vox2vec, _paired])
@pytest.mark.parametrize("backbone", ["vit3d_nano", "resenc_tiny"])
def test_both_kinds_of_backbone_learn(
    build: Callable[[nn.Module], Vox2Vec | PairedDense], backbone: str, make_batch: MakeBatch
) -> None:
    method = build(create_backbone(backbone))
    assert isinstance(method, Method)
    batch = make_batch(2, globals_per_slot=2, locals_per_slot=0, global_size=(16, 32, 16))
    # the same smooth pattern of the scan in all views: random noise has nothing that could be found again
    views = tuple(replace(view, image=(view.coords_mm / 5).sin().mean(1, keepdim=True)) for view in batch.views)
    batch = replace(batch, views=views)
    optimizer = torch.optim.Adam(method.parameters(), lr=2e-3)
    losses = []
    for step in range(10):
        optimizer.zero_grad()
        output = method(batch, step)
        output.loss.backward()
        untouched = {n for n, p in method.encoder.named_parameters() if p.grad is None or not p.grad.any()}
        assert untouched <= {"mask_token", "mask_value"}
        assert all(value.ndim == 0 and not value.requires_grad for value in output.metrics.values())
        optimizer.step()
        method.after_optimizer_step(step)
        losses.append(output.loss.item())
    assert sum(losses[-2:]) < 0.95 * sum(losses[:2])
    assert method.export_encoder() is method.encoder


@pytest.mark.parametrize("build", [_vox2vec, _paired])
def test_held_out_points_are_fixed_and_trained_ones_are_not(
    build: Callable[[nn.Module], Vox2Vec | PairedDense], pyramid_encoder: nn.Module, make_batch: MakeBatch
) -> None:
    method, batch = build(pyramid_encoder), _batch(make_batch)
    assert method(batch, 0).loss.item() != method(batch, 0).loss.item()
    method.eval()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    assert method(batch, 0).loss.item() == method(batch, 9).loss.item()
    assert all(torch.equal(before[key], value) for key, value in method.state_dict().items())


@pytest.mark.parametrize("build", [_vox2vec, _paired])
def test_without_one_matched_point_the_loss_is_zero_and_gradients_are_there(
    build: Callable[..., Vox2Vec | PairedDense], pyramid_encoder: nn.Module, make_batch: MakeBatch
) -> None:
    change = {"pairs": "cross"} if build is _vox2vec else {"known_share": 0.0}
    method = build(pyramid_encoder, **change)
    output = method(_unmatched(_batch(make_batch)), 0)
    output.loss.backward()
    assert output.loss.item() == output.metrics["matched_share"].item() == 0.0
    assert "match_error_mm" not in output.metrics
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("build", [_vox2vec, _paired])
def test_losses_are_float32_under_autocast(
    build: Callable[..., Vox2Vec | PairedDense], pyramid_encoder: nn.Module, make_batch: MakeBatch
) -> None:
    method, batch = build(pyramid_encoder).eval(), _batch(make_batch)
    full = method(batch, 0).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(batch, 0).loss
    assert half.dtype == torch.float32 and half.item() == pytest.approx(full, rel=0.02)


# vox2vec


def test_vox2vec_tells_each_point_from_all_others_but_its_own_patients_elsewhere(
    pyramid_encoder: nn.Module, make_batch: MakeBatch
) -> None:
    batch = replace(_batch(make_batch), patient=torch.tensor([4, 4, 5]))
    method = _vox2vec(pyramid_encoder, near_mm=5.0).eval()
    generator = torch.Generator().manual_seed(0)
    features = [method.encoder(view.image) for view in batch.views]
    losses = []
    for i, j in ((0, 2), (1, 3)):
        points = point_pairs(
            (batch.views[i], batch.views[j]), (features[i], features[j]), (1, 4), 16, generator=generator
        )
        assert 0.3 < points.valid.float().mean() < 1
        stranger = torch.zeros(48, 48, dtype=torch.bool)
        for a in range(48):
            for b in range(48):
                other = batch.patient[a // 16] != batch.patient[b // 16]
                apart = a // 16 == b // 16 and points.distance_mm[a, b] > 5.0
                stranger[a, b] = bool(points.valid[a] and points.valid[b] and (other or apart))
        z = method.projector(torch.stack([points.first, points.second]))
        losses.append(twin_contrast(z[0], z[1], stranger, temperature=0.1, valid=points.valid))
    assert method(batch, 0).loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_voxels_that_all_look_alike_cost_ln_k(pyramid_encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _vox2vec(pyramid_encoder)
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.fill_(0.0)
    metrics = method(_batch(make_batch), 0).metrics
    assert metrics["loss_lnk"].item() == pytest.approx(1.0, abs=1e-5)
    assert metrics["embedding_std"].item() == 0.0


def test_vox2vec_needs_correspondences_only_across_phases(pyramid_encoder: nn.Module, make_batch: MakeBatch) -> None:
    batch = _batch(make_batch)
    batch = replace(batch, views=tuple(replace(view, partner_mm=None) for view in batch.views))
    within, cross = _vox2vec(pyramid_encoder), _vox2vec(pyramid_encoder, pairs="cross")
    assert (Vox2Vec.needs_correspondences, within.needs_correspondences, cross.needs_correspondences) == (
        False,
        False,
        True,
    )
    assert within(batch, 0).loss > 0
    with pytest.raises(ValueError, match="vox2vec with pairs='cross' needs to know where exhale points are"):
        cross(batch, 0)


# paired_dense


def test_the_loss_is_half_of_known_warps_and_half_across_slots(
    pyramid_encoder: nn.Module, make_batch: MakeBatch
) -> None:
    batch, method = _batch(make_batch), _paired(pyramid_encoder).eval()
    generator = torch.Generator().manual_seed(0)
    features = [method.encoder(view.image) for view in batch.views]

    def loss(i: int, j: int) -> torch.Tensor:
        points = point_pairs(
            (batch.views[i], batch.views[j]), (features[i], features[j]), (1, 4), 16, generator=generator
        )
        negative = far_or_strangers(points.distance_mm, points.sample, points.valid, far_mm=20.0)
        return dense_infonce(points.first, points.second, soft_positives(points.distance_mm, 3.0), negative)

    cross = torch.stack([loss(0, 1), loss(2, 3)]).mean().item()
    known = torch.stack([loss(0, 2), loss(1, 3)]).mean().item()
    output = method(batch, 0)
    assert output.metrics["cross_loss"].item() == pytest.approx(cross, rel=1e-5)
    assert output.metrics["known_loss"].item() == pytest.approx(known, rel=1e-5)
    assert output.loss.item() == pytest.approx((cross + known) / 2, rel=1e-5)
    alone = _paired(pyramid_encoder, known_share=0.0).eval()(batch, 0)
    assert alone.loss.item() == pytest.approx(cross, rel=1e-5) and "known_loss" not in alone.metrics


def test_features_that_say_the_place_match_without_error_and_others_by_chance(make_batch: MakeBatch) -> None:
    batch = _batch(make_batch)

    def placed(view: View) -> View:  # slot 0's voxels show where they are in slot 1's scan
        place = view.coords_mm if view.partner_mm is None else view.partner_mm
        weights = torch.tensor([1.0, 0.13, 0.017])[None, :, None, None, None]
        return replace(view, image=(0.02 * place * weights).sum(1, keepdim=True))

    method = _paired(WhereEncoder(), points=64).eval()
    knowing = method(replace(batch, views=tuple(placed(view) for view in batch.views)), 0).metrics
    assert knowing["chance_mm"] > 10.0
    assert knowing["match_error_mm"] < 0.3 * knowing["chance_mm"]
    guessing = method(batch, 0).metrics
    assert guessing["match_error_mm"] > 0.6 * guessing["chance_mm"]


def test_match_error_is_the_median_over_known_points_and_chance_the_mean_of_all_pairs() -> None:
    # one sample of 4 points on a line, at 0, 10, 30 and an unknown place; each finds its right-hand neighbour
    place = torch.tensor([0.0, 10.0, 30.0, torch.nan])
    distance = (place[:, None] - place[None]).abs()
    first = torch.eye(4)
    second = torch.eye(4)[[3, 0, 1, 2]]  # row 0 of `first` looks like row 1 of `second`, and so on
    points = PointPairs(
        first=first,
        second=second,
        distance_mm=distance,
        sample=torch.zeros(4, dtype=torch.long),
        valid=torch.tensor([True, True, True, False]),
    )
    metrics = match_metrics([points])
    # 0 finds 10, 1 finds 30; 2 looks like the unknown one, and no other is alike: the first of equals, 30 away
    assert metrics["match_error_mm"].item() == 20.0  # of 10, 20, 30
    assert metrics["chance_mm"].item() == pytest.approx((10 + 20 + 30) * 2 / 9)
    assert metrics["matched_share"].item() == 0.75


def test_what_cannot_work_is_refused_with_what_is_needed(pyramid_encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = _paired(pyramid_encoder)
    with pytest.raises(
        ValueError, match=r"known_share=0.5\), got globals_per_slot=1; set it to 2, or known_share to 0"
    ):
        method.check_views(globals_per_slot=1, locals_per_slot=0)
    _paired(pyramid_encoder, known_share=0.0).check_views(globals_per_slot=1, locals_per_slot=0)
    with pytest.raises(ValueError, match="vox2vec with pairs='within' compares two global views of each slot"):
        _vox2vec(pyramid_encoder).check_views(globals_per_slot=1, locals_per_slot=0)
    for one in (method, _vox2vec(pyramid_encoder)):
        one.check_views(globals_per_slot=2, locals_per_slot=0)
        with pytest.raises(ValueError, match="uses no local ones, got globals_per_slot=2 and locals_per_slot=1"):
            one.check_views(globals_per_slot=2, locals_per_slot=1)
    with pytest.raises(ValueError, match=r"two global views of one slot are needed, got views of slots \[0, 1\]"):
        method(_batch(make_batch, globals_per_slot=1), 0)
    batch = _batch(make_batch)
    with pytest.raises(ValueError, match="paired_dense needs to know where exhale points are"):
        method(replace(batch, views=tuple(replace(view, partner_mm=None) for view in batch.views)), 0)
    with pytest.raises(ValueError, match=r"less than 1, got 1\.0; for views of one scan alone take vox2vec"):
        _paired(pyramid_encoder, known_share=1.0)
    with pytest.raises(ValueError, match=r"sigma_mm 8\.0 and far_mm 20\.0 make points both positive and negative"):
        _paired(pyramid_encoder, sigma_mm=8.0)
    with pytest.raises(ValueError, match="vox2vec's pairs must be 'within' or 'cross', got 'all'"):
        misspelt = Vox2Vec.Config()
        object.__setattr__(misspelt, "pairs", "all")  # past the types, which tests check
        misspelt.build(pyramid_encoder, total_steps=10)
    for build in (_paired, _vox2vec):
        with pytest.raises(ValueError, match="Linear is not an Encoder"):
            build(nn.Linear(2, 2))
        flat = PyramidEncoder()
        flat.pyramid_channels = ()
        with pytest.raises(ValueError, match=r"feature maps, and pyramid has none; .* such as resenc_tiny"):
            build(flat)


def test_matches_with_strangers_stay_at_chance_however_long_they_are_trained(make_batch: MakeBatch) -> None:
    """T20: nothing in the method tells places where slot 1 shows another scene."""

    def scenes(strangers: bool) -> PairBatch:
        batch = make_batch(4, locals_per_slot=0, global_size=(16, 16, 16))
        coarse = torch.randn(4, 1, 11, 11, 11)
        scene = nn.functional.interpolate(coarse, size=(20, 20, 20), mode="trilinear", align_corners=True)
        first, second = batch.views
        place = first.coords_mm
        seen = scene[:, :, 4:, 2:18, 2:18]  # 4, 2 and 2 voxels on: what slot 0 has at z + 4 slot 1 has at z
        shift_mm = 2.0 * torch.tensor([2.0, 2.0, 4.0])[:, None, None, None]
        first = replace(first, image=scene[:, :, :16, :16, :16], partner_mm=place - shift_mm)
        second = replace(second, image=seen.roll(1, 0) if strangers else seen, coords_mm=place)
        lung = torch.ones_like(first.lung)
        return replace(batch, views=(replace(first, lung=lung), replace(second, lung=lung)))

    def error_over_chance(strangers: bool) -> float:
        torch.manual_seed(1)
        encoder = create_backbone("resenc_tiny", widths=(8, 16), depths=(1, 1))
        method = _paired(encoder, points=48, known_share=0.0, sigma_mm=1.0, far_mm=6.0)
        optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
        for step in range(16):
            loss = method(scenes(strangers), step).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        metrics = method.eval()(scenes(strangers), 16).metrics
        return (metrics["match_error_mm"] / metrics["chance_mm"]).item()

    assert error_over_chance(strangers=False) < 0.1
    assert error_over_chance(strangers=True) > 0.7
