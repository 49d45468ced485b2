import pytest
import torch
from lungssl_backbones import create_backbone
from lungssl_backbones.inflation import (
    _resize_patch,
    inflate_conv_net,
    inflate_convnext,
    inflate_kernel,
    inflate_vit,
)
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FlatNet(nn.Module):
    """Convolutions with bias, stride, dilation and groups; batch norm; both pools."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.down = nn.Conv2d(8, 12, 2, stride=2)
        self.average = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.pool(self.norm(self.stem(x)).relu())
        return [fine, self.average(self.down(self.wide(fine).relu()))]


def randomised(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net.eval()


def picture(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("how", ["centre", "mean"])
def test_a_kernel_keeps_its_sum_along_z(how: str) -> None:
    kernel = torch.randn(4, 2, 5, 3)
    inflated = inflate_kernel(kernel, 5, how=how)
    assert inflated.shape == (4, 2, 5, 5, 3)
    torch.testing.assert_close(inflated.sum(dim=2), kernel)
    filled = inflated.abs().sum(dim=(0, 1, 3, 4)).bool().tolist()
    assert filled == ([False, False, True, False, False] if how == "centre" else [True] * 5)


def test_a_volume_constant_along_z_gives_the_flat_network_s_features_in_every_slice() -> None:
    flat = randomised(FlatNet())
    solid = inflate_conv_net(flat)
    x = picture(2, 1, 48, 80)
    expected = flat(x.expand(-1, 3, -1, -1))
    for wanted, found in zip(expected, solid(x[:, :, None].expand(-1, -1, 64, -1, -1)), strict=True):
        torch.testing.assert_close(found, wanted[:, :, None].expand_as(found), rtol=1e-4, atol=1e-5)


def test_with_mean_kernels_the_middle_agrees_and_every_slice_counts() -> None:
    flat = randomised(FlatNet())
    solid = inflate_conv_net(flat, how="mean")
    x = picture(1, 1, 48, 80)
    volume = x[:, :, None].expand(-1, -1, 96, -1, -1).contiguous()
    wanted, found = flat(x.expand(-1, 3, -1, -1))[1], solid(volume)[1]
    torch.testing.assert_close(found[:, :, 3], wanted, rtol=1e-4, atol=1e-5)
    assert (found[:, :, 0] - wanted).abs().max() > 1e-3  # the padding
    volume[:, :, 49] += 0.5
    assert (solid(volume)[1] - found).abs().max() > 1e-3


def test_the_flat_network_is_left_as_it_was() -> None:
    flat = randomised(FlatNet()).train()
    before = {name: tensor.clone() for name, tensor in flat.state_dict().items()}
    solid = inflate_conv_net(flat, in_channels=2)
    assert flat.training
    assert solid.training
    assert solid.stem.weight.shape == (8, 2, 7, 7, 7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in flat.state_dict().items())


def test_a_network_that_names_its_axes_is_refused_with_the_deviation() -> None:
    class Axes(FlatNet):
        def forward(self, x: Tensor) -> list[Tensor]:
            fine = self.stem(x)
            return [fine * fine.mean(dim=(2, 3), keepdim=True) * torch.arange(fine.shape[2])[None, None, :, None, None]
                    if fine.ndim == 5 else fine * fine.mean(dim=(2, 3), keepdim=True)]  # fmt: skip

    with pytest.raises(ValueError, match=r"the inflated Axes differs from the 2-D network by .*%"):
        inflate_conv_net(Axes())
    with pytest.raises(ValueError, match="Linear has no Conv2d"):
        inflate_conv_net(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pads by a rule of its own"):
        inflate_conv_net(nn.Conv2d(3, 4, 3, padding="same"))


def test_a_patch_embedding_sees_an_enlarged_patch_as_before() -> None:
    weight, patch = torch.randn(6, 1, 4, 4), torch.randn(1, 1, 4, 4)
    enlarged = nn.functional.interpolate(patch, size=(8, 8), mode="bilinear", align_corners=False)
    before, after = (weight * patch).sum(dim=(1, 2, 3)), (_resize_patch(weight, 8) * enlarged).sum(dim=(1, 2, 3))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["resnet18", "regnety_002", "efficientnet_b0"])
def test_timm_networks_inflate_as_they_are(model: str) -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    flat = randomised(timm.create_model(model, pretrained=False, features_only=True))
    solid = inflate_conv_net(flat)
    x = picture(1, 1, 64, 32)
    expected = flat(x.expand(-1, 3, -1, -1))
    for wanted, found in zip(expected, solid(x[:, :, None].expand(-1, -1, 32, -1, -1)), strict=True):
        scale = wanted.detach().abs().max().item()
        torch.testing.assert_close(found, wanted[:, :, None].expand_as(found), rtol=1e-3, atol=1e-4 * scale)


def test_timm3d_is_an_encoder() -> None:
    pytest.importorskip("timm", exc_type=ImportError)
    torch.manual_seed(0)
    encoder = create_backbone("timm3d", model="resnet18", how="mean").eval()
    x = picture(1, 1, 32, 64, 32)
    features = encoder(x)
    assert features.grid == (1, 2, 1)
    assert [level.shape[1] for level in features.pyramid] == [64, 64, 128, 256, 512]
    torch.testing.assert_close(features.pyramid[-1].flatten(2).mT, features.tokens, rtol=0, atol=0)
    mask = torch.tensor([[True, False]])
    changed = x.clone()
    changed[:, :, :, :32] = 0.9
    assert torch.equal(encoder(changed, mask=mask).tokens, encoder(x, mask=mask).tokens)


@pytest.mark.parametrize("version", [1, 2])
def test_an_inflated_convnext_equals_timm_s_on_a_volume_constant_along_z(version: int) -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    torch.manual_seed(0)
    flat = timm.create_model(
        "convnext_tiny" if version == 1 else "convnextv2_tiny", pretrained=False, depths=(1, 1, 1, 1),
        dims=(8, 16, 24, 32), **({"ls_init_value": 0.5} if version == 1 else {}),
    ).eval()  # fmt: skip
    for name, parameter in flat.named_parameters():
        if "grn" in name:
            nn.init.normal_(parameter, std=0.3)
    encoder = create_backbone(
        "convnext3d_t", widths=(8, 16, 24, 32), depths=(1, 1, 1, 1), response_norm=version == 2
    ).eval()
    report = inflate_convnext(encoder, flat.state_dict(), mean=MEAN, std=STD)
    assert report.missing == ("mask_value",)
    x = picture(1, 1, 64, 32)
    scaled = (x.expand(-1, 3, -1, -1) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    expected = flat.forward_intermediates(scaled, intermediates_only=True)
    other = create_backbone("convnext3d_t", widths=(8, 16, 24, 32), depths=(1, 1, 1, 1), response_norm=version == 1)
    with pytest.raises(ValueError, match="4 tensors that the encoder lacks" if version == 1 else "8 tensors that"):
        inflate_convnext(other, flat.state_dict())
    for wanted, found in zip(expected, encoder(x[:, :, None].expand(-1, -1, 64, -1, -1)).pyramid, strict=True):
        torch.testing.assert_close(found, wanted[:, :, None].expand_as(found), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_an_inflated_vit_equals_timm_s_on_one_layer_of_tokens(layer_scale: float | None) -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    torch.manual_seed(0)
    flat = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=0,
        reg_tokens=2, patch_size=8, init_values=layer_scale, no_embed_class=layer_scale is None,
    ).eval()  # fmt: skip
    with torch.no_grad():  # one row for all places: what of absolute positions carries over
        flat.pos_embed.copy_(torch.randn_like(flat.pos_embed))
        flat.pos_embed[:, -16:] = torch.randn(24)
        flat.cls_token.normal_()
    state = flat.state_dict()
    encoder = create_backbone(
        "vit3d_ti", dim=24, depth=2, heads=2, patch_vox=8, registers=2, wavelengths_mm=(1e9, 1e9)
    ).eval()  # waves so long that no token is turned
    report = inflate_vit(encoder, state, mean=MEAN, std=STD)
    assert report.missing == ("mask_token",)
    x = picture(1, 1, 32, 32)
    scaled = (x.expand(-1, 3, -1, -1) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    wanted = flat.forward_features(scaled)
    features = encoder(x[:, :, None].expand(-1, -1, 8, -1, -1))
    torch.testing.assert_close(features.tokens, wanted[:, 3:], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(features.cls, wanted[:, 0], rtol=1e-3, atol=1e-4)
