import pytest
import torch
from lungssl_backbones.resenc import ResEnc
from torch import nn

CONFIG = ResEnc.Config(widths=(8, 16, 24), depths=(1, 2, 1))


def test_brightening_a_crop_changes_the_features_unless_the_stem_normalises() -> None:
    x = torch.rand(1, 1, 16, 24, 20, generator=torch.Generator().manual_seed(0))
    moved = {}
    for stem_norm in ("none", "instance"):
        torch.manual_seed(0)
        encoder = ResEnc.Config(widths=(8, 16), depths=(1, 1), stem_norm=stem_norm).build().eval()
        encoder.stem = nn.Conv3d(
            1, 8, 3, padding=1, padding_mode="replicate"
        )  # zeros would show the level at the border
        before, after = encoder(x).pyramid[0], encoder(x + 0.2).pyramid[0]
        moved[stem_norm] = ((after - before).norm() / before.norm()).item()
    assert moved["instance"] < 1e-4
    assert moved["none"] > 0.1


def test_each_token_is_fed_by_its_own_block_of_voxels() -> None:
    torch.manual_seed(0)
    encoder = CONFIG.build()
    x = torch.rand(1, 1, 16, 24, 20, requires_grad=True)
    features = encoder(x)
    z, y, x_token = 1, 4, 2
    features.tokens[0, (z * 6 + y) * 5 + x_token].sum().backward()
    per_block = torch.nn.functional.avg_pool3d(x.grad.square()[0], 4)[0]
    assert divmod(int(per_block.argmax()), 30) == (z, y * 5 + x_token)


def test_stages_that_do_not_agree_are_rejected() -> None:
    with pytest.raises(ValueError, match="same number of stages"):
        ResEnc.Config(widths=(8, 16), depths=(1,)).build()
    with pytest.raises(ValueError, match=r"\(8, 18\) must be multiples of groups, 4"):
        ResEnc.Config(widths=(8, 18), depths=(1, 1)).build()
