import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lungssl_data.batch import PairBatch
from lungssl_methods.correspondence import token_matches, token_mean
from lungssl_methods.losses import teacher_probs
from lungssl_methods.phase_dino import PhaseDino
from torch import nn

MakeBatch = Callable[..., PairBatch]


def build(encoder: nn.Module, **changes: object) -> PhaseDino:
    sizes = {"prototypes": 32, "head_hidden": 16, "head_bottleneck": 8, "invariant_share": 0.5}
    return PhaseDino.Config(**(sizes | changes)).build(encoder, total_steps=10)  # pyright: ignore


def test_the_dense_term_is_what_the_teacher_says_of_the_same_place(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = build(encoder, mass_weight=0.0, recruitment_weight=0.0)
    assert method.dense is not None
    batch = make_batch(2, locals_per_slot=0)
    output = method(batch, 5)
    total = weights = torch.zeros(())
    with torch.no_grad():
        for first, second in (batch.views, batch.views[::-1]):
            match = token_matches(first, second, method.stride_vox, sigma_mm=method.sigma_mm)
            student = method.encoder(first.image).tokens[None, ..., :6]
            teacher = (match @ method.teacher_encoder(second.image).tokens)[None, ..., :6]
            rows = method.dense.student(student.flatten(1, 2), method.dense.moments) / 0.1
            logits = method.dense.teacher(teacher.flatten(1, 2), method.dense.moments)
            probs = teacher_probs(logits, method.dense.unbiased_centre(), method.teacher_temperature(5))
            lung = token_mean(first.lung[:, None].float(), method.stride_vox)[..., 0]
            weight = (lung * match.sum(2)).flatten()
            total = total + (-(probs * rows.log_softmax(-1)).sum(-1)[0] * weight).sum()
            weights = weights + weight.sum()
    expected = (total / weights).item()
    assert output.metrics["dense_loss"].item() == pytest.approx(expected, rel=1e-4)
    assert output.loss.item() == pytest.approx(output.metrics["loss_lnk"].item() * math.log(32) + expected, rel=1e-4)
    assert 0.1 < output.metrics["matched_share"].item() <= 1.0


def test_only_the_invariant_channels_are_matched_across_views(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = build(encoder, mass_weight=0.0, recruitment_weight=0.0)
    batch = make_batch(2)
    before = method(batch, 5).loss
    with torch.no_grad():  # the free half of student and teacher says something else
        for model in (method.encoder, method.teacher_encoder):
            model.get_parameter("norm.bias")[6:] += 3.0
    assert method(batch, 5).loss.item() == pytest.approx(before.item(), rel=1e-6)
    with torch.no_grad():
        method.encoder.get_parameter("norm.bias")[:6] += torch.linspace(0.0, 3.0, 6)
    assert method(batch, 5).loss.item() != pytest.approx(before.item(), rel=1e-3)


def test_the_auxiliary_losses_train_only_the_free_channels(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = build(encoder)
    with torch.no_grad():  # past their first step, at which only the last layer moves
        for head in method.auxiliary.values():
            nn.init.normal_(head.net[-1].weight)
    batch = make_batch(2)
    output = method(batch, 5)
    assert output.metrics["mass_vs_no_change"] > 0 and output.metrics["recruitment_vs_no_change"] > 0
    norm = method.encoder.get_parameter("norm.bias")
    (gradient,) = torch.autograd.grad(
        method.auxiliary["mass"](batch, _free(method, batch))[0], norm, allow_unused=False
    )
    assert not gradient[:6].any() and gradient[6:].any()


def _free(method: PhaseDino, batch: PairBatch) -> list:
    found = []
    for view in batch.views:
        features = method.encoder(view.image)
        found.append(replace(features, tokens=features.tokens[..., 6:]))
    return found


def test_a_batch_in_which_nothing_corresponds_trains_the_rest_and_moves_no_dense_centre(
    encoder: nn.Module, make_batch: MakeBatch
) -> None:
    method = build(encoder)
    assert method.dense is not None
    batch = make_batch(2)
    views = tuple(
        replace(view, partner_mm=None if view.partner_mm is None else torch.full_like(view.partner_mm, torch.nan))
        for view in batch.views
    )
    output = method(replace(batch, views=views), 5)
    output.loss.backward()
    assert output.metrics["dense_loss"].item() == 0.0 and torch.isfinite(output.loss)
    assert method.dense.student.prototypes.grad is not None and not method.dense.student.prototypes.grad.any()
    method.after_optimizer_step(5)
    assert not method.dense.centre.any() and method.summary.centre.any()
    assert all(torch.isfinite(value).all() for value in method.state_dict().values())


def test_the_dense_teacher_follows_its_student(encoder: nn.Module, make_batch: MakeBatch) -> None:
    method = build(encoder, momentum=0.5)
    assert method.dense is not None
    before = method.dense.teacher.prototypes.clone()
    with torch.no_grad():
        method.dense.student.prototypes.add_(1.0)
    method(make_batch(2), 0)
    method.after_optimizer_step(0)
    torch.testing.assert_close(method.dense.teacher.prototypes, before + 0.5)
    assert method.dense.centre.any()


def test_crops_without_correspondences_and_shares_without_channels_are_refused(
    encoder: nn.Module, make_batch: MakeBatch
) -> None:
    batch = make_batch(2)
    views = tuple(replace(view, partner_mm=None) for view in batch.views)
    with pytest.raises(ValueError, match=r"phase_dino needs to know where .*set data.correspondences: true"):
        build(encoder)(replace(batch, views=views), 0)
    with pytest.raises(ValueError, match=r"invariant_share 1.0 leaves 12 of 12 channels to be matched and 0 for mass"):
        build(encoder, invariant_share=1.0)
    build(encoder, invariant_share=1.0, mass_weight=0.0, recruitment_weight=0.0)
    with pytest.raises(ValueError, match="leaves 0 of 12 channels"):
        build(encoder, invariant_share=0.0)
