"""Lung voxels of one scan, and their parts: both lungs, each, lobes, ten slabs along gravity."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8
from lungssl_data.pair import PhaseScan
from lungssl_data.volume import LabelMap, Volume
from numpy import ndarray

LOBE_NAMES = {1: "RUL", 2: "RML", 3: "RLL", 4: "LUL", 5: "LLL"}
SLABS = 10
Down = Literal["back", "front"]
"""Where gravity pulls: to the back of a supine patient, to the front of a prone one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LungVoxels:
    """The voxels of a lung mask, in the order of `mask > 0`."""

    hu: Shaped[ndarray, " n"]
    side: UInt8[ndarray, " n"]
    """1 right, 2 left."""
    lobe: UInt8[ndarray, " n"] | None
    y_mm: Float[ndarray, " n"]
    """LPS: grows to the back."""
    voxel_ml: float


def of_scan(scan: PhaseScan) -> LungVoxels:
    """Of a prepared scan."""
    inside = scan.lung > 0
    return LungVoxels(
        hu=scan.ct_hu[inside],
        side=scan.lung[inside],
        lobe=None if scan.lobes is None else scan.lobes[inside],
        y_mm=np.nonzero(inside)[1] * scan.spacing_mm[1] + scan.origin_mm[1],
        voxel_ml=scan.geometry().voxel_ml(),
    )


def of_volume(volume: Volume, lung: LabelMap, lobes: LabelMap | None = None) -> LungVoxels:
    """Of a scan's own voxels, so that nothing of the chest wall is mixed in; the masks are on its grid.

    Voxels that the scanner padded are left out. Raises ValueError for a mask on another grid.
    """
    for name, mask in (("lung", lung), ("lobes", lobes)):
        if mask is not None and not mask.geometry.same_grid(volume.geometry):
            raise ValueError(f"the {name} mask is on another grid than the volume; resample it first")
    inside = (lung.labels > 0) & volume.valid()
    to_y = volume.geometry.index_to_mm()[1]
    z, y, x = np.nonzero(inside)
    return LungVoxels(
        hu=volume.hu[inside],
        side=lung.labels[inside],
        lobe=None if lobes is None else lobes.labels[inside],
        y_mm=to_y[0] * x + to_y[1] * y + to_y[2] * z + to_y[3],
        voxel_ml=volume.geometry.voxel_ml(),
    )


def parts(voxels: LungVoxels, *, down: Down = "back") -> dict[str, Bool[ndarray, " n"]]:
    """Which voxels belong to a part.

    `lungs`, `right`, `left`; the lobes where they are known; `gravity_01` (uppermost) to `gravity_10` (lowest), each as
    near to a tenth of the lungs' voxels as whole rows allow. Parts without a voxel are left out.
    """
    found = {"lungs": np.ones(len(voxels.hu), bool), "right": voxels.side == 1, "left": voxels.side == 2}
    if voxels.lobe is not None:
        found |= {name: voxels.lobe == code for code, name in LOBE_NAMES.items()}
    depth = np.round(voxels.y_mm if down == "back" else -voxels.y_mm, 2)
    # The share of lung above a row's middle, so that a row goes to the slab that most of it lies in.
    rows, place, count = np.unique(depth, return_inverse=True, return_counts=True)
    above = (np.cumsum(count) - count / 2) / max(len(depth), 1)
    slab = np.minimum((above * SLABS).astype(int), SLABS - 1)[place] if len(rows) else place
    found |= {f"gravity_{k + 1:02d}": slab == k for k in range(SLABS)}
    return {name: where for name, where in found.items() if where.any()}
