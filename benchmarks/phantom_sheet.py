"""Contact sheet of twelve phantoms, coronal and axial middle slices in the lung window, beside real scans if given.

    python benchmarks/phantom_sheet.py --out docs/guide/phantoms.png [--spacing-mm 3] [--scans scan.nii.gz ...]

Of each phantom: exhale at the left, inhale at the right. Scans given come last, in any format that
`lungssl_data.readers` knows.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from lungssl_data.phantom import PhantomConfig, make_phantom
from lungssl_data.readers import read_volume
from lungssl_data.volume import Geometry

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOW_HU, HIGH_HU = -1050.0, 200.0
SHEET = [
    PhantomConfig(preset="healthy", seed=0),
    PhantomConfig(preset="healthy", seed=1, pathology=("emphysema",)),
    PhantomConfig(preset="healthy", seed=2, motion="ffd"),
    PhantomConfig(preset="deep", seed=0),
    PhantomConfig(preset="deep", seed=1),
    PhantomConfig(preset="deep", seed=2, artefacts=("streaks", "cropped_fov")),
    PhantomConfig(preset="ards", seed=0),
    PhantomConfig(preset="ards", seed=1, pathology=("covid",)),
    PhantomConfig(preset="ards", seed=3),
    PhantomConfig(preset="ards", seed=4, pathology=("consolidation", "effusion")),
    PhantomConfig(preset="peep", seed=0),
    PhantomConfig(preset="peep", seed=1),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/guide/phantoms.png"))
    parser.add_argument("--spacing-mm", type=float, default=3.0)
    parser.add_argument("--scans", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    columns = []
    for config in SHEET:
        phantom = make_phantom(PhantomConfig(**{**config.__dict__, "spacing_mm": args.spacing_mm}))
        extra = ", ".join((*(config.pathology or ()), *config.artefacts, *(["ffd"] if config.motion == "ffd" else [])))
        title = f"{config.preset} {config.seed}" + (f"\n{extra}" if extra else "\n")
        panels = []
        for phase in (phantom.exhale, phantom.inhale):
            geometry = phase.ct.geometry
            centre = np.argwhere(phase.lung > 0).mean(0).astype(int)
            panels += _slices(phase.ct.hu, geometry, int(centre[0]), int(centre[1]))
        columns.append((title, panels))
    for path in args.scans:
        volume = read_volume(path)
        z, y, _ = (n // 2 for n in volume.hu.shape)
        columns.append((f"real: {path.parent.name[:18]}\n", _slices(volume.hu, volume.geometry, z, y)))
    blocks = 3
    across = -(-len(columns) // blocks)
    figure, axes = plt.subplots(2 * blocks, 2 * across, figsize=(3.2 * across, 10.2), facecolor="black")
    for axis in axes.ravel():
        axis.axis("off")
    for number, (title, panels) in enumerate(columns):
        row, column = 2 * (number // across), 2 * (number % across)
        axes[row, column].set_title(title, color="white", fontsize=8, loc="left")
        for place, (image, aspect) in enumerate(panels):
            axis = axes[row + place % 2, column + place // 2]
            axis.imshow(image, cmap="gray", vmin=LOW_HU, vmax=HIGH_HU, aspect=aspect)
    figure.subplots_adjust(left=0.003, right=0.997, top=0.95, bottom=0.005, wspace=0.03, hspace=0.14)
    figure.savefig(args.out, dpi=100, facecolor="black", pil_kwargs={"optimize": True})
    print(f"{args.out}: {len(SHEET)} phantoms, {len(args.scans)} scans")


def _slices(hu: np.ndarray, geometry: Geometry, z: int, y: int) -> list[tuple[np.ndarray, float]]:
    """Coronal with the head up, axial with the front up; the patient's right is on the left in both."""
    dx, dy, dz = geometry.spacing_mm
    coronal, axial = hu[:, y], hu[z]
    ahead = np.diag(geometry.direction) > 0
    coronal = coronal[:: -1 if ahead[2] else 1, :: 1 if ahead[0] else -1]
    axial = axial[:: 1 if ahead[1] else -1, :: 1 if ahead[0] else -1]
    return [(_cut(coronal), dz / dx), (_cut(axial), dy / dx)]


def _cut(image: np.ndarray) -> np.ndarray:
    """Without the air around the body."""
    rows, columns = (np.flatnonzero((image > -600).sum(axis) > 3) for axis in (1, 0))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


if __name__ == "__main__":
    main()
