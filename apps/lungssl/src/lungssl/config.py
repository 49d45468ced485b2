"""Recipes: YAML files resolved to the packages' Config dataclasses, with every mistake named.

A recipe has sections `seed`, `data` (CropConfig), `views` (ViewConfig), `backbone` {name, ...}, `method` {name, ...} or
`task` {name, ...}, and `train` (TrainConfig). It states only what it decides; defaults are in the dataclasses, and
trailing `section.key=value` overrides reach every field. This module imports no torch; resolving a section does.
"""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import yaml

from lungssl.errors import ConfigError, did_you_mean
from lungssl.recipe_files import recipe_text, yaml_values
from lungssl.training.config import TrainConfig

if TYPE_CHECKING:
    from lungssl_data.crops import CropConfig
    from lungssl_data.views import ViewConfig

SECTIONS = ("seed", "data", "views", "backbone", "method", "task", "train")
_PLAIN = {
    "data": "lungssl_data.crops:CropConfig",
    "views": "lungssl_data.views:ViewConfig",
    "train": "lungssl.training.config:TrainConfig",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A registry entry with its options: a backbone, a method or a task."""

    name: str
    config: Any
    """The frozen Config dataclass of the named class; `config.build(...)` makes it."""

    def as_dict(self) -> dict[str, Any]:
        """Name and every option, defaults included."""
        return {"name": self.name, **asdict(self.config)}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A resolved recipe: every value set and of the right type."""

    seed: int
    data: "CropConfig"
    views: "ViewConfig"
    backbone: Part
    method: Part | None
    """What to pretrain with; None in fine-tuning recipes."""
    task: Part | None
    """What to fine-tune for; None in pretraining recipes."""
    train: TrainConfig

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain YAML values; loading it again gives the same recipe."""
        values: dict[str, Any] = {"seed": self.seed}
        for name in SECTIONS[1:]:
            part = getattr(self, name)
            if part is not None:
                values[name] = part.as_dict() if isinstance(part, Part) else asdict(part)
        return _plain(values)


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe. Raises ConfigError that names the key."""
    text = recipe_text(name_or_path)
    try:
        values = yaml_values(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name_or_path}: not valid YAML: {error}") from error
    return resolve(values, overrides, source=str(name_or_path))


def resolve(values: Any, overrides: Sequence[str] = (), *, source: str = "recipe") -> Recipe:
    """Check the plain values of a recipe after `overrides`. Raises ConfigError that names the key."""
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: a recipe is a mapping with sections {', '.join(SECTIONS)}")
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for override in overrides:
        apply_override(values, override)
    _check_keys(values, SECTIONS, "")
    if ("method" in values) == ("task" in values):
        raise ConfigError(
            f"{source}: a recipe needs either a `method` (to pretrain) or a `task` (to fine-tune) section"
        )
    if "backbone" not in values:
        raise ConfigError(f"{source}: section `backbone` is missing, e.g. backbone: {{name: vit3d_nano}}")
    for section in ("backbone", "method", "task"):  # names first: they need no torch
        if section in values:
            _check_name(section, values[section])
    return Recipe(
        seed=_validate(int, values.get("seed", 0), "seed"),
        backbone=_part("backbone", values["backbone"]),
        method=_part("method", values["method"]) if "method" in values else None,
        task=_part("task", values["task"]) if "task" in values else None,
        **{name: checked_section(_load(target), values.get(name), name) for name, target in _PLAIN.items()},
    )


def registry(section: str) -> dict[str, Any]:
    """The dict of names for `backbone`, `method`, `task` or `layout`. Imports no torch."""
    module, name = {
        "backbone": ("lungssl_backbones", "BACKBONES"),
        "method": ("lungssl_methods", "METHODS"),
        "task": ("lungssl_tasks", "TASKS"),
        "layout": ("lungssl_data.layouts", "LAYOUTS"),
    }[section]
    return getattr(importlib.import_module(module), name)


def describe(config: Any) -> dict[str, str]:
    """Field name to the docstring under it, for a Config dataclass or an instance; what it inherits comes first."""
    cls = config if isinstance(config, type) else type(config)
    notes = {}
    for owner in reversed(cls.__mro__):
        if is_dataclass(owner):
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
            assert isinstance(body, ast.ClassDef)
            for field, note in zip(body.body, body.body[1:], strict=False):
                match field, note:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        notes[name] = " ".join(text.split())
    return notes


def apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *path, last = key.split(".")
    if not equals or not all([*path, last]):
        raise ConfigError(f"override {override!r} is not of the form section.key=value, e.g. train.steps=200")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {text!r} is not a YAML value") from error
    node = values
    for depth, name in enumerate(path):
        if not isinstance(node.setdefault(name, {}), dict):
            raise ConfigError(f"{key}: {'.'.join(path[: depth + 1])} is a single value and has no keys")
        node = node[name]
    if last == "name" and node.get("name") not in (None, value) and path[-1] in ("backbone", "method", "task"):
        node.clear()  # the other's settings are none of this one's
    node[last] = value


def _check_name(section: str, values: Any) -> None:
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        raise ConfigError(f"{section}.name: missing; `lungssl list {section}s` shows the names")
    names = registry(section)
    if values["name"] not in names:
        raise ConfigError(f"{section}.name: unknown {section} {values['name']!r}{did_you_mean(values['name'], names)}")


def _part(section: str, values: dict[str, Any]) -> Part:
    name = values["name"]
    options = {key: value for key, value in values.items() if key != "name"}
    entry = registry(section)[name]
    target, preset = entry if isinstance(entry, tuple) else (entry, {})
    return Part(name=name, config=checked_section(_load(target).Config, {**preset, **options}, section))


def checked_section(cls: type, values: Any, where: str) -> Any:
    """An instance of a Config dataclass from plain values."""
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping with keys {', '.join(f.name for f in fields(cls))}")
    _check_nested(cls, values, where)
    return _validate(cls, dict(values), where)


def _check_nested(kind: Any, value: Any, where: str) -> None:
    """ConfigError for unknown keys of a dataclass, wherever it is: pydantic ignores those of standard dataclasses."""
    if isinstance(kind, type) and is_dataclass(kind):
        if isinstance(value, Mapping):
            hints = get_type_hints(kind)
            _check_keys(value, [field.name for field in fields(kind)], f"{where}.")
            for name, item in value.items():
                _check_nested(hints[name], item, f"{where}.{name}")
    elif get_origin(kind) in (Union, UnionType):
        members = [member for member in get_args(kind) if isinstance(member, type) and is_dataclass(member)]
        if len(members) == 1:
            _check_nested(members[0], value, where)
    elif get_origin(kind) is dict and isinstance(value, Mapping):
        for name, item in value.items():
            _check_nested(get_args(kind)[1], item, f"{where}.{name}")


def _validate(kind: type, value: Any, where: str) -> Any:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        # A union reports one error per member; the member's tag, e.g. `tuple[float, float]`, is no part of the key.
        found = error.errors()
        keys = [".".join([where, *(str(k) for k in e["loc"] if isinstance(k, int) or _is_key(str(k)))]) for e in found]
        reasons = dict.fromkeys(e["msg"] for e, key in zip(found, keys, strict=True) if key == keys[0])
        text = " or ".join(reason.removeprefix("Value error, ") for reason in reasons)
        got = "" if found[0]["type"] in ("missing", "value_error") else f", got {found[0]['input']!r}"
        raise ConfigError(f"{keys[0]}: {text}{got}") from error


def _is_key(text: str) -> bool:
    return text.isidentifier() and text not in ("float", "int", "str", "bool")


def _check_keys(values: Mapping[str, Any], known: Iterable[str], prefix: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{prefix}{key}: unknown key{did_you_mean(str(key), known)}")


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
