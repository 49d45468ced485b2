"""Weights that others made, or that were made for another crop or another number of channels.

encoder = create_backbone("primus_m", crop_vox=(160, 160, 160))
report = load_pretrained(encoder, import_checkpoint(Path("checkpoint_final.pth")))
"""

import pickle
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lungssl_backbones.names import find_name, without_aliases
from lungssl_backbones.primus import resize_positions
from lungssl_backbones.weights import LoadReport, load_weights, read_tensors

Reshape = Literal["positions", "in_channels"]

_IN_PROJECTIONS = (
    *("patch_embed.weight", "stem.weight", "stem.0.weight", "stem.convs.0.conv.weight"),
    *("down_projection.proj.weight", "swinViT.patch_embed.proj.weight"),
)
"""First weight of each of our encoders: [out, in, z, y, x], or for Vit3d [out, in * z * y * x]."""

_STATES = ("network_weights", "state_dict", "model_state_dict", "model")
"""Where checkpoints keep their weights: nnssl and nnU-Net, Lightning and MONAI, plain PyTorch, DINO and MAE."""


def load_pretrained(
    encoder: nn.Module,
    state_or_path: Mapping[str, Tensor] | Path,
    *,
    min_coverage: float = 0.95,
    allow_reshape: Collection[Reshape] = ("positions", "in_channels"),
    position_grid: tuple[int, int, int] | None = None,
) -> LoadReport:
    """Copy weights into `encoder` as `load_weights` does, adapting what depends on the crop and on the channels.

    "positions": a table of absolute positions is interpolated to the encoder's grid; `position_grid` is the (z, y, x)
    of the weights' grid, needed where it is no cube. "in_channels": the first kernel is summed over its channels and
    shared out equally, so that the same picture in every channel gives the same response as before.
    Rotary and sin-cos positions have no weights: build the encoder with the `spacing_mm` of the crops to come.

    Raises ValueError, with `encoder` unchanged, under `min_coverage` of the encoder's numbers, and as `load_weights`.
    """
    if isinstance(state_or_path, Path):
        (tensors, sha256), source = read_tensors(state_or_path), str(state_or_path)
    else:
        tensors, sha256, source = state_or_path, None, "the given weights"
    state = without_aliases(tensors)
    own = encoder.state_dict()
    reshaped = []
    for name in list(state):
        target = find_name(name, own)
        if target is None or state[name].shape == own[target].shape:
            continue
        adapted = None
        if target in _IN_PROJECTIONS and "in_channels" in allow_reshape:
            adapted = _other_channels(state[name], own[target], encoder.config)
        elif target.endswith("pos_embed") and "positions" in allow_reshape:
            adapted = _other_grid(state[name], own[target], encoder, position_grid)
        if adapted is not None:
            reshaped.append(f"{target}: file {tuple(state[name].shape)}, encoder {tuple(own[target].shape)}")
            state[name] = adapted
    report = load_weights(encoder, state, min_coverage=min_coverage, source=source)
    return replace(report, reshaped=tuple(reshaped), sha256=sha256)


def import_checkpoint(path: Path, *, key: str | None = None) -> dict[str, Tensor]:
    """The weights in a .pth, .pt or .ckpt file of another project, read with `weights_only=True`: no code is run.

    `key` names the entry that holds them, e.g. "teacher"; by default one of `_STATES`, or the file itself.
    Raises ValueError where the file holds more than tensors and plain values, or no weights are found.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects that only code of its own can read, and is not opened ({error}); save its state "
            "dict as .safetensors where it was made"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    if key is not None and key not in content:
        raise ValueError(f"{path} has no entry {key!r}; it has {', '.join(map(str, content))}")
    state: Any = content[key] if key is not None else next((content[k] for k in _STATES if k in content), content)
    tensors = {n: t for n, t in state.items() if isinstance(t, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ValueError(f"{path} has no weights in {key or 'its usual places'}; name one of {', '.join(content)}")
    return tensors


def _other_channels(tensor: Tensor, own: Tensor, config: Any) -> Tensor | None:
    """None where more than the channels differ."""
    if tensor.ndim == 2 and own.ndim == 2:
        patch = (config.patch_vox,) * 3
        voxels = config.patch_vox**3
        if tensor.shape[1] % voxels:
            return None
        cubes = _other_channels(tensor.unflatten(1, (-1, *patch)), own.unflatten(1, (-1, *patch)), config)
        return None if cubes is None else cubes.flatten(1)
    if tensor.shape[0] != own.shape[0] or tensor.shape[2:] != own.shape[2:]:
        return None
    shared = tensor.sum(dim=1, keepdim=True) / own.shape[1]
    return shared.expand_as(own)


def _other_grid(
    tensor: Tensor, own: Tensor, encoder: nn.Module, position_grid: tuple[int, int, int] | None
) -> Tensor | None:
    """None where more than the number of positions differs. Raises ValueError where the weights' grid is unclear."""
    if tensor.ndim != 3 or tensor.shape[2] != own.shape[2]:
        return None
    primus: Any = encoder
    target: tuple[int, int, int] = primus.position_grid
    registers: int = primus.config.registers
    cells = tensor.shape[1] - registers
    side = round(cells ** (1 / 3))
    if position_grid is None and side**3 != cells:
        raise ValueError(
            f"{cells} positions are no cube; say which (z, y, x) grid they were made for, e.g. position_grid=(6, 8, 8)"
        )
    return resize_positions(tensor, position_grid or (side, side, side), target, fixed=registers)
