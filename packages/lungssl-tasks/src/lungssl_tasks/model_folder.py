"""A fine-tuned model as a folder that needs nothing else.

    model.json          what the model is: format, backbone and what comes after it with their configs, spacing,
                        HU window, versions, extra (provenance, free form); to segment: labels, roi
    model.safetensors   all weights

Written whole or not at all: into a folder beside it, flushed to disk, then renamed. No pickle is written or read.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from lungssl_backbones import create_backbone
from lungssl_backbones.encoder import Encoder
from lungssl_data.batch import HU_WINDOW
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lungssl_tasks.cosegmentation.model import CosegmentationModel
from lungssl_tasks.joint.model import JointModel
from lungssl_tasks.registration.network import RegistrationModel
from lungssl_tasks.segmentation import SegmentationModel

FORMAT = "lungssl-segmentation-1"
REGISTRATION_FORMAT = "lungssl-registration-1"
JOINT_FORMAT = "lungssl-joint-1"
COSEGMENTATION_FORMAT = "lungssl-cosegmentation-1"
Model = TypeVar("Model", bound=nn.Module)
_CARD, WEIGHTS = "model.json", "model.safetensors"


class ModelFolderError(ValueError):
    """A folder that is not a model, or not one that this version reads."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a model was made for."""

    backbone: str
    labels: dict[int, str]
    """Label code -> name; 0 is background."""
    spacing_mm: tuple[float, float, float]
    """Voxel size (x, y, z) of the scans it expects."""
    roi_vox: tuple[int, int, int]
    """Sliding window (z, y, x)."""
    versions: dict[str, str]
    """Packages that wrote it."""
    extra: dict[str, Any]
    """Provenance as the writer gave it."""


def save_model(
    folder: Path,
    model: SegmentationModel,
    *,
    labels: Mapping[int, str],
    spacing_mm: tuple[float, float, float],
    roi_vox: tuple[int, int, int],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a model folder; an older model at `folder` is replaced.

    `labels` names the codes 1 to `model.classes`; `extra` must be JSON. Raises ValueError where the labels don't match
    the model, and ModelFolderError where `folder` exists and holds something else than a model.
    """
    _check_labels(labels, model.classes)
    card = {
        "format": FORMAT,
        "backbone": {"name": model.encoder.name, "config": asdict(model.encoder.config)},
        "decoder": asdict(model.config),
        "labels": {str(code): name for code, name in labels.items()},
        "spacing_mm_xyz": list(spacing_mm),
        "roi_vox_zyx": list(roi_vox),
    }
    _write(folder, card, model, extra)


def save_registration(folder: Path, model: RegistrationModel, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write a model folder of a registration network; an older model at `folder` is replaced.

    Raises ModelFolderError where `folder` exists and holds something else than a model.
    """
    card = {
        "format": REGISTRATION_FORMAT,
        "backbone": {"name": model.encoder.name, "config": asdict(model.encoder.config)},
        "network": asdict(model.config),
        "spacing_mm_xyz": [model.encoder.spacing_mm] * 3,
    }
    _write(folder, card, model, extra)


def save_joint(
    folder: Path, model: JointModel, *, labels: Mapping[int, str], extra: Mapping[str, Any] | None = None
) -> None:
    """Write a model folder of a joint model; an older model at `folder` is replaced. Raises as `save_model`."""
    _check_labels(labels, model.classes)
    card = {
        "format": JOINT_FORMAT,
        "backbone": {"name": model.encoder.name, "config": asdict(model.encoder.config)},
        "joint": asdict(model.config),
        "labels": {str(code): name for code, name in labels.items()},
        "spacing_mm_xyz": [model.encoder.spacing_mm] * 3,
    }
    _write(folder, card, model, extra)


def save_cosegmentation(
    folder: Path, model: CosegmentationModel, *, side_vox: int, extra: Mapping[str, Any] | None = None
) -> None:
    """Write a model folder of a co-segmentation network, with the side of its crops; an older model is replaced.

    Raises ModelFolderError where `folder` exists and holds something else than a model.
    """
    card = {
        "format": COSEGMENTATION_FORMAT,
        "backbone": {"name": model.encoder.name, "config": asdict(model.encoder.config)},
        "cosegmentation": asdict(model.config),
        "side_vox": side_vox,
        "spacing_mm_xyz": [model.encoder.spacing_mm] * 3,
    }
    _write(folder, card, model, extra)


def _check_labels(labels: Mapping[int, str], classes: int) -> None:
    if sorted(labels) != list(range(1, classes + 1)):
        raise ValueError(f"labels are {sorted(labels)}, the model's classes are 1 to {classes}; name each once")


def _write(folder: Path, card: dict[str, Any], model: nn.Module, extra: Mapping[str, Any] | None) -> None:
    if folder.exists() and not (folder / _CARD).is_file():
        raise ModelFolderError(f"{folder} exists and is not a model folder; choose another name or remove it")
    card |= {
        "hu_window": list(HU_WINDOW),
        "versions": {name: version(name) for name in ("lungssl-tasks", "lungssl-backbones", "torch")},
        "extra": dict(extra or {}),
    }
    text = json.dumps(card, indent=2)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}, new / WEIGHTS
        )
        (new / _CARD).write_text(text, encoding="utf-8")
        for path in (new / WEIGHTS, new / _CARD, new):
            _fsync(path)
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        new.rename(folder)
        _fsync(folder.parent)


def load_model(folder: Path) -> tuple[SegmentationModel, ModelCard]:
    """The model in eval mode on the CPU, and what it is for.

    Raises ModelFolderError where the folder isn't a model, is of another format, or its weights don't fit.
    """

    def build(encoder: Encoder, card: dict[str, Any]) -> SegmentationModel:
        return SegmentationModel.Config(**card["decoder"]).build(encoder, len(card["labels"]))

    model, card = _read(folder, FORMAT, build)
    return model, ModelCard(
        backbone=card["backbone"]["name"],
        labels={int(code): name for code, name in card["labels"].items()},
        spacing_mm=tuple(card["spacing_mm_xyz"]),
        roi_vox=tuple(card["roi_vox_zyx"]),
        versions=card["versions"],
        extra=card["extra"],
    )


def load_registration(folder: Path) -> RegistrationModel:
    """A registration network in eval mode on the CPU, for voxels of `model.encoder.spacing_mm`.

    Raises ModelFolderError as `load_model` does.
    """

    def build(encoder: Encoder, card: dict[str, Any]) -> RegistrationModel:
        return RegistrationModel.Config(**card["network"]).build(encoder)

    return _read(folder, REGISTRATION_FORMAT, build)[0]


def load_joint(folder: Path) -> tuple[JointModel, dict[int, str]]:
    """A joint model in eval mode on the CPU, for voxels of `model.encoder.spacing_mm`, and its labels' names.

    Raises ModelFolderError as `load_model` does.
    """

    def build(encoder: Encoder, card: dict[str, Any]) -> JointModel:
        values = dict(card["joint"])
        halves = {
            "register": RegistrationModel.Config(**values.pop("register")),
            "segment": SegmentationModel.Config(**values.pop("segment")),
        }
        return JointModel.Config(**halves, **values).build(encoder, len(card["labels"]))

    model, card = _read(folder, JOINT_FORMAT, build)
    return model, {int(code): name for code, name in card["labels"].items()}


def load_cosegmentation(folder: Path) -> tuple[CosegmentationModel, int]:
    """A co-segmentation network in eval mode on the CPU, and the side of its crops in voxels of its encoder.

    Raises ModelFolderError as `load_model` does.
    """

    def build(encoder: Encoder, card: dict[str, Any]) -> CosegmentationModel:
        values = dict(card["cosegmentation"])
        segment = SegmentationModel.Config(**values.pop("segment"))
        values.setdefault("told", False)  # older networks weren't
        return CosegmentationModel.Config(segment=segment, **values).build(encoder)

    model, card = _read(folder, COSEGMENTATION_FORMAT, build)
    return model, int(card["side_vox"])


def load_displacements(folder: Path) -> RegistrationModel | JointModel:
    """Either of the two that give displacements. Raises ModelFolderError as `load_model` does."""
    return load_joint(folder)[0] if model_format(folder) == JOINT_FORMAT else load_registration(folder)


def model_format(folder: Path) -> str | None:
    """What `format` a folder's card names; None where there is no card, or none that says so."""
    try:
        card = json.loads((folder / _CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return card.get("format") if isinstance(card, dict) else None


def _read(
    folder: Path, expected: str, build: Callable[[Encoder, dict[str, Any]], Model]
) -> tuple[Model, dict[str, Any]]:
    for name in (_CARD, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelFolderError(
                f"{folder} is not a model folder: {name} is missing; give the folder that `lungssl finetune` exported"
            )
    try:
        card = json.loads((folder / _CARD).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFolderError(f"{folder / _CARD} is not JSON ({error}); copy the folder again") from error
    found = card.get("format") if isinstance(card, dict) else None
    if found != expected:
        other = found in (FORMAT, REGISTRATION_FORMAT, JOINT_FORMAT, COSEGMENTATION_FORMAT)
        step = "give a model that was fine-tuned for this" if other else "update lungssl"
        raise ModelFolderError(f"{folder / _CARD}: format {found!r}, expected {expected!r}; {step}")
    if tuple(card["hu_window"]) != HU_WINDOW:
        raise ModelFolderError(
            f"{folder}: trained on the HU window {card['hu_window']}, this version scales to {list(HU_WINDOW)}; "
            "use the version that wrote it (`versions` in model.json)"
        )
    try:
        encoder = create_backbone(card["backbone"]["name"], **_tuples(card["backbone"]["config"]))
        assert isinstance(encoder, Encoder)
        model = build(encoder, card)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFolderError(
            f"{folder / _CARD} describes a model that this version cannot build: {error!r}; "
            "use the version that wrote it (`versions` in model.json)"
        ) from error
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        raise ModelFolderError(f"{folder / WEIGHTS} does not fit model.json: {error}; copy the folder again") from error
    model.eval()
    return model, card


def _tuples(config: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where the config has tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
