"""What goes into a training step, and what comes out of it.

A sample is one patient seen through two *slots*. With both phases, slot 0 is exhale and slot 1 inhale; with one phase,
both slots are crops of the same scan. So every arm of a comparison (one phase, two phases, cross-phase positives)
sees the same number of views, and the method reads from `slot_phase` what a pair of views is.

Arrays are (z, y, x), points and affines (x, y, z) in LPS millimetres.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float32, Int16, Int64, UInt8
from torch import Tensor

PHASES = ("exhale", "inhale")
"""A phase's integer code is its place in this tuple."""

HU_WINDOW = (-1000.0, 400.0)
"""Hounsfield units mapped to network input 0 and 1 (`architecture.md`: one fixed window, never per volume)."""


@dataclass(frozen=True, kw_only=True)
class CropBatch:
    """Matched blocks of int16 HU as the loader yields them, before augmentation."""

    ct_hu: Int16[Tensor, "b 2 z y x"]
    valid: Bool[Tensor, "b 2 z y x"]
    """Measured voxels: false in scanner padding and outside the volume."""
    lung: UInt8[Tensor, "b 2 z y x"]
    """0 outside, 1 right lung, 2 left lung."""
    labels: UInt8[Tensor, "b 2 z y x"] | None = None
    """Task labels (for lobes 1 RUL, 2 RML, 3 RLL, 4 LUL, 5 LLL), where asked for."""
    voxel_to_mm: Float32[Tensor, "b 2 3 4"]
    """(x, y, z) index in the block to LPS mm in that slot's scan."""
    slot_phase: Int64[Tensor, "b 2"]
    patient: Int64[Tensor, " b"]
    """Index of the patient in the cache's order: tells twins from strangers, never identifies."""
    exhale_to_inhale: Float32[Tensor, "b 3 4"]
    """Coarse affine from exhale mm to inhale mm; the identity where only one phase is there."""
    partner_mm: Float32[Tensor, "b 3 _z _y _x"] | None = None
    """Where points of slot 0's block are in slot 1's scan, LPS mm (x, y, z), on a lattice of nodes evenly spaced from
    the block's first voxel to its last; NaN where that is not known. None: not asked for."""

    def to(self, device: torch.device | str) -> "CropBatch":
        """The same batch on `device`."""
        moved = {
            f.name: v.to(device, non_blocking=True) for f in fields(self) if (v := getattr(self, f.name)) is not None
        }
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class View:
    """One augmented crop per sample, all of one size."""

    image: Float[Tensor, "b 1 z y x"]
    """Network input: HU clipped to HU_WINDOW and scaled to [0, 1], after intensity augmentation."""
    coords_mm: Float32[Tensor, "b 3 z y x"]
    """LPS position (x, y, z) in the slot's own scan of the point that each voxel was sampled at."""
    valid: Bool[Tensor, "b z y x"]
    """Voxels sampled wholly from measured data."""
    partner_mm: Float32[Tensor, "b 3 z y x"] | None = None
    """For views of slot 0: where each voxel's point is in slot 1's scan, LPS mm; NaN where that is not known. None for
    slot 1, and where the crops were read without correspondences."""
    lung: Bool[Tensor, "b z y x"]
    labels: UInt8[Tensor, "b z y x"] | None = None
    shift_hu: Float32[Tensor, " b"] | None = None
    """Added to the whole view, and `gamma`, the exponent on the scaled window after it: both are drawn for each view,
    so what is measured in HU is to be measured without them. None: neither was."""
    gamma: Float32[Tensor, " b"] | None = None
    slot: Literal[0, 1]
    kind: Literal["global", "local"]

    @classmethod
    def later(cls, made: dict[str, Callable[[], Tensor]], **known: Any) -> "View":
        """A view of what is `known`, and of fields that are made when they are first read: not all methods read all.

        Raises TypeError where a field is missing that has no default.
        """
        if missing := {f.name for f in fields(cls) if f.default is MISSING} - made.keys() - known.keys():
            raise TypeError(f"a view needs {', '.join(sorted(missing))}")
        view = object.__new__(cls)
        defaults = {f.name: f.default for f in fields(cls) if f.default is not MISSING and f.name not in made}
        for name, value in {**defaults, **known, "_made": made}.items():
            object.__setattr__(view, name, value)
        return view

    def __getattr__(self, name: str) -> Tensor:
        """Of fields that aren't there yet."""
        make = self.__dict__.get("_made", {}).get(name)
        if make is None:
            raise AttributeError(f"a view has no {name}")
        # As before the pass that reads it: positions are float32 and have no gradient.
        with torch.no_grad(), torch.autocast(self.image.device.type, enabled=False):
            object.__setattr__(self, name, make())
        return self.__dict__[name]


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Augmented views on the device: what a method or a task is given."""

    views: tuple[View, ...]
    """All global views first (slot 0, slot 1, ...), then all local ones (slot 0, slot 1, ...)."""
    slot_phase: Int64[Tensor, "b 2"]
    patient: Int64[Tensor, " b"]
    exhale_to_inhale: Float32[Tensor, "b 3 4"]

    def paired(self) -> Bool[Tensor, " b"]:
        """Samples whose two slots hold two different phases."""
        return self.slot_phase[:, 0] != self.slot_phase[:, 1]

    def global_views(self) -> tuple[View, ...]:
        """The global views, slot 0 first."""
        return tuple(view for view in self.views if view.kind == "global")


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """A method's or a task's answer to one batch."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]
    """Detached scalars to log; names ending in `_lnk` are in units of ln K."""
