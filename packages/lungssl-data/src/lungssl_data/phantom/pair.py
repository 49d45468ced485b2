"""One synthetic patient: two CTs of the same lungs, and the exact map between them (`domain.md` D).

Phantom results show correctness and mechanism, never clinical performance.
"""

import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from numpy import ndarray
from numpy.random import Generator, SeedSequence, default_rng

from lungssl_data.phantom.config import PhantomConfig
from lungssl_data.phantom.motion import Breath
from lungssl_data.phantom.presets import PRESETS
from lungssl_data.phantom.render import Rendering, render, to_phase
from lungssl_data.phantom.subject import Subject, draw_subject
from lungssl_data.phantom.texture import blur, scanner_noise, texture
from lungssl_data.volume import Geometry, LabelMap, Volume

LANDMARKS = 300
LANDMARK_DEPTH_MM = 5.0
"""Least distance of a landmark to its lung's surface, in both phases (`domain.md` D6)."""
LANDMARK_GAP_MM = 8.0
TEXTURE_MM = (2.0, 6.0)
"""Correlation length of the parenchyma (D2)."""
PSF_FWHM_MM = (0.8, 1.0)
"""Point spread of a soft kernel (D5)."""
NOISE_HU = (8.0, 25.0)
"""Standard deviation (D5)."""
NOISE_BLUR_VOX = (0.35, 0.6)


@dataclass(frozen=True, kw_only=True, eq=False)
class PhantomPhase:
    """One scan and its labels, all on one axis-aligned grid."""

    ct: Volume
    """With the scanner's blur and noise."""
    clean_hu: Float32[ndarray, "z y x"]
    """Hounsfield units at the voxels' centres, free of noise and blur: gas and mass balance on these."""
    lung: UInt8[ndarray, "z y x"]
    """0 outside, 1 right, 2 left."""
    lobes: UInt8[ndarray, "z y x"]
    """0 outside, 1 RUL, 2 RML, 3 RLL, 4 LUL, 5 LLL."""
    body: UInt8[ndarray, "z y x"]
    """1 inside the skin, lungs and airways included."""
    region: UInt8[ndarray, "z y x"]
    """0 air, 1 right lung, 2 left lung, 3 mediastinum, 4 abdomen, 5 neck, 6 chest wall, 7 spine. Displacements jump
    where regions slide along each other, and are smooth inside them but for a crease below and above the hila."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Phantom:
    """A pair with known correspondence. Displacements are LPS mm, components (x, y, z) first, 0 outside the body."""

    exhale: PhantomPhase
    inhale: PhantomPhase
    exhale_to_inhale_mm: Float32[ndarray, "3 ze ye xe"]
    """On the exhale grid: tissue at p at exhale is at p + u(p) at inhale."""
    inhale_to_exhale_mm: Float32[ndarray, "3 zi yi xi"]
    """On the inhale grid, the inverse."""
    jacobian: Float32[ndarray, "ze ye xe"]
    """Local expansion from exhale to inhale, det(d inhale / d exhale), in closed form; 0 outside the lungs."""
    landmarks_exhale_mm: Float64[ndarray, "n 3"]
    """300 random lung points, 5 mm and more from the lung's surface in both phases, 8 mm and more from one another."""
    landmarks_inhale_mm: Float64[ndarray, "n 3"]
    """The same tissue at inhale, exact."""
    subject: Subject
    """The closed-form motion behind the images."""
    parameters: dict[str, object]
    """The config and every drawn number, ready for JSON."""

    def to_inhale(self, points_mm: Float64[ndarray, "n 3"]) -> Float64[ndarray, "n 3"]:
        """Exhale lung points to inhale, exact to rounding; NaN for points outside the lungs."""
        return to_phase(self.subject.chest, self.subject.exhale, self.subject.exhale, self.subject.inhale, points_mm)

    def to_exhale(self, points_mm: Float64[ndarray, "n 3"]) -> Float64[ndarray, "n 3"]:
        """Inhale lung points to exhale, exact to rounding; NaN for points outside the lungs."""
        return to_phase(self.subject.chest, self.subject.exhale, self.subject.inhale, self.subject.exhale, points_mm)


def make_phantom(config: PhantomConfig) -> Phantom:
    """Draw, render and map one patient.

    Some 4 CPU seconds at 2 mm, most of them spread over all cores; a machine's first call compiles for 15 s more.
    """
    # One stream per purpose: a change of one (say, the noise) leaves the others' draws alone.
    names = ["subject", "geometry", "texture", "landmarks"]
    names += ["exhale_texture", "inhale_texture", "exhale_ct", "inhale_ct"]
    streams = SeedSequence((config.seed, list(PRESETS).index(config.preset))).spawn(len(names))
    rng = {name: default_rng(stream) for name, stream in zip(names, streams, strict=True)}
    subject = draw_subject(rng["subject"], config.preset)
    correlation_mm = float(rng["texture"].uniform(*TEXTURE_MM))
    shared = texture(rng["texture"], correlation_mm)

    def phase(name: str, here: Breath, there: Breath) -> tuple[Rendering, PhantomPhase, dict[str, float]]:
        field = shared
        if config.texture_rho < 1:
            own = texture(rng[f"{name}_texture"], correlation_mm)
            field = np.float32(config.texture_rho**0.5) * shared + np.float32((1 - config.texture_rho) ** 0.5) * own
        geometry = _geometry(subject, here, config, rng["geometry"])
        rendering = render(subject.chest, subject.anatomy, subject.lung, subject.exhale, here, there, field, geometry)
        return rendering, *_scan(rendering, geometry, config.noise_hu, rng[f"{name}_ct"])

    at_exhale, exhale, exhale_scan = phase("exhale", subject.exhale, subject.inhale)
    at_inhale, inhale, inhale_scan = phase("inhale", subject.inhale, subject.exhale)
    landmarks_exhale, landmarks_inhale = _landmarks(subject, rng["landmarks"])
    return Phantom(
        exhale=exhale,
        inhale=inhale,
        exhale_to_inhale_mm=at_exhale.displacement_mm,
        inhale_to_exhale_mm=at_inhale.displacement_mm,
        jacobian=at_exhale.jacobian,
        landmarks_exhale_mm=landmarks_exhale,
        landmarks_inhale_mm=landmarks_inhale,
        subject=subject,
        parameters={
            "config": asdict(config),
            "subject": subject.drawn,
            "texture_correlation_mm": correlation_mm,
            "exhale_scan": exhale_scan,
            "inhale_scan": inhale_scan,
        },
    )


def write_phantom(phantom: Phantom, folder: Path) -> None:
    """Write a patient's folder in the layout `folder`: CTs, masks, u as .nrrd, landmarks.csv and phantom.json."""
    # SimpleITK and nibabel take a second to import, and making phantoms needs neither.
    from lungssl_data.field import write_field
    from lungssl_data.readers import write_labels, write_volume

    folder.mkdir(parents=True, exist_ok=True)
    for name, phase in (("exhale", phantom.exhale), ("inhale", phantom.inhale)):
        geometry = phase.ct.geometry
        write_volume(folder / f"{name}.nii.gz", phase.ct)
        write_labels(folder / f"{name}_lung.nii.gz", LabelMap(labels=phase.lung, geometry=geometry))
        write_labels(folder / f"{name}_lobes.nii.gz", LabelMap(labels=phase.lobes, geometry=geometry))
    write_field(folder / "exhale_to_inhale.nrrd", phantom.exhale_to_inhale_mm, phantom.exhale.ct.geometry)
    with (folder / "landmarks.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f"{phase}_{axis}_mm" for phase in ("exhale", "inhale") for axis in "xyz"])
        for row in np.hstack((phantom.landmarks_exhale_mm, phantom.landmarks_inhale_mm)):
            writer.writerow([f"{value:.6f}" for value in row])
    (folder / "phantom.json").write_text(json.dumps(phantom.parameters, indent=2) + "\n")


def _geometry(subject: Subject, here: Breath, config: PhantomConfig, rng: Generator) -> Geometry:
    """A grid around one phase's body, and its lungs along z, shifted by part of a voxel so that grids differ."""
    chest, anatomy, spacing = subject.chest, subject.anatomy, config.spacing_mm
    # Bounds of the skin as `anatomy.outside_body` draws it; the recess lies 24 mm deeper at the back.
    wall = 28.0 + 1.2 * anatomy.muscle_mm
    half_width = chest.half_width_mm + here.lateral_mm + wall + anatomy.fat_mm
    front = chest.half_depth_mm + 2.0 * here.anterior_mm + wall + 1.35 * anatomy.fat_mm
    back = chest.half_depth_mm + wall + 0.8 * anatomy.muscle_mm + 0.65 * anatomy.fat_mm
    low = np.array([-half_width, -front, here.recess_mm - 24.0]) - config.margin_mm
    high = np.array([half_width, back, chest.apex_mm]) + config.margin_mm
    origin = low + rng.uniform(0.0, spacing, 3)
    nx, ny, nz = (int(n) for n in np.ceil((high - low) / spacing))
    return Geometry(
        shape=(nz, ny, nx),
        spacing_mm=(spacing, spacing, spacing),
        origin_mm=(float(origin[0]), float(origin[1]), float(origin[2])),
        direction=np.eye(3),
    )


def _scan(
    rendering: Rendering, geometry: Geometry, noise_hu: float | None, rng: Generator
) -> tuple[PhantomPhase, dict[str, float]]:
    """Blur and noise of one scan, whose distribution does not know the phase."""
    fwhm_mm, drawn_hu, noise_vox = (float(rng.uniform(*bounds)) for bounds in (PSF_FWHM_MM, NOISE_HU, NOISE_BLUR_VOX))
    sigma_hu = drawn_hu if noise_hu is None else noise_hu
    # A voxel averages over its width (variance 1/12) on top of the scanner's point spread; FWHM = 2.355 sigma.
    hu = blur(rendering.hu, float(np.hypot(fwhm_mm / 2.355 / geometry.spacing_mm[0], 12**-0.5)))
    if sigma_hu > 0:
        hu = hu + scanner_noise(rng, geometry.shape, sigma_hu=sigma_hu, blur_vox=noise_vox)
    region = rendering.region
    phase = PhantomPhase(
        ct=Volume(hu=np.clip(np.rint(hu), -1024, 3071).astype(np.int16), geometry=geometry),
        clean_hu=rendering.hu,
        lung=np.where(region <= 2, region, np.uint8(0)),
        lobes=rendering.lobes,
        body=(region > 0).astype(np.uint8),
        region=region,
    )
    return phase, {"psf_fwhm_mm": fwhm_mm, "noise_hu": sigma_hu, "noise_blur_vox": noise_vox}


def _landmarks(subject: Subject, rng: Generator) -> tuple[Float64[ndarray, "n 3"], Float64[ndarray, "n 3"]]:
    """Random points deep in both phases' lungs, each kept where no kept one is near (Poisson thinning).

    Of the subject alone, not of its grids: one seed has the same landmarks at every spacing. A point is deep where
    probes in 26 directions, a tenth longer than the depth to allow for what lies between them, all end in its lung.
    """
    chest, exhale, inhale = subject.chest, subject.exhale, subject.inhale
    corner = np.array([chest.half_width_mm, chest.half_depth_mm, chest.apex_mm])
    points = rng.uniform(-1.0, 1.0, (60 * LANDMARKS, 3)) * corner
    moved = to_phase(chest, exhale, exhale, inhale, points)
    lung = np.flatnonzero(np.isfinite(moved).all(1))[: 8 * LANDMARKS]
    points, moved = points[lung], moved[lung]
    deep = np.ones(len(points), bool)
    probes = np.stack(np.meshgrid(*[(-1.0, 0.0, 1.0)] * 3), -1).reshape(-1, 3)
    for probe in np.delete(probes, 13, axis=0):
        step = probe * (1.1 * LANDMARK_DEPTH_MM / np.linalg.norm(probe))
        deep &= np.isfinite(to_phase(chest, exhale, exhale, inhale, points + step)).all(1)
        deep &= np.isfinite(to_phase(chest, exhale, inhale, exhale, moved + step)).all(1)
    kept: list[int] = []
    for i in np.flatnonzero(deep):
        if all(((points[kept] - points[i]) ** 2).sum(1) >= LANDMARK_GAP_MM**2):
            kept.append(int(i))
    return points[kept[:LANDMARKS]], moved[kept[:LANDMARKS]]
