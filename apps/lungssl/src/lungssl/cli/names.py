"""`lungssl list`."""

from enum import Enum
from typing import Annotated

import typer

What = Enum("What", {name: name for name in ("methods", "backbones", "recipes", "layouts", "tasks")}, type=str)


def list_names(
    what: Annotated[What | None, typer.Argument(help="Which names; all without it.")] = None,
) -> None:
    """List what there is: methods, backbones, recipes, layouts, tasks.

    Example: lungssl list recipes
    """
    for kind in [what] if what is not None else list(What):
        if what is None:
            print(f"{kind.value}:")
        rows = _rows(kind.value)
        width = max(len(name) for name, _ in rows)
        for name, note in rows:
            print(f"{'' if what else '  '}{name:<{width}}  {note}".rstrip())


def _rows(kind: str) -> list[tuple[str, str]]:
    from lungssl.config import list_recipes, recipe_text, registry

    if kind == "recipes":
        return [(name, recipe_text(name).partition("\n")[0].removeprefix("# ")) for name in list_recipes()]
    entries = registry(kind.removesuffix("s"))
    return [
        (
            name,
            entry if isinstance(entry, str) else f"{entry[0]} {', '.join(f'{k}={v}' for k, v in entry[1].items())}",
        )
        for name, entry in entries.items()
    ]
