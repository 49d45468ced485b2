"""A whole scan through a model that only ever saw crops."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int16, UInt8
from lungssl_data.views import scale_hu
from numpy import ndarray

from lungssl_tasks.segmentation import SegmentationModel

_MAX_LOGITS_BYTES = 2**30
"""Float logits held at once: six classes on a 512 x 512 x 400 scan would be 2.5 GB, their labels are 0.1 GB."""


def predict_labels(
    model: SegmentationModel,
    ct_hu: Int16[ndarray, "z y x"],
    *,
    roi_vox: tuple[int, int, int],
    overlap: float = 0.5,
    device: torch.device | str = "cpu",
    windows_per_batch: int = 1,
    max_logits_bytes: int = _MAX_LOGITS_BYTES,
) -> UInt8[ndarray, "z y x"]:
    """Label of every voxel, 0 background, by MONAI's Gaussian-weighted sliding window.

    `ct_hu` has the model's spacing; any size does: a side shorter than `roi_vox` is padded with air. Windows run on
    `device`, where the model is moved and left in eval mode; logits are summed on the CPU. Scans whose logits would
    exceed `max_logits_bytes` go through in slabs along z that repeat the windows on their borders, so that the labels
    are the same. Raises ValueError where `roi_vox` is not a multiple of the encoder's token stride or `overlap` is
    outside [0, 1).
    """
    stride = model.encoder.token_stride_vox
    if any(side < 1 or side % stride for side in roi_vox):
        fits = tuple(-(-max(side, 1) // stride) * stride for side in roi_vox)
        raise ValueError(f"roi_vox {roi_vox} must be multiples of the token stride, {stride} voxels; try {fits}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap {overlap} must be at least 0 and below 1; 0.5 is usual")
    from monai.inferers.utils import sliding_window_inference

    model.to(device).eval()
    image = scale_hu(torch.from_numpy(ct_hu).float())[None, None]
    labels = np.empty(ct_hu.shape, np.uint8)
    plane_bytes = 4 * (model.classes + 1) * max(ct_hu.shape[1], roi_vox[1]) * max(ct_hu.shape[2], roi_vox[2])
    step = max(int(roi_vox[0] * (1 - overlap)), 1)
    with torch.inference_mode():
        for first, last, start, stop in _slabs(len(ct_hu), roi_vox[0], step, max_logits_bytes // plane_bytes):
            logits = sliding_window_inference(
                image[:, :, first:last],
                roi_vox,
                windows_per_batch,
                model,
                overlap=overlap,
                mode="gaussian",
                sw_device=device,
                device="cpu",
            )
            assert isinstance(logits, torch.Tensor)
            chosen = logits[0, :, start - first : stop - first].max(dim=0).indices
            labels[start:stop] = chosen.to(torch.uint8).numpy()
    return labels


def _slabs(size: int, roi: int, step: int, most: int) -> Iterator[tuple[int, int, int, int]]:
    """(first, last, start, stop): reading planes [first, last) gives planes [start, stop) all their windows.

    Windows begin at multiples of `step`, but the last one, which ends with the image. About `most` planes are read at
    once, never fewer than it takes to finish `step` planes.
    """
    planes = max((most - 2 * roi) // step, 1) * step
    if size <= max(most, roi):
        planes = size
    for start in range(0, size, planes):
        stop = min(start + planes, size)
        first = min(max(-((roi - 1 - start) // step), 0), max(size - roi, 0) // step) * step
        last = size if stop > size - roi else (stop - 1) // step * step + roi
        yield first, last, start, stop
