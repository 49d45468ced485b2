"""The built-in cohort: phantoms of many patients, made once, kept in the user's cache folder."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lungssl_data.pair import PhasePair, Split


@dataclass(frozen=True, kw_only=True)
class CohortConfig:
    """Which phantoms make a cohort."""

    patients: int = 16
    """Seeds 0, 1, ...; see `preset_of`."""
    spacing_mm: float = 5.0
    """Voxel size of the phantoms and of the cache: both lungs in a 56-voxel view, seconds a patient."""
    texture_rho: float = 0.5
    """Share of the texture that both phases have in common: at 1 dense methods could match identical noise
    (`domain.md` D2), so the demo runs at one half."""
    seed: int = 0
    """First phantom's seed."""
    motion: Literal["charts", "ffd"] = "charts"
    """Family of the lungs' inner motion: `ffd`, a B-spline warp without gravity, is held out for tests of shift."""
    preset: Literal["deep", "ards"] | None = None
    """How all of them breathe; None: see `preset_of`."""
    pathology: tuple[Literal["ground_glass", "consolidation", "emphysema", "covid", "effusion"], ...] | None = None
    """Lesions that every patient has, with masks of ground glass and consolidation in the cache; None as presets draw
    them, without masks."""

    def __post_init__(self) -> None:
        if self.patients < 1 or not self.spacing_mm > 0 or not 0 <= self.texture_rho <= 1:
            raise ValueError(
                f"a cohort has at least 1 patient, voxels above 0 mm and a texture_rho of 0 to 1, got "
                f"{self.patients}, {self.spacing_mm:g} and {self.texture_rho:g}"
            )

    def name(self) -> str:
        """Folder name: a new one for every other cohort, and for every other version of phantom or cache."""
        from lungssl_data.cache_index import FORMAT_VERSION
        from lungssl_data.phantom.config import PHANTOM_VERSION

        fields = {name: value for name, value in asdict(self).items() if value is not None}  # names as they ever were
        text = json.dumps([FORMAT_VERSION, PHANTOM_VERSION, fields], sort_keys=True)
        return f"phantoms-{self.patients}x{self.spacing_mm:g}mm-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


LESION_COHORT = CohortConfig(spacing_mm=4.0, seed=300, pathology=("ground_glass", "consolidation"))
"""What `finetune cosegment` learns from without --data; none of the seeds that GrabCut's defaults were chosen on."""


def preset_of(seed: int) -> Literal["deep", "ards"]:
    """How a cohort's patient breathes: every third is ventilated ARDS."""
    return "ards" if seed % 3 == 2 else "deep"


def user_cache_folder() -> Path:
    """$LUNGSSL_CACHE, else the platform's usual place ($XDG_CACHE_HOME or ~/.cache) + `lungssl`."""
    if folder := os.environ.get("LUNGSSL_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lungssl"


def builtin_cohort(config: CohortConfig | None = None, *, say: Callable[[str], None] = print) -> Path:
    """Folder of the built-in cohort's cache; makes what is missing."""
    config = config or CohortConfig()
    folder = user_cache_folder() / config.name()
    for line in make_cohort(config, folder):
        say(line)
    return folder


def make_cohort(config: CohortConfig, folder: Path) -> Iterator[str]:
    """Make the phantoms that `folder` lacks; yields a line for each one made."""
    from lungssl_data.cache import write_pair
    from lungssl_data.phantom import PhantomConfig, make_phantom
    from lungssl_data.splits import assign_splits

    names = [f"phantom{config.seed + index:03d}" for index in range(config.patients)]
    splits = assign_splits(names, {})
    for index, name in enumerate(names):
        if (folder / f"{name}.h5").exists():
            continue
        preset = config.preset or preset_of(config.seed + index)
        phantom_config = PhantomConfig(
            preset=preset,
            seed=config.seed + index,
            spacing_mm=config.spacing_mm,
            texture_rho=config.texture_rho,
            motion=config.motion,
            pathology=config.pathology,
        )
        pair = pair_from_phantom(
            make_phantom(phantom_config), name, splits[name], key=config.name(), lesions=config.pathology is not None
        )
        write_pair(pair, folder)
        yield f"phantom {index + 1}/{config.patients}: {preset}, seed {config.seed + index}, {splits[name]}"


def pair_from_phantom(
    phantom: Any,
    patient: str,
    split: Split,
    *,
    key: str = "",
    margin_mm: float = 20.0,
    lesions: bool = False,
    vessels: bool = False,
) -> PhasePair:
    """A phantom as the cache holds a patient: cut to its lungs, its exact displacement kept.

    `lesions`: with masks of ground glass and consolidation; `vessels`: of airways, arteries and veins.

    `phantom` is a `lungssl_data.phantom.Phantom`, whose grids are axis-aligned already.
    """
    import numpy as np
    from lungssl_data.building.duplicates import voxels_sha256
    from lungssl_data.pair import AIR_HU, Displacement, PhaseScan
    from lungssl_data.prepare import coarse_affine

    scans, corners = {}, {}
    u_mm = np.where(phantom.exhale.body > 0, phantom.exhale_to_inhale_mm, np.float32(np.nan))
    for phase in ("exhale", "inhale"):
        source = getattr(phantom, phase)
        geometry = source.ct.geometry
        inside = np.argwhere(source.lung > 0)
        margin = np.ceil(margin_mm / np.asarray(geometry.spacing_mm)[::-1]).astype(int)
        low = np.maximum(inside.min(0) - margin, 0)
        high = np.minimum(inside.max(0) + margin + 1, geometry.shape)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        x, y, z = (float(v) for v in np.add(geometry.origin_mm, low[::-1] * np.asarray(geometry.spacing_mm)))
        corners[phase] = box
        scans[phase] = PhaseScan(
            ct_hu=np.maximum(source.ct.hu[box], AIR_HU),
            valid=np.ones([s.stop - s.start for s in box], np.uint8),
            lung=np.ascontiguousarray(source.lung[box]),
            lobes=np.ascontiguousarray(source.lobes[box]),
            # 4 and 5, collapse and emphysema, are no codes of the cache
            lesion=np.where(source.lesion[box] <= 2, source.lesion[box], np.uint8(0)) if lesions else None,
            vessels=np.ascontiguousarray(source.tree[box]) if vessels else None,
            spacing_mm=geometry.spacing_mm,
            origin_mm=(x, y, z),
            source_sha256=voxels_sha256(source.ct),
        )
    exhale, inhale = scans["exhale"], scans["inhale"]
    return PhasePair(
        patient=patient,
        exhale=exhale,
        inhale=inhale,
        exhale_to_inhale=coarse_affine(exhale, inhale),
        affine_provenance="lung mask moments",
        displacement=Displacement(
            u_mm=np.ascontiguousarray(u_mm[(slice(None), *corners["exhale"])]),
            spacing_mm=exhale.spacing_mm,
            origin_mm=exhale.origin_mm,
            provenance="phantom (exact)",
        ),
        split=split,
        key=key,
    )
