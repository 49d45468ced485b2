"""A phantom as files: the layout `folder`, and everything that is known beside it."""

import csv
import json
from pathlib import Path

import numpy as np

from lungssl_data.phantom.pair import Phantom
from lungssl_data.phantom.pathology import CONSOLIDATION
from lungssl_data.phantom.trees import AIRWAY, ARTERY, VEIN
from lungssl_data.volume import LabelMap


def write_phantom(phantom: Phantom, folder: Path) -> None:
    """Write a patient's folder in the layout `folder`: CTs, masks, u as .nrrd, landmarks.csv and phantom.json.

    Per phase: `lung`, `lobes`, `body`, `airways`, `arteries`, `veins`, `lesion` (1 ground glass, 2 consolidation) and
    `pathology` (these, 4 collapse, 5 emphysema); on the exhale grid `recruited`, `derecruited` and `hyperinflated`.
    """
    # SimpleITK and nibabel take a second to import, and making phantoms needs neither.
    from lungssl_data.field import write_field
    from lungssl_data.readers import write_labels, write_volume

    folder.mkdir(parents=True, exist_ok=True)
    for name, phase in (("exhale", phantom.exhale), ("inhale", phantom.inhale)):
        geometry = phase.ct.geometry
        write_volume(folder / f"{name}.nii.gz", phase.ct)
        labels = {"lung": phase.lung, "lobes": phase.lobes, "body": phase.body, "pathology": phase.lesion}
        labels["lesion"] = np.where(phase.lesion <= CONSOLIDATION, phase.lesion, np.uint8(0))
        for tree, code in (("airways", AIRWAY), ("arteries", ARTERY), ("veins", VEIN)):
            labels[tree] = (phase.tree == code).astype(np.uint8)
        for label, image in labels.items():
            write_labels(folder / f"{name}_{label}.nii.gz", LabelMap(labels=image, geometry=geometry))
    grid = phantom.exhale.ct.geometry
    for label in ("recruited", "derecruited", "hyperinflated"):
        write_labels(folder / f"{label}.nii.gz", LabelMap(labels=getattr(phantom.truth, label), geometry=grid))
    write_field(folder / "exhale_to_inhale.nrrd", phantom.exhale_to_inhale_mm, grid)
    with (folder / "landmarks.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f"{phase}_{axis}_mm" for phase in ("exhale", "inhale") for axis in "xyz"])
        for row in np.hstack((phantom.landmarks_exhale_mm, phantom.landmarks_inhale_mm)):
            writer.writerow([f"{value:.6f}" for value in row])
    (folder / "phantom.json").write_text(json.dumps(phantom.parameters, indent=2) + "\n", encoding="utf-8")
