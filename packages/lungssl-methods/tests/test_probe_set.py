import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lungssl_backbones.encoder import Features, token_grid
from lungssl_backbones.representation import effective_rank
from lungssl_data.batch import PairBatch
from lungssl_methods.probe_set import ProbeSet, landmark_errors_mm
from torch import Tensor, nn

MakeBatch = Callable[..., PairBatch]
STRIDE = 4


@pytest.fixture
def batch(make_batch: MakeBatch) -> PairBatch:
    return make_batch(4, locals_per_slot=0, global_size=(12, 12, 16))


def _position_features(coords_mm: Tensor) -> Features:
    """Sines of the true position: nearest in cosine is nearest in space, within some centimetres."""
    grid = token_grid(tuple(coords_mm.shape[2:]), STRIDE)
    place = torch.nn.functional.avg_pool3d(coords_mm, STRIDE).flatten(2).mT / 40.0
    tokens = torch.cat([place.sin(), place.cos()], dim=-1)
    return Features(cls=None, tokens=tokens, pyramid=(), grid=grid, stride_mm=8.0)


def test_figures_are_those_of_the_embeddings_and_the_encoder_is_left_as_it_was(
    batch: PairBatch, encoder: nn.Module
) -> None:
    encoder.train()
    probe = ProbeSet([batch], encoder)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    figures = probe.figures(encoder)
    assert encoder.training and all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    with torch.no_grad():
        embeddings = torch.cat([encoder(view.image).embedding() for view in batch.global_views()])
    assert figures["effective_rank"] == pytest.approx(effective_rank(embeddings))
    assert figures["patch_gram_drift"] == 0.0
    assert set(figures) >= {"rankme", "embedding_std", "off_diagonal_cosine", "retrieval_top1", "phase_auc"}
    assert figures == probe.figures(encoder)


def test_drift_is_that_of_the_tokens_similarities(batch: PairBatch, encoder: nn.Module) -> None:
    probe = ProbeSet([batch], encoder)
    with torch.no_grad():
        encoder.embed.weight.normal_()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    assert probe.figures(encoder)["patch_gram_drift"] > 0.05


def test_one_patient_gives_no_retrieval_and_one_phase_no_auc(make_batch: MakeBatch, encoder: nn.Module) -> None:
    alone = ProbeSet([make_batch(1, locals_per_slot=0)], encoder).figures(encoder)
    assert not {"retrieval_top1", "phase_auc"} & set(alone)
    single = ProbeSet([make_batch(3, locals_per_slot=0, paired=False)], encoder).figures(encoder)
    assert "retrieval_top1" in single and "phase_auc" not in single


def test_a_patient_counts_once_however_many_samples_it_has(make_batch: MakeBatch, encoder: nn.Module) -> None:
    one = make_batch(3, locals_per_slot=0)
    again = replace(make_batch(3, locals_per_slot=0), patient=torch.tensor([0, 0, 0]))
    first, both = ProbeSet([one], encoder).figures(encoder), ProbeSet([one, again], encoder).figures(encoder)
    assert first["retrieval_mrr"] == both["retrieval_mrr"] and first["phase_auc"] == both["phase_auc"]


def test_features_that_know_their_place_find_it_to_a_token_and_shuffled_ones_do_not(batch: PairBatch) -> None:
    first, second = batch.global_views()
    second = replace(second, coords_mm=first.coords_mm + 1.0)  # as the batch's partner_mm has it
    known = _position_features(first.coords_mm), _position_features(first.coords_mm)
    errors, floor = landmark_errors_mm(first, second, *known, STRIDE)
    assert len(errors) > 100 and errors.median() < 8.0  # tokens are 8 mm apart
    assert bool((floor <= errors + 1e-4).all()) and floor.max() < 8.0
    mixed = known[1].tokens[:, torch.randperm(known[1].tokens.shape[1])]
    wrong, _ = landmark_errors_mm(first, second, known[0], replace(known[1], tokens=mixed), STRIDE)
    assert wrong.median() > 1.5 * errors.median()


def test_views_without_correspondences_give_no_landmark_error(batch: PairBatch, encoder: nn.Module) -> None:
    bare = replace(batch, views=tuple(replace(view, partner_mm=None) for view in batch.views))
    assert "landmark_mm" in ProbeSet([batch], encoder).figures(encoder)
    assert "landmark_mm" not in ProbeSet([bare], encoder).figures(encoder)


def test_features_that_are_no_numbers_are_told_as_such(batch: PairBatch, encoder: nn.Module) -> None:
    probe = ProbeSet([batch], encoder)
    with torch.no_grad():
        encoder.norm.weight[0] = math.nan  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    assert all(math.isnan(value) for value in probe.figures(encoder).values())


def test_the_phase_can_be_told_only_where_it_shows(make_batch: MakeBatch, encoder: nn.Module) -> None:
    """T26: slots drawn from one distribution, then with slot 1 darker."""
    batches = [
        replace(make_batch(24, locals_per_slot=0, global_size=(8, 8, 8)), patient=torch.arange(24) + 24 * i)
        for i in range(4)
    ]
    alike = ProbeSet(batches, encoder).figures(encoder)["phase_auc"]
    # Of 96 scans against 96 the AUC of chance has a standard error of sqrt((2 n + 1) / 12) / n (Hanley, McNeil 1982).
    assert abs(alike - 0.5) < 3 * math.sqrt((2 * 96 + 1) / 12) / 96
    darker = [
        replace(batch, views=tuple(replace(v, image=v.image - 0.3) if v.slot == 1 else v for v in batch.global_views()))
        for batch in batches
    ]
    assert ProbeSet(darker, encoder).figures(encoder)["phase_auc"] > 0.9


def test_an_empty_set_is_refused(encoder: nn.Module) -> None:
    with pytest.raises(ValueError, match="at least one batch of held-out views, got none"):
        ProbeSet([], encoder)
