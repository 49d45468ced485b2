from collections.abc import Callable

import numpy as np
import pytest
import torch
from lungssl_data.batch import HU_WINDOW
from lungssl_tasks.inference import predict_labels
from lungssl_tasks.segmentation import SegmentationModel


def _scan(shape: tuple[int, int, int]) -> np.ndarray:
    smooth = torch.nn.functional.interpolate(
        torch.randn(1, 1, 5, 4, 6, generator=torch.Generator().manual_seed(1)), size=shape, mode="trilinear"
    )
    return (-500 + 400 * smooth[0, 0]).numpy().astype(np.int16)


@pytest.mark.parametrize("shape", [(21, 17, 30), (5, 19, 9)])
def test_a_model_that_thresholds_hu_gives_the_thresholded_scan_whatever_its_size(
    shape: tuple[int, int, int], tiny_encoder: Callable
) -> None:
    model = SegmentationModel.Config().build(tiny_encoder((1,)), 3)  # 1x1x1 convolutions only
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        model.encoder.get_submodule("convs.0").weight[0] = 1.0
        # k x - c_k is largest for the k that counts the thresholds 0.2, 0.4, 0.6 below x.
        model.head.weight[:, 0, 0, 0, 0] = torch.arange(4.0)
        model.head.bias[:] = -torch.tensor([0.0, 0.2, 0.6, 1.2])
    ct_hu = _scan(shape)
    low, high = HU_WINDOW
    expected = np.digitize((ct_hu - low) / (high - low), [0.2, 0.4, 0.6])
    assert len(np.unique(expected)) == 4
    labels = predict_labels(model, ct_hu, roi_vox=(8, 10, 12))
    assert labels.dtype == np.uint8
    # A voxel on a threshold may tip: weighted sums of its equal logits round.
    assert (labels == expected).mean() > 0.995


@pytest.mark.parametrize("depth", [9, 16, 24, 37, 41])
@pytest.mark.parametrize("overlap", [0.5, 0.25])
def test_slabs_give_the_labels_of_the_whole_volume(depth: int, overlap: float, tiny_encoder: Callable) -> None:
    model = SegmentationModel.Config(base_width=4, max_width=8).build(tiny_encoder((4,)), 3)
    ct_hu = _scan((depth, 17, 13))
    whole = predict_labels(model, ct_hu, roi_vox=(8, 12, 16), overlap=overlap)
    slabs = predict_labels(model, ct_hu, roi_vox=(8, 12, 16), overlap=overlap, max_logits_bytes=1)
    assert len(np.unique(whole)) > 1
    np.testing.assert_array_equal(slabs, whole)


def test_a_window_that_no_token_grid_fits_is_answered_with_one_that_does(tiny_encoder: Callable) -> None:
    model = SegmentationModel.Config().build(tiny_encoder((4,)), 3)
    with pytest.raises(ValueError, match=r"multiples of the token stride, 4 voxels; try \(12, 8, 8\)"):
        predict_labels(model, _scan((9, 9, 9)), roi_vox=(10, 8, 8))
