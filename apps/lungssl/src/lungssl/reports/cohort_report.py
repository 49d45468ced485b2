"""One page about many analysed pairs: a row each, the most unusual first, sortable."""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image

from lungssl.errors import DataError

COLUMNS: dict[str, tuple[str, str, int]] = {
    "eelv_ml": ("EELV", "ml", 0),
    "tidal_volume_ml": ("gas in", "ml", 0),
    "strain": ("strain", "", 2),
    "exhale_mass_g": ("mass", "g", 0),
    "net_recruited_percent": ("recruited", "% of mass", 1),
    "recruited_gas_ml": ("gas into poor and non", "ml", 0),
    "tidal_hyperinflation_ml": ("hyperinflation", "ml", 0),
    "corrected_ventilation_mean": ("gas change", "SACJ", 2),
}
"""Of both lungs: title, unit, digits."""
UNUSUAL = 3.5
"""Robust z from which a figure is marked: 0.6745 (x - median) / median |x - median|, Iglewicz & Hoaglin 1993."""
FEWEST = 5
"""Pairs below which nothing is called unusual: of four, one is always far from the others' middle."""
THUMBNAIL_PX = 560
LARGEST_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One pair."""

    name: str
    cells: Sequence[tuple[str, float | None, bool]]
    """As shown, as a number, and whether it is unusual."""
    doubts: Sequence[str]
    thumbnail: str | None
    unusual: float
    """The largest robust z. Rows with a figure that is unusual come first, then those with most doubts."""


def write_cohort(folder: Path, path: Path) -> int:
    """Read every analysis (`*.json` of `lungssl analyze`) of a folder, write the page; returns their number.

    Names are those of the files: whoever analysed chose them. Raises DataError for a folder without analyses, or a JSON
    file that claims to be one and isn't.
    """
    found = {one.stem: held for one in sorted(folder.glob("*.json")) if (held := _read(one)) is not None}
    if not found:
        raise DataError(
            f"{folder} holds no analysis; make some with `lungssl analyze ... -o {folder.name}/<name>.html`"
        )
    rows = _rows(found, {name: _thumbnail(folder / f"{name}.html") for name in found})
    template = (files("lungssl.reports") / "templates" / "cohort.html").read_text(encoding="utf-8")
    page = {
        "rows": rows,
        "columns": [f"{title} ({unit})" if unit else title for title, unit, _ in COLUMNS.values()],
        "unusual": f"{UNUSUAL:g}",
        "told": len(found) >= FEWEST,
    }
    path.write_text(Environment(autoescape=True).from_string(template).render(page), encoding="utf-8")
    return len(found)


def _read(path: Path) -> dict[str, Any] | None:
    """An analysis; None for other JSON files."""
    if path.stat().st_size > LARGEST_BYTES:
        return None
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        return None
    if not isinstance(held, dict) or not {"headline", "parts", "checks"} <= set(held):
        return None
    try:
        figures = held["parts"]["lungs"]["pair"]
        whole = all(figures.get(name) is None or isinstance(figures[name], int | float) for name in COLUMNS)
        whole = whole and all(isinstance(check["name"], str) for check in held["checks"])
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise DataError(f"{path.name}: a damaged analysis; make it again with `lungssl analyze`")
    return held


def _rows(found: Mapping[str, dict[str, Any]], thumbnails: Mapping[str, str | None]) -> list[Row]:
    figures = {name: held["parts"]["lungs"]["pair"] for name, held in found.items()}
    scores = {column: robust_z([figures[name].get(column) for name in found]) for column in COLUMNS}
    rows = []
    for place, (name, held) in enumerate(found.items()):
        cells = []
        for column, (_, _, digits) in COLUMNS.items():
            value, score = figures[name].get(column), scores[column][place]
            cells.append(("-" if value is None else f"{value:.{digits}f}", value, abs(score) >= UNUSUAL))
        rows.append(
            Row(
                name=name,
                cells=cells,
                doubts=[f"{check['name']}: {check['doubt']}" for check in held["checks"] if check.get("doubt")],
                thumbnail=thumbnails[name],
                unusual=max(abs(scores[column][place]) for column in COLUMNS),
            )
        )
    return sorted(rows, key=lambda row: (row.unusual < UNUSUAL, -len(row.doubts), -row.unusual, row.name))


def robust_z(values: Sequence[float | None]) -> list[float]:
    """By median and median absolute deviation; 0 for what isn't known, and all 0 for fewer than FEWEST or no spread."""
    known = np.array([value for value in values if value is not None], float)
    if len(known) < FEWEST:
        return [0.0] * len(values)
    middle = float(np.median(known))
    spread = float(np.median(np.abs(known - middle)))
    return [0.0 if value is None or not spread else 0.6745 * (value - middle) / spread for value in values]


def _thumbnail(page: Path) -> str | None:
    """The picture of three planes of an analysis' page, small; None where the page isn't there."""
    if not page.is_file() or page.stat().st_size > LARGEST_BYTES:
        return None
    picture = re.search(r'src="data:image/png;base64,([A-Za-z0-9+/=]+)"', page.read_text(encoding="utf-8"))
    if picture is None:
        return None
    image = Image.open(io.BytesIO(base64.b64decode(picture[1])))
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
