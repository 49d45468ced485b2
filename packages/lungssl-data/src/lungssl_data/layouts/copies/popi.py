"""Copies of POPI's two sets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lungssl_data.layouts.copies.common import mark, numbered, phases_of, write_mhd, write_points
from lungssl_data.layouts.copies.dicom import write_series
from lungssl_data.layouts.popi import DICOM_SHIFT_MM, EXHALE, ORIGINAL, ORIGINAL_POINTS
from lungssl_data.phantom import Phantom, PhantomPhase

ORDER = ("original", "bl", "dx", "ng", "gt", "mm2", "bh")
AS_DICOM = "dx"
"""Has no `mhd/`, so that its points are shifted."""
SIX_POINTS = 100


def write(root: Path, phantoms: Sequence[Phantom]) -> None:
    """The original model, then the six patients."""
    for name, phantom in numbered(phantoms, ORDER):
        if name == "original":
            _write_original(root, phantom)
        else:
            _write_patient(root / name, name, phantom)
    mark(root, "popi")


def _write_original(root: Path, phantom: Phantom) -> None:
    percents = {phase: percent for percent, phase in ORIGINAL.items()}
    for phase, (scan, points_mm) in phases_of(phantom).items():
        percent, grid = percents[phase], scan.ct.geometry
        write_mhd(root / f"{percent}-P.mhd", scan.ct.hu, grid)
        write_mhd(root / f"{percent}-air-lungs-body.mhd", _regions(scan), grid)
        from_first = points_mm[: ORIGINAL_POINTS - 1] - grid.origin_mm
        write_points(root / f"{percent}-Landmarks.pts", np.vstack([from_first, np.zeros((1, 3))]))
    _write_field(root / "VF16.vf", phantom)


def _write_patient(folder: Path, name: str, phantom: Phantom) -> None:
    for phase, (scan, points_mm) in phases_of(phantom).items():
        percent = EXHALE.get(name, "50") if phase == "exhale" else "10" if name == "bl" else "00"
        shift_mm = 0.0
        if name == AS_DICOM:
            shift_mm = DICOM_SHIFT_MM[name]
            write_series(folder / "dcm" / percent, scan.ct, patient=f"popi-{name}", study="1", series=percent)
        else:
            write_mhd(folder / "mhd" / f"{percent}.mhd", scan.ct.hu, scan.ct.geometry)
        write_points(folder / "pts" / f"{percent}.pts", points_mm[:SIX_POINTS] - [0.0, shift_mm, 0.0])


def _regions(scan: PhantomPhase) -> np.ndarray:
    """Air 1, lungs 0, body 2."""
    return np.where(scan.lung > 0, 0, np.where(scan.body > 0, 2, 1)).astype(np.uint8)


def _write_field(path: Path, phantom: Phantom) -> None:
    """Two lines of text, then all x, all y and all z components, in voxels; from inhale to exhale."""
    z, y, x = phantom.inhale.ct.geometry.shape
    sx, sy, sz = phantom.inhale.ct.geometry.spacing_mm
    voxels = phantom.inhale_to_exhale_mm / np.array([sx, sy, sz], np.float32)[:, None, None, None]
    head = f"vectorfieldMagic\n{x} {y} {z} {sx:g} {sy:g} {sz:g}\n"
    path.write_bytes(head.encode() + voxels.astype("<f4").tobytes())
