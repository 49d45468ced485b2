"""Ranges that subjects are drawn from, uniformly and independently. Sources: `domain.md` A2, D1-D3."""

from dataclasses import dataclass

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
    """Mean HU of the lungs at exhale, or None where the density profile is given in absolute terms."""
    inhale_hu: Range
    """Accepted mean HU at inhale (it follows from the volumes, since mass is conserved)."""
    gradient: Range
    """Rise of the tissue fraction from front to back at exhale."""
    collapse: Range | None
    """Tissue fraction of dependent collapse at exhale (0.86 and more is non-aerated, -100 HU), or None without any."""
    collapse_depth: Range = (0.25, 0.5)
    """Y at which collapse is half complete."""
    recruitable: Range = (0.0, 0.25)
    """Share of the collapse that gravity and pressure aim to open at inhale."""
    texture_cv: Range
    exhale_l: Range
    """Accepted volume of both lungs at exhale."""
    inhale_l: Range
    exhale_gas_l: Range
    gain_l: Range
    """Accepted difference in volume."""
    displacement_mm: Range
    """Accepted mean displacement of lung tissue."""
    right_share: Range = (0.515, 0.548)
    """Accepted share of the right lung at exhale: near the sum of its lobes' fractions, 0.53."""


PRESETS = {
    "deep": Preset(
        descent_mm=(28.0, 55.0),
        anterior_mm=(8.0, 20.0),
        widening_mm=(4.0, 12.0),
        lift_mm=(3.0, 8.0),
        kappa=(-0.15, 0.15),
        apex_mm=(195.0, 232.0),
        exhale_hu=(-735.0, -665.0),
        inhale_hu=(-852.0, -788.0),
        gradient=(0.04, 0.09),
        collapse=None,
        texture_cv=(0.12, 0.25),
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
        collapse=(0.93, 0.96),
        texture_cv=(0.15, 0.25),
        exhale_l=(1.8, 3.5),
        inhale_l=(2.0, 4.2),
        exhale_gas_l=(0.6, 2.1),
        gain_l=(0.3, 0.6),
        displacement_mm=(3.5, 14.0),
    ),
}
"""`deep`: healthy, from end-expiration to a deep breath-hold. `ards`: ventilated, tidal, with dependent collapse."""
