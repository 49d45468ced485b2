"""The YAML files of recipes and plans: shipped ones by name, others by path. Imports next to nothing."""

from collections.abc import Hashable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from lungssl.errors import ConfigError, did_you_mean

Kind = Literal["recipe", "plan"]


def list_recipes(kind: Kind = "recipe") -> list[str]:
    """Names of what is shipped with lungssl, e.g. `dino_vit_nano` and `finetune/segment`, or plans: `tiny`."""
    found = []
    for entry in (files("lungssl") / f"{kind}s").iterdir():
        if entry.is_dir():
            found += [f"{entry.name}/{file.name[:-5]}" for file in entry.iterdir() if file.name.endswith(".yaml")]
        elif entry.name.endswith(".yaml"):
            found.append(entry.name[:-5])
    return sorted(found)


def recipe_text(name_or_path: str | Path, kind: Kind = "recipe") -> str:
    """The YAML of a shipped recipe or plan, or of a file (all that ends in .yaml or .yml). Raises ConfigError."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"{path}: no such {kind} file; `lungssl list {kind}s` names the shipped ones")
        return path.read_text(encoding="utf-8")
    known = list_recipes(kind)
    if str(name_or_path) not in known:
        raise ConfigError(f"unknown {kind} {str(name_or_path)!r}{did_you_mean(str(name_or_path), known)}")
    return (files("lungssl") / f"{kind}s" / f"{name_or_path}.yaml").read_text(encoding="utf-8")


def yaml_values(text: str) -> Any:
    """The values of a YAML text. Raises yaml.YAMLError, of keys that are there twice too: the last one would win."""
    try:
        return yaml.load(text, _Strict)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deep") from error


class _Strict(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, Hashable):
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is no word", key.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)
