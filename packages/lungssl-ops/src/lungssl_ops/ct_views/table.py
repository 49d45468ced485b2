"""What to do for each view: where it lies in which volume, and what happens to its HU."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

HU_WINDOW = (-1000.0, 400.0)
"""HU that become 0 and 1 unless a table says otherwise: air to soft tissue, as for all of lungssl's networks."""
N_NUMBERS = 17
"""Per view: 12 of the affine, then window low and high, shift, gamma, noise."""
MOST_NODES = 64
"""Of a lattice along an axis; the C++ kernel has that much room."""
MOST_SAMPLES = 8
"""Along an axis of a voxel; 8 means that a view shrinks its volume eightfold."""


class Packed(NamedTuple):
    """A table as the kernels take it."""

    volume: Int64[Tensor, " v"]
    numbers: Float32[Tensor, "v 17"]
    seed: Int64[Tensor, " v"]
    lattice: Float32[Tensor, "v 3 n n n"] | None


@dataclass(frozen=True, kw_only=True)
class ViewTable:
    """One row per view. All tensors are on the CPU, where they can be checked for free; the op sends them along.

    Positions are voxel indices in the order (x, y, z), voxel centres at whole numbers; images are [z, y, x].
    Raises ValueError for tensors whose shapes don't go together.
    """

    volume: Int64[Tensor, " v"]
    """Which of the volumes the view is cut from."""
    affine: Float32[Tensor, "v 3 4"]
    """From a voxel of the view to a position in its volume, both (x, y, z). A mirrored axis is a negative column."""
    lattice: Float32[Tensor, "v 3 n n n"] | None = None
    """Displacements in voxels of the volume, components (x, y, z), at n nodes along (z, y, x) from the first voxel of
    the view to its last; trilinear in between. 2 <= n <= 64. So a node's value is reached, its standard deviation is
    that of the displacement there, and a voxel depends on 8 nodes; a cubic B-spline would be smoother, but halves the
    standard deviation and takes 64. Where it is NaN, voxels lie outside of the volume."""
    window_hu: Float32[Tensor, "v 2"] | None = None
    """HU that become 0 and 1; HU_WINDOW if None."""
    shift_hu: Float32[Tensor, " v"] | None = None
    """Added to all voxels, before the window; 0 if None."""
    gamma: Float32[Tensor, " v"] | None = None
    """Exponent on the windowed value; 1 if None."""
    noise_hu: Float32[Tensor, " v"] | None = None
    """Standard deviation of white noise, added before the window; 0 if None."""
    seed: Int64[Tensor, " v"] | None = None
    """Of the noise; 0 if None. Views of one size and seed have the same noise."""

    def __post_init__(self) -> None:
        v = len(self.volume)
        expected = {
            "volume": ((v,), torch.int64),
            "affine": ((v, 3, 4), torch.float32),
            "window_hu": ((v, 2), torch.float32),
            "shift_hu": ((v,), torch.float32),
            "gamma": ((v,), torch.float32),
            "noise_hu": ((v,), torch.float32),
            "seed": ((v,), torch.int64),
        }
        if self.lattice is not None:
            n = self.lattice.shape[-1] if self.lattice.dim() == 5 else 0
            if not 2 <= n <= MOST_NODES:
                raise ValueError(
                    f"ViewTable.lattice has shape {tuple(self.lattice.shape)}; expected [{v}, 3, n, n, n] "
                    f"with 2 <= n <= {MOST_NODES}"
                )
            expected["lattice"] = ((v, 3, n, n, n), torch.float32)
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            shape, dtype = expected[field.name]
            if value.shape != shape or value.dtype != dtype or value.device.type != "cpu":
                raise ValueError(
                    f"ViewTable.{field.name} is {value.dtype} of shape {tuple(value.shape)} on {value.device}; "
                    f"expected {dtype} of shape {shape} on cpu"
                )

    def __len__(self) -> int:
        return len(self.volume)

    def packed(self) -> Packed:
        """The table in as few tensors as the kernels need."""
        v = len(self)
        window = torch.tensor(HU_WINDOW).expand(v, 2) if self.window_hu is None else self.window_hu
        columns = [_or(self.shift_hu, v, 0.0), _or(self.gamma, v, 1.0), _or(self.noise_hu, v, 0.0)]
        numbers = torch.cat([self.affine.flatten(1), window, torch.stack(columns, 1)], 1)
        seed = torch.zeros(v, dtype=torch.int64) if self.seed is None else self.seed
        return Packed(self.volume, numbers, seed, self.lattice)


def _or(value: Tensor | None, count: int, default: float) -> Tensor:
    return torch.full((count,), default) if value is None else value


def view_affine(
    size_vox: tuple[int, int, int], centre_vox: Float[Tensor, "v 3"], matrix: Float[Tensor, "v 3 3"]
) -> Float32[Tensor, "v 3 4"]:
    """`ViewTable.affine` of views of `size_vox` (z, y, x) whose centre lies at `centre_vox` (x, y, z) in the volume.

    Column k of `matrix` is the step in the volume, in its voxels (x, y, z), for one voxel of the view along its axis k:
    zoom times a rotation, negative where the view is mirrored. Computed in float64.
    """
    half = (torch.tensor(size_vox[::-1], dtype=torch.float64) - 1) / 2
    linear = matrix.double()
    return torch.cat([linear, (centre_vox.double() - linear @ half)[..., None]], -1).float()


def check_values(packed: Packed, n_volumes: int) -> None:
    """Raises ValueError where a table's numbers make no sense; kernels would read foreign memory, or give NaN."""
    volume, numbers = packed.volume, packed.numbers
    wrong = (volume < 0) | (volume >= n_volumes)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(f"view {at} is of volume {int(volume[at])}; there are {n_volumes}, counted from 0")
    low, high, _, gamma, noise = numbers[:, 12:].unbind(1)
    rules = [
        (numbers.isfinite().all(1), "has a number that isn't finite", numbers[:, :12]),
        (high > low, "has a window whose high end isn't above its low end", numbers[:, 12:14]),
        (gamma > 0, "has a gamma that isn't positive", gamma),
        (noise >= 0, "has a negative noise_hu", noise),
    ]
    if packed.lattice is not None:
        rules.append((~packed.lattice.flatten(1).isinf().any(1), "has an infinite lattice", volume))
    for holds, problem, values in rules:
        if not holds.all():
            at = int((~holds).nonzero()[0])
            raise ValueError(f"view {at} of the table {problem}: {values[at].tolist()}; correct the table")


def samples_per_voxel(numbers: Float32[Tensor, "v 17"], *, antialias: bool) -> Int32[Tensor, "v 3"]:
    """How many samples along (x, y, z) a voxel of each view is averaged from.

    As many as its step in the volume has voxels, halves rounded down: 1 up to a step of 1.5, 2 up to 2.5. A sample is
    trilinear, so it covers the gap to the next. Raises ValueError above MOST_SAMPLES.
    """
    if not antialias:
        return torch.ones(len(numbers), 3, dtype=torch.int32)
    step = torch.linalg.vector_norm(numbers[:, :12].reshape(-1, 3, 4)[:, :, :3].double(), dim=1)
    # 1e-4: a zoom of 1.5 in float32, rotated, is still 1.5.
    count = torch.ceil(step - 0.5 - 1e-4).clamp_min(1)
    if (count > MOST_SAMPLES).any():
        at = int((count > MOST_SAMPLES).any(1).nonzero()[0])
        raise ValueError(
            f"view {at} takes steps of {[round(s, 2) for s in step[at].tolist()]} voxels (x, y, z); above "
            f"{MOST_SAMPLES + 0.5} shrink the volume first, or pass antialias=False"
        )
    return count.int()


def check_size(size_vox: Sequence[int], patch_vox: Sequence[int]) -> None:
    """Raises ValueError for sizes that aren't positive, too large, or no multiples of the patch (empty: no patches)."""
    if any(s < 1 for s in (*size_vox, *patch_vox)):
        raise ValueError(f"sizes must be positive, got size_vox {tuple(size_vox)} and patch_vox {tuple(patch_vox)}")
    z, y, x = size_vox
    if z * y * x >= 2**30 or max(size_vox) >= 2**20:
        raise ValueError(
            f"a view of {tuple(size_vox)} has {z * y * x} voxels; expected < 2^30, sides < 2^20; cut it in parts"
        )
    if patch_vox and any(s % p for s, p in zip(size_vox, patch_vox, strict=True)):
        raise ValueError(f"view sides (z, y, x) {tuple(size_vox)} must be multiples of the patch {tuple(patch_vox)}")


def views_shape(views: int, size_vox: Sequence[int], patch_vox: Sequence[int]) -> tuple[int, ...]:
    """Of what `ct_views` gives: volumes, or rows of patches."""
    if not patch_vox:
        return (views, 1, *size_vox)
    (z, y, x), (pz, py, px) = size_vox, patch_vox
    return (views, (z // pz) * (y // py) * (x // px), pz * py * px)
