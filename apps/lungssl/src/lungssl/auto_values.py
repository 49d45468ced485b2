"""The values of a recipe that the run's size decides: found, with their reasons, before anything is built."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lungssl_methods import method_class
from lungssl_methods.auto import RunSize

from lungssl.config import Recipe
from lungssl.errors import ConfigError


def settle(recipe: Recipe, *, patients: int, recorded: Mapping[str, Any] | None = None) -> tuple[Recipe, list[str]]:
    """The recipe without any "auto", and a line for each: key, value, reason.

    `patients`: those to train on. `recorded` is the config.yaml of the run that is resumed, whose values stay, as a
    longer run would ask for others. Raises ConfigError for `lr: auto` without a method.
    """
    method, train = recipe.method, recipe.train
    if method is None:
        if train.lr == "auto":
            raise ConfigError("train.lr: auto is for pretraining; give a number, as in the recipe finetune/segment")
        return recipe, []
    run = RunSize(
        effective_batch=train.patients() * train.accumulate,
        total_steps=train.steps,
        patients=patients,
        accumulate=train.accumulate,
    )
    cls, lines = method_class(method.name), []
    found: dict[str, Any] = {}
    if hasattr(method.config, "settled"):
        config, reasons = method.config.settled(run)
        before = (recorded or {}).get("method", {})
        for key, reason in reasons.items():
            found[key] = getattr(config, key)
            if before.get(key) not in (None, "auto"):
                found[key], reason = before[key], "as the run that is resumed has it"
            lines.append(f"method.{key}: {found[key]}  ({reason})")
    if train.lr == "auto":
        rate = cls.base_rate.at(run)
        train = dataclasses.replace(train, lr=rate.value)
        lines.append(f"train.lr: {rate.value:g}  ({rate.reason})")
    method = dataclasses.replace(method, config=dataclasses.replace(method.config, **found))
    return dataclasses.replace(recipe, method=method, train=train), lines
