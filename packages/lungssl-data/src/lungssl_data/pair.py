"""A patient's exhale and inhale scans in numpy, as the cache holds them.

Arrays are (z, y, x); points, spacings and affines (x, y, z) in LPS millimetres.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Float64, Int16, UInt8
from numpy import ndarray

from lungssl_data.volume import Geometry

PATIENT_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
AIR_HU = -1000
"""What padding and everything outside the scanner's view is set to."""

Phase = Literal["exhale", "inhale"]
Split = Literal["train", "val", "test"]
LandmarkKind = Literal["expert", "automatic"]
"""Points that people set, and points that a program found: never mixed (`domain.md` C)."""


class CacheError(ValueError):
    """A cache that can't be read or written; the message names the file and the next step."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PhaseScan:
    """One phase of one patient on its own axis-aligned grid."""

    ct_hu: Int16[ndarray, "z y x"]
    valid: UInt8[ndarray, "z y x"]
    lung: UInt8[ndarray, "z y x"]
    lobes: UInt8[ndarray, "z y x"] | None = None
    lesion: UInt8[ndarray, "z y x"] | None = None
    """Lesion types in the codes of `layouts.source.LESION_CODES`."""
    vessels: UInt8[ndarray, "z y x"] | None = None
    """Airways and vessels in the codes of `layouts.source.VESSEL_CODES`."""
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    source_sha256: str = ""
    """Hash of the voxels that the scan was made from (`building.duplicates.voxels_sha256`)."""

    def geometry(self) -> Geometry:
        """The scan's grid in LPS mm."""
        return Geometry(
            shape=self.ct_hu.shape, spacing_mm=self.spacing_mm, origin_mm=self.origin_mm, direction=np.eye(3)
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Displacement:
    """A field on the exhale side: exhale point p lies at p + u(p) in the inhale scan."""

    u_mm: Float32[ndarray, "3 z y x"]
    """Components (x, y, z) in LPS mm; NaN where unknown."""
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    provenance: str
    """Where it is from, e.g. `phantom` (exact) or a registration's name and version."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Landmarks:
    """Corresponding points of a pair: row i of both arrays is the same tissue, (x, y, z) in LPS mm, unrounded."""

    exhale_mm: Float64[ndarray, "n 3"]
    inhale_mm: Float64[ndarray, "n 3"]

    def identity_tre_mm(self) -> Float64[ndarray, " n"]:
        """Distance of each point to its partner: the target registration error of doing nothing."""
        return np.linalg.norm(self.inhale_mm - self.exhale_mm, axis=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class PhasePair:
    """A patient's scans as they are on disk and in numpy."""

    patient: str
    exhale: PhaseScan | None = None
    inhale: PhaseScan | None = None
    exhale_to_inhale: Float[ndarray, "3 4"] | None = None
    """Coarse affine in LPS mm."""
    affine_provenance: str = ""
    displacement: Displacement | None = None
    landmarks: Mapping[LandmarkKind, Landmarks] = field(default_factory=dict)
    person: str = ""
    """Who was scanned, where other patients of the cache may be the same one (a collection that holds another); all
    of a person's patients are in one split. Empty: the patient."""
    split: Split = "train"
    key: str = ""
    """SHA-256 of the sources, the parameters and the format; equal key means nothing to rebuild."""

    def phases(self) -> tuple[Phase, ...]:
        """The phases that are there, exhale first."""
        return tuple(p for p in ("exhale", "inhale") if getattr(self, p) is not None)

    def scan(self, phase: Phase) -> PhaseScan:
        """The scan of one phase; ValueError where the patient lacks it."""
        scan = getattr(self, phase)
        if scan is None:
            raise ValueError(f"patient {self.patient} has no {phase} scan, only {', '.join(self.phases())}")
        return scan


def check_patient_id(patient: str) -> str:
    """Return `patient` if it can be a file name; CacheError with the rule otherwise."""
    if not PATIENT_PATTERN.fullmatch(patient):
        raise CacheError(
            f"patient id of {len(patient)} characters can't be used: 1-64 letters, digits, '-' and '_', "
            f"starting with a letter or digit; give de-identified ids, never names"
        )
    return patient
