import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lungssl_backbones.encoder import Features
from lungssl_data.batch import PairBatch
from lungssl_data.views import scale_hu
from lungssl_methods.auxiliary import AUXILIARY, MassHead, RecruitmentHead, token_air
from torch import nn

MakeBatch = Callable[..., PairBatch]
STRIDE = 4


def scans(make_batch: MakeBatch, exhale_hu: float, inhale_hu: float, *, paired: bool = True) -> PairBatch:
    """Uniform lungs in both phases."""
    batch = make_batch(2, locals_per_slot=0, paired=paired)
    views = [
        replace(
            view,
            image=scale_hu(torch.full_like(view.image, exhale_hu if view.slot == 0 else inhale_hu)),
            lung=torch.ones_like(view.lung),
        )
        for view in batch.views
    ]
    return replace(batch, views=tuple(views))


def features(batch: PairBatch, dim: int = 6) -> list[Features]:
    found = []
    for view in batch.views:
        grid = tuple(side // STRIDE for side in view.image.shape[2:])
        tokens = torch.randn(len(view.image), math.prod(grid), dim, requires_grad=True)
        found.append(Features(cls=None, tokens=tokens, pyramid=(), grid=grid, stride_mm=8.0))  # pyright: ignore
    return found


def test_a_views_own_shift_and_gamma_are_taken_back(make_batch: MakeBatch) -> None:
    view = scans(make_batch, -700.0, -700.0).views[0]
    shift_hu, gamma = torch.tensor([10.0, -10.0]), torch.tensor([0.9, 1.1])
    each = (-1, 1, 1, 1, 1)
    image = scale_hu(torch.full_like(view.image, -700.0) + shift_hu.view(each)) ** gamma.view(each)
    disturbed = replace(view, image=image, shift_hu=shift_hu, gamma=gamma)
    assert (token_air(replace(disturbed, gamma=None), STRIDE).fraction - 0.3).abs().max() > 0.02
    torch.testing.assert_close(token_air(disturbed, STRIDE).fraction, token_air(view, STRIDE).fraction)


def test_uniform_lung_has_its_fractions(make_batch: MakeBatch) -> None:
    view = scans(make_batch, -700.0, -800.0).views[0]
    air = token_air(view, STRIDE)
    torch.testing.assert_close(air.fraction, torch.full_like(air.fraction, 0.3), atol=1e-5, rtol=0)
    assert not air.non_aerated.any() and (air.lung == 1).all()
    dense = token_air(scans(make_batch, 20.0, -800.0).views[0], STRIDE)
    assert (dense.non_aerated == 1).all()


@pytest.mark.parametrize(
    ("head", "exhale_hu", "inhale_hu", "expected"),
    [
        (MassHead, -700.0, -800.0, [math.log(1.5)]),
        (MassHead, -800.0, -700.0, [-math.log(1.5)]),
        (RecruitmentHead, 20.0, -500.0, [1.0, -0.52]),
        (RecruitmentHead, -500.0, -500.0, [0.0, 0.0]),
    ],
)
def test_targets_are_those_of_the_two_scans(
    make_batch: MakeBatch, head: type[MassHead], exhale_hu: float, inhale_hu: float, expected: list[float]
) -> None:
    batch = scans(make_batch, exhale_hu, inhale_hu)
    made = head(6, stride_vox=STRIDE)
    target, weight = made._target(batch.views[0], batch.views[1], batch.paired()[:, None])
    assert weight.any()
    found = target[weight > 0]
    torch.testing.assert_close(found, torch.tensor(expected).expand_as(found), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(AUXILIARY))
def test_a_head_starts_at_no_change_and_learns(name: str, make_batch: MakeBatch) -> None:
    batch = scans(make_batch, -650.0, -820.0)
    if name == "recruitment":
        batch = scans(make_batch, 20.0, -600.0)
    head, student = AUXILIARY[name](6, stride_vox=STRIDE), features(batch)
    loss, metrics = head(batch, student)
    assert metrics[f"{name}_vs_no_change"].item() == pytest.approx(1.0, abs=1e-5)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss, metrics = head(batch, student)
        loss.backward()
        optimizer.step()
    assert metrics[f"{name}_vs_no_change"].item() < 0.2
    assert student[0].tokens.grad is not None and student[0].tokens.grad.any()
    assert student[1].tokens.grad is None  # the inhale tokens are the answer


@pytest.mark.parametrize("name", sorted(AUXILIARY))
def test_nothing_to_learn_is_a_loss_of_zero_with_a_gradient_of_zero(name: str, make_batch: MakeBatch) -> None:
    one_phase = scans(make_batch, -700.0, -800.0, paired=False)
    no_lung = scans(make_batch, -700.0, -800.0)
    no_lung = replace(no_lung, views=tuple(replace(v, lung=torch.zeros_like(v.lung)) for v in no_lung.views))
    for batch in (one_phase, no_lung):
        head: nn.Module = AUXILIARY[name](6, stride_vox=STRIDE)
        loss, metrics = head(batch, features(batch))
        loss.backward()
        assert loss.item() == 0.0 and all(torch.isfinite(value) for value in metrics.values())
        assert all(p.grad is not None and not p.grad.any() for p in head.parameters())
