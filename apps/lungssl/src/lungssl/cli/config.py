"""`lungssl config`."""

from typing import Annotated

import typer

from lungssl.cli import Verb, new_app

app = new_app(no_args_is_help=True, help="Look at a recipe, or check one, without running it.")

_Recipe = Annotated[str, typer.Argument(help="A name of `lungssl list recipes`, or a .yaml file.")]
_Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="e.g. train.steps=200")]


@app.command(cls=Verb)
def show(
    recipe: _Recipe,
    overrides: _Overrides = None,
    describe: Annotated[bool, typer.Option("--describe", help="Say what each key means.")] = False,
) -> None:
    """Print the resolved recipe: every key, defaults included, as YAML that can be run.

    Example: lungssl config show dino_vit_nano train.steps=200 --describe
    """
    import yaml

    from lungssl.config import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    values = resolved.as_dict()
    if not describe:
        print(yaml.safe_dump(values, sort_keys=False), end="")
        return
    for section, keys in values.items():
        if not isinstance(keys, dict):
            print(f"{section}: {keys}")
            continue
        print(f"{section}:")
        part = getattr(resolved, section)
        _described(keys, getattr(part, "config", part), "  ")


@app.command(cls=Verb)
def validate(recipe: _Recipe, overrides: _Overrides = None) -> None:
    """Check a recipe: keys, types, and that its encoder and method can be built together.

    Example: lungssl config validate my.yaml backbone.patch_vox=16
    """
    from lungssl.config import load_recipe

    resolved = load_recipe(recipe, overrides or [])

    from lungssl.pretraining import build_method

    encoder, method = build_method(resolved) if resolved.method else (resolved.backbone.config.build(), None)
    trained = sum(p.numel() for p in (method or encoder).parameters() if p.requires_grad)
    print(f"ok: {recipe}, {trained / 1e6:.2f} M trained parameters")


def _described(keys: dict, config: object, indent: str) -> None:
    from textwrap import wrap

    import yaml

    from lungssl.config import describe

    notes = describe(config)
    for key, value in keys.items():
        for line in wrap(notes.get(key, ""), 100):
            print(f"{indent}# {line}")
        if isinstance(value, dict):
            print(f"{indent}{key}:")
            _described(value, getattr(config, key), indent + "  ")
        else:
            # A lone scalar ends in a document marker.
            text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
            print(f"{indent}{key}: {text}")
