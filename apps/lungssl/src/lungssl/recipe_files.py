"""The YAML files of recipes: shipped ones by name, others by path. Imports next to nothing."""

from importlib.resources import files
from pathlib import Path

from lungssl.errors import ConfigError, did_you_mean


def list_recipes() -> list[str]:
    """Names of the recipes shipped with lungssl, e.g. `dino_vit_nano` and `finetune/segment`."""
    found = []
    for entry in (files("lungssl") / "recipes").iterdir():
        if entry.is_dir():
            found += [f"{entry.name}/{file.name[:-5]}" for file in entry.iterdir() if file.name.endswith(".yaml")]
        elif entry.name.endswith(".yaml"):
            found.append(entry.name[:-5])
    return sorted(found)


def recipe_text(name_or_path: str | Path) -> str:
    """The YAML of a shipped recipe or of a file (anything that ends in .yaml or .yml). Raises ConfigError."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"{path}: no such recipe file; `lungssl list recipes` names the shipped ones")
        return path.read_text(encoding="utf-8")
    known = list_recipes()
    if str(name_or_path) not in known:
        raise ConfigError(f"unknown recipe {str(name_or_path)!r}{did_you_mean(str(name_or_path), known)}")
    return (files("lungssl") / "recipes" / f"{name_or_path}.yaml").read_text(encoding="utf-8")
