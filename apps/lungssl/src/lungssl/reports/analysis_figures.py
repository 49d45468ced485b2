"""Pictures of an analysed pair: what moved, what opened, where the air went, and from front to back."""

import numpy as np
from lungssl_tasks.aeration import COMPARTMENTS_HU
from lungssl_tasks.aeration.compartments import MOST_HU
from lungssl_tasks.aeration.parts import SLABS
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy import ndarray

from lungssl.analyzing import EVENTS, Analysed
from lungssl.registering import warp_volume
from lungssl.reports.figures import WINDOW_HU, lung_centre_mm, plane

COMPARTMENT_COLOURS = {"hyper": "#4477aa", "normal": "#66ccee", "poor": "#ccbb44", "non": "#ee6677"}
EVENT_COLOURS = {"recruited": "#228833", "derecruited": "#aa3377", "hyperinflated": "#ee7733"}
"""Paul Tol's `bright` scheme and one of his `vibrant`, told apart with any colour vision."""
DIFFERENCE_HU = 300.0
"""Colours end there: a deep breath takes some 100 to 200 HU off."""
VOLUME_CHANGE = (0.5, 2.0)
ARROWS_MM = 14.0
"""Between arrows: some ten across a lung."""
APEX_SHARE = 0.05
"""Of the lungs' height: what hardly moves in a breath, and is taken as standing still."""
MOST_STRETCH = 1.8
"""Colours end there: along its way the base of a lung grows by a half and more in a deep breath."""
PLANES = ("coronal", "sagittal", "axial")


def planes_figure(found: Analysed) -> Figure:
    """Three planes of the exhale scan: exhale, inhale brought there, difference, compartments, events, volume."""
    scan, alone = found.registered.scans["fixed"], found.scans["exhale"]  # one grid; the second holds the lungs alone
    grid, place = scan.geometry(), lung_centre_mm(scan)
    side = lung_centre_mm(scan, side=1) if (scan.lung == 1).any() else place
    warped = warp_volume(found.registered.moving, found.registered.registration.on_grid(grid), grid).hu
    lung = scan.lung > 0
    compartment = np.zeros(lung.shape, np.uint8)
    for code, (low, high) in enumerate(COMPARTMENTS_HU.values(), start=1):
        compartment[lung & (np.maximum(alone.ct_hu, -1000) >= low) & (alone.ct_hu < high)] = code
    compartment[lung & (alone.ct_hu == MOST_HU)] = code
    change = np.where(lung, found.matched_hu() - alone.ct_hu, np.nan)
    volume = np.where(lung, np.log2(np.clip(found.jacobian(), 1e-3, None)), np.nan)
    events = found.events()
    figure = Figure(figsize=(17.5, 9.2), layout="constrained")
    axes = figure.subplots(3, 6)
    for row, name in zip(axes, PLANES, strict=True):

        def cut(values: ndarray, name: str = name) -> ndarray:
            return plane(values, scan, name, side if name == "sagittal" else place)

        grey = {"cmap": "gray", "vmin": WINDOW_HU[0], "vmax": WINDOW_HU[1], "interpolation": "bilinear"}
        row[0].imshow(cut(scan.ct_hu), **grey)
        row[1].imshow(cut(warped), **grey)
        difference = row[2].imshow(cut(change), cmap="RdBu_r", vmin=-DIFFERENCE_HU, vmax=DIFFERENCE_HU)
        for column, (labels, colours) in enumerate(
            ((compartment, COMPARTMENT_COLOURS), (events, EVENT_COLOURS)), start=3
        ):
            row[column].imshow(cut(scan.ct_hu), **grey)
            row[column].imshow(
                np.ma.masked_equal(cut(labels), 0),
                cmap=ListedColormap(list(colours.values())),
                vmin=1,
                vmax=len(colours),
                interpolation="nearest",
                alpha=0.75,
            )
        ends = np.log2(VOLUME_CHANGE)
        growth = row[5].imshow(cut(volume), cmap="RdBu", vmin=ends[0], vmax=ends[1])
        row[0].set_ylabel(name if name != "sagittal" else "sagittal, right lung", fontsize=10)
        figure.colorbar(difference, ax=row[2], shrink=0.7, label="HU")
        bar = figure.colorbar(growth, ax=row[5], ticks=[-1, 0, 1], shrink=0.7)
        bar.ax.set_yticklabels(["half", "same", "twice"])
        for one in row:
            one.set_xticks([])
            one.set_yticks([])
    titles = ("exhale", "inhale, same tissue", "inhale - exhale", "compartments, exhale", "what became of it", "volume")
    for one, title in zip(axes[0], titles, strict=True):
        one.set_title(title, fontsize=11)
    shown = {**COMPARTMENT_COLOURS, **{EVENTS[code]: EVENT_COLOURS[EVENTS[code]] for code in EVENTS}}
    if found.masks == "aerated":
        shown = {name: colour for name, colour in shown.items() if name not in ("recruited", "derecruited")}
    handles = [Patch(color=colour, label=name) for name, colour in shown.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=10, frameon=False)
    return figure


def motion_figure(found: Analysed) -> Figure:
    """Where points of the exhale lungs go, beside their apices, and how much lung is stretched along its way."""
    scan = found.scans["exhale"]
    lung, spacing = scan.lung > 0, np.asarray(scan.spacing_mm)
    u_mm = found.motion_mm()
    heights = np.flatnonzero(lung.any(axis=(1, 2)))
    top = lung.copy()
    top[: round(float(np.quantile(heights, 1 - APEX_SHARE)))] = False
    u_mm = u_mm - u_mm[:, top].mean(axis=1).reshape(3, 1, 1, 1)
    stretch = np.where(lung, found.stretch(), np.nan)
    place = lung_centre_mm(scan)
    side = lung_centre_mm(scan, side=1) if (scan.lung == 1).any() else place
    figure = Figure(figsize=(17, 4.6), layout="constrained")
    planes = [(shown, *cut) for shown in ("motion", "stretch") for cut in (("coronal", place), ("sagittal", side))]
    for axes, (shown, name, at) in zip(figure.subplots(1, 4), planes, strict=True):
        across, grey = (0 if name == "coronal" else 1), found.registered.scans["fixed"].ct_hu
        axes.set_xticks([])
        axes.set_yticks([])
        window = {"vmin": WINDOW_HU[0], "vmax": WINDOW_HU[1], "interpolation": "bilinear"}
        axes.imshow(plane(grey, scan, name, at), cmap="gray", **window)
        if shown == "stretch":
            drawn = axes.imshow(plane(stretch, scan, name, at), cmap="viridis", vmin=1, vmax=MOST_STRETCH)
            figure.colorbar(drawn, ax=axes, shrink=0.8)
            axes.set_title("largest stretch", fontsize=11)
            continue
        step = max(1, round(ARROWS_MM / spacing[0]))
        seen = plane(lung, scan, name, at)[step // 2 :: step, step // 2 :: step]
        rows, columns = np.nonzero(seen)
        rows, columns = rows * step + step // 2, columns * step + step // 2
        right = plane(u_mm[across], scan, name, at)[rows, columns] / spacing[across]
        up = plane(u_mm[2], scan, name, at)[rows, columns] / spacing[2]
        length = np.linalg.norm([plane(one, scan, name, at)[rows, columns] for one in u_mm], axis=0)
        arrows = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.005, "cmap": "plasma"}
        drawn = axes.quiver(columns, rows, right, -up, length, **arrows)  # rows count from the head
        figure.colorbar(drawn, ax=axes, shrink=0.8, label="mm")
        axes.set_title(f"motion, {name}", fontsize=11)
    return figure


def compartments_figure(found: Analysed) -> Figure:
    """Shares of volume and of mass, exhale above inhale; and the same by mass from top to bottom along gravity. Of
    masks of aerated lung only, shares of their volume alone.
    """
    whole = found.masks == "whole"
    figure = Figure(figsize=(13, 3.6) if whole else (7, 3.2), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.4)) if whole else [figure.subplots()]
    lungs = found.parts["lungs"]
    for one, of in zip(axes[:2], ("volume", "mass") if whole else ("volume",), strict=True):
        for row, held in enumerate((lungs.inhale, lungs.exhale)):
            left = 0.0
            for name, colour in COMPARTMENT_COLOURS.items():
                share = held.volume_percent(name) if of == "volume" else held.mass_percent(name)
                one.barh(row, share, left=left, color=colour, label=name if row else None)
                if share >= 6:
                    one.text(left + share / 2, row, f"{share:.0f}", ha="center", va="center", fontsize=9)
                left += share
        one.set_yticks([0, 1], ["inhale", "exhale"], fontsize=10)
        one.set_xlim(0, 100)
        one.set_title(f"% of {'lung' if whole else 'aerated'} {of}", fontsize=11)
        one.spines[["top", "right", "left"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, fontsize=9, frameon=False)
    if not whole:
        return figure
    slabs = [name for name in (f"gravity_{k:02d}" for k in range(1, SLABS + 1)) if name in found.parts]
    places = [int(name[-2:]) for name in slabs]
    for phase, style in (("exhale", "-"), ("inhale", "--")):
        for name in ("poor", "non"):
            shares = [getattr(found.parts[slab], phase).mass_percent(name) for slab in slabs]
            axes[2].plot(places, shares, style, color=COMPARTMENT_COLOURS[name], label=f"{name}, {phase}", marker=".")
    axes[2].set_xlabel("tenth of the lungs, from the uppermost to the lowest", fontsize=10)
    axes[2].set_ylabel("% of its mass", fontsize=10)
    axes[2].set_title("along gravity", fontsize=11)
    axes[2].spines[["top", "right"]].set_visible(False)
    axes[2].legend(fontsize=8, frameon=False)
    return figure
