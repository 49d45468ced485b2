"""Self-supervised methods for single and paired lung CT. Reading the registry imports no torch."""

import difflib
import importlib

METHODS: dict[str, str] = {
    "dino": "lungssl_methods.dino:Dino",
    "mae": "lungssl_methods.mae:Mae",
    "phase_dino": "lungssl_methods.phase_dino:PhaseDino",
}
"""Name -> "module:Class"; the class has a `Config` whose `build(encoder, total_steps=...)` makes the method."""


def list_methods() -> list[str]:
    """Names that `method_class` knows."""
    return list(METHODS)


def method_class(name: str) -> type:
    """The class behind a name, e.g. `method_class("dino").Config(pairs="cross").build(encoder, total_steps=1000)`.

    Raises ValueError for an unknown name.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(METHODS)}"
        raise ValueError(f"unknown method {name!r}; {hint}")
    module, _, cls = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), cls)
