"""Which tensor of a foreign checkpoint is which tensor of an encoder."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

PREFIXES = (
    *("module.", "_orig_mod.", "encoder.", "backbone.", "student.", "teacher."),
    *("model.", "network.", "swinViT.", "swin_vit."),
)
"""Wrappers whose names are stripped: DDP, torch.compile, and what checkpoints call the encoder inside a method."""

_ALIAS = re.compile(r"\.all_modules\.([01])\.")
"""dynamic-network-architectures registers a convolution and its norm a second time, in this list."""


def find_name(name: str, own: Mapping[str, Tensor]) -> str | None:
    """The encoder's name for a checkpoint's, tried with ever fewer of the leading `PREFIXES`; None if it has none."""
    while True:
        for form in _forms(name):
            if form in own:
                return form
        stripped = next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), None)
        if stripped is None:
            return None
        name = stripped


def _forms(name: str) -> Iterator[str]:
    """The name, and as MONAI's SwinUNETR would say it: its pretraining code wrote `fc1`, a doubled stage index, or no
    `swinViT`."""
    yield name
    swin = re.sub(r"^(layers\dc?)\.0\.0\.", r"\1.0.", name)
    swin = swin.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")
    yield f"swinViT.{swin}"


def without_aliases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without the second names of dynamic-network-architectures.

    Raises ValueError where the two names of a tensor hold different numbers.
    """
    kept = {}
    for name, tensor in state.items():
        first = _ALIAS.sub(lambda match: (".conv.", ".norm.")[int(match.group(1))], name)
        if first == name or first not in state:
            kept[name] = tensor
        elif not torch.equal(tensor, state[first]):
            raise ValueError(
                f"{first!r} and {name!r} are one tensor in dynamic-network-architectures, but differ here; "
                "remove the one that was not trained"
            )
    return kept


def with_aliases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with the second names that dynamic-network-architectures expects for each convolution and norm."""
    doubled = {}
    for name, tensor in state.items():
        doubled[name] = tensor
        module, _, leaf = name.rpartition(".")
        for index, kind in enumerate((".conv", ".norm")):
            if module.endswith(kind):
                doubled[f"{module.removesuffix(kind)}.all_modules.{index}.{leaf}"] = tensor
    return doubled
