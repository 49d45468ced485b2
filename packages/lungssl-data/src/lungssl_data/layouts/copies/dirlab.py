"""Copies of DIR-Lab's collections: raw int16 little endian, HU + 1024, head first; points rounded to 1-based voxels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int16
from numpy import ndarray

from lungssl_data.layouts.copies.common import mark, mm_to_index, numbered, phases_of, write_points
from lungssl_data.layouts.dirlab_4dct import OFFSET_HU
from lungssl_data.pair import Phase
from lungssl_data.phantom import Phantom
from lungssl_data.readers.raw import RawFormat
from lungssl_data.volume import Geometry, Volume

ORDER_4DCT = (1, 6, 8, 2, 3, 4, 5, 7, 9, 10)
"""Patients with the collection's odd names first."""
PADDING = -2000
SAMPLED = 75


def write_4dct(root: Path, phantoms: Sequence[Phantom]) -> None:
    """`Case1Pack/Images/case1_T00_s.img`, and the names of the later cases."""
    formats = {}
    for case, phantom in numbered(phantoms, ORDER_4DCT):
        folder = root / {8: "Case8Deploy/Case8Deploy"}.get(case, f"Case{case}Pack")
        suffix = {1: "_s", 2: "-ssm"}.get(case, "_s" if case < 6 else "")
        text = f"ExtremePhases/Case{case}_300" if case < 6 else f"extremePhases/case{case}_dirLab300"
        own: dict[Phase, RawFormat] = {}
        for phase, (scan, points_mm) in phases_of(phantom).items():
            percent = "00" if phase == "inhale" else "50"
            voxels = _voxels(points_mm, scan.ct.geometry)
            own[phase] = _write_image(folder / f"Images/case{case}_T{percent}{suffix}.img", scan.ct, scan.ct.hu)
            write_points(folder / f"{text}_T{percent}_xyz.txt", voxels, form="%d", between="\t")
            write_points(
                folder / f"Sampled4D/case{case}_4D-75_T{percent}.txt", voxels[:SAMPLED], form="%d", between="\t"
            )
        formats[str(case)] = own
    mark(root, "dirlab-4dct", formats)


def write_copd(root: Path, phantoms: Sequence[Phantom]) -> None:
    """`copd1/copd1_iBHCT.img`, nothing but padding outside the field of view."""
    formats = {}
    for case, phantom in numbered(phantoms, range(1, 11)):
        folder = root / f"copd{case}" / (f"copd{case}" if case == 1 else "")
        own: dict[Phase, RawFormat] = {}
        for phase, (scan, points_mm) in phases_of(phantom).items():
            letter = phase[0]
            hu = np.where(field_of_view(scan.ct.geometry), scan.ct.hu, np.int16(PADDING + OFFSET_HU))
            own[phase] = _write_image(folder / f"copd{case}_{letter}BHCT.img", scan.ct, hu)
            voxels = _voxels(points_mm, scan.ct.geometry)
            write_points(folder / f"copd{case}_300_{letter}BH_xyz_r1.txt", voxels, form="%d", between="\t")
        formats[str(case)] = own
    mark(root, "dirlab-copd", formats)


def field_of_view(grid: Geometry) -> ndarray:
    """The ellipse that touches a slice's borders, for every slice."""
    z, y, x = grid.shape
    rows, columns = np.indices((y, x))
    inside = ((rows - (y - 1) / 2) / (y / 2)) ** 2 + ((columns - (x - 1) / 2) / (x / 2)) ** 2 <= 1
    return np.broadcast_to(inside, (z, y, x))


def _write_image(path: Path, volume: Volume, hu: Int16[ndarray, "z y x"]) -> RawFormat:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((hu[::-1] - np.int16(OFFSET_HU)).astype("<i2").tobytes())
    grid = volume.geometry
    return RawFormat(shape=grid.shape, spacing_mm=grid.spacing_mm, origin_mm=grid.origin_mm, flip_z=True)


def _voxels(points_mm: Float64[ndarray, "n 3"], grid: Geometry) -> Float64[ndarray, "n 3"]:
    index = np.rint(mm_to_index(points_mm, grid))
    index[:, 2] = grid.shape[0] - 1 - index[:, 2]
    return index + 1
