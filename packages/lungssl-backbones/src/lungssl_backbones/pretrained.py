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
from lungssl_backbones.weights import LoadReport, load_weights, read_tensors, require_usable

Reshape = Literal["positions", "in_channels"]

_FLAT_CHANNELS = (1, 2, 3, 4)
"""Channels that are believed of a flattened patch embedding, [out, in * z * y * x], which does not say its patch. With
so few, another patch is never as long: no cubes of two whole sides are to each other as two of these numbers."""

_STATES = ("network_weights", "state_dict", "model_state_dict", "model")
"""Where checkpoints keep their weights: nnssl and nnU-Net, Lightning and MONAI, plain PyTorch, DINO and MAE."""

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
"""How files of torch.save begin, since and before torch 1.6."""


def load_pretrained(
    encoder: nn.Module,
    state_or_path: Mapping[str, Tensor] | Path | str,
    *,
    min_coverage: float = 0.95,
    allow_reshape: Collection[Reshape] = ("positions", "in_channels"),
    position_grid: tuple[int, int, int] | None = None,
    in_channels: int | None = None,
) -> LoadReport:
    """Copy weights into `encoder` as `load_weights` does, adapting what depends on the crop and on the channels.

    "positions": a table of absolute positions is interpolated to the encoder's grid; `position_grid` is the (z, y, x)
    of the weights' grid, needed where it is no cube. "in_channels": the first kernel is summed over its channels and
    shared out equally, so that the same picture in every channel gives the same response as before; `in_channels` is
    the weights' number, needed for a Vit3d's of more than 4. Rotary and sin-cos positions have no weights: build the
    encoder with the `spacing_mm` of the crops to come.

    Raises ValueError, with `encoder` unchanged, under `min_coverage` of the encoder's numbers, where the first kernel
    is missing or made for another patch, and as `load_weights`.
    """
    if isinstance(state_or_path, (Path, str)):
        (tensors, sha256), source = read_tensors(Path(state_or_path)), str(state_or_path)
    else:
        tensors, sha256, source = state_or_path, None, "the given weights"
    state = without_aliases(tensors)
    own = encoder.state_dict()
    projection = in_projection(encoder)
    reshaped = []
    for name in list(state):
        target = find_name(name, own)
        if target is None:
            continue
        reads_crop = projection is not None and target == f"{projection}.weight"
        if reads_crop and in_channels is not None and state[name].ndim == own[target].ndim:
            _require_channels(state[name], encoder.config, in_channels, source)
        if state[name].shape == own[target].shape:
            continue
        adapted = None
        if reads_crop and "in_channels" in allow_reshape:
            require_usable(state[name], own[target], f"{source}: {name}")
            adapted = _other_channels(state[name], own[target], encoder.config, in_channels, source)
        elif target.endswith("pos_embed") and "positions" in allow_reshape:
            require_usable(state[name], own[target], f"{source}: {name}")
            adapted = _other_grid(state[name], own[target], encoder, position_grid)
        if adapted is not None:
            reshaped.append(f"{target}: file {tuple(state[name].shape)}, encoder {tuple(own[target].shape)}")
            state[name] = adapted
    required = [] if projection is None else [name for name in own if name.rpartition(".")[0] == projection]
    report = load_weights(encoder, state, min_coverage=min_coverage, source=source, required=required)
    return replace(report, reshaped=tuple(reshaped), sha256=sha256)


def in_projection(encoder: nn.Module) -> str | None:
    """Name of the layer that reads the crop: the first convolution or Linear, as in all of `BACKBONES`."""
    return next((name for name, layer in encoder.named_modules() if isinstance(layer, (nn.Conv3d, nn.Linear))), None)


def import_checkpoint(path: Path, *, key: str | None = None) -> dict[str, Tensor]:
    """The weights in a .pth, .pt or .ckpt file of another project, read with `weights_only=True`: no code is run.

    `key` names the entry that holds them, e.g. "teacher"; by default one of `_STATES`, or the file itself.
    Raises ValueError where the file is none of torch.save or torn, holds more than tensors and plain values, or no
    named weights are found; OSError where it cannot be opened.
    """
    with path.open("rb") as file:
        start = file.read(len(_ZIP))
    if not start.startswith((_ZIP, _PICKLE)):
        raise ValueError(
            f"{path} begins with {start!r}, not as files of torch.save; download it again if it is a web page or a "
            "Git LFS pointer, and give a .safetensors file to load_pretrained as it is"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects that only code of its own can read, and is not opened ({error}); save its state "
            "dict as .safetensors where it was made"
        ) from error
    # A torn or made-up file fails at any instruction: EOFError, IndexError, KeyError, OSError, RuntimeError and more.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"{path} is not a whole checkpoint of torch.save ({type(error).__name__}: {reason}); copy or export it "
            "again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    entries = ", ".join(map(str, content))
    if key is not None and key not in content:
        raise ValueError(f"{path} has no entry {key!r}; it has {entries}")
    state: Any = content[key] if key is not None else next((content[k] for k in _STATES if k in content), content)
    tensors = {n: t for n, t in state.items() if isinstance(t, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ValueError(f"{path} has no weights in {key or 'its usual places'}; name one of {entries}")
    if unnamed := [name for name in tensors if not isinstance(name, str)]:
        raise ValueError(
            f"{path} calls a tensor {unnamed[0]!r}, expected names such as 'blocks.0.norm1.weight'; save the module's "
            "state_dict() where it was made"
        )
    return tensors


def _other_channels(tensor: Tensor, own: Tensor, config: Any, in_channels: int | None, source: str) -> Tensor | None:
    """None where the layer is another. Raises ValueError where it is made for another patch."""
    if tensor.ndim != own.ndim or tensor.shape[0] != own.shape[0] or not tensor.numel():
        return None
    if tensor.ndim > 2:
        if tensor.shape[2:] != own.shape[2:]:
            raise _other_patch(tensor, own, config, source)
        return _shared_out(tensor, own)
    voxels = config.patch_vox**3
    channels, rest = divmod(tensor.shape[1], voxels)
    if rest or (in_channels is None and channels not in _FLAT_CHANNELS):
        raise _other_patch(tensor, own, config, source)
    return _shared_out(tensor.unflatten(1, (-1, voxels)), own.unflatten(1, (-1, voxels))).flatten(1)


def _shared_out(tensor: Tensor, own: Tensor) -> Tensor:
    return (tensor.sum(dim=1, keepdim=True) / own.shape[1]).expand_as(own)


def _require_channels(tensor: Tensor, config: Any, in_channels: int, source: str) -> None:
    """Raises ValueError where the first kernel has another number of channels, its patch being the encoder's."""
    found = tensor.shape[1] / config.patch_vox**3 if tensor.ndim == 2 else tensor.shape[1]
    if found != in_channels:
        raise ValueError(
            f"{source}: a first kernel of {tuple(tensor.shape)} has {found:g} channels of the encoder's patch, "
            f"expected in_channels={in_channels}; give the weights' own number, and build the encoder with their patch"
        )


def _other_patch(tensor: Tensor, own: Tensor, config: Any, source: str) -> ValueError:
    sides = _sides(tensor)
    ours = (config.patch_vox,) * 3 if own.ndim == 2 else tuple(own.shape[2:])
    option = next((name for name in ("patch_vox", "stem_vox") if hasattr(config, name)), None)
    if option is None:
        remedy = "take an encoder of the weights' architecture"
    elif sides is None or len(set(sides)) > 1:
        remedy = f"build the encoder with their {option}"
    else:
        remedy = f"build the encoder with {option}={sides[0]}"
    if own.ndim == 2:
        remedy += f"; if they have more than {_FLAT_CHANNELS[-1]} channels, say how many with in_channels"
    return ValueError(
        f"{source}: the first kernel, {tuple(tensor.shape)}, is for patches of {sides or 'unknown'} voxels (z, y, x), "
        f"the encoder's, {tuple(own.shape)}, for {ours}; {remedy}"
    )


def _sides(kernel: Tensor) -> tuple[int, ...] | None:
    """Of a kernel; of a flattened one those of a cube with few channels, None where it is no cube."""
    if kernel.ndim > 2:
        return tuple(kernel.shape[2:])
    for channels in _FLAT_CHANNELS:
        side = round((kernel.shape[1] / channels) ** (1 / 3))
        if channels * side**3 == kernel.shape[1]:
            return (side,) * 3
    return None


def _other_grid(
    tensor: Tensor, own: Tensor, encoder: nn.Module, position_grid: tuple[int, int, int] | None
) -> Tensor | None:
    """None where more than the number of positions differs. Raises ValueError where the weights' grid is unclear."""
    if tensor.ndim != 3 or tensor.shape[0] != 1 or tensor.shape[2] != own.shape[2]:
        return None
    primus: Any = encoder
    target: tuple[int, int, int] = primus.position_grid
    registers: int = primus.config.registers
    cells = tensor.shape[1] - registers
    if cells < 1:
        raise ValueError(
            f"a table of {tensor.shape[1]} positions leaves no grid beside the encoder's {registers} registers; build "
            "the encoder with the weights' number of registers"
        )
    side = round(cells ** (1 / 3))
    if position_grid is None and side**3 != cells:
        raise ValueError(
            f"{cells} positions are no cube; say which (z, y, x) grid they were made for, e.g. position_grid=(6, 8, 8)"
        )
    return resize_positions(tensor, position_grid or (side, side, side), target, fixed=registers)
