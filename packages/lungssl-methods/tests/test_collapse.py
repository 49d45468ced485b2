import json
import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from lungssl_backbones.representation import effective_rank
from lungssl_data.batch import PairBatch, View
from lungssl_methods.collapse import Alarm, CollapseMonitor
from lungssl_methods.dino import Dino
from lungssl_methods.variance import direction_spread
from torch import nn

HEALTHY = {"loss": 3.9, "loss_lnk": 0.95, "teacher_entropy_lnk": 0.45, "teacher_kl_lnk": 0.5, "grad_norm": 100.0}


def _alarms(steps: int = 80, /, **changes: float) -> list[Alarm]:
    monitor = CollapseMonitor.Config().build()
    for step in range(steps):
        monitor.step(step, HEALTHY | changes)
    return monitor.alarms


def test_a_healthy_history_raises_nothing() -> None:
    assert _alarms(200) == []


@pytest.mark.parametrize(
    ("kind", "metric", "value", "within"),
    [
        ("certain", "teacher_entropy_lnk", 0.001, 0.021),
        ("uniform", "teacher_entropy_lnk", 0.999, 0.994),
        ("constant", "teacher_kl_lnk", 0.0005, 0.006),
        ("loss", "loss_lnk", 1.6, 1.4),
    ],
)
def test_each_bound_fires_beyond_it_after_the_grace_and_not_within_it(
    kind: str, metric: str, value: float, within: float
) -> None:
    assert _alarms(50, **{metric: value}) == []
    first = _alarms(**{metric: value})[0]
    assert (first.kind, first.step) == (kind, 50)
    assert "(step 50)" in first.sentence
    assert _alarms(**{metric: within}) == []


def test_any_metric_that_is_no_number_fires_at_once() -> None:
    for value in (math.nan, math.inf):
        first = _alarms(1, grad_norm=value)[0]
        assert (first.kind, first.step) == ("nan", 0) and first.sentence == f"grad_norm is {value} (step 0)"


def test_one_odd_batch_is_averaged_away() -> None:
    monitor = CollapseMonitor.Config().build()
    for step in range(100):
        monitor.step(step, HEALTHY | ({"teacher_entropy_lnk": 0.0} if step == 70 else {}))
    assert monitor.alarms == []


def test_a_loss_without_ln_k_is_compared_with_its_start_also_below_zero() -> None:
    for start, fine, bad in ((2.0, 2.9, 3.1), (-1.0, -0.6, -0.4)):
        for later, expected in ((fine, None), (bad, "loss")):
            monitor = CollapseMonitor.Config().build()
            kinds = [monitor.step(step, {"loss": start if step < 20 else later}) for step in range(60)]
            assert (kinds[-1].kind if kinds[-1] else None) == expected


def test_rank_and_spread_are_compared_with_their_first() -> None:
    monitor = CollapseMonitor.Config().build()
    assert monitor.probe(0, {"effective_rank": 23.3, "embedding_std": 0.098}) is None
    assert monitor.probe(50, {"effective_rank": 23.4, "embedding_std": 0.083}) is None
    rank = monitor.probe(100, {"effective_rank": 4.5, "embedding_std": 0.09})
    spread = monitor.probe(150, {"effective_rank": 23.0, "embedding_std": 0.010})
    assert rank is not None and rank.kind == "rank" and "fell from 23.3 to 4.5, below 0.3 of its start" in rank.sentence
    assert spread is not None and spread.kind == "spread"
    assert monitor.alarms == [rank, spread]


def test_a_monitor_that_is_loaded_goes_on_as_if_it_had_not_been() -> None:
    values = [HEALTHY | {"loss_lnk": 0.95 + 0.02 * step} for step in range(80)]
    whole, parts = CollapseMonitor.Config().build(), CollapseMonitor.Config().build()
    for step, metrics in enumerate(values):
        if step == 47:
            state = json.loads(json.dumps(parts.state()))
            parts = CollapseMonitor.Config().build()
            parts.load(state)
        assert whole.step(step, metrics) == parts.step(step, metrics)
    assert whole.alarms == parts.alarms and whole.alarms[0].kind == "loss"


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ValueError, match="got window 0, grace 50"):
        CollapseMonitor.Config(window=0)


def _smooth_batch(seed: int, b: int = 8) -> PairBatch:
    """Smooth random volumes, one per patient, with a noisy copy for the other phase."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(b, 1, 5, 5, 5, generator=generator)
    volume = torch.sigmoid(1.5 * F.interpolate(coarse, size=(16, 16, 16), mode="trilinear", align_corners=True))

    def view(slot: Literal[0, 1], kind: Literal["global", "local"], side: int) -> View:
        start = int(torch.randint(0, 17 - side, (1,), generator=generator))
        image = volume[..., start : start + side, :side, :side] * (0.8 if slot else 1.0)
        inside = torch.ones(b, side, side, side, dtype=torch.bool)
        return View(
            image=image + 0.02 * torch.randn(image.shape, generator=generator),
            coords_mm=torch.zeros(b, 3, side, side, side),
            valid=inside,
            lung=inside,
            slot=slot,
            kind=kind,
        )

    views = (view(0, "global", 16), view(1, "global", 16), view(0, "local", 8), view(1, "local", 8))
    phases = torch.tensor([[0, 1]]).repeat(b, 1)
    return PairBatch(
        views=views, slot_phase=phases, patient=torch.arange(b), exhale_to_inhale=torch.eye(3, 4).repeat(b, 1, 1)
    )


def _train(
    encoder: nn.Module, *, lr: float = 1.8e-4, centred: bool = True, temperature: tuple[float, float] = (0.04, 0.06)
) -> set[str]:
    """Kinds of alarm in 100 steps of `dino`."""
    config = Dino.Config(prototypes=64, head_hidden=32, head_bottleneck=16, teacher_temperature=temperature)
    method = config.build(encoder, total_steps=100, effective_batch=8)
    if not centred:
        method.summary.update = lambda: None
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=lr)
    monitor = CollapseMonitor.Config().build()
    held_out = _smooth_batch(1000, 24)
    for step in range(100):
        if step % 25 == 0:
            with torch.no_grad():
                features = method.teacher_encoder(held_out.views[0].image).embedding()
            figures = {"effective_rank": effective_rank(features), "embedding_std": float(direction_spread(features))}
            monitor.probe(step, figures)
        output = method(_smooth_batch(step), step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_optimizer_step(step)
        monitor.step(step, {name: float(value) for name, value in output.metrics.items()})
    return {alarm.kind for alarm in monitor.alarms}


def test_a_healthy_dino_raises_nothing(encoder: nn.Module) -> None:
    assert _train(encoder) == set()


def test_a_dino_without_centre_is_certain(encoder: nn.Module) -> None:
    assert "certain" in _train(encoder, centred=False)


def test_a_dino_neither_centred_nor_sharpened_gives_one_target_to_all(encoder: nn.Module) -> None:
    assert "constant" in _train(encoder, centred=False, temperature=(0.1, 0.1))


def test_a_hundredfold_learning_rate_loses_the_spread(encoder: nn.Module) -> None:
    assert "spread" in _train(encoder, lr=1.8e-2)
