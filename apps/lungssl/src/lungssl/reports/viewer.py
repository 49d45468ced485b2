"""Linked slices of volumes in a page, drawn by NiiVue when a reader asks for them; no network, no other file.

NiiVue (https://niivue.com, BSD-2-Clause) comes with the package `ipyniivue`, whose notebook widget holds it as one ES
module. The page carries that module compressed, and imports it from memory.
"""

import base64
import gzip
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int16
from jinja2 import Environment
from lungssl_data.readers import nifti
from lungssl_data.volume import Geometry
from numpy import ndarray

STEP_HU = 5
"""Values are rounded to it: a tenth of the noise of a low-dose scan, and a file of half the bytes."""
MOST_BYTES = 9_000_000
"""Of all volumes in a page, compressed; with the viewer, base64 and pictures it stays under 15 MB."""
NOWHERE = -32000
"""Value of voxels that a layer says nothing about: below every colour."""


class ViewerError(RuntimeError):
    """The installed ipyniivue is not as this module knows it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One volume as it is coloured."""

    values: Int16[ndarray, "z y x"]
    """NOWHERE is transparent above another layer."""
    colours: Sequence[str]
    """Of `low` to `high`, evenly, as #rrggbb."""
    low: float
    high: float
    """Limits. Above another layer, values below `low` + 1 % of the range are transparent."""
    opacity: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """A canvas: layers above each other, all on one grid."""

    title: str
    layers: Sequence[Layer]


def viewer(
    panels: Sequence[Panel], grid: Geometry, start_mm: Float[ndarray, "3"], *, most_bytes: int = MOST_BYTES
) -> str:
    """HTML of a button that opens linked canvases at the LPS place `start_mm`. Every layer is on `grid`.

    Volumes that several panels share are held once. Where all of them take more than `most_bytes`, every second voxel
    along each axis is left out, or more, and the page says so.
    """
    unique = list({id(layer.values): layer.values for panel in panels for layer in panel.layers}.values())
    step = 1
    while True:
        held = [_compressed(values, grid, step) for values in unique]
        if sum(map(len, held)) <= most_bytes or max(grid.shape) // step < 16:
            break
        step += 1
    places = {id(values): place for place, values in enumerate(unique)}
    scene = [
        {
            "title": panel.title,
            "layers": [
                {
                    "volume": places[id(layer.values)],
                    "colours": [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in layer.colours],
                    "low": layer.low,
                    "high": layer.high,
                    "opacity": layer.opacity,
                }
                for layer in panel.layers
            ],
        }
        for panel in panels
    ]
    template = (files("lungssl.reports") / "templates" / "viewer.html").read_text(encoding="utf-8")
    code, licence = niivue()
    return (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            code=base64.b64encode(code).decode(),
            licence=licence,
            volumes=[base64.b64encode(volume).decode() for volume in held],
            scene=json.dumps(scene).replace("<", "\\u003c"),
            start_mm=[round(float(mm), 1) for mm in nifti.RAS_TO_LPS @ start_mm],
            voxel_mm=f"{grid.spacing_mm[0] * step:g}",
        )
    )


def _compressed(values: Int16[ndarray, "z y x"], grid: Geometry, step: int) -> bytes:
    """A .nii.gz, of every `step`-th voxel."""
    thinned = np.ascontiguousarray(values[::step, ::step, ::step])
    x, y, z = grid.spacing_mm
    spacing = (x * step, y * step, z * step)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "volume.nii.gz"
        nifti.write(
            path,
            thinned,
            Geometry(shape=thinned.shape, spacing_mm=spacing, origin_mm=grid.origin_mm, direction=grid.direction),
        )
        return path.read_bytes()


@cache
def niivue() -> tuple[bytes, str]:
    """NiiVue as a compressed ES module that sets `globalThis.Niivue`, and its licence.

    Raises ViewerError where the widget of ipyniivue isn't built as it was when this was written (2.4.4).
    """
    widget = (files("ipyniivue") / "static" / "widget.js").read_text(encoding="utf-8")
    made = re.search(r'"Creating new Niivue instance"\);let (\w+)=[^;]*?,\w+=\w+\(\1\);\w+=new (\w+)\(', widget)
    end = widget.rfind("export{")
    texts = [path for path in metadata.files("ipyniivue") or [] if path.name.upper().startswith("LICENSE")]
    if made is None or end < 0 or not texts:
        raise ViewerError(
            f"NiiVue wasn't found in ipyniivue {metadata.version('ipyniivue')}; install ipyniivue 2.4.4, or leave the "
            f"viewer out with --no-viewer"
        )
    module = f"{widget[:end]};globalThis.Niivue={made[2]};"
    return gzip.compress(module.encode(), mtime=0), texts[0].read_text(encoding="utf-8")
