from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_data.batch import PairBatch
from lungssl_methods import METHODS, method_class
from lungssl_methods.choices import check_choice, check_choices
from lungssl_methods.latent import latent_loss
from torch import nn


@dataclass(frozen=True)
class Config:
    one: Literal["a", "b", "c"] = "a"
    union: Literal["x", "y"] | tuple[float, float] | None = "x"
    plain: str = "anything"


def test_a_value_that_is_no_choice_is_named_with_the_choices() -> None:
    check_choices("method", Config())
    for union in ((1.0, 0.5), None):
        check_choices("method", replace(Config(), union=union))
    with pytest.raises(ValueError, match=r"^method's one must be 'a', 'b' or 'c', got 'B'$"):
        check_choices("method", _changed(Config(), "one", "B"))
    with pytest.raises(ValueError, match=r"^method's union must be 'x' or 'y', got ''$"):
        check_choices("method", _changed(Config(), "union", ""))
    with pytest.raises(ValueError, match=r"^what must be 'a', got None$"):
        check_choice("what", None, ["a"])


def _changed(config: Any, name: str, value: object) -> Any:
    """Past what checks types in these tests, and nowhere else."""
    changed = replace(config)
    object.__setattr__(changed, name, value)
    return changed


def _choices() -> Iterator[tuple[str, str]]:
    for method in sorted(METHODS):
        for field in fields(method_class(method).Config):
            if "Literal" in str(field.type):
                yield method, field.name


CHOICES = list(_choices())


def test_the_choices_are_found() -> None:
    known = {("dino", "centering"), ("jepa", "norm"), ("croco", "directions"), ("mae", "norm"), ("vicreg", "pairs")}
    assert known <= set(CHOICES)


@pytest.mark.parametrize(("method", "name"), CHOICES)
def test_every_method_refuses_a_choice_that_it_does_not_know(method: str, name: str, encoder: nn.Module) -> None:
    config = _changed(method_class(method).Config(), name, "sinkhron")
    owner = "dino" if method == "phase_dino" else method
    with pytest.raises(ValueError, match=rf"^{owner}'s {name} must be '.+', got 'sinkhron'$"):
        config.build(encoder, total_steps=10)


def test_a_norm_that_is_unknown_is_not_smooth_l1() -> None:
    rows = torch.randn(1, 2, 3)
    unchecked: Callable[..., object] = getattr(latent_loss, "__wrapped__", latent_loss)
    with pytest.raises(ValueError, match="latent_loss's norm must be 'smooth_l1' or 'l1', got 'L1'"):
        unchecked(rows, rows, torch.ones(1, 2), norm="L1")


@pytest.mark.parametrize("method", ["mae", "croco", "simmim", "spark", "jepa", "phase_jepa"])
def test_plain_air_asks_for_nothing_and_shows_as_nothing_learned(
    method: str, encoder: nn.Module, make_batch: Callable[..., PairBatch]
) -> None:
    if method == "spark":
        encoder = create_backbone("resenc_tiny", widths=(8, 12), depths=(1, 1))
    batch = make_batch(2, locals_per_slot=0, global_size=(16, 16, 16))
    air = tuple(replace(view, image=torch.zeros_like(view.image)) for view in batch.views)
    options = {} if "jepa" in method else {"mask_unit_tokens": 1}
    built = method_class(method).Config(**options).build(encoder, total_steps=10).eval()
    metrics = built(replace(batch, views=air), 0).metrics
    assert all(torch.isfinite(value) for value in metrics.values())
    if method in ("mae", "croco", "spark"):
        assert metrics["loss_vs_zero"].item() == 1.0
