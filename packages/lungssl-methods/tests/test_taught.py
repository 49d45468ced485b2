from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lungssl_backbones.encoder import Features
from lungssl_data.batch import PairBatch, View
from lungssl_methods.paired_dense import PairedDense
from lungssl_methods.taught import taught_matches
from torch import nn

MakeBatch = Callable[..., PairBatch]
SHIFT_MM = torch.tensor([5.0, 6.0, 4.0])
"""From exhale to inhale, (x, y, z)."""


class PlaceEncoder(nn.Module):
    """Its features are sines and cosines of the place that the image tells (`told`)."""

    name = "place"
    config = None
    dim = 12
    supports_keep = False
    token_stride_vox = 4
    pyramid_channels = (12,)
    pyramid_strides_vox = (1,)
    spacing_mm = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("periods_mm", torch.tensor([15.0, 40.0]))

    def forward(
        self, x: torch.Tensor, *, mask: object = None, keep: object = None, coords_mm: object = None
    ) -> Features:
        place = torch.cat([x % 100, x // 100 % 100, x // 10_000], dim=1)
        angle = (6.2832 * place[:, :, None] / self.periods_mm[:, None, None, None]).flatten(1, 2)
        fine = torch.cat([angle.sin(), angle.cos()], dim=1) * self.scale
        return Features(cls=None, tokens=fine.flatten(2).mT, pyramid=(fine,), grid=(1, 1, 1), stride_mm=2.0)


def told(place_mm: torch.Tensor) -> torch.Tensor:
    """One number for the millimetres x, y, z, each from 0 to 99: float32 holds it."""
    x, y, z = place_mm.round().split(1, dim=1)
    return x + 100 * y + 10_000 * z


def _telling(batch: PairBatch) -> PairBatch:
    """Views whose voxels tell the place in slot 1's scan, which is SHIFT_MM from that in slot 0's."""

    def placed(view: View) -> View:
        moved = view.coords_mm + (SHIFT_MM if view.slot == 0 else torch.zeros(3))[:, None, None, None]
        return replace(
            view, image=told(moved), partner_mm=moved if view.slot == 0 else None, lung=torch.ones_like(view.lung)
        )

    return replace(batch, views=tuple(placed(view) for view in batch.views))


def _batch(make_batch: MakeBatch) -> PairBatch:
    return _telling(make_batch(2, globals_per_slot=2, locals_per_slot=0, global_size=(18, 20, 22)))


def _matches(batch: PairBatch, encoder: nn.Module, **changes: object):  # noqa: ANN202
    first, second = batch.views[0], batch.views[1]
    options = {"affine": batch.exhale_to_inhale, "reach_mm": 16.0, "residual_mm": 3.0} | changes
    return taught_matches(first, second, (encoder(first.image), encoder(second.image)), (1,), 200, **options)  # pyright: ignore


def test_features_that_tell_the_place_find_a_shift_that_nobody_told(make_batch: MakeBatch) -> None:
    batch = _batch(make_batch)
    found = _matches(batch, PlaceEncoder())
    first = batch.views[0]
    x, y, z = found.first_vox.long().unbind(-1)
    truth = torch.stack([first.coords_mm[i, :, z[i], y[i], x[i]].mT for i in range(2)]) + SHIFT_MM
    error = torch.linalg.vector_norm(found.second_mm - truth, dim=-1)
    # Places are on a lattice of 4 mm, whose cells have half a diagonal of 3.5 mm; points whose partner is outside of
    # the second view find something else, and few of them come back.
    assert found.valid.float().mean() > 0.4
    assert error[found.valid].median() < 2.5
    assert (error[found.valid] < 3.6).float().mean() > 0.9
    # and the voxel is where the place is
    second = batch.views[1]
    x, y, z = found.second_vox.long().unbind(-1)
    for i in range(2):
        torch.testing.assert_close(second.coords_mm[i, :, z[i], y[i], x[i]].mT, found.second_mm[i])


def test_features_that_tell_nothing_seldom_lead_back(make_batch: MakeBatch) -> None:
    batch = _batch(make_batch)
    noise = replace(batch, views=tuple(replace(v, image=1e6 * torch.rand_like(v.image)) for v in batch.views))
    assert _matches(noise, PlaceEncoder()).valid.float().mean() < 0.1


def test_places_are_looked_for_around_where_the_affine_leads(make_batch: MakeBatch) -> None:
    batch = _batch(make_batch)
    first = batch.views[0]
    for affine_mm in (torch.zeros(3), torch.tensor([10.0, 0.0, -6.0])):
        affine = batch.exhale_to_inhale.clone()
        affine[:, :, 3] = affine_mm
        found = _matches(batch, PlaceEncoder(), affine=affine, reach_mm=5.0)
        x, y, z = found.first_vox.long().unbind(-1)
        start = torch.stack([first.coords_mm[i, :, z[i], y[i], x[i]].mT for i in range(2)]) + affine_mm
        away = torch.linalg.vector_norm(found.second_mm - start, dim=-1)
        assert found.valid.any() and (away[found.valid] <= 5.0).all()


def test_outside_of_the_lung_nothing_is_found(make_batch: MakeBatch) -> None:
    batch = _batch(make_batch)
    second = replace(batch.views[1], lung=torch.zeros_like(batch.views[1].lung))
    assert not _matches(replace(batch, views=(batch.views[0], second)), PlaceEncoder()).valid.any()


def test_a_teacher_takes_the_place_of_the_displacement(make_batch: MakeBatch) -> None:
    batch = _batch(make_batch)
    encoder = PlaceEncoder()
    method = PairedDense.Config(points=64, matched_by="teacher", momentum=0.5).build(encoder, total_steps=10)
    assert not method.needs_correspondences
    told = method(batch, 0)
    assert told.metrics["taught_error_mm"] < 2.5 and told.metrics["matched_share"] > 0.3
    alone = replace(batch, views=tuple(replace(view, partner_mm=None) for view in batch.views))
    untold = method.eval()(alone, 0)
    assert "taught_error_mm" not in untold.metrics and untold.metrics["cross_loss"] > 0
    told.loss.backward()
    teacher = method.teacher_encoder
    assert isinstance(teacher, PlaceEncoder) and teacher.scale.grad is None and encoder.scale.grad is not None
    with torch.no_grad():
        encoder.scale.fill_(3.0)
    method.after_optimizer_step(0)
    assert teacher.scale.item() == pytest.approx(2.0)  # half of 1 and half of 3
    assert method.export_encoder() is encoder


def test_a_teacher_needs_known_warps_beside_it() -> None:
    with pytest.raises(ValueError, match=r"known_share 0\.25 with matched_by='teacher'.*set it to at least 0\.5"):
        PairedDense.Config(matched_by="teacher", known_share=0.25).build(PlaceEncoder(), total_steps=10)
