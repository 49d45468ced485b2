"""Parts of the lungs that figures are given for: both, each, lobes, and ten slabs from the top to the bottom."""

from typing import Literal

import numpy as np
from jaxtyping import Bool
from lungssl_data.pair import PhaseScan
from numpy import ndarray

LOBE_NAMES = {1: "RUL", 2: "RML", 3: "RLL", 4: "LUL", 5: "LLL"}
SLABS = 10
Down = Literal["back", "front"]
"""Where gravity pulls: to the back of a supine patient, to the front of a prone one."""


def parts(scan: PhaseScan, *, down: Down = "back") -> dict[str, Bool[ndarray, " n"]]:
    """Which of a scan's lung voxels, in the order of `scan.lung > 0`, belong to a part.

    `lungs`, `right`, `left`; the lobes where the scan has them; `gravity_01` (uppermost) to `gravity_10` (lowest),
    each as near to a tenth of the lungs' voxels as whole rows allow. Parts without a voxel are left out.
    """
    inside = scan.lung > 0
    side = scan.lung[inside]
    found = {"lungs": np.ones(len(side), bool), "right": side == 1, "left": side == 2}
    if scan.lobes is not None:
        lobe = scan.lobes[inside]
        found |= {name: lobe == code for code, name in LOBE_NAMES.items()}
    height = np.nonzero(inside)[1]  # y grows towards the back
    if down == "front":
        height = -height
    # The share of lung above a row's middle, so that a row goes to the slab that most of it lies in.
    rows, place, count = np.unique(height, return_inverse=True, return_counts=True)
    above = (np.cumsum(count) - count / 2) / max(len(side), 1)
    slab = np.minimum((above * SLABS).astype(int), SLABS - 1)[place] if len(rows) else place
    found |= {f"gravity_{k + 1:02d}": slab == k for k in range(SLABS)}
    return {name: where for name, where in found.items() if where.any()}
