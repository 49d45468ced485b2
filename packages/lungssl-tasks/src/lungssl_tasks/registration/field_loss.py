"""What a network's fields of a pair are trained on: the loss of `descent.py` both ways, without truth; and with it.

Unsupervised loss, Balakrishnan et al. 2019 (VoxelMorph), https://arxiv.org/abs/1809.05231; there and back again, Greer
et al. 2021 (ICON), https://arxiv.org/abs/2105.04459. Displacements are (x, y, z) in voxels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lungssl_ops.lncc import lncc
from lungssl_ops.warp import warp, warp_loss_terms
from torch import Tensor

from lungssl_tasks.registration.descent import EPS, DescentConfig
from lungssl_tasks.registration.training_pairs import TrainingPair


@dataclass(frozen=True, kw_only=True)
class FieldWeights:
    """What counts how much in a field's loss, beside 1 - LNCC."""

    truth: float = 0.0
    """Weight of the mean error in mm where a pair's displacement is known (phantoms). 0: no pair's is looked at."""
    consistency: float = 0.1
    """Weight of the mean squared way from a point of the lung there and back again, in voxels (ICON, Greer et al.
    2021, https://arxiv.org/abs/2105.04459): alike places are many, and only the same one is found both ways."""
    window: int = 5
    """LNCC's, in voxels."""
    diffusion: float = DescentConfig().diffusion
    """This and the two below: as in descent."""
    bending: float = DescentConfig().bending
    folding: float = DescentConfig().folding


def field_loss(
    pair: TrainingPair, there: Float[Tensor, "1 3 z y x"], back: Float[Tensor, "1 3 z y x"], weights: FieldWeights
) -> dict[str, Float[Tensor, ""]]:
    """`loss` of a pair's fields, fixed to moving and back, and its figures (`RegistrationTask.forward`)."""
    grid = pair.grid
    lung = grid.fixed_lung > 0
    with torch.autocast(there.device.type, enabled=False):
        fixed, moving = grid.lungs()
        ways = (
            _one_way(there, fixed, moving, grid.fixed_lung, grid.moving_seen, weights),
            _one_way(back, moving, fixed, grid.moving_lung, torch.ones_like(grid.moving_seen), weights),
        )
        figures = {name: (ways[0][name] + ways[1][name]) / 2 for name in ways[0]}
        around = [_miss(there, back)[lung & (grid.moving_seen > 0)], _miss(back, there)[grid.moving_lung > 0]]
        figures["loss"] = figures["loss"] + weights.consistency * torch.stack([m.mean() for m in around]).mean()
        figures["disagreement_mm"] = around[0].detach().sqrt().mean() * grid.spacing_mm
        if pair.true_vox is not None:
            known = lung & pair.true_vox.isfinite().all(dim=1, keepdim=True)
            apart = torch.linalg.vector_norm(torch.where(known, there - pair.true_vox, 0.0) + 1e-6, dim=1)
            figures["error_mm"] = apart.sum() / known.sum().clamp_min(1) * grid.spacing_mm
            if weights.truth:
                figures["loss"] = figures["loss"] + weights.truth * figures["error_mm"]
    return figures


def _one_way(
    v_vox: Float[Tensor, "1 3 z y x"],
    fixed: Float[Tensor, "1 1 z y x"],
    moving: Float[Tensor, "1 1 z y x"],
    lung: Float[Tensor, "1 1 z y x"],
    seen: Float[Tensor, "1 1 z y x"],
    weights: FieldWeights,
) -> dict[str, Float[Tensor, ""]]:
    """`seen`: 1 where `moving` has voxels."""
    rim = F.max_pool3d(lung, 3, stride=1, padding=1)
    terms = warp_loss_terms(moving, v_vox, weight=rim, with_bending=True)
    assert terms.bending is not None
    counts = rim * (warp(seen, v_vox.detach(), padding="zeros") > 0.99)
    similarity = lncc(fixed, terms.warped, window=weights.window, eps=EPS, mask=counts).sum()
    smooth = weights.diffusion * terms.diffusion + weights.bending * terms.bending
    loss = 1 - similarity + (smooth + weights.folding * terms.folding).sum()
    return {"loss": loss, "lncc": similarity, "folding": terms.folding.sum()}


def _miss(there: Float[Tensor, "b 3 z y x"], back: Float[Tensor, "b 3 z y x"]) -> Float[Tensor, "b 1 z y x"]:
    """Squared distance in voxels by which there and back again misses each voxel."""
    return (there + warp(back, there)).square().sum(dim=1, keepdim=True)
