"""Synthetic exhale/inhale pairs of chest CTs with exact correspondence, density and labels (`domain.md` D).

`PhantomConfig` costs nothing to import; the rest brings numba, when first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lungssl_data.phantom.config import PhantomConfig

if TYPE_CHECKING:
    from lungssl_data.phantom.folder import write_phantom
    from lungssl_data.phantom.pair import Phantom, PhantomPhase, make_phantom

__all__ = ["Phantom", "PhantomConfig", "PhantomPhase", "make_phantom", "write_phantom"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "folder" if name == "write_phantom" else "pair"
    return getattr(import_module(f"lungssl_data.phantom.{module}"), name)
