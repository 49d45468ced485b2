"""Strings that only a few of are known: a misspelt one must not run something else in silence."""

from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_choice(what: str, value: object, choices: Iterable[str]) -> None:
    """ValueError where `value` is none of `choices`, with both."""
    known = [repr(choice) for choice in choices]
    if repr(value) not in known:
        *others, last = known
        listed = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{what} must be {listed}, got {value!r}")


def check_choices(owner: str, config: Any) -> None:
    """ValueError where a field of a Config holds a string that the Literals of its type don't have.

    Types aren't checked at run time, and a Config needn't come from a recipe, where they are.
    """
    for name, kind in get_type_hints(type(config)).items():
        value, choices = getattr(config, name), _literals(kind)
        if choices and isinstance(value, str):
            check_choice(f"{owner}'s {name}", value, choices)


def _literals(kind: Any) -> list[str]:
    """Strings of a Literal, and of those in a union."""
    if get_origin(kind) is Literal:
        return [value for value in get_args(kind) if isinstance(value, str)]
    return [value for part in get_args(kind) for value in _literals(part)]
