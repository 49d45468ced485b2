"""One scan in, one mask out, on the scan's own grid."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from lungssl_data.lung_mask import LungMaskError, lung_mask, plausibility
from lungssl_data.prepare import PrepareConfig, prepare_scan
from lungssl_data.resample import resample_labels
from lungssl_data.volume import LabelMap, Volume
from numpy import ndarray

from lungssl.errors import ConfigError
from lungssl.structures import LUNG_NAMES, in_one_piece


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

    Lobes and lungs are freed of islands (`tidy`), unless `raw`.
    """
    from lungssl_tasks.inference import predict_labels
    from lungssl_tasks.model_folder import WEIGHTS, load_model
    from lungssl_tasks.tidying import tidy

    from lungssl.finetuning import file_sha256

    folder = model_folder(folder)
    model, card = load_model(folder)
    if len(set(card.spacing_mm)) > 1:
        raise ConfigError(f"{folder}: trained at {card.spacing_mm} mm; only isotropic models can be applied to scans")
    scan = prepare_scan(volume, config=PrepareConfig(spacing_mm=card.spacing_mm[0]))
    labels = predict_labels(model, scan.ct_hu, roi_vox=card.roi_vox, device=device)
    if in_one_piece(card.labels) and not raw:
        labels = tidy(labels)
    own_grid: UInt8[ndarray, "z y x"] = resample_labels(
        LabelMap(labels=labels, geometry=scan.geometry()), volume.geometry
    )
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
