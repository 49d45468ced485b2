"""Lists of points as files, (x, y, z) in LPS mm.

| suffix | what is in it |
|---|---|
| .csv | a header that names x, y and z (`x_mm,y_mm,z_mm`, or any three columns that end so), or three numbers a line |
| .txt | three numbers a line |
| .pts | elastix: `point` (mm) or `index` (voxels of a grid), how many, then three numbers a line |

Values are LPS, as ITK and elastix have them; tables in RAS or in voxels must be turned into LPS mm first.
"""

import csv
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray

from lungssl_data.readers.checks import replacing
from lungssl_data.volume import Geometry

LARGEST_BYTES = 64 << 20
"""A million points take 40 MB."""
SUFFIXES = (".csv", ".txt", ".pts")


def read_points(path: Path, grid: Geometry | None = None, *, of: str | None = None) -> Float64[ndarray, "n 3"]:
    """Points in LPS mm; `grid` is what indices of a .pts file count in. `of`: which of several triples of a .csv, e.g.
    `exhale` for `exhale_x_mm,exhale_y_mm,exhale_z_mm,inhale_x_mm,...`.

    Raises ValueError with the line for anything that isn't a list of points.
    """
    _check_suffix(path)
    if path.stat().st_size > LARGEST_BYTES:
        raise ValueError(f"{path.name}: {path.stat().st_size} bytes are no list of points")
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
    first, kind = 0, "point"
    columns = (0, 1, 2)
    if path.suffix.lower() == ".pts":
        kind, first = [*lines, ""][0].lower(), 2
        if kind not in ("point", "index") or len(lines) < 2 or not lines[1].isdigit():
            raise ValueError(f"{path.name}: an elastix list begins with `point` or `index` and the number of points")
    elif path.suffix.lower() == ".csv" and lines and not _numbers(lines[0], path.name, 1, quiet=True):
        columns, first = _columns(lines[0], path.name, of), 1
    rows = [_numbers(line, path.name, number) for number, line in enumerate(lines[first:], start=first + 1) if line]
    named = path.suffix.lower() == ".csv" and first == 1  # else which three of more numbers would be a guess
    wrong = next((row for row in rows if (len(row) <= max(columns) if named else len(row) != 3)), None)
    if not rows or wrong is not None:
        raise ValueError(f"{path.name}: expected three numbers a line, got {wrong or 'none'}")
    points = np.array([[row[column] for column in columns] for row in rows])
    if path.suffix.lower() == ".pts" and len(points) != int(lines[1]):
        raise ValueError(f"{path.name}: says {lines[1]} points and has {len(points)}; copy it again")
    if kind == "point":
        return points
    if grid is None:
        raise ValueError(f"{path.name}: holds voxel indices; name the image that they count in (--fixed)")
    affine = grid.index_to_mm()
    return points @ affine[:, :3].T + affine[:, 3]


def write_points(path: Path, points_mm: Float[ndarray, "n 3"]) -> None:
    """Write points in LPS mm, to a thousandth of a micrometre. Raises ValueError for an unknown suffix."""
    _check_suffix(path)
    head = {".csv": "x_mm,y_mm,z_mm\n", ".txt": "", ".pts": f"point\n{len(points_mm)}\n"}[path.suffix.lower()]
    between = "," if path.suffix.lower() == ".csv" else " "
    text = head + "".join(between.join(f"{value:.6f}" for value in point) + "\n" for point in points_mm)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _columns(header: str, name: str, of: str | None) -> tuple[int, int, int]:
    named = [title.strip().lower().removesuffix("_mm") for title in next(csv.reader([header]))]
    found = [[at for at, title in enumerate(named) if title == axis or title.endswith(f"_{axis}")] for axis in "xyz"]
    if of is not None and all(len(at) > 1 for at in found):
        found = [[named.index(f"{of}_{axis}")] if f"{of}_{axis}" in named else [] for axis in "xyz"]
    if any(len(at) != 1 for at in found):
        raise ValueError(f"{name}: its header names {', '.join(named)}; expected one column each for x_mm, y_mm, z_mm")
    x, y, z = (at[0] for at in found)
    return x, y, z


def _numbers(line: str, name: str, number: int, *, quiet: bool = False) -> list[float]:
    try:
        values = [float(part) for part in line.replace(",", " ").replace(";", " ").split()]
    except ValueError:
        values = []
    if not values or not np.isfinite(values).all():
        if quiet:
            return []
        raise ValueError(f"{name}, line {number}: expected numbers")
    return values


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path.name}: points are read and written as {', '.join(SUFFIXES)}")
