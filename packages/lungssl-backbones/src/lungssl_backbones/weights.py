"""Encoder weight files: safetensors only, never pickle.

tensors                 the encoder's state dict
metadata                strings, as safetensors has them:
  format                "lungssl-encoder"
  format_version        "1"
  backbone              name in `BACKBONES`
  config                JSON of all the Config's fields
  extra                 JSON object of strings: provenance, whatever the writer says
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lungssl_backbones import BACKBONES, create_backbone
from lungssl_backbones.encoder import Encoder
from lungssl_backbones.names import find_name

FORMAT = "lungssl-encoder"
FORMAT_VERSION = "1"


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What came of loading weights into an encoder. Names are the encoder's own, but for `unexpected`."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    """In the encoder, not in the file; left as they were."""
    unexpected: tuple[str, ...]
    """In the file, not in the encoder."""
    mismatched: tuple[str, ...]
    """Of another shape in the file, as "name: file (..), encoder (..)"; left as they were."""
    coverage: float
    """Share of the encoder's numbers that were loaded; integers (tables of indices) do not count."""
    sha256: str | None
    """Of the file; None for weights given as tensors."""
    reshaped: tuple[str, ...] = ()
    """Adapted to the encoder's shape before loading, written as in `mismatched` (`pretrained.load_pretrained`)."""


def save_encoder(encoder: nn.Module, path: Path, *, extra: Mapping[str, str] | None = None) -> None:
    """Write a registered encoder to one .safetensors file, atomically.

    Raises ValueError for another suffix, or a module that is not an encoder of `BACKBONES`.
    """
    _require_safetensors(path)
    if not isinstance(encoder, Encoder) or encoder.name not in BACKBONES:
        raise ValueError(
            f"{type(encoder).__name__} is not an encoder of lungssl_backbones.BACKBONES; unwrap the encoder, "
            "or add its class there"
        )
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "backbone": encoder.name,
        "config": json.dumps(asdict(encoder.config)),
        "extra": json.dumps(dict(extra or {})),
    }
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(save(state, metadata))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_metadata(path: Path) -> dict[str, Any]:
    """The `backbone`, `config` (a dict) and `extra` (a dict) of a file of `save_encoder`.

    Raises ValueError for a file of another format or version, FileNotFoundError where there is none.
    """
    metadata = _metadata(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by save_encoder; build the encoder with create_backbone and use load_weights"
        )
    if metadata["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path}: encoder format {metadata['format_version']}, this lungssl-backbones reads {FORMAT_VERSION}; "
            "install the lungssl-backbones that wrote it"
        )
    return {
        "backbone": metadata["backbone"],
        "config": json.loads(metadata["config"]),
        "extra": json.loads(metadata["extra"]),
    }


def load_encoder(path: Path) -> nn.Module:
    """Rebuild an encoder with its weights from a file of `save_encoder`, on the CPU, in training mode.

    Raises ValueError as `read_metadata` does, and where `BACKBONES` has no such name.
    """
    metadata = read_metadata(path)
    # JSON has no tuples; every sequence in a Config is one.
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in metadata["config"].items()}
    encoder = create_backbone(metadata["backbone"], **values)
    state = _tensors(path)
    encoder.to(next(t.dtype for t in state.values() if t.is_floating_point())).load_state_dict(state)
    return encoder


def load_weights(
    encoder: nn.Module,
    state_or_path: Mapping[str, Tensor] | Path | str,
    *,
    min_coverage: float = 0.95,
    source: str = "the given weights",
    required: Collection[str] = (),
) -> LoadReport:
    """Copy weights of the same name and shape into `encoder`, whatever wrote them, and say what was left out.

    Names that the encoder does not have are tried without their leading `names.PREFIXES`. `source` is what errors call
    weights that come without a path. Raises ValueError, with `encoder` unchanged, where fewer than `min_coverage` of
    its numbers or not all of its `required` tensors would be loaded, two tensors claim one name, or one holds what no
    weight is: NaN, infinities, integers, complex numbers.
    """
    if isinstance(state_or_path, (Path, str)):
        (state, sha256), source = read_tensors(Path(state_or_path)), str(state_or_path)
    else:
        state, sha256 = state_or_path, None
    own = encoder.state_dict()
    origin: dict[str, str] = {}
    unexpected = []
    for name in state:
        target = find_name(name, own)
        if target is None:
            unexpected.append(name)
        elif target in origin:
            raise ValueError(
                f"{source}: both {origin[target]!r} and {name!r} are {target!r} of the encoder; "
                "pass only the one you mean, e.g. the teacher's"
            )
        else:
            origin[target] = name
    fits = {
        name: state[origin[name]] for name in own if name in origin and state[origin[name]].shape == own[name].shape
    }
    report = LoadReport(
        loaded=tuple(fits),
        missing=tuple(name for name in own if name not in origin),
        unexpected=tuple(unexpected),
        mismatched=tuple(
            f"{name}: file {tuple(state[origin[name]].shape)}, encoder {tuple(own[name].shape)}"
            for name in own
            if name in origin and name not in fits
        ),
        coverage=sum(_numbers(own[name]) for name in fits) / sum(_numbers(tensor) for tensor in own.values()),
        sha256=sha256,
    )
    if report.coverage < min_coverage:
        raise ValueError(
            f"{source} covers {report.coverage:.1%} of the encoder, less than {min_coverage:.0%}: "
            f"{len(fits)} tensors fit; {_first('missing', report.missing)}; "
            f"{_first('of another shape', report.mismatched)}; {_first('unexpected', report.unexpected)}. "
            "Is the encoder built with the config that the weights were made with?"
        )
    if lacking := [name for name in required if name not in fits]:
        found = next((entry for entry in report.mismatched if entry.startswith(f"{lacking[0]}: ")), "nothing for it")
        raise ValueError(
            f"{source}: {lacking[0]} must be loaded, found {found}; without it the encoder would compute with random "
            "weights. Take weights made for this config; load_weights trains the layer afresh unless it is `required`"
        )
    for name, tensor in fits.items():
        require_usable(tensor, own[name], f"{source}: {origin[name]}")
    with torch.no_grad():
        for name, tensor in fits.items():
            own[name].copy_(tensor)
    return report


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """All tensors of a .safetensors file and its SHA-256. Raises ValueError for another suffix or a torn file."""
    return _tensors(path), _sha256(path)


def require_usable(tensor: Tensor, own: Tensor, what: str) -> None:
    """Raises ValueError where `tensor`, which errors call `what`, has no values that `own` could take."""
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"{what} is sparse or without data, expected a dense tensor; save it dense where it was made")
    if tensor.is_complex() or tensor.is_floating_point() != own.is_floating_point():
        raise ValueError(
            f"{what} is {tensor.dtype}, expected {own.dtype} or its like; quantised weights must be dequantised where "
            "they were made"
        )
    finite = torch.isfinite(tensor.to(own.dtype))
    if not finite.all():
        raise ValueError(
            f"{what}: {int((~finite).sum())} of {tensor.numel()} numbers are not finite in {own.dtype}; the training "
            "diverged or the file is damaged: take an earlier checkpoint"
        )


def _numbers(tensor: Tensor) -> int:
    return tensor.numel() if tensor.is_floating_point() else 0


def _first(what: str, names: tuple[str, ...], count: int = 3) -> str:
    shown = f" ({', '.join(names[:count])}{', ...' if len(names) > count else ''})" if names else ""
    return f"{len(names)} {what}{shown}"


def _metadata(path: Path) -> dict[str, str]:
    with _opened(path) as file:
        return file.metadata() or {}


def _tensors(path: Path) -> dict[str, Tensor]:
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    _require_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); copy or export it again") from error


def _require_safetensors(path: Path) -> None:
    if path.is_dir():
        inside = next((str(file) for file in sorted(path.glob("*.safetensors"))), "a .safetensors file")
        raise ValueError(f"{path} is a folder, expected a file of weights; give {inside}")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: weights are .safetensors files; pickled ones can run code and are never read here")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
