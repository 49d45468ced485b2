"""What a phantom is made from."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PhantomConfig:
    """One synthetic patient; equal configs give identical bytes."""

    preset: Literal["deep", "ards"] = "deep"
    """`deep`: healthy, end-expiration to a deep breath-hold. `ards`: ventilated, tidal, with dependent collapse."""
    seed: int = 0
    """Draws the subject, its texture and its noise; not negative."""
    spacing_mm: float = 2.0
    """Voxel size of both grids."""
    texture_rho: float = 1.0
    """Share of the texture's variance that both phases have in common, in [0, 1]. At 1 a network can match noise."""
    noise_hu: float | None = None
    """Standard deviation of the noise; None draws it for each phase alike from 8 to 25 HU (`domain.md` D5)."""
    margin_mm: float = 15.0
    """Free space kept around the body, and around the lungs along z."""

    def __post_init__(self) -> None:
        if self.preset not in ("deep", "ards"):
            raise ValueError(f"preset {self.preset!r} is unknown; choose 'deep' or 'ards'")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        if not 0.5 <= self.spacing_mm <= 8.0:
            raise ValueError(f"spacing_mm must lie in [0.5, 8], got {self.spacing_mm}; 2 is usual, 0.5 is 370 M voxels")
        if not 0.0 <= self.texture_rho <= 1.0:
            raise ValueError(f"texture_rho is a share of variance in [0, 1], got {self.texture_rho}")
        if self.noise_hu is not None and self.noise_hu < 0:
            raise ValueError(f"noise_hu is a standard deviation, got {self.noise_hu}; 0 renders without noise")
