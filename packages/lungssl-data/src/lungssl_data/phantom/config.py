"""What a phantom is made from."""

from dataclasses import dataclass
from typing import Literal, get_args

PresetName = Literal["healthy", "deep", "ards", "peep"]
Motion = Literal["charts", "ffd"]
Pathology = Literal["ground_glass", "consolidation", "emphysema", "covid", "effusion"]
Artefact = Literal["streaks", "cropped_fov", "scale_error", "step"]


PHANTOM_VERSION = 4
"""Raised whenever equal configurations give other bytes."""


@dataclass(frozen=True, kw_only=True)
class PhantomConfig:
    """One synthetic patient; equal configs give identical bytes."""

    preset: PresetName = "deep"
    """`healthy`: end-expiration to a moderate breath. `deep`: healthy, to a deep breath-hold. `ards`: ventilated,
    tidal, with dependent collapse. `peep`: such lungs at end-expiration, at 5 and at 15 cmH2O."""
    seed: int = 0
    """Draws the subject, its texture and its noise; not negative."""
    spacing_mm: float = 2.0
    """Voxel size of both grids."""
    motion: Motion = "charts"
    """Family of the lungs' inner motion: `ffd`, a B-spline warp without gravity, is for tests of shift (D7)."""
    trees: bool = True
    """Draw airways, arteries and veins into the lungs."""
    pathology: tuple[Pathology, ...] | None = None
    """Lesions besides collapse; () for none, None to draw by the preset's chances."""
    texture_rho: float = 1.0
    """Share of the texture's variance that both phases have in common, in [0, 1]. At 1 a network can match noise."""
    noise_hu: float | None = None
    """Standard deviation of the noise; None draws it for each phase alike from 8 to 25 HU (`domain.md` D5)."""
    expiratory_low_dose: bool = False
    """Twice the noise at exhale, as at a quarter of the dose in COPDGene: the phase shows in the noise."""
    artefacts: tuple[Artefact, ...] = ()
    """Of the scanner, in both phases; the truth does not follow `step` and `cropped_fov`."""
    margin_mm: float = 15.0
    """Free space kept around the body, and around the lungs along z."""

    def __post_init__(self) -> None:
        _one_of("preset", self.preset, get_args(PresetName))
        _one_of("motion", self.motion, get_args(Motion))
        for name in self.pathology or ():
            _one_of("pathology", name, get_args(Pathology))
        for name in self.artefacts:
            _one_of("artefact", name, get_args(Artefact))
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        if not 0.5 <= self.spacing_mm <= 8.0:
            raise ValueError(f"spacing_mm must lie in [0.5, 8], got {self.spacing_mm}; 2 is usual, 0.5 is 370 M voxels")
        if not 0.0 <= self.texture_rho <= 1.0:
            raise ValueError(f"texture_rho is a share of variance in [0, 1], got {self.texture_rho}")
        if self.noise_hu is not None and self.noise_hu < 0:
            raise ValueError(f"noise_hu is a standard deviation, got {self.noise_hu}; 0 renders without noise")


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{what} {value!r} is unknown; choose {', '.join(map(repr, known[:-1]))} or {known[-1]!r}")
