"""A displacement field on a lattice of some millimetres: small enough to keep, exact enough to train on."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64
from numpy import ndarray

from lungssl_data.pair import Displacement

LATTICE_MM = 6.0
"""Distance of nodes. Of breathing, 20 mm over a lung of 300 mm, linear interpolation between them misses at most
h^2 / 8 * max |u''| = 36 / 8 * 20 * (2 pi / 300)^2 = 0.04 mm, but a step at the pleura is smeared over one node."""


@dataclass(frozen=True, kw_only=True)
class CoarseField:
    """Exhale-to-inhale displacements in LPS mm, linear between nodes; NaN where a node around is not known."""

    u_mm: Float32[ndarray, "3 z y x"]
    spacing_mm: tuple[float, float, float]
    """Of the nodes, (x, y, z)."""
    origin_mm: tuple[float, float, float]

    @classmethod
    def of(cls, field: Displacement) -> "CoarseField":
        """Every n-th node of a field, n the largest that keeps nodes within LATTICE_MM. A copy: the field can go."""
        x, y, z = (max(1, math.floor(LATTICE_MM / mm + 1e-6)) for mm in field.spacing_mm)
        sx, sy, sz = field.spacing_mm
        return cls(
            u_mm=np.ascontiguousarray(field.u_mm[:, ::z, ::y, ::x]),
            spacing_mm=(sx * x, sy * y, sz * z),
            origin_mm=field.origin_mm,
        )

    def inhale_mm(self, exhale_mm: Float[ndarray, "n 3"]) -> Float64[ndarray, "n 3"]:
        """Where exhale points are in the inhale scan: p + u(p); NaN outside of the known field."""
        index = (exhale_mm - self.origin_mm) / self.spacing_mm
        last = np.array(self.u_mm.shape[:0:-1]) - 1
        inside = ((index >= 0) & (index <= last)).all(axis=1)
        where = torch.from_numpy(2 * index / np.maximum(last, 1) - 1).to(torch.float64)
        volume = torch.from_numpy(self.u_mm).double()[None]
        u_mm = F.grid_sample(volume, where[None, :, None, None], align_corners=True, padding_mode="border")
        return np.where(inside[:, None], exhale_mm + u_mm[0, :, :, 0, 0].T.numpy(), np.nan)
