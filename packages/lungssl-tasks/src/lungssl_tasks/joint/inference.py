"""Labels of a pair's fixed scan: as a joint model predicts them, and as a field brings the moving scan's over."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from lungssl_data.pair import PhaseScan
from numpy import ndarray

from lungssl_tasks.joint.model import JointModel
from lungssl_tasks.registration import Registration
from lungssl_tasks.registration.common_grid import common_grid, labels_at, unit_to_mm


def predicted_labels(
    model: JointModel, fixed: PhaseScan, moving: PhaseScan, affine: Float[ndarray, "3 4"]
) -> UInt8[ndarray, "z y x"]:
    """The likeliest label of every fixed voxel, 0 background, after an affine, fixed to moving LPS mm.

    On the model's device, left in eval mode; scans have the encoder's voxels.
    """
    device = next(model.parameters()).device
    pair = common_grid(fixed, moving, affine, multiple=model.multiple, device=device)
    model.eval()
    with torch.inference_mode():
        output = model(pair.fixed_hu, pair.fixed_lung, pair.moving_hu, pair.moving_lung)
        chosen = output.fixed_logits[0].max(dim=0).indices.to(torch.uint8)
    z, y, x = fixed.ct_hu.shape
    return chosen[:z, :y, :x].cpu().numpy()


def warped_labels(found: Registration, fixed: PhaseScan, moving: PhaseScan) -> UInt8[ndarray, "z y x"]:
    """The moving scan's lobes where the field leads, `labels_at` there. Raises ValueError for a scan without lobes."""
    if moving.lobes is None:
        raise ValueError("the moving scan has no lobes to carry over")
    grid = fixed.geometry()
    index = np.indices(grid.shape).reshape(3, -1).T[:, ::-1]
    places = index * np.asarray(fixed.spacing_mm) + np.asarray(fixed.origin_mm)
    places = places + np.moveaxis(found.on_grid(grid), 0, -1).reshape(-1, 3)
    to_unit = np.linalg.inv(unit_to_mm(moving.geometry()))
    where = torch.from_numpy(places @ to_unit[:3, :3].T + to_unit[:3, 3]).float().reshape(1, *grid.shape, 3)
    return labels_at(moving.lobes, where)[0].numpy()
