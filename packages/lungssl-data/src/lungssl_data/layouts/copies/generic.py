"""Copies of the layouts that are nobody's collection: `folder`, `manifest`, `bids`."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lungssl_data.layouts.copies.common import mark, phases_of
from lungssl_data.layouts.manifest import COLUMNS, NAME
from lungssl_data.phantom import Phantom, write_phantom
from lungssl_data.readers import write_labels, write_volume
from lungssl_data.volume import LabelMap


def write_folder(root: Path, phantoms: Sequence[Phantom]) -> None:
    """A folder per phantom, named by its preset and seed, with everything that is known of it."""
    for phantom in phantoms:
        write_phantom(phantom, root / _free_name(root, phantom))
    mark(root, "folder")


def write_manifest(root: Path, phantoms: Sequence[Phantom]) -> None:
    """Files in other formats, with other people's codes, under names that say nothing, and the manifest."""
    rows = []
    for place, phantom in enumerate(phantoms):
        patient = f"p{place:02d}"
        for number, (phase, (scan, _)) in enumerate(phases_of(phantom).items()):
            names = {role: f"files/{place}{number}_{role}.nrrd" for role in ("image", "lung", "lobes", "lesion")}
            (root / "files").mkdir(exist_ok=True)
            grid = scan.ct.geometry
            totalsegmentator = np.array([0, 12, 13, 14, 10, 11], np.uint8)[scan.lobes]
            write_volume(root / names["image"], scan.ct)
            write_labels(root / names["lung"], LabelMap(labels=scan.lung, geometry=grid))
            write_labels(root / names["lobes"], LabelMap(labels=totalsegmentator, geometry=grid))
            lesion = np.where(scan.lesion <= 2, scan.lesion, np.uint8(0))
            write_labels(root / names["lesion"], LabelMap(labels=lesion, geometry=grid))
            row = dict.fromkeys(COLUMNS, "") | {"patient_id": patient, "phase": {"exhale": "EE", "inhale": "EI"}[phase]}
            row |= names | {"lobe_codes": "totalsegmentator", "lesion_codes": "medseg", "lung_codes": "lungmask"}
            row |= {"landmarks": f"files/{place}.csv", "site": "phantoms", "licence": "Apache-2.0", "split": "train"}
            rows.append(row)
        with (root / f"files/{place}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([f"{phase}_{axis}_mm" for phase in ("exhale", "inhale") for axis in "xyz"])
            writer.writerows(np.hstack((phantom.landmarks_exhale_mm, phantom.landmarks_inhale_mm)).tolist())
    with (root / NAME).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    mark(root, "manifest")


def write_bids(root: Path, phantoms: Sequence[Phantom]) -> None:
    """`sub-XX/ct/` with masks in derivatives."""
    for place, phantom in enumerate(phantoms, start=1):
        subject = f"sub-{place:02d}"
        labels = root / "derivatives" / "masks" / subject / "ct"
        for folder in (root / subject / "ct", labels):
            folder.mkdir(parents=True, exist_ok=True)
        for phase, (scan, _) in phases_of(phantom).items():
            name = f"{subject}_acq-{'ee' if phase == 'exhale' else 'ei'}"
            grid = scan.ct.geometry
            write_volume(root / subject / "ct" / f"{name}_ct.nii.gz", scan.ct)
            write_labels(labels / f"{name}_desc-lung_dseg.nii.gz", LabelMap(labels=scan.lung, geometry=grid))
            write_labels(labels / f"{name}_desc-lobes_dseg.nii.gz", LabelMap(labels=scan.lobes, geometry=grid))
    mark(root, "bids")


def _free_name(root: Path, phantom: Phantom) -> str:
    config = phantom.parameters["config"]
    assert isinstance(config, dict)
    name = f"{config['preset']}{config['seed']:03d}"
    taken = sum(1 for _ in root.glob(f"{name}*"))
    return f"{name}-{taken + 1}" if taken else name
