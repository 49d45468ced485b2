"""How cohorts lie on disk. A layout is one file with `read(root: Path) -> list[PairSource]`, and one line here."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lungssl_data.layouts.source import PairSource

LAYOUTS = {
    "folder": "lungssl_data.layouts.folder:read",
    "manifest": "lungssl_data.layouts.manifest:read",
}


def read_layout(name: str, root: Path) -> "list[PairSource]":
    """The patients under `root`, read as layout `name`; `auto` takes a .csv as `manifest`, a folder as `folder`."""
    if name == "auto":
        name = "manifest" if root.suffix == ".csv" else "folder"
    if name not in LAYOUTS:
        raise ValueError(f"layout {name!r} is unknown; known are auto, {', '.join(LAYOUTS)}")
    module, function = LAYOUTS[name].split(":")
    return getattr(import_module(module), function)(root)
