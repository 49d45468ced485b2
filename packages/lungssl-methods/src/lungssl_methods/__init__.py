"""Self-supervised methods for single and paired lung CT. Reading the registry imports no torch."""

import difflib
import importlib

METHODS: dict[str, str] = {
    "dino": "lungssl_methods.dino:Dino",
    "mae": "lungssl_methods.mae:Mae",
    "phase_dino": "lungssl_methods.phase_dino:PhaseDino",
    "croco": "lungssl_methods.croco:Croco",
    "paired_dense": "lungssl_methods.paired_dense:PairedDense",
    "simclr": "lungssl_methods.simclr:SimClr",
    "vicreg": "lungssl_methods.vicreg:VicReg",
    "vox2vec": "lungssl_methods.vox2vec:Vox2Vec",
    "simmim": "lungssl_methods.simmim:SimMim",
    "spark": "lungssl_methods.spark:Spark",
    "jepa": "lungssl_methods.jepa:Jepa",
    "phase_jepa": "lungssl_methods.phase_jepa:PhaseJepa",
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
