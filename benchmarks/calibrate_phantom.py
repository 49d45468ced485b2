"""Volumes and displacements of `deep` phantoms beside those of the ten DIR-Lab COPDgene patients; summary figures only.

    python benchmarks/calibrate_phantom.py --masks copd_masks.zip --landmarks copd_landmarks_mm.npz [--count 10]

The masks are resampled to 1.75 x 1.25 x 1.75 mm; the landmarks are in mm and shifted to each phase's lung box, which
takes part of the motion away. So what is compared is the spread about the mean displacement, which no shift changes,
and the ratio of the lung volumes.
"""

import argparse
import gzip
import json
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
from lungssl_data.phantom import PhantomConfig, make_phantom

CASES = range(1, 11)


def spread_mm(exhale_mm: np.ndarray, inhale_mm: np.ndarray) -> float:
    """Mean length of the displacements less their mean."""
    u = inhale_mm - exhale_mm
    return float(np.linalg.norm(u - u.mean(0), axis=1).mean())


def real(masks: Path, landmarks: Path) -> dict[str, list[float]]:
    """One figure per patient."""
    figures: dict[str, list[float]] = {"exhale_l": [], "inhale_l": [], "volume_ratio": [], "spread_mm": []}
    points = np.load(landmarks)
    with zipfile.ZipFile(masks) as archive:
        for case in CASES:
            litres = {}
            for phase in ("exp", "insp"):
                image = nib.Nifti1Image.from_bytes(
                    gzip.decompress(archive.read(f"case_{case:02d}_{phase}_mask.nii.gz"))
                )
                voxel_l = float(np.prod(image.header.get_zooms()[:3])) * 1e-6
                litres[phase] = float((np.asarray(image.dataobj) > 0).sum()) * voxel_l
            figures["exhale_l"].append(litres["exp"])
            figures["inhale_l"].append(litres["insp"])
            figures["volume_ratio"].append(litres["insp"] / litres["exp"])
            exhale, inhale = (points[f"copd{case}_{phase}_mm"].astype(float) for phase in ("exp", "insp"))
            figures["spread_mm"].append(spread_mm(exhale, inhale))
    return figures


def phantoms(count: int) -> dict[str, list[float]]:
    """One figure per phantom, and the identity TRE, which the real landmarks' shift hides."""
    figures: dict[str, list[float]] = {
        "exhale_l": [], "inhale_l": [], "volume_ratio": [], "spread_mm": [], "identity_tre_mm": [],
    }  # fmt: skip
    for seed in range(count):
        p = make_phantom(PhantomConfig(preset="deep", seed=seed, spacing_mm=6.0))
        exhale_l, inhale_l = (float((x.lung > 0).sum()) * x.ct.geometry.voxel_ml() / 1000 for x in (p.exhale, p.inhale))
        figures["exhale_l"].append(exhale_l)
        figures["inhale_l"].append(inhale_l)
        figures["volume_ratio"].append(inhale_l / exhale_l)
        figures["spread_mm"].append(spread_mm(p.landmarks_exhale_mm, p.landmarks_inhale_mm))
        u = p.landmarks_inhale_mm - p.landmarks_exhale_mm
        figures["identity_tre_mm"].append(float(np.linalg.norm(u, axis=1).mean()))
    return figures


def summary(figures: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {
        name: {"least": round(min(v), 2), "median": round(float(np.median(v)), 2), "most": round(max(v), 2)}
        for name, v in figures.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=Path, required=True)
    parser.add_argument("--landmarks", type=Path, required=True)
    parser.add_argument("--count", type=int, default=10)
    args = parser.parse_args()
    figures = {"patients": summary(real(args.masks, args.landmarks)), "phantoms": summary(phantoms(args.count))}
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
