"""An encoder's features of a scan as colours."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from lungssl_backbones.representation import pca_colours
from lungssl_data.pair import PhaseScan
from lungssl_data.views import scale_hu
from numpy import ndarray
from torch import nn

_LEAST_STRIDE_VOX = 4
"""Finer levels of a convolutional encoder are close to the image itself and say little about what was learned."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureColours:
    """Colours of the lungs' voxels in each phase."""

    rgb: dict[str, Float[ndarray, "z y x 3"]]
    """Phase -> colours in [0, 1]; black outside of the lungs."""
    explained: float
    """Share of the features' variance in the three components."""
    stride_mm: float
    """Pitch of the features."""


@torch.no_grad()
def feature_colours(encoder: nn.Module, scans: Mapping[str, PhaseScan]) -> FeatureColours:
    """First three principal components of lung features as red, green, blue, fitted on all phases together.

    `scans`: of phases, with voxels of the encoder's size.
    """
    encoder = encoder.eval()
    strides: tuple[int, ...] = encoder.pyramid_strides_vox  # pyright: ignore[reportAssignmentType]
    level = next((i for i, stride in enumerate(strides) if stride >= _LEAST_STRIDE_VOX), len(strides) - 1)
    inside = {phase: torch.from_numpy(scan.lung > 0) for phase, scan in scans.items()}
    lungs = {phase: _dense_features(encoder, scan, level)[:, inside[phase]].T for phase, scan in scans.items()}
    joint = torch.cat(list(lungs.values()))
    centred = joint.double() - joint.double().mean(0)
    spectrum = torch.linalg.eigvalsh(centred.T @ centred).flip(0)
    rgb: dict[str, Float[ndarray, "z y x 3"]] = {}
    for phase, mask in inside.items():
        rgb[phase] = np.zeros((*mask.shape, 3))
        rgb[phase][mask.numpy()] = pca_colours(lungs[phase], fit_on=joint).numpy()
    return FeatureColours(
        rgb=rgb,
        explained=float(spectrum[:3].sum() / spectrum.sum()),
        stride_mm=strides[level] * next(iter(scans.values())).spacing_mm[0],
    )


def _dense_features(encoder: torch.nn.Module, scan: PhaseScan, level: int) -> Float[torch.Tensor, "d z y x"]:
    """Features of a whole scan at every voxel, interpolated from one pyramid level."""
    stride: int = encoder.token_stride_vox  # pyright: ignore[reportAssignmentType]
    image = scale_hu(torch.from_numpy(scan.ct_hu).float())[None, None]
    size = image.shape[2:]
    padding = [amount for n in reversed(size) for amount in (0, -n % stride)]
    padded = F.pad(image, padding)
    features = encoder(padded).pyramid[level]
    full = F.interpolate(features, size=padded.shape[2:], mode="trilinear", align_corners=False)
    return full[0, :, : size[0], : size[1], : size[2]]
