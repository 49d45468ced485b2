"""`lungssl list`."""

from typing import Annotated, Literal, get_args

import typer

Kind = Literal["methods", "backbones", "recipes", "layouts", "tasks", "plans"]


def list_names(what: Annotated[Kind | None, typer.Argument(help="Which names; all without it.")] = None) -> None:
    """List what there is: methods, backbones, recipes, layouts, tasks, plans.

    Example: lungssl list recipes
    """
    for kind in get_args(Kind) if what is None else (what,):
        if what is None:
            print(f"{kind}:")
        rows = _rows(kind)
        width = max(len(name) for name, _ in rows)
        for name, note in rows:
            print(f"{'' if what else '  '}{name:<{width}}  {note}".rstrip())


def _rows(kind: str) -> list[tuple[str, str]]:
    from lungssl.config import registry
    from lungssl.recipe_files import list_recipes, recipe_text

    if kind in ("recipes", "plans"):
        what = "recipe" if kind == "recipes" else "plan"
        return [(name, recipe_text(name, what).partition("\n")[0].removeprefix("# ")) for name in list_recipes(what)]
    entries = registry(kind.removesuffix("s"))
    return [
        (
            name,
            entry if isinstance(entry, str) else f"{entry[0]} {', '.join(f'{k}={v}' for k, v in entry[1].items())}",
        )
        for name, entry in entries.items()
    ]
