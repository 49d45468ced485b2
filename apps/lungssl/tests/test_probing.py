"""The linear probe of lobes, on features whose answer is known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lungssl.cohort import pair_from_phantom
from lungssl.comparison.probing import (
    RIDGE,
    dice_of_points,
    fit_probe,
    lobes_at,
    probe_dice,
    probes_of,
)
from lungssl_backbones import create_backbone
from lungssl_data.cache import PairCache, write_pair
from lungssl_data.pair import PhaseScan, Split
from lungssl_data.phantom import PhantomConfig, make_phantom

SPLITS: tuple[Split, ...] = ("train", "train", "test")


def scattered(lobes: torch.Tensor, noise: float) -> torch.Tensor:
    """Features in seven channels of unlike sizes, of which three say the lobe."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(6, 3, generator=generator)
    told = codes[lobes] + noise * torch.randn(len(lobes), 3, generator=generator)
    return torch.cat([told, 50 + 9 * torch.randn(len(lobes), 4, generator=generator)], dim=1)


def test_a_probe_is_the_ridge_regression_of_the_textbook() -> None:
    lobes = torch.randint(6, (301,), generator=torch.Generator().manual_seed(0))
    features = scattered(lobes, 0.5)
    probe = fit_probe(features, lobes)
    inside = lobes > 0
    x = (features[inside] - probe.mean) / probe.scale
    wanted = np.eye(5)[lobes[inside] - 1]
    # Ridge as least squares with as many more rows as features, that pull the weights to 0.
    more = np.sqrt(RIDGE * len(x)) * np.eye(7)
    rows = np.concatenate([x.double().numpy(), more])
    target = np.concatenate([wanted - wanted.mean(axis=0), np.zeros((7, 5))])
    weight, *_ = np.linalg.lstsq(rows, target, rcond=None)
    np.testing.assert_allclose(probe.weight, weight, atol=1e-5)
    np.testing.assert_allclose(probe.bias, wanted.mean(axis=0), atol=1e-6)


def test_features_that_say_the_lobe_score_high_and_others_chance() -> None:
    lobes = torch.randint(6, (4000,), generator=torch.Generator().manual_seed(0))
    train, test = slice(0, 2000), slice(2000, 4000)
    for noise, low, high in ((0.05, 0.97, 1.0), (300.0, 0.1, 0.3)):
        features = scattered(lobes, noise)
        found = probe_dice([fit_probe(features[train], lobes[train])], features[test], lobes[test])
        assert found is not None and low <= found <= high
    assert probe_dice([], features[test], lobes[test]) is None
    assert probe_dice([fit_probe(features, lobes)], features, torch.zeros_like(lobes)) is None


def test_dice_of_points() -> None:
    """Lobe 1: 2 * 1 / (1 + 2); lobe 2: 2 * 1 / (2 + 1); lobe 4, which nothing has, isn't counted."""
    assert dice_of_points(torch.tensor([1, 2, 2]), torch.tensor([1, 1, 2])) == pytest.approx(2 / 3)
    assert dice_of_points(torch.tensor([4, 4]), torch.tensor([1, 2])) == 0.0


def test_probes_learn_from_training_patients_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PhaseScan] = []
    monkeypatch.setattr(
        "lungssl.comparison.probing.point_features",
        lambda encoder, scan, points, side: seen.append(scan) or points / 100,
    )
    for seed, split in enumerate(SPLITS):
        phantom = make_phantom(PhantomConfig(seed=seed, spacing_mm=8.0))
        write_pair(pair_from_phantom(phantom, f"p{seed}", split), tmp_path)
    cache = PairCache(tmp_path)
    encoder = create_backbone("resenc_tiny")
    (first, second) = probes_of(encoder, cache, 16)  # two patients are fewer than five: both in either draw
    torch.testing.assert_close(first.weight, second.weight)
    assert len(seen) == 2
    held = cache["p2"].scan("inhale")
    assert held.lobes is not None
    z, y, x = np.argwhere(held.lobes == 3)[0]
    points = torch.tensor(np.array([[x, y, z]]) * held.spacing_mm + held.origin_mm).float()
    assert lobes_at(held, points).tolist() == [3]
