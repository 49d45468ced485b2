"""One scan in, one mask out, on the scan's own grid."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from lungssl_data.lung_mask import LungMaskError, lung_mask, plausibility
from lungssl_data.prepare import PrepareConfig, prepare_scan
from lungssl_data.resample import resample_labels
from lungssl_data.volume import Geometry, LabelMap, Volume
from numpy import ndarray

from lungssl.errors import ConfigError
from lungssl.structures import LUNG_NAMES, in_one_piece

FAR_MM = 80.0
"""How far beyond the last air lungs are looked for at first. On six scans of three phantoms of ARDS 20 mm, the cache's
margin, lost three quarters of the airless lung, 40 mm a third of it, 60 and 80 mm next to none (docs/log.md)."""


@dataclass(frozen=True, kw_only=True)
class Segmented:
    """A mask on the scan's own grid, and what its labels mean."""

    mask: LabelMap
    names: dict[int, str]
    made_by: Mapping[str, object]
    """Method, and what identifies a model."""

    def volumes_ml(self) -> dict[str, float]:
        """Volume of each structure in millilitres."""
        voxel_ml = self.mask.geometry.voxel_ml()
        return {name: float(np.count_nonzero(self.mask.labels == code) * voxel_ml) for code, name in self.names.items()}


def segment_lungs(volume: Volume) -> Segmented:
    """The training-free mask of the air-filled lungs. Raises LungMaskError where no plausible lung is found."""
    mask = LabelMap(labels=lung_mask(volume), geometry=volume.geometry)
    if problem := plausibility(mask.labels, mask.geometry):
        raise LungMaskError(problem)
    return Segmented(mask=mask, names=LUNG_NAMES, made_by={"method": "lungs by their air, no training"})


def segment_with_model(volume: Volume, folder: Path, *, device: str = "cpu", raw: bool = False) -> Segmented:
    """Labels of a fine-tuned model: the scan is prepared as the cache prepares it, predicted, and brought back.

    Lobes and lungs are freed of islands (`tidy`), unless `raw`. They are looked for twice: in what lies within FAR_MM
    of the lungs that are found by their air, since airless lung may lie far behind these, then, as in training, in what
    lies within the cache's margin of the first answer.
    """
    from lungssl_tasks.inference import predict_labels
    from lungssl_tasks.model_folder import WEIGHTS, load_model
    from lungssl_tasks.tidying import tidy

    from lungssl.finetuning import file_sha256

    folder = model_folder(folder)
    model, card = load_model(folder)
    if len(set(card.spacing_mm)) > 1:
        raise ConfigError(f"{folder}: trained at {card.spacing_mm} mm; only isotropic models can be applied to scans")
    config, air = PrepareConfig(spacing_mm=card.spacing_mm[0]), segment_lungs(volume).mask

    def look(margin_mm: float, around: LabelMap | None) -> tuple[UInt8[ndarray, "z y x"], Geometry]:
        scan = prepare_scan(volume, config=replace(config, margin_mm=margin_mm), lung=air, around=around)
        return predict_labels(model, scan.ct_hu, roi_vox=card.roi_vox, device=device), scan.geometry()

    whole, around = in_one_piece(card.labels), None
    if whole:
        labels, grid = look(FAR_MM, None)
        around = LabelMap(labels=np.minimum(tidy(labels), 1), geometry=grid)
    labels, grid = look(config.margin_mm, around)
    if whole and not raw:
        labels = tidy(labels)
    own_grid: UInt8[ndarray, "z y x"] = resample_labels(LabelMap(labels=labels, geometry=grid), volume.geometry)
    made_by = {
        "method": "fine-tuned model",
        "backbone": card.backbone,
        "voxel_mm": card.spacing_mm[0],
        "weights_sha256": file_sha256(folder / WEIGHTS),
        "versions": card.versions,
    }
    return Segmented(mask=LabelMap(labels=own_grid, geometry=volume.geometry), names=card.labels, made_by=made_by)


def model_folder(path: Path) -> Path:
    """The model inside a fine-tuning run's folder, or the folder itself."""
    return path / "export" / "model" if (path / "export" / "model").is_dir() else path


def describe(segmented: Segmented) -> str:
    """One line per structure with its volume."""
    return "\n".join(f"{name:>12}: {volume:8.1f} ml" for name, volume in segmented.volumes_ml().items())


def write_report(segmented: Segmented, path: Path, *, seconds: float) -> None:
    """What was found, and by what, as JSON: no file name, nothing of the patient."""
    from lungssl.training.run_folder import environment

    env = environment()
    held = {
        "research_use_only": True,
        "volumes_ml": {name: round(ml, 3) for name, ml in segmented.volumes_ml().items()},
        "labels": {code: name for code, name in segmented.names.items()},
        "grid": {"shape_zyx": segmented.mask.labels.shape, "spacing_mm": segmented.mask.geometry.spacing_mm},
        "made_by": dict(segmented.made_by),
        "versions": env["versions"],
        "commit": env["commit"],
        "seconds": round(seconds, 1),
    }
    path.write_text(json.dumps(held, indent=1), encoding="utf-8")
