"""Synthetic exhale/inhale pairs of chest CTs with exact correspondence, density and labels."""

from lungssl_data.phantom.config import PhantomConfig
from lungssl_data.phantom.pair import Phantom, PhantomPhase, make_phantom, write_phantom

__all__ = ["Phantom", "PhantomConfig", "PhantomPhase", "make_phantom", "write_phantom"]
