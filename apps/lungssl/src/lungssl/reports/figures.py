"""Pictures of scans, masks, features and curves as PNG data, ready to put into one offline page.

Scans are shown as radiologists hang them: the patient's right on the picture's left, head up, back down.
"""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from lungssl_data.pair import PhaseScan
from lungssl_tasks.aeration.parts import LOBE_NAMES
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy import ndarray

WINDOW_HU = (-1000, 200)
"""Lung window of level -400, width 1200: parenchyma and soft tissue both visible."""
LOBE_COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677")
"""Paul Tol's `bright` scheme, told apart with any colour vision."""
PHASE_COLOURS = {"exhale": "#4477aa", "inhale": "#ee6677"}
PLANES = ("coronal", "axial")


def png(figure: Figure, *, dpi: int = 110) -> str:
    """The figure as a `data:` URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def plane(volume: ndarray, scan: PhaseScan, name: str, place_mm: Float[ndarray, "3"]) -> ndarray:
    """The slice of an array on the scan's grid through an LPS point, turned for display."""
    index = np.rint((place_mm - scan.origin_mm) / scan.spacing_mm).astype(int)
    x, y, z = np.clip(index, 0, np.asarray(scan.ct_hu.shape[::-1]) - 1)
    if name == "coronal":
        return volume[::-1, y]  # head up; index x grows to the patient's left, the picture's right
    if name == "axial":
        return volume[z]  # front up
    if name == "sagittal":
        return volume[::-1, :, x]
    raise ValueError(f"plane {name!r} is unknown; known are coronal, axial, sagittal")


def lung_centre_mm(scan: PhaseScan, *, side: int | None = None) -> Float[ndarray, "3"]:
    """Mean position of the lungs' voxels (of one side: 1 right, 2 left)."""
    mask = scan.lung > 0 if side is None else scan.lung == side
    index = np.argwhere(mask).mean(0)[::-1]
    return index * np.asarray(scan.spacing_mm) + np.asarray(scan.origin_mm)


def show_scan(
    axes: Axes,
    scan: PhaseScan,
    name: str,
    place_mm: Float[ndarray, "3"],
    *,
    labels: UInt8[ndarray, "z y x"] | None = None,
    colours: Float[ndarray, "z y x 3"] | None = None,
) -> None:
    """Draw one plane of the CT, with labels or feature colours over it; one mm is as long along both axes."""
    dx, dy, dz = scan.spacing_mm
    aspect = {"coronal": dz / dx, "axial": dy / dx, "sagittal": dz / dy}[name]
    low, high = WINDOW_HU
    axes.imshow(
        plane(scan.ct_hu, scan, name, place_mm),
        cmap="gray",
        vmin=low,
        vmax=high,
        aspect=aspect,
        interpolation="bilinear",
    )
    if labels is not None:
        shown = plane(labels, scan, name, place_mm)
        axes.imshow(
            np.ma.masked_equal(shown, 0),
            cmap=ListedColormap(LOBE_COLOURS),
            vmin=1,
            vmax=len(LOBE_COLOURS),
            alpha=0.55,
            aspect=aspect,
            interpolation="nearest",
        )
    if colours is not None:
        lung = plane(scan.lung > 0, scan, name, place_mm)
        rgba = np.concatenate([plane(colours, scan, name, place_mm), lung[..., None].astype(float)], -1)
        axes.imshow(rgba, aspect=aspect, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def pair_figure(scans: Mapping[str, Mapping[str, PhaseScan]]) -> Figure:
    """Both phases of some patients, coronal and axial, with their lobes. `scans[title][phase]`."""
    figure = Figure(figsize=(11, 2.9 * len(scans)), layout="constrained")
    grid = figure.subplots(len(scans), 4, squeeze=False)
    for row, (title, phases) in zip(grid, scans.items(), strict=True):
        for column, (phase, name) in enumerate((p, n) for n in PLANES for p in ("exhale", "inhale")):
            scan = phases[phase]
            show_scan(row[column], scan, name, lung_centre_mm(scan), labels=scan.lobes if name == "coronal" else None)
            row[column].set_title(f"{phase}, {name}", fontsize=9)
        row[0].set_ylabel(title, fontsize=9)
    _lobe_legend(figure)
    return figure


def masks_figure(scan: PhaseScan, masks: Mapping[str, UInt8[ndarray, "z y x"]]) -> Figure:
    """Truth and predictions side by side on one scan: coronal, and sagittal through the right lung."""
    figure = Figure(figsize=(3.1 * len(masks), 5.6), layout="constrained")
    grid = figure.subplots(2, len(masks), squeeze=False)
    for column, (title, mask) in enumerate(masks.items()):
        show_scan(grid[0][column], scan, "coronal", lung_centre_mm(scan), labels=mask)
        show_scan(grid[1][column], scan, "sagittal", lung_centre_mm(scan, side=1), labels=mask)
        grid[0][column].set_title(title, fontsize=10)
    grid[0][0].set_ylabel("coronal", fontsize=9)
    grid[1][0].set_ylabel("sagittal, right lung", fontsize=9)
    _lobe_legend(figure)
    return figure


def features_figure(phases: Mapping[str, tuple[PhaseScan, Float[ndarray, "z y x 3"]]]) -> Figure:
    """The first three principal components of the features as red, green and blue, fitted on both phases together."""
    figure = Figure(figsize=(11, 3.0), layout="constrained")
    row = figure.subplots(1, 2 * len(phases))
    for column, (name, (phase, (scan, colours))) in enumerate((n, item) for n in PLANES for item in phases.items()):
        show_scan(row[column], scan, name, lung_centre_mm(scan), colours=colours)
        row[column].set_title(f"{phase}, {name}", fontsize=9)
    return figure


def curves_figure(
    panels: Sequence[
        tuple[str, str, Mapping[str, tuple[Sequence[float], Sequence[float]]], tuple[float, float] | None]
    ],
) -> Figure:
    """Curves over steps. Each panel: title, y label, name -> (steps, values), and a band to shade or None."""
    figure = Figure(figsize=(3.7 * len(panels), 2.9), layout="constrained")
    for axes, (title, unit, curves, band) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        if band is not None:
            axes.axhspan(*band, color="#228833", alpha=0.12, linewidth=0)
        for (name, (steps, values)), colour in zip(curves.items(), ("#4477aa", "#ee6677", "#228833"), strict=False):
            axes.plot(steps, values, label=name, color=colour, linewidth=1.6)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylabel(unit, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    return figure


def scores_figure(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Per-patient scores of several models: one point a patient, a line where it is the same patient.

    `scores[lobe][model]` lists the patients in one order.
    """
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    axes = figure.subplots()
    models = list(next(iter(scores.values())))
    for place, by_model in enumerate(scores.values()):
        values = np.array([by_model[model] for model in models])
        x = place + np.linspace(-0.18, 0.18, len(models))
        axes.plot(x, values, color="#bbbbbb", linewidth=0.8, zorder=1)
        for column, (model, colour) in enumerate(zip(models, ("#ee6677", "#4477aa", "#228833"), strict=False)):
            label = model if place == 0 else None
            axes.scatter(np.full(values.shape[1], x[column]), values[column], s=16, color=colour, label=label, zorder=2)
    axes.set_xticks(range(len(scores)), list(scores))
    axes.set_ylabel("Dice", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def _lobe_legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=c, label=n) for c, n in zip(LOBE_COLOURS, LOBE_NAMES.values(), strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
