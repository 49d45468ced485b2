"""Ranges that subjects are drawn from, uniformly and independently. Sources: `domain.md` A2, D1-D3."""

from dataclasses import dataclass, field

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One breathing regime. Excursions are differences between exhale and inhale."""

    descent_mm: Range
    """Of the dome's top."""
    anterior_mm: Range
    """Of the sternum."""
    widening_mm: Range
    """Of the transverse diameter."""
    lift_mm: Range
    """Of the front ends of the lowest ribs."""
    kappa: Range
    """Uneven expansion from base to apex; |kappa| <= 0.3 keeps it invertible with room to spare."""
    half_width_mm: Range = (106.0, 124.0)
    half_depth_mm: Range = (72.0, 86.0)
    apex_mm: Range
    dome_mm: Range = (45.0, 65.0)
    exhale_hu: Range | None
    """Mean HU of the parenchyma at exhale, or None where the density profile is given in absolute terms. Trees and
    lesions come on top: vessels raise the mean by some 45 HU at exhale, 25 HU at inhale."""
    inhale_hu: Range
    """Accepted mean HU of the parenchyma at inhale (it follows from the volumes, since mass is conserved)."""
    gradient: Range
    """Rise of the tissue fraction from front to back at exhale."""
    collapse: Range | None
    """Tissue fraction of dependent collapse at exhale (0.86 and more is non-aerated, -100 HU), or None without any."""
    collapse_depth: Range = (0.25, 0.5)
    """Y at which collapse is half complete."""
    recruitable: Range = (0.0, 0.25)
    """Share of the collapse that gravity and pressure aim to open at inhale."""
    texture_cv: Range
    lobule_cv: Range
    exhale_l: Range
    """Accepted volume of both lungs at exhale."""
    inhale_l: Range
    exhale_gas_l: Range
    gain_l: Range
    """Accepted difference in volume."""
    displacement_mm: Range
    """Accepted mean displacement of lung tissue."""
    pathology: dict[str, float] = field(default_factory=dict)
    """Chance of each kind of lesion."""
    right_share: Range = (0.515, 0.548)
    """Accepted share of the right lung at exhale: near the sum of its lobes' fractions, 0.53."""


SICK = {"ground_glass": 0.6, "consolidation": 0.4, "covid": 0.15, "effusion": 0.3}

PRESETS = {
    "deep": Preset(
        descent_mm=(28.0, 55.0),
        anterior_mm=(8.0, 20.0),
        widening_mm=(4.0, 12.0),
        lift_mm=(3.0, 8.0),
        kappa=(-0.15, 0.15),
        apex_mm=(195.0, 232.0),
        exhale_hu=(-770.0, -705.0),
        inhale_hu=(-876.0, -815.0),
        gradient=(0.04, 0.09),
        collapse=None,
        texture_cv=(0.12, 0.25),
        lobule_cv=(0.1, 0.25),
        exhale_l=(1.9, 3.4),
        inhale_l=(3.6, 6.3),
        exhale_gas_l=(1.0, 3.0),
        gain_l=(1.2, 3.5),
        displacement_mm=(14.0, 27.5),
    ),
    "ards": Preset(
        descent_mm=(8.0, 18.0),
        anterior_mm=(1.0, 5.0),
        widening_mm=(0.5, 2.0),
        lift_mm=(0.0, 2.0),
        kappa=(-0.08, 0.08),
        apex_mm=(180.0, 220.0),
        exhale_hu=None,
        inhale_hu=(-750.0, -350.0),
        gradient=(0.08, 0.2),
        collapse=(0.94, 0.965),
        texture_cv=(0.15, 0.25),
        lobule_cv=(0.1, 0.25),
        exhale_l=(1.8, 3.5),
        inhale_l=(2.0, 4.2),
        exhale_gas_l=(0.6, 2.1),
        gain_l=(0.3, 0.6),
        displacement_mm=(3.5, 14.0),
        pathology=SICK,
    ),
    "healthy": Preset(
        descent_mm=(14.0, 30.0),
        anterior_mm=(4.0, 12.0),
        widening_mm=(2.0, 7.0),
        lift_mm=(1.0, 5.0),
        kappa=(-0.12, 0.12),
        apex_mm=(200.0, 238.0),
        exhale_hu=(-800.0, -735.0),
        inhale_hu=(-875.0, -812.0),
        gradient=(0.08, 0.12),
        collapse=None,
        texture_cv=(0.18, 0.25),
        lobule_cv=(0.5, 0.56),
        exhale_l=(2.3, 3.5),
        inhale_l=(3.55, 5.5),
        exhale_gas_l=(1.2, 3.0),
        gain_l=(0.7, 2.0),
        displacement_mm=(7.0, 16.0),
    ),
    "peep": Preset(
        descent_mm=(8.0, 22.0),
        anterior_mm=(2.0, 9.0),
        widening_mm=(1.0, 5.0),
        lift_mm=(0.0, 3.0),
        kappa=(-0.1, 0.1),
        apex_mm=(180.0, 220.0),
        exhale_hu=None,
        inhale_hu=(-800.0, -350.0),
        gradient=(0.08, 0.2),
        collapse=(0.92, 0.96),
        recruitable=(0.0, 0.4),
        texture_cv=(0.15, 0.25),
        lobule_cv=(0.1, 0.25),
        exhale_l=(1.7, 3.3),
        inhale_l=(2.1, 4.3),
        exhale_gas_l=(0.5, 2.0),
        gain_l=(0.4, 1.1),
        displacement_mm=(3.5, 15.0),
        pathology=SICK,
    ),
}
"""Described at `PhantomConfig.preset`. Order: a preset's place seeds its subjects."""
