"""One offline page about an analysed pair: doubts first, then figures, pictures, and how they were made."""

from importlib.resources import files
from pathlib import Path

from jinja2 import Environment
from lungssl_backbones.encoder import Encoder
from lungssl_data.prepare import PrepareConfig, prepare_scan
from lungssl_data.volume import LabelMap
from lungssl_tasks.aeration.breath import OF_NON_AERATED
from lungssl_tasks.aeration.change import TISSUE_HU
from lungssl_tasks.aeration.precision import RECRUITMENT
from markupsafe import Markup
from torch import nn

from lungssl.analyzing import NOT_MEASURABLE, ROLES, Analysed
from lungssl.reports.analysis_figures import compartments_figure, motion_figure, planes_figure
from lungssl.reports.analysis_viewer import analysis_viewer
from lungssl.reports.feature_colours import feature_colours
from lungssl.reports.figures import features_figure, png
from lungssl.reports.matches_figure import matches_figure
from lungssl.training.run_folder import environment

FIGURES = {
    "eelv_ml": ("Gas at exhale (EELV)", "ml", 0),
    "eilv_ml": ("Gas at inhale (EILV)", "ml", 0),
    "tidal_volume_ml": ("Gas that came in", "ml", 0),
    "strain": ("Dynamic strain: gas that came in by EELV", "", 2),
    "exhale_mass_g": ("Lung mass at exhale", "g", 0),
    "net_recruited_percent": ("Net recruitment (non-aerated mass, Gattinoni), of the part's mass", "%", 1),
    "net_recruited_g": ("the same", "g", 0),
    "recruited_g": ("Recruited by place, gross", "g", 0),
    "derecruited_g": ("Derecruited by place, gross", "g", 0),
    "recruited_gas_ml": ("Gas into poorly and non-aerated lung (Malbouisson)", "ml", 0),
    "recruited_gas_tidal_percent": ("the same, of the gas that came in", "%", 0),
    "tidal_hyperinflation_ml": ("Tidal hyperinflation: gain of volume below -900 HU", "ml", 0),
    "tidal_hyperinflation_percent": ("the same, of the gas that came in", "%", 0),
    "hyperinflated_ml": ("Hyperinflated by place, volume at inhale", "ml", 0),
    "unmatched_percent": ("Exhale lung without a place in the inhale lung", "%", 1),
    "ventilation_mean": ("Specific volume change, mean (J - 1)", "", 2),
    "corrected_ventilation_mean": ("Specific gas change, mean (SACJ)", "", 2),
}
"""Title, unit and digits, in the order of the table."""
COLUMNS = ("lungs", "right", "left", "RUL", "RML", "RLL", "LUL", "LLL")


def write_report(found: Analysed, path: Path, *, viewer: bool = True, encoder: nn.Module | None = None) -> None:
    """Write a page that needs no other file; with a `viewer` of linked slices, some megabytes more.

    `encoder`: its features of both phases are shown as colours.
    """
    template = (files("lungssl.reports") / "templates" / "analysis.html").read_text(encoding="utf-8")
    env = environment()
    whole = found.masks == "whole"
    columns = [name for name in COLUMNS if name in found.parts]
    figures = found.figures()
    srd = RECRUITMENT["machine"]
    page = {
        "headline": found.headline(),
        "doubts": [f"{check.name}: {check.doubt}" for check in found.checks if check.doubt],
        "checks": found.checks,
        "columns": columns,
        "rows": [
            (title, unit, [_shown(figures[part].get(name), name, digits, whole=whole) for part in columns])
            for name, (title, unit, digits) in FIGURES.items()
            if name in figures["lungs"]
        ],
        "not_measurable": None if whole else NOT_MEASURABLE,
        "srd": f"{srd.value:g} % (95 % interval {srd.low:g} to {srd.high:g})",
        "viewer": Markup(analysis_viewer(found)) if viewer else "",
        "planes": png(planes_figure(found), dpi=80),
        "motion": png(motion_figure(found), dpi=80),
        "matches": None if found.registered.points_mm is None else png(matches_figure(found), dpi=80),
        "features": None if encoder is None else features_of(found, encoder),
        "compartments": png(compartments_figure(found), dpi=90),
        "voxel_mm": f"{found.scans['exhale'].spacing_mm[0]:g}",
        "tissue_hu": f"{TISSUE_HU:g}",
        "down": found.down,
        "machine": f"lungssl {env['versions'].get('lungssl')}, torch {env['versions'].get('torch')}, commit "
        f"{str(env['commit'])[:8]}, registration preset {found.registered.preset}, {found.seconds:.0f} s on "
        f"{env['cores']} CPU cores or the accelerator asked for",
    }
    path.write_text(Environment(autoescape=True).from_string(template).render(page), encoding="utf-8")


def features_of(found: Analysed, encoder: nn.Module) -> dict[str, str]:
    """Picture and figures of an encoder's features of both phases, on scans of its voxel size."""
    assert isinstance(encoder, Encoder)
    config = PrepareConfig(spacing_mm=encoder.spacing_mm)
    scans = {}
    for phase, role in ROLES.items():
        cubes = found.registered.scans[role]
        lung = LabelMap(labels=cubes.lung, geometry=cubes.geometry())
        scans[phase] = prepare_scan(getattr(found.registered, role), config=config, lung=lung)
    colours = feature_colours(encoder, scans)
    return {
        "picture": png(features_figure({phase: (scans[phase], rgb) for phase, rgb in colours.rgb.items()})),
        "explained": f"{colours.explained:.0%}",
        "stride_mm": f"{colours.stride_mm:g}",
    }


def _shown(value: float | None, name: str, digits: int, *, whole: bool) -> str:
    if value is None:
        return "not measurable" if name in OF_NON_AERATED and not whole else "-"
    return f"{value:.{digits}f}"
