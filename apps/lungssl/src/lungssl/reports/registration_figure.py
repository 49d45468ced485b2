"""A registration to look at: both scans over each other before and after, a checkerboard, volume change, motion."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from lungssl.registering import Registered, warp_volume
from lungssl.reports.figures import lung_centre_mm, plane

WINDOW_HU = (-1000.0, 0.0)
SQUARE_MM = 24.0
"""Of the checkerboard: a dozen across a lung."""
VOLUME_CHANGE = (0.5, 2.0)
"""Colours of the Jacobian end there, at half and twice the volume."""


def write_picture(found: Registered, path: Path) -> None:
    """Write a PNG of 1,800 pixels' width."""
    registration_figure(found).savefig(path, dpi=110, bbox_inches="tight", facecolor="white")


def registration_figure(found: Registered) -> Figure:
    """Coronal and axial planes through the fixed lungs' centre, on the grid that was registered on."""
    scan = found.scans["fixed"]
    grid, place = scan.geometry(), lung_centre_mm(scan)
    u_mm = found.registration.on_grid(grid)
    shift_mm = found.registration.at(place[None])[0]
    # Before: the moving scan where the lung's centre lies on the fixed one's, whatever the files' origins are.
    still = np.broadcast_to(shift_mm.astype(np.float32)[:, None, None, None], u_mm.shape)
    before, after = (warp_volume(found.moving, np.ascontiguousarray(u), grid).hu for u in (still, u_mm))
    jacobian, _ = found.jacobian()
    lung = scan.lung > 0
    motion = np.where(lung, np.linalg.norm(u_mm - shift_mm.reshape(3, 1, 1, 1), axis=0), np.nan)
    volume = np.where(lung, np.log2(np.clip(jacobian, 1e-3, None)), np.nan)
    board = np.where(_squares(scan.ct_hu.shape, scan.spacing_mm[0]), scan.ct_hu, after)
    figure = Figure(figsize=(17, 6.4), layout="constrained")
    for row, name in zip(figure.subplots(2, 5), ("coronal", "axial"), strict=True):

        def cut(values: ndarray, name: str = name) -> ndarray:
            return plane(values, scan, name, place)

        _show(row[0], _both(cut(scan.ct_hu), cut(before)), f"{name}, centres aligned")
        _show(row[1], _both(cut(scan.ct_hu), cut(after)), "after registration")
        _show(row[2], _grey(cut(board)), "fixed and moving in turn")
        ends = np.log2(VOLUME_CHANGE)
        drawn = row[3].imshow(cut(volume), cmap="RdBu", vmin=ends[0], vmax=ends[1])
        bar = figure.colorbar(drawn, ax=row[3], ticks=[-1, 0, 1], shrink=0.8)
        bar.ax.set_yticklabels(["half", "same", "twice"])
        _bare(row[3], "volume at moving by fixed")
        drawn = row[4].imshow(cut(motion), cmap="viridis", vmin=0)
        figure.colorbar(drawn, ax=row[4], shrink=0.8, label="mm")
        _bare(row[4], "motion beside the centre's")
    figure.suptitle(
        "magenta: fixed is brighter, green: moving is; grey where both agree. "
        + ("Nothing speaks against it." if not found.registration.trust.doubts else "NOT TRUSTED, see the summary."),
        fontsize=10,
    )
    return figure


def _squares(shape: tuple[int, ...], spacing_mm: float) -> ndarray:
    side = max(1, round(SQUARE_MM / spacing_mm))
    return sum(np.ix_(*(np.arange(size) // side for size in shape))) % 2 == 0


def _grey(hu: Float[ndarray, "h w"] | ndarray) -> Float[ndarray, "h w 3"]:
    low, high = WINDOW_HU
    return np.repeat(np.clip((hu.astype(float) - low) / (high - low), 0, 1)[..., None], 3, axis=-1)


def _both(fixed_hu: ndarray, moving_hu: ndarray) -> Float[ndarray, "h w 3"]:
    picture = _grey(fixed_hu)
    picture[..., 1] = _grey(moving_hu)[..., 0]
    return picture


def _show(axes: Axes, picture: Float[ndarray, "h w 3"], title: str) -> None:
    axes.imshow(picture, interpolation="bilinear")
    _bare(axes, title)


def _bare(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
