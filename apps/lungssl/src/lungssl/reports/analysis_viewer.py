"""The interactive viewer of an analysed pair: exhale, the same tissue at inhale, and what changed, linked."""

import numpy as np
from jaxtyping import Int16
from lungssl_data.volume import Geometry
from matplotlib import colormaps
from matplotlib.colors import to_hex
from numpy import ndarray

from lungssl.analyzing import Analysed
from lungssl.registering import warp_volume
from lungssl.reports.analysis_figures import DIFFERENCE_HU, EVENT_COLOURS
from lungssl.reports.figures import WINDOW_HU, lung_centre_mm
from lungssl.reports.viewer import NOWHERE, STEP_HU, Layer, Panel, viewer

AROUND_MM = 15.0
"""Shown around the lungs: chest wall and diaphragm, by which a reader finds the place."""


def analysis_viewer(found: Analysed) -> str:
    """HTML of the viewer, on the grid that was registered on, cut to the exhale lungs."""
    scan = found.registered.scans["fixed"]
    grid = scan.geometry()
    warped = warp_volume(found.registered.moving, found.registered.registration.on_grid(grid), grid).hu
    box, cut = _around(found.scans["exhale"].lung > 0, grid)
    grey = ("#000000", "#ffffff")
    exhale = Layer(values=_rounded(scan.ct_hu[box]), colours=grey, low=WINDOW_HU[0], high=WINDOW_HU[1])
    inhale = Layer(values=_rounded(warped[box]), colours=grey, low=exhale.low, high=exhale.high)
    change = found.matched_hu()[box] - found.scans["exhale"].ct_hu[box]  # NaN beyond the lung
    inside = np.isfinite(change)
    most = 0.98 * DIFFERENCE_HU  # what is off the scale keeps its end's colour
    difference = Layer(
        values=np.where(inside, _rounded(np.clip(np.nan_to_num(change), -most, most)), NOWHERE).astype(np.int16),
        colours=[to_hex(colormaps["RdBu_r"](share)) for share in np.linspace(0, 1, 11)],
        low=-DIFFERENCE_HU,
        high=DIFFERENCE_HU,
        opacity=0.8,
    )
    events = found.events()[box]
    became = Layer(
        values=np.where(events > 0, events, NOWHERE).astype(np.int16),
        colours=list(EVENT_COLOURS.values()),
        low=0.9,
        high=len(EVENT_COLOURS),
        opacity=0.7,
    )
    names = list(EVENT_COLOURS) if found.masks == "whole" else ["hyperinflated"]
    codes = {name: code for code, name in enumerate(EVENT_COLOURS, start=1)}
    return viewer(
        [
            Panel(title=f"Exhale; {', '.join(f'{codes[n]} {n}' for n in names)}", layers=[exhale, became]),
            Panel(title="Inhale, same tissue, HU", layers=[inhale]),
            Panel(title="Inhale - exhale, HU, over exhale", layers=[exhale, difference]),
        ],
        cut,
        lung_centre_mm(scan, side=1 if (scan.lung == 1).any() else None),
    )


def _rounded(hu: ndarray) -> Int16[ndarray, "z y x"]:
    """To STEP_HU, within what the window shows and some more."""
    return (np.rint(np.clip(hu, -1100, 1000) / STEP_HU) * STEP_HU).astype(np.int16)


def _around(lung: ndarray, grid: Geometry) -> tuple[tuple[slice, ...], Geometry]:
    """The box AROUND_MM around a mask, and its grid."""
    margin = round(AROUND_MM / grid.spacing_mm[0])
    spans = []
    for axis in range(3):
        filled = np.flatnonzero(lung.any(axis=tuple(other for other in range(3) if other != axis)))
        spans.append(slice(max(0, int(filled[0]) - margin), min(lung.shape[axis], int(filled[-1]) + margin + 1)))
    box = tuple(spans)
    start = np.array([span.start for span in reversed(box)], float)
    affine = grid.index_to_mm()
    x, y, z = affine[:, :3] @ start + affine[:, 3]
    shape = tuple(span.stop - span.start for span in box)
    return box, Geometry(shape=shape, spacing_mm=grid.spacing_mm, origin_mm=(x, y, z), direction=grid.direction)
