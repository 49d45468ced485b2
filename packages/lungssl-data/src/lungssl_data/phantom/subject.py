"""Draws one subject: shape, breath, density and lobes, redrawn until volumes and motion are physiological."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float64
from numpy import ndarray
from numpy.random import Generator

from lungssl_data.phantom.anatomy import Anatomy
from lungssl_data.phantom.ffd import draw_warp
from lungssl_data.phantom.motion import Breath, Chest, transport_table
from lungssl_data.phantom.parenchyma import TISSUE_HU, Parenchyma, whole
from lungssl_data.phantom.pathology import draw_blobs, draw_effusion
from lungssl_data.phantom.points import place_lung
from lungssl_data.phantom.presets import PRESETS, Preset, Range

LOBE_FRACTIONS = (0.19, 0.08, 0.26, 0.23, 0.24)
"""RUL, RML, RLL, LUL, LLL as parts of both lungs at exhale (`domain.md` D3)."""
FISSURE_GAP = (0.2, 0.6)
"""Share of a fissure that is missing (D3)."""
EVEN = np.linspace(-1.0, 1.0, 2049)
"""Nodes of the density and transport tables over Y."""
BASE_MM = -100.0
"""Below every costophrenic recess, so that the rib cage widens down to the lowest lung."""
ATTEMPTS = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """Everything that the charts and the renderer need, and the numbers behind it for the record."""

    chest: Chest
    exhale: Breath
    inhale: Breath
    anatomy: Anatomy
    lung: Parenchyma
    drawn: dict[str, float]


class _Draw:
    """Uniform draws that are remembered by name."""

    def __init__(self, rng: Generator) -> None:
        self.rng = rng
        self.record: dict[str, float] = {}

    def __call__(self, name: str, bounds: Range) -> float:
        self.record[name] = float(self.rng.uniform(*bounds))
        return self.record[name]


def draw_subject(rng: Generator, preset: str, *, motion: str = "charts") -> Subject:
    """The first random subject of `preset`, without lesions, whose figures all lie in the preset's accepted ranges."""
    ranges = PRESETS[preset]
    for _ in range(ATTEMPTS):
        subject, figures = _attempt(_Draw(rng), ranges, motion)
        if all(low <= figures[name] <= high for name in figures for low, high in [getattr(ranges, name)]):
            return subject
    raise AssertionError(f"no subject of preset {preset!r} in {ATTEMPTS} draws: its ranges contradict one another")


def draw_pathology(rng: Generator, preset: str) -> tuple[str, ...]:
    """Kinds of lesions by the preset's chances."""
    return tuple(kind for kind, chance in PRESETS[preset].pathology.items() if rng.uniform() < chance)


def with_pathology(
    subject: Subject, rng: Generator, kinds: tuple[str, ...]
) -> tuple[Subject, dict[str, dict[str, float]]]:
    """The subject with lesions of these kinds, and the severity drawn for each."""
    blobs, severity = draw_blobs(rng, kinds, subject.chest, subject.exhale)
    lung = subject.lung._replace(blobs=blobs)
    if "effusion" in kinds:
        material, cell = _material_grid((28, 96, 36))
        _, det = place_lung(subject.chest, subject.exhale, subject.exhale, material)
        effusion, wanted_ml = draw_effusion(rng, material, det * cell / 1000)
        lung = lung._replace(effusion=effusion)
        severity["effusion"] = {"volume_ml": wanted_ml}
    return replace(subject, lung=lung), severity


def _attempt(draw: _Draw, ranges: Preset, motion: str) -> tuple[Subject, dict[str, float]]:
    chest, anatomy = _draw_body(draw, ranges)
    exhale_density, inhale_density = _draw_densities(draw, ranges)
    exhale, inhale = _draw_breaths(draw, ranges, chest, exhale_density, inhale_density)
    if motion == "ffd":
        inhale = inhale._replace(
            kappa=0.0, kappa_posterior=0.0, transport=exhale.transport, transport_slope=exhale.transport_slope,
            warp=draw_warp(draw.rng.spawn(1)[0]),
        )  # fmt: skip

    material, cell = _material_grid()
    exhale_mm, det_exhale = place_lung(chest, exhale, exhale, material)
    inhale_mm, det_inhale = place_lung(chest, exhale, inhale, material)
    exhale_l, inhale_l = (float(det.sum()) * cell * 1e-6 for det in (det_exhale, det_inhale))
    mean = float(np.average(np.interp(material[:, 1], EVEN, exhale_density), weights=det_exhale))
    if ranges.exhale_hu is not None:
        wanted = (1000.0 + draw("exhale_hu", ranges.exhale_hu)) / (1000.0 + TISSUE_HU)
        exhale_density, mean = exhale_density * (wanted / mean), wanted
    figures = {
        "exhale_l": exhale_l,
        "inhale_l": inhale_l,
        "gain_l": inhale_l - exhale_l,
        "exhale_gas_l": exhale_l * (1.0 - mean),
        "inhale_hu": -1000.0 + (1000.0 + TISSUE_HU) * mean * exhale_l / inhale_l,
        "displacement_mm": float(np.average(np.linalg.norm(inhale_mm - exhale_mm, axis=1), weights=det_exhale)),
        "right_share": float(det_exhale[material[:, 0] < 0].sum() / det_exhale.sum()),
    }
    lung = _draw_parenchyma(draw, ranges, material, det_exhale, exhale_density)
    drawn = draw.record | figures
    return Subject(chest=chest, exhale=exhale, inhale=inhale, anatomy=anatomy, lung=lung, drawn=drawn), figures


def _draw_body(draw: _Draw, ranges: Preset) -> tuple[Chest, Anatomy]:
    chest = Chest(
        half_width_mm=draw("half_width_mm", ranges.half_width_mm),
        half_depth_mm=draw("half_depth_mm", ranges.half_depth_mm),
        apex_mm=draw("apex_mm", ranges.apex_mm),
        base_mm=BASE_MM,
        apex_drop_mm=draw("apex_drop_mm", (30.0, 42.0)),
        right_dome_mm=draw("right_dome_mm", (5.0, 15.0)),
        mediastinum_mm=draw("mediastinum_mm", (15.0, 20.0)),
        heart_left_mm=draw("heart_left_mm", (44.0, 58.0)),
        heart_right_mm=draw("heart_right_mm", (12.0, 20.0)),
        heart_front=draw("heart_front", (-0.4, -0.25)),
        heart_level=draw("heart_level", (0.2, 0.28)),
    )
    anatomy = Anatomy(
        fat_mm=draw("fat_mm", (5.0, 32.0)),
        muscle_mm=draw("muscle_mm", (9.0, 15.0)),
        rib_pitch_mm=draw("rib_pitch", (0.105, 0.115)) * chest.apex_mm,
        rib_slope=float(np.tan(np.radians(draw("rib_slope_deg", (15.0, 25.0))))),
        trachea_mm=draw("trachea_mm", (7.5, 9.5)),
        carina=draw("carina", (0.55, 0.64)),
        stomach_gas=draw("stomach_gas", (0.15, 0.6)),
    )
    return chest, anatomy


def _draw_densities(draw: _Draw, ranges: Preset) -> tuple[Float64[ndarray, " nodes"], Float64[ndarray, " nodes"]]:
    """Tissue fraction over Y at exhale, and the profile over Y that gravity and recruitment aim at for inhale.

    The second sets relative expansion only: the volumes, with conserved mass, set its scale.
    """
    rise = (EVEN + 1.0) / 2
    ventral, gradient = draw("ventral_tissue", (0.22, 0.28)), draw("gradient", ranges.gradient)
    exhale, inhale = ventral + gradient * rise, 0.9 * ventral + 0.6 * gradient * rise
    if ranges.collapse is not None:
        collapsed = 1.0 / (1.0 + np.exp((draw("collapse_depth", ranges.collapse_depth) - EVEN) / 0.12))
        tissue = draw("collapse", ranges.collapse)
        exhale = exhale + (tissue - exhale) * collapsed
        # What lies lowest opens last: it keeps its density, and pleural fluid there its volume.
        opens = draw("recruitable", ranges.recruitable) * np.clip((0.9 - EVEN) / 0.2, 0.0, 1.0)
        inhale = inhale + (tissue - inhale) * collapsed * (1.0 - opens)
    return exhale, inhale


def _draw_breaths(
    draw: _Draw,
    ranges: Preset,
    chest: Chest,
    exhale_density: Float64[ndarray, " nodes"],
    inhale_density: Float64[ndarray, " nodes"],
) -> tuple[Breath, Breath]:
    dome, descent = draw("dome_mm", ranges.dome_mm), draw("descent_mm", ranges.descent_mm)
    flattening = draw("flattening", (0.1, 0.3))
    exhale = Breath(
        recess_mm=0.0,
        dome_mm=dome,
        lateral_mm=0.0,
        anterior_mm=0.0,
        lift=0.0,
        kappa=0.0,
        kappa_posterior=0.0,
        transport=EVEN,
        transport_slope=np.ones_like(EVEN),
    )
    transport, slope = transport_table(exhale_density, inhale_density)
    inhale = Breath(
        recess_mm=-(1.0 - flattening) * descent,
        dome_mm=dome - flattening * descent,
        lateral_mm=draw("widening_mm", ranges.widening_mm) / 2,
        anterior_mm=draw("anterior_mm", ranges.anterior_mm) / 2,
        lift=draw("lift_mm", ranges.lift_mm) / chest.apex_mm,
        kappa=draw("kappa", ranges.kappa),
        kappa_posterior=draw("kappa_posterior", ranges.kappa),
        transport=transport,
        transport_slope=slope,
    )
    return exhale, inhale


def _material_grid(cells: tuple[int, int, int] = (14, 24, 18)) -> tuple[Float64[ndarray, "n 3"], float]:
    """Midpoints (q, Y, v) of a grid over both lungs, and the material volume of a cell."""
    s, y, v = ((np.arange(n) + 0.5) / n for n in cells)
    q = np.concatenate((-1.0 - s, 1.0 + s))
    material = np.stack(np.meshgrid(q, 2.0 * y - 1.0, v, indexing="ij"), -1).reshape(-1, 3)
    return material, 2.0 / float(np.prod(cells))


def _draw_parenchyma(
    draw: _Draw,
    ranges: Preset,
    material: Float64[ndarray, "n 3"],
    det_exhale: Float64[ndarray, " n"],
    density: Float64[ndarray, " nodes"],
) -> Parenchyma:
    """Fissures from (Y 1, v 0.75) to (Y -0.6, v 0) and near v = 0.5 (D3), shifted to give every lobe its fraction."""
    upper_right, middle, lower_right, upper_left, lower_left = LOBE_FRACTIONS
    slope, bend = draw("oblique_slope", (0.42, 0.52)), draw("oblique_bend", (-0.15, 0.15))
    minor_slope = draw("minor_slope", (-0.1, 0.1))
    right = material[:, 0] < 0
    oblique = material[:, 2] - slope * material[:, 1] - bend * (np.abs(material[:, 0]) - 1.5) ** 2
    minor = material[:, 2] - minor_slope * material[:, 1]

    def level(values: Float64[ndarray, " n"], chosen: Bool[ndarray, " n"], share: float) -> float:
        """The value below which `share` of the chosen tissue's exhale volume lies."""
        order = np.argsort(values[chosen])
        volume = np.cumsum(det_exhale[chosen][order])
        return float(np.interp(share, (volume - 0.5 * det_exhale[chosen][order]) / volume[-1], values[chosen][order]))

    gaps, angles = [], []
    for name in ("right_oblique", "left_oblique", "minor"):
        first, second = (draw(f"{name}_gap_{n}", (0.0, 2 * np.pi)) for n in range(2))
        angles.append((first, second))
        sheet = whole.py_func(first, second, np.abs(material[:, 0]) - 1.0, material[:, 1])  # type: ignore[call-arg]
        gaps.append(float(np.quantile(sheet, draw(f"{name}_incomplete", FISSURE_GAP))))
    oblique_right = level(oblique, right, lower_right / (upper_right + middle + lower_right))
    return Parenchyma(
        density=density,
        texture_cv=draw("texture_cv", ranges.texture_cv),
        lobule_cv=draw("lobule_cv", ranges.lobule_cv),
        oblique_right=oblique_right,
        oblique_left=level(oblique, ~right, lower_left / (upper_left + lower_left)),
        oblique_slope=slope,
        oblique_bend=bend,
        minor=level(minor, right & (oblique >= oblique_right), middle / (upper_right + middle)),
        minor_slope=minor_slope,
        fissure_mm=draw("fissure_mm", (0.3, 0.7)),
        fissure_gap=np.asarray(gaps),
        fissure_phase=np.asarray(angles),
        blobs=np.zeros((0, 8)),
        effusion=np.zeros(2),
    )
