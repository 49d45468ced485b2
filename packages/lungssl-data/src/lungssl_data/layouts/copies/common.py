"""What the writers of copies share."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float64, Shaped, UInt8
from numpy import ndarray

from lungssl_data.layouts.files import PHANTOM_FILE
from lungssl_data.pair import Phase
from lungssl_data.phantom import Phantom, PhantomPhase
from lungssl_data.readers import write_labels, write_volume
from lungssl_data.readers.raw import RawFormat
from lungssl_data.volume import Geometry, LabelMap, Volume

Case = TypeVar("Case")
METAIMAGE_TYPES = {"int16": "MET_SHORT", "uint8": "MET_UCHAR"}


def numbered(phantoms: Sequence[Phantom], cases: Sequence[Case]) -> Iterator[tuple[Case, Phantom]]:
    """Each phantom with the patient of the collection whose place it takes; ValueError for too many."""
    if len(phantoms) > len(cases):
        raise ValueError(f"{len(phantoms)} phantoms for a copy of at most {len(cases)} patients; make fewer")
    return zip(cases, phantoms, strict=False)


def phases_of(phantom: Phantom) -> dict[Phase, tuple[PhantomPhase, Float64[ndarray, "n 3"]]]:
    """Scan and landmarks (LPS mm) of both phases."""
    return {
        "exhale": (phantom.exhale, phantom.landmarks_exhale_mm),
        "inhale": (phantom.inhale, phantom.landmarks_inhale_mm),
    }


def mark(root: Path, layout: str, formats: Mapping[str, Mapping[Phase, RawFormat]] | None = None) -> None:
    """Say beside the copy that it is one, and what its files without headers hold, by case."""
    written = {case: {phase: asdict(form) for phase, form in own.items()} for case, own in (formats or {}).items()}
    text = json.dumps({"layout": layout, "made_of": "phantoms", "formats": written}, indent=1)
    (root / PHANTOM_FILE).write_text(text + "\n", encoding="utf-8")


def mm_to_index(points_mm: Float64[ndarray, "n 3"], grid: Geometry) -> Float64[ndarray, "n 3"]:
    """LPS mm to 0-based voxel indices (x, y, z), unrounded."""
    affine = grid.index_to_mm()
    return (points_mm - affine[:, 3]) @ np.linalg.inv(affine[:, :3]).T


def turned(values: Shaped[ndarray, "z y x"], grid: Geometry) -> tuple[Shaped[ndarray, "z y x"], Geometry]:
    """The same scan stored from left to right and back to front, as NIfTI files in RAS order are."""
    last = np.array([grid.shape[2] - 1, grid.shape[1] - 1, 0.0])
    x, y, z = (float(v) for v in grid.origin_mm + grid.direction @ (last * grid.spacing_mm))
    direction = grid.direction @ np.diag([-1.0, -1.0, 1.0])
    flipped = np.ascontiguousarray(values[:, ::-1, ::-1])
    return flipped, Geometry(shape=grid.shape, spacing_mm=grid.spacing_mm, origin_mm=(x, y, z), direction=direction)


def write_ras(path: Path, values: Shaped[ndarray, "z y x"], grid: Geometry) -> Geometry:
    """Write a CT (int16) or labels (uint8) as NIfTI in RAS order; the grid that the file has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flipped, own = turned(values, grid)
    if values.dtype == np.uint8:
        write_labels(path, LabelMap(labels=flipped, geometry=own))
    else:
        write_volume(path, Volume(hu=flipped, geometry=own))
    return own


def write_mhd(path: Path, values: Shaped[ndarray, "z y x"], grid: Geometry) -> None:
    """Write an .mhd header and its .raw, little endian, uncompressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    z, y, x = values.shape
    matrix = " ".join(f"{v:.17g}" for v in grid.direction.T.ravel())
    lines = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": matrix,
        "Offset": " ".join(f"{v:.17g}" for v in grid.origin_mm),
        "ElementSpacing": " ".join(f"{v:.17g}" for v in grid.spacing_mm),
        "DimSize": f"{x} {y} {z}",
        "ElementType": METAIMAGE_TYPES[values.dtype.name],
        "ElementDataFile": path.with_suffix(".raw").name,
    }
    path.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()), encoding="utf-8")
    path.with_suffix(".raw").write_bytes(values.astype(values.dtype.newbyteorder("<")).tobytes())


def write_points(path: Path, points: Float64[ndarray, "n k"], *, form: str = "%.6f", between: str = " ") -> None:
    """Write rows of numbers as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, points, fmt=form, delimiter=between)


def either_lung(phase: PhantomPhase) -> UInt8[ndarray, "z y x"]:
    """1 in the lungs, as masks that don't tell sides have it."""
    return (phase.lung > 0).astype(np.uint8)


def any_lesion(phase: PhantomPhase) -> UInt8[ndarray, "z y x"]:
    """1 in ground glass and consolidation."""
    return np.isin(phase.lesion, (1, 2)).astype(np.uint8)
