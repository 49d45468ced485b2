"""One synthetic patient: two CTs of the same lungs, and the exact map between them (`domain.md` D).

Phantom results show correctness and mechanism, never clinical performance.
"""

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from numpy import ndarray
from numpy.random import Generator, SeedSequence, default_rng

from lungssl_data.phantom.config import PhantomConfig
from lungssl_data.volume import Geometry, LabelMap, Volume

if TYPE_CHECKING:
    from lungssl_data.phantom.render import Rendering
    from lungssl_data.phantom.subject import Subject

LANDMARKS = 300
LANDMARK_DEPTH_MM = 5.0
"""Least distance of a landmark to its lung's surface, in both phases (`domain.md` D6)."""
LANDMARK_GAP_MM = 8.0
PSF_FWHM_MM = (0.8, 1.0)
"""Point spread of a soft kernel; with the voxel's own width it is what a scan of that spacing shows."""
NOISE_HU = (8.0, 25.0)
NOISE_BLUR_VOX = (0.35, 0.6)

PointMap = Callable[[Float64[ndarray, "n 3"]], Float64[ndarray, "n 3"]]


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
    """Everything inside the skin."""
    region: UInt8[ndarray, "z y x"]
    """0 air, 1 right lung, 2 left lung, 3 mediastinum, 4 abdomen, 5 neck, 6 chest wall, 7 spine. Displacements are
    smooth inside a region and jump where regions slide along each other."""


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
    landmarks_inhale_mm: Float64[ndarray, "n 3"]
    to_inhale: PointMap
    """Exhale lung points in mm to inhale, to rounding error; NaN for points outside the lungs."""
    to_exhale: PointMap
    parameters: dict[str, object]
    """The config and every drawn number, ready for JSON."""


def make_phantom(config: PhantomConfig) -> Phantom:
    """Draw, render and map one patient. About 5 s at 2 mm on 2 cores, plus compilation on a machine's first call."""
    # numba's import and the kernels' compilation are paid by those who make phantoms only.
    from lungssl_data.phantom.render import render, to_phase
    from lungssl_data.phantom.subject import draw_subject
    from lungssl_data.phantom.texture import texture

    names = ("subject", "geometry", "texture", "exhale_texture", "inhale_texture", "landmarks", "exhale_ct", "inhale_ct")
    entropy = (config.seed, 0 if config.preset == "deep" else 1)
    rng = {name: default_rng(s) for name, s in zip(names, SeedSequence(entropy).spawn(len(names)), strict=True)}
    subject = draw_subject(rng["subject"], config.preset)
    correlation_mm = float(rng["texture"].uniform(2.0, 6.0))
    shared = texture(rng["texture"], correlation_mm)
    own = 1.0 - config.texture_rho

    renderings, phases, scans = {}, {}, {}
    for phase, here, there in (
        ("exhale", subject.exhale, subject.inhale),
        ("inhale", subject.inhale, subject.exhale),
    ):
        field = shared
        if own > 0:
            apart = texture(rng[f"{phase}_texture"], correlation_mm)
            field = np.sqrt(np.float32(config.texture_rho)) * shared + np.sqrt(np.float32(own)) * apart
        geometry = _geometry(subject, here.recess_mm, here.lateral_mm, here.anterior_mm, config, rng["geometry"])
        rendering = render(
            subject.chest, subject.anatomy, subject.lung, subject.exhale, here, there, field, geometry
        )
        renderings[phase] = rendering
        phases[phase], scans[phase] = _scan(rendering, geometry, config.noise_hu, rng[f"{phase}_ct"])

    def to_inhale(points_mm: Float64[ndarray, "n 3"]) -> Float64[ndarray, "n 3"]:
        return to_phase(subject.chest, subject.exhale, subject.exhale, subject.inhale, points_mm)

    def to_exhale(points_mm: Float64[ndarray, "n 3"]) -> Float64[ndarray, "n 3"]:
        return to_phase(subject.chest, subject.exhale, subject.inhale, subject.exhale, points_mm)

    landmarks = _landmarks(phases["exhale"], phases["inhale"], to_inhale, rng["landmarks"])
    return Phantom(
        exhale=phases["exhale"],
        inhale=phases["inhale"],
        exhale_to_inhale_mm=renderings["exhale"].displacement_mm,
        inhale_to_exhale_mm=renderings["inhale"].displacement_mm,
        jacobian=renderings["exhale"].jacobian,
        landmarks_exhale_mm=landmarks,
        landmarks_inhale_mm=to_inhale(landmarks),
        to_inhale=to_inhale,
        to_exhale=to_exhale,
        parameters={
            "config": asdict(config),
            "subject": subject.drawn,
            "texture_correlation_mm": correlation_mm,
            "scans": scans,
        },
    )


def write_phantom(phantom: Phantom, folder: Path) -> None:
    """Write a patient's folder in the layout `folder`: CTs and masks as .nii.gz, u as .nrrd, landmarks, phantom.json."""
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


def _geometry(
    subject: "Subject", recess_mm: float, lateral_mm: float, anterior_mm: float, config: PhantomConfig, rng: Generator
) -> Geometry:
    """A grid around body and lungs of one phase, shifted by a part of a voxel so that grids of phases never coincide."""
    chest, anatomy, margin, spacing = subject.chest, subject.anatomy, config.margin_mm, config.spacing_mm
    wall = 12.0 + 1.6 * anatomy.muscle_mm + 14.0
    width = chest.half_width_mm + lateral_mm + wall + anatomy.fat_mm + margin
    front = -(chest.half_depth_mm + 2.0 * anterior_mm + wall + 1.35 * anatomy.fat_mm + margin)
    back = chest.half_depth_mm + wall + 0.7 * anatomy.muscle_mm + 0.65 * anatomy.fat_mm + margin
    # The recess lies 24 mm deeper at the back (motion.diaphragm).
    low, high = recess_mm - 24.0 - margin, chest.apex_mm + 10.0 + margin
    shift = rng.uniform(0.0, spacing, 3)
    size = np.array([2.0 * width, back - front, high - low])
    nx, ny, nz = (int(n) for n in np.ceil(size / spacing))
    return Geometry(
        shape=(nz, ny, nx),
        spacing_mm=(spacing, spacing, spacing),
        origin_mm=(float(shift[0] - width), float(shift[1] + front), float(shift[2] + low)),
        direction=np.eye(3),
    )


def _scan(
    rendering: "Rendering", geometry: Geometry, noise_hu: float | None, rng: Generator
) -> tuple[PhantomPhase, dict[str, float]]:
    """Blur and noise from this phase's own stream, whose distribution does not know the phase."""
    from lungssl_data.phantom.texture import blur, scanner_noise

    fwhm_mm, drawn_hu, noise_vox = (float(rng.uniform(*bounds)) for bounds in (PSF_FWHM_MM, NOISE_HU, NOISE_BLUR_VOX))
    sigma_hu = drawn_hu if noise_hu is None else noise_hu
    # A voxel averages over its width (variance 1/12) on top of the scanner's point spread.
    sigma_vox = float(np.sqrt((fwhm_mm / 2.355 / geometry.spacing_mm[0]) ** 2 + 1 / 12))
    hu = blur(rendering.hu, sigma_vox)
    if sigma_hu > 0:
        hu = hu + scanner_noise(rng, geometry.shape, sigma_hu=sigma_hu, blur_vox=noise_vox)
    region = rendering.region
    phase = PhantomPhase(
        ct=Volume(hu=np.clip(np.rint(hu), -1024, 3071).astype(np.int16), geometry=geometry),
        clean_hu=rendering.hu,
        lung=np.where(region <= 2, region, 0).astype(np.uint8),
        lobes=rendering.lobes,
        body=(region > 0).astype(np.uint8),
        region=region,
    )
    return phase, {"psf_fwhm_mm": fwhm_mm, "noise_hu": sigma_hu, "noise_blur_vox": noise_vox}


def _landmarks(
    exhale: PhantomPhase, inhale: PhantomPhase, to_inhale: PointMap, rng: Generator
) -> Float64[ndarray, "n 3"]:
    """Random exhale points deep enough in the lungs of both phases, kept where no kept one is near (Poisson thinning)."""
    geometry = exhale.ct.geometry
    spacing = geometry.spacing_mm[0]
    deep = np.flatnonzero(_depth_mm(exhale).ravel() >= LANDMARK_DEPTH_MM)
    index = np.stack(np.unravel_index(rng.permutation(deep)[: 40 * LANDMARKS], geometry.shape)[::-1], 1)
    points = np.asarray(geometry.origin_mm) + (index + rng.uniform(-0.5, 0.5, index.shape)) * spacing
    at_inhale = np.rint((to_inhale(points) - np.asarray(inhale.ct.geometry.origin_mm)) / spacing).astype(int)
    points = points[_depth_mm(inhale)[tuple(at_inhale.T[::-1])] >= LANDMARK_DEPTH_MM]
    kept = points[:1]
    for point in points[1:]:
        if len(kept) == LANDMARKS:
            break
        if ((kept - point) ** 2).sum(1).min() >= LANDMARK_GAP_MM**2:
            kept = np.vstack((kept, point))
    return kept


def _depth_mm(phase: PhantomPhase) -> Float32[ndarray, "z y x"]:
    """At least how far below its lung's surface any point of a voxel lies: less half a diagonal and the surface's step."""
    from edt import edt

    spacing = phase.ct.geometry.spacing_mm[0]
    return edt(phase.lung, anisotropy=(spacing,) * 3) - np.float32(spacing * (0.5 * 3**0.5 + 1.0))
