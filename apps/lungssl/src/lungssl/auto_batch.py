"""`train.batch: auto` of a pretraining recipe: found by real steps, kept when a run is resumed."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lungssl.config import Recipe
from lungssl.training.memory import budget_mb, largest_batch
from lungssl.training.ranks import Ranks
from lungssl.training.step_cost import measure_steps

if TYPE_CHECKING:
    from lungssl.pretraining import Pretraining


def settle_batch(
    recipe: Recipe,
    *,
    build: Callable[[Recipe], "Pretraining"],
    patients: int,
    device: torch.device,
    ranks: Ranks,
    recorded: Mapping[str, Any] | None = None,
) -> tuple[Recipe, str]:
    """The recipe with a number of patients, and a line that says why.

    `build` makes a run of a recipe for this process alone, to be thrown away; random numbers are as before. No more
    than the training `patients`, and on several ranks as many for each as the one with the least memory holds;
    processes of one machine share what is free. `recorded` is the config.yaml of the run that is resumed, whose number
    stays.
    """
    before = (recorded or {}).get("train", {}).get("batch")
    if isinstance(before, int):
        return _with(recipe, before), f"train.batch: {before}  (as the run that is resumed has it)"

    def step(number: int) -> Callable[[], Tensor]:
        def call() -> Tensor:
            parts = build(_with(recipe, number, compile=False))
            cost = measure_steps(
                parts.method,
                read=parts.read,
                prepare=parts.prepare,
                config=parts.recipe.train,
                seed=recipe.seed,
                device=device,
            )
            return torch.tensor(cost.losses)

        return call

    budget = budget_mb(device) / (1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        found = largest_batch(step, device=device, budget_mb=budget, most=max(1, patients // ranks.size))
    each = min(ranks.all(found.batch))
    return _with(recipe, each * ranks.size), f"train.batch: {each * ranks.size}  ({found.reason()})"


def _with(recipe: Recipe, batch: int, **more: Any) -> Recipe:
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, batch=batch, **more))
