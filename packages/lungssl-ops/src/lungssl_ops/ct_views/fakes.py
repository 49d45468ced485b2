"""Shapes and dtypes of the operators' results, which are the same from every backend, for `torch.compile`."""

import torch
from torch import Tensor

from lungssl_ops.ct_views.table import views_shape


def views_fake(
    volumes: list[Tensor],
    volume: Tensor,
    numbers: Tensor,
    seed: Tensor,
    lattice: Tensor | None,
    size_vox: list[int],
    patch_vox: list[int],
    fill_hu: float | None,
    antialias: bool,
    dtype: torch.dtype,
) -> Tensor:
    return volumes[0].new_empty(views_shape(len(volume), size_vox, patch_vox), dtype=dtype)


def masks_fake(
    masks: list[Tensor],
    volume: Tensor,
    numbers: Tensor,
    seed: Tensor,
    lattice: Tensor | None,
    size_vox: list[int],
    wholly: bool,
    antialias: bool,
) -> Tensor:
    return masks[0].new_empty((len(volume), *size_vox))
