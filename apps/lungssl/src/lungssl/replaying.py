"""A step of pretraining that gave no number, made again from the file that the run kept."""

from pathlib import Path

import torch

from lungssl.config import Recipe
from lungssl.errors import ConfigError
from lungssl.pretraining import build_pretraining
from lungssl.training.loop import micro_seed
from lungssl.training.precision import autocast
from lungssl.training.ranks import check_alone
from lungssl.training.watch import first_bad_modules, read_step


def replay(recipe: Recipe, kept: Path, *, data: Path, device: str = "auto") -> str:
    """Repeat a step that gave no number, up to it; returns what happened, with the first parts that made it.

    `recipe` is the run's config.yaml and `kept` a file of its `nan` folder. Raises DataError for another file,
    ConfigError where it is of another model.
    """
    check_alone("--replay")
    found = read_step(kept)
    parts = build_pretraining(recipe, data, device=device, recorded=recipe.as_dict())
    method, train = parts.method, parts.recipe.train
    try:
        method.load_state_dict(found.state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"--replay {kept}: of another model than {recipe.backbone.name} ({reason})") from error
    method.train()
    bad, hooks = first_bad_modules(method)
    lines = [f"step {found.step + 1}: {found.what} was {found.value}"]
    for index in range(found.step * train.accumulate, found.index + 1):
        torch.manual_seed(micro_seed(parts.recipe.seed, index))
        views = parts.prepare(parts.read(index), index)
        with autocast(parts.device, train.precision, method):
            output = method(views, found.step)
        lines.append(f"micro-batch {index}: loss {float(output.loss.detach()):.6g}")
        for view in views.views:
            if not bool(view.image.isfinite().all()):
                lines.append(f"  a {view.kind} view of slot {view.slot} holds values that are no numbers")
        output.loss.backward()
    for hook in hooks:
        hook.remove()
    if bad:
        lines.append(f"first part whose output is no number: {bad[0]}" + (f" ({len(bad)} in all)" if bad[1:] else ""))
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    no_number = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    lines.append(
        f"{len(no_number)} of {len(gradients)} gradients are no numbers"
        + (f": {no_number[0]} ..." if no_number else "")
    )
    return "\n".join(lines)
