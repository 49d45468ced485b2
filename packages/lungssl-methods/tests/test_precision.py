"""T24: the same loss in bf16 autocast, to 1 %."""

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_data.batch import PairBatch
from lungssl_methods import METHODS, method_class

SMALL = {
    "croco": {"decoder_width": 48, "decoder_depth": 1, "mask_unit_tokens": 1},
    "dino": {"prototypes": 64, "head_hidden": 32, "head_bottleneck": 16},
    "mae": {"decoder_width": 48, "decoder_depth": 1, "mask_unit_tokens": 1},
    "phase_dino": {"prototypes": 64, "head_hidden": 32, "head_bottleneck": 16},
    "simmim": {"mask_unit_tokens": 1},
    "spark": {"decoder_width": 16, "mask_unit_tokens": 2},
}
RESENC = ("resenc_tiny", {"widths": (8, 12), "depths": (1, 1)})
VIT = ("vit3d_nano", {"depth": 2, "patch_vox": 4})


@pytest.mark.parametrize("name", sorted(METHODS))
def test_autocast_changes_the_loss_by_less_than_a_hundredth(name: str, make_batch: Callable[..., PairBatch]) -> None:
    backbone, size = RESENC if name == "spark" else VIT
    config = method_class(name).Config(**SMALL.get(name, {}))
    method = config.build(create_backbone(backbone, **size), total_steps=8)
    batch = make_batch(4, **asdict(method.typical_views), global_size=(16, 16, 16), local_size=(8, 8, 8))
    for step in (2, 3):  # the first one moves only the last layer of those that start at predicting 0
        method.zero_grad()
        method(batch, step).loss.backward()
        with torch.no_grad():
            for parameter in method.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        method.after_optimizer_step(step)
    method.eval()
    with torch.no_grad():
        full = method(batch, 4).loss
        with torch.autocast("cpu", torch.bfloat16):
            half = method(batch, 4).loss
    assert half.dtype == torch.float32 and half != full  # or nothing was in bf16
    assert half.item() == pytest.approx(full.item(), rel=0.01)
