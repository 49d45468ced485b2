"""Copies of the registration challenges' sets: Learn2Reg, Lung250M-4B, EMPIRE10."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lungssl_data.layouts import empire10, learn2reg, lung250m
from lungssl_data.layouts.copies.common import (
    either_lung,
    mark,
    mm_to_index,
    numbered,
    phases_of,
    write_mhd,
    write_points,
    write_ras,
)
from lungssl_data.phantom import Phantom

EXPERT_POINTS = 100
LUNG250M_ORDER = (1, 104, 12, 54, 34, 84)
"""One of each source: EMPIRE10, COPDgene, NLST, LungCT, 4D-Lung, Ventilation."""
EMPIRE_ORDER = (1, 13, 2, *(number for number in range(3, 31) if number != 13))
"""Exhale fixed, inhale fixed, not published."""
EMPIRE_STORED_HU = {2: 24}
"""Added to HU in the file."""


def write_learn2reg(root: Path, phantoms: Sequence[Phantom]) -> None:
    """LungCT's pairs 1, 2, ..., and as NLST's pair 1 the first phantom's inhale scan twice."""
    for number, phantom in numbered(phantoms, range(1, 31)):
        part = "Tr" if number <= 20 else "Ts"
        for phase, (scan, points_mm) in phases_of(phantom).items():
            frame = next(frame for frame, which in learn2reg.FRAMES.items() if which == phase)
            name = f"LungCT_{number:04d}_{frame}"
            grid = write_ras(root / f"images{part}/{name}.nii.gz", scan.ct.hu, scan.ct.geometry)
            write_ras(root / f"masks{part}/{name}.nii.gz", either_lung(scan), scan.ct.geometry)
            index = mm_to_index(points_mm, grid)
            write_points(root / f"keypoints{part}/{name}.csv", index, between=",")
            write_points(root / f"landmarks{part}/{name}.csv", index[:EXPERT_POINTS], between=",")
    for frame in learn2reg.FRAMES:
        scan = phantoms[0].inhale
        write_ras(root / f"imagesTr/NLST_0001_{frame}.nii.gz", scan.ct.hu, scan.ct.geometry)
    mark(root, "learn2reg")


def write_lung250m(root: Path, phantoms: Sequence[Phantom]) -> None:
    """A case of each source; the one of COPDgene reads 24 HU too high, the one of NLST has two inhale scans."""
    for case, phantom in numbered(phantoms, LUNG250M_ORDER):
        part = "Ts" if case in lung250m.COPD_CASES else "Tr"
        both = []
        for frame, phase in lung250m.FRAMES.items():
            scan, points_mm = phases_of(phantom)["inhale" if case in lung250m.NLST_CASES else phase]
            high = lung250m.COPD_OFFSET_HU if case in lung250m.COPD_CASES else 0
            name = f"case_{case:03d}_{frame}.nii.gz"
            grid = write_ras(root / f"images{part}/{name}", scan.ct.hu - np.int16(high), scan.ct.geometry)
            write_ras(root / f"masks{part}/{name}", either_lung(scan), scan.ct.geometry)
            both.append(mm_to_index(points_mm, grid))
        if part == "Tr":
            write_points(root / f"corrfieldTr/case_{case:03d}.csv", np.hstack(both), form="%.3f", between=",")
    mark(root, "lung250m")


def write_empire10(root: Path, phantoms: Sequence[Phantom]) -> None:
    """Pairs in either order, one of them stored with an offset."""
    for number, phantom in numbered(phantoms, EMPIRE_ORDER):
        fixed = empire10.FIXED_IS.get(number, "exhale")
        stored = np.int16(EMPIRE_STORED_HU.get(number, 0))
        for phase, (scan, _) in phases_of(phantom).items():
            name = f"{number:02d}_{'Fixed' if phase == fixed else 'Moving'}.mhd"
            write_mhd(root / "scans" / name, scan.ct.hu + stored, scan.ct.geometry)
            write_mhd(root / "lungMasks" / name, either_lung(scan), scan.ct.geometry)
    mark(root, "empire10")
