"""Copies of the collections of one inspiratory scan per patient: LUNA16, MosMedData, COVID-19-20."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lungssl_data.layouts.copies.common import any_lesion, mark, numbered, write_mhd, write_ras
from lungssl_data.phantom import Phantom

UID = "1.2.826.0.1.3680043.8.498.1.{}"
"""Below pydicom's own root, which is nobody's scanner."""
TRACHEA = 5


def write_luna16(root: Path, phantoms: Sequence[Phantom]) -> None:
    """`subset0/<uid>.mhd`, and lungs (left 3, right 4) with the airways outside of them (5)."""
    for place, phantom in enumerate(phantoms):
        scan, name = phantom.inhale, f"{UID.format(place + 1)}.mhd"
        lungs = np.array([0, 4, 3], np.uint8)[scan.lung]
        lungs[(scan.tree == 1) & (scan.lung == 0)] = TRACHEA
        write_mhd(root / f"subset{place % 10}" / name, scan.ct.hu, scan.ct.geometry)
        write_mhd(root / "seg-lungs-LUNA16" / name, lungs, scan.ct.geometry)
    mark(root, "luna16")


def write_mosmed(root: Path, phantoms: Sequence[Phantom]) -> None:
    """`studies/CT-1/study_0255.nii.gz` and on; the 50 with masks are of CT-1."""
    for number, phantom in numbered(phantoms, range(255, 305)):
        scan = phantom.inhale
        write_ras(root / f"studies/CT-1/study_{number:04d}.nii.gz", scan.ct.hu, scan.ct.geometry)
        write_ras(root / f"masks/study_{number:04d}_mask.nii.gz", any_lesion(scan), scan.ct.geometry)
    mark(root, "mosmed")


def write_covid_19_20(root: Path, phantoms: Sequence[Phantom]) -> None:
    """`Train/volume-covid19-A-0001_ct.nii.gz` and on."""
    for number, phantom in numbered(phantoms, range(1, 200)):
        scan, name = phantom.inhale, f"Train/volume-covid19-A-{number:04d}"
        write_ras(root / f"{name}_ct.nii.gz", scan.ct.hu, scan.ct.geometry)
        write_ras(root / f"{name}_seg.nii.gz", any_lesion(scan), scan.ct.geometry)
    mark(root, "covid-19-20")
