"""One synthetic patient: two CTs of the same lungs, and the exact map between them (`domain.md` D).

Phantom results show correctness and mechanism, never clinical performance.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from numpy import ndarray
from numpy.random import Generator, SeedSequence, default_rng

from lungssl_data.phantom.config import PhantomConfig
from lungssl_data.phantom.landmarks import FORK, draw_landmarks
from lungssl_data.phantom.motion import EFFUSION, LEFT_LUNG, Breath
from lungssl_data.phantom.parenchyma import to_phase
from lungssl_data.phantom.physics import scan
from lungssl_data.phantom.presets import PRESETS
from lungssl_data.phantom.rasterise import LEAST_VOX, draw_trees
from lungssl_data.phantom.render import Rendering, Textures, render
from lungssl_data.phantom.subject import Subject, draw_pathology, draw_subject, with_pathology
from lungssl_data.phantom.texture import texture
from lungssl_data.phantom.trees import ARTERY, VEIN, Tree, carry_trees, grow_trees
from lungssl_data.phantom.truth import Truth, recruitment
from lungssl_data.volume import Geometry, Volume

TEXTURE_MM = (2.0, 6.0)
"""Correlation length of the parenchyma (D2)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PhantomPhase:
    """One scan and its labels, all on one axis-aligned grid."""

    ct: Volume
    """With the scanner's blur, noise and artefacts."""
    clean_hu: Float32[ndarray, "z y x"]
    """Hounsfield units before the scanner: parenchyma at the voxels' centres, trees as partial volume."""
    parenchyma_hu: Float32[ndarray, "z y x"]
    """The same without trees: gas, mass and recruitment balance on these. `clean_hu` itself without trees."""
    lung: UInt8[ndarray, "z y x"]
    """0 outside, 1 right, 2 left. Vessels and airways from the lobar bronchi on belong to the lung; trachea, main
    bronchi and pleural fluid do not."""
    lobes: UInt8[ndarray, "z y x"]
    """0 outside, 1 RUL, 2 RML, 3 RLL, 4 LUL, 5 LLL."""
    body: UInt8[ndarray, "z y x"]
    """1 inside the skin, lungs and airways included."""
    region: UInt8[ndarray, "z y x"]
    """0 air, 1 right lung, 2 left lung, 3 mediastinum, 4 abdomen, 5 neck, 6 chest wall, 7 spine, 8 pleural fluid.
    Displacements jump where regions slide along each other, and are smooth inside them but for a crease below and above
    the hila."""
    tree: UInt8[ndarray, "z y x"]
    """0 none, 1 airway lumen, trachea and main bronchi included, 2 artery, 3 vein; arteries and veins of the lungs and
    hila only, wherever they fill half a voxel."""
    lesion: UInt8[ndarray, "z y x"]
    """0 none, 1 ground glass, 2 consolidation, 4 dependent collapse (non-aerated in this phase), 5 emphysema."""


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
    truth: Truth
    """Recruitment and hyperinflation on the exhale grid, and their figures."""
    landmarks_exhale_mm: Float64[ndarray, "n 3"]
    """300 lung points, 5 mm and more from the lung's surface in both phases, 8 mm and more from one another."""
    landmarks_inhale_mm: Float64[ndarray, "n 3"]
    """The same tissue at inhale, exact."""
    landmark_kind: UInt8[ndarray, " n"]
    """1 a tree's bifurcation, 0 a random point of the texture, where bifurcations were too few."""
    subject: Subject
    """The closed-form motion behind the images."""
    trees: tuple[Tree, ...]
    """Veins, arteries and airways in material space; () without trees."""
    parameters: dict[str, Any]
    """The config and every drawn number, ready for JSON."""

    def to_inhale(self, points_mm: Float64[ndarray, "n 3"]) -> Float64[ndarray, "n 3"]:
        """Exhale lung points to inhale, exact to rounding; NaN for points outside the lungs."""
        s = self.subject
        return to_phase(s.chest, s.lung, s.exhale, s.exhale, s.inhale, points_mm)

    def to_exhale(self, points_mm: Float64[ndarray, "n 3"]) -> Float64[ndarray, "n 3"]:
        """Inhale lung points to exhale, exact to rounding; NaN for points outside the lungs."""
        s = self.subject
        return to_phase(s.chest, s.lung, s.exhale, s.inhale, s.exhale, points_mm)


def make_phantom(config: PhantomConfig) -> Phantom:
    """Draw, render and map one patient.

    Some 6 CPU seconds at 2 mm, most of them spread over all cores; a machine's first call compiles for 20 s more.
    """
    # One stream per purpose: a change of one (say, the noise) leaves the others' draws alone.
    names = ["subject", "geometry", "texture", "landmarks"]
    names += ["exhale_texture", "inhale_texture", "exhale_ct", "inhale_ct", "trees", "pathology"]
    streams = SeedSequence((config.seed, list(PRESETS).index(config.preset))).spawn(len(names))
    rng = {name: default_rng(stream) for name, stream in zip(names, streams, strict=True)}
    subject = draw_subject(rng["subject"], config.preset, motion=config.motion)
    drawn_kinds = draw_pathology(rng["pathology"], config.preset)
    kinds = drawn_kinds if config.pathology is None else config.pathology
    subject, severity = with_pathology(subject, rng["pathology"], kinds)
    trees, vessels = (), {}
    if config.trees:
        trees, vessels = grow_trees(rng["trees"], subject.chest, subject.exhale, subject.anatomy, subject.lung)
    correlation_mm = float(rng["texture"].uniform(*TEXTURE_MM))
    shared = texture(rng["texture"], correlation_mm)
    fields = {"exhale": shared, "inhale": shared}
    if config.texture_rho < 1:
        for name in fields:
            own = texture(rng[f"{name}_texture"], correlation_mm)
            rho = config.texture_rho
            fields[name] = np.float32(rho**0.5) * shared + np.float32((1 - rho) ** 0.5) * own

    def phase(name: str, other: str, here: Breath, there: Breath) -> tuple[Rendering, PhantomPhase, dict[str, float]]:
        geometry = _geometry(subject, here, config, rng["geometry"])
        textures = Textures(here=fields[name], there=fields[other], edges=shared)
        rendering = render(
            subject.chest, subject.anatomy, subject.lung, subject.exhale, here, there, textures, geometry
        )
        return rendering, *_scanned(name, subject, trees, here, rendering, geometry, config, rng[f"{name}_ct"])

    at_exhale, exhale, exhale_scan = phase("exhale", "inhale", subject.exhale, subject.inhale)
    at_inhale, inhale, inhale_scan = phase("inhale", "exhale", subject.inhale, subject.exhale)
    truth = recruitment(
        at_exhale.hu, at_exhale.hu_there, at_exhale.jacobian, exhale.lung > 0, at_inhale.hu[inhale.lung > 0],
        exhale.ct.geometry.voxel_ml(), inhale.ct.geometry.voxel_ml(),
    )  # fmt: skip
    landmarks_exhale, landmarks_inhale, landmark_kind = draw_landmarks(subject, trees, rng["landmarks"])
    return Phantom(
        exhale=exhale,
        inhale=inhale,
        exhale_to_inhale_mm=at_exhale.displacement_mm,
        inhale_to_exhale_mm=at_inhale.displacement_mm,
        jacobian=at_exhale.jacobian,
        truth=truth,
        landmarks_exhale_mm=landmarks_exhale,
        landmarks_inhale_mm=landmarks_inhale,
        landmark_kind=landmark_kind,
        subject=subject,
        trees=trees,
        parameters={
            # As JSON gives it back: lists, not tuples.
            "config": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()},
            "subject": subject.drawn,
            "trees": vessels,
            "pathology": severity,
            "texture_correlation_mm": correlation_mm,
            "exhale_scan": exhale_scan,
            "inhale_scan": inhale_scan,
            "landmark_forks": int((landmark_kind == FORK).sum()),
            "truth": truth.figures,
        },
    )


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


def _scanned(
    name: str,
    subject: Subject,
    trees: tuple[Tree, ...],
    here: Breath,
    rendering: Rendering,
    geometry: Geometry,
    config: PhantomConfig,
    rng: Generator,
) -> tuple[PhantomPhase, dict[str, float]]:
    """Trees, then the scanner, whose draws do not know the phase."""
    region, shown, volumes = rendering.region, rendering.hu, {}
    tree = np.zeros(geometry.shape, np.uint8)
    if trees:
        least_mm = LEAST_VOX * config.spacing_mm
        pieces = carry_trees(trees, subject.chest, subject.exhale, here, least_radius_mm=least_mm)
        shown, tree = draw_trees(pieces, geometry, region, rendering.hu)
        volumes = {"vessels_ml": pieces.volume_ml(ARTERY) + pieces.volume_ml(VEIN)}
    body = (region > 0).astype(np.uint8)
    counts, drawn = scan(
        rng, shown, body, spacing_mm=config.spacing_mm, noise_hu=config.noise_hu,
        low_dose=config.expiratory_low_dose and name == "exhale", artefacts=config.artefacts,
    )  # fmt: skip
    phase = PhantomPhase(
        ct=Volume(hu=counts, geometry=geometry),
        clean_hu=shown,
        parenchyma_hu=rendering.hu,
        lung=np.where(region <= LEFT_LUNG, region, np.uint8(0)),
        lobes=rendering.lobes,
        body=body,
        region=region,
        tree=tree,
        lesion=rendering.lesion,
    )
    return phase, drawn | volumes | {"effusion_ml": float((region == EFFUSION).sum()) * geometry.voxel_ml()}
