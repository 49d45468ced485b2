import math

import pytest
import torch
import torch.nn.functional as F
from lungssl_backbones.vit3d import Vit3d, _Block, _patches
from torch import Tensor

SPACING_MM = 1.5


def vit(**overrides: object) -> Vit3d:
    torch.manual_seed(0)
    return Vit3d.Config(**{"dim": 48, "depth": 3, "heads": 2, "layer_scale": 1.0, **overrides}).build().eval()


def crop(z: int = 16, y: int = 24, x: int = 32) -> Tensor:
    return torch.rand(2, 1, z, y, x, generator=torch.Generator().manual_seed(1))


def regular_coords_mm(x: Tensor, spacing_mm: float = SPACING_MM) -> Tensor:
    """LPS (x, y, z) of each voxel of an axis-aligned crop."""
    axes = [torch.arange(n) * spacing_mm for n in x.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1]).expand(len(x), -1, -1, -1, -1)


def test_patches_are_the_cubes_in_zyx_order() -> None:
    x = crop()
    by_hand = torch.stack(
        [
            x[:, 0, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8, 8 * k : 8 * k + 8].flatten(1)
            for i in range(2)
            for j in range(3)
            for k in range(4)
        ],
        dim=1,
    )
    assert torch.equal(_patches(x, (2, 3, 4)), by_hand)


def test_the_patch_embedding_is_a_strided_convolution() -> None:
    model, x = vit(), crop()
    kernel = model.patch_embed.weight.unflatten(1, (8, 8, 8))[:, None]
    convolved = F.conv3d(x, kernel, model.patch_embed.bias, stride=8).flatten(2).mT
    torch.testing.assert_close(model.patch_embed(_patches(x, (2, 3, 4))), convolved)


def test_attention_without_rotation_is_torch_multihead_attention() -> None:
    torch.manual_seed(0)
    block = _Block(Vit3d.Config(dim=48, heads=2, layer_scale=1.0), 0.0)
    for layer in (block.mlp[0], block.mlp[2]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    t = torch.randn(2, 7, 48)
    normed = block.norm1(t)
    theirs = F.multi_head_attention_forward(
        *(normed.transpose(0, 1),) * 3, 48, 2, block.qkv.weight, block.qkv.bias, None, None, False, 0.0,
        block.proj.weight, block.proj.bias, training=False, need_weights=False,
    )[0].transpose(0, 1)  # fmt: skip
    found, _ = block(t.flatten(0, 1), [t.shape[:2]], None)
    torch.testing.assert_close(found.unflatten(0, (2, 7)), t + theirs)


def test_crops_of_several_sizes_are_encoded_together_as_one_by_one() -> None:
    model, sizes = vit(), [crop(), crop(24, 8, 16)[:1]]
    for many, x in zip(model(sizes), sizes, strict=True):
        one = model(x)
        torch.testing.assert_close(many.cls, one.cls)
        torch.testing.assert_close(many.tokens, one.tokens)
        torch.testing.assert_close(many.pyramid[0], one.pyramid[0])
        assert many.grid == one.grid
    with pytest.raises(ValueError, match="several sizes take no mask, keep or coords_mm"):
        model(sizes, keep=torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize("changed", [{}, {"mlp": "swiglu"}, {"position": "sincos"}, {"depth": 1}])
def test_a_summary_alone_is_the_same_with_the_same_gradients(changed: dict[str, object]) -> None:
    found = []
    for summary_only in (False, True):
        model = vit(**changed)
        features = model(crop(), summary_only=summary_only)
        assert features.cls is not None
        features.cls.sin().sum().backward()
        found.append([features.cls, *(p.grad for name, p in model.named_parameters() if name != "mask_token")])
        if summary_only:
            assert features.tokens.shape == (2, 0, 48)
            assert features.pyramid == ()
    for whole, alone in zip(*found, strict=True):
        torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)


def test_coords_of_a_regular_grid_change_nothing() -> None:
    model, x = vit(), crop()
    torch.testing.assert_close(model(x, coords_mm=regular_coords_mm(x)).tokens, model(x).tokens, rtol=1e-4, atol=1e-5)


def test_the_scanner_origin_is_invisible_and_the_voxel_size_is_not() -> None:
    model, x = vit(), crop()
    coords = regular_coords_mm(x)
    moved = model(x, coords_mm=coords + torch.tensor([-211.0, 37.0, -980.0])[:, None, None, None])
    torch.testing.assert_close(moved.tokens, model(x).tokens, rtol=1e-3, atol=1e-4)
    assert (model(x, coords_mm=2 * coords).tokens - model(x).tokens).abs().max() > 1e-2


def test_positions_are_millimetres_over_wavelengths() -> None:
    fine, coarse = vit(spacing_mm=1.5, wavelengths_mm=(48.0, 800.0)), vit(spacing_mm=3.0, wavelengths_mm=(96.0, 1600.0))
    torch.testing.assert_close(fine(crop()).tokens, coarse(crop()).tokens)


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_moving_patches_moves_tokens_only_if_their_coordinates_move_too(axis: int) -> None:
    model, x = vit(), crop()
    coords = regular_coords_mm(x)

    def roll_tokens(tokens: Tensor) -> Tensor:
        return tokens.unflatten(1, (2, 3, 4)).roll(1, axis - 1).flatten(1, 3)

    expected = roll_tokens(model(x).tokens)
    with_coords = model(x.roll(8, axis), coords_mm=coords.roll(8, axis)).tokens
    torch.testing.assert_close(with_coords, expected, rtol=1e-4, atol=1e-5)
    assert (model(x.roll(8, axis)).tokens - expected).abs().max() > 1e-2


def test_keeping_all_tokens_in_another_order_permutes_the_output() -> None:
    model, x = vit(), crop()
    keep = torch.stack([torch.randperm(24), torch.randperm(24)])
    whole, kept = model(x), model(x, keep=keep)
    torch.testing.assert_close(kept.tokens, whole.tokens.gather(1, keep[..., None].expand(-1, -1, 48)))
    torch.testing.assert_close(kept.cls, whole.cls)
    assert kept.pyramid == ()
    assert kept.grid == (2, 3, 4)


def test_dropped_voxels_are_not_seen() -> None:
    model, x = vit(), crop()
    first_layer = torch.arange(12).expand(2, -1)
    changed = x.clone()
    changed[:, :, 8:] = 0.9
    assert torch.equal(model(changed, keep=first_layer).tokens, model(x, keep=first_layer).tokens)


def test_drop_path_skips_whole_samples_and_keeps_the_mean() -> None:
    block = _Block(Vit3d.Config(dim=48, heads=2), 0.25).train()
    counts = [torch.Size([4_000, 3]), torch.Size([6_000, 1])]
    torch.manual_seed(0)
    kept = block._scale(torch.ones(2), counts)
    assert kept.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert torch.equal(kept[..., 0], kept[..., 1])
    assert kept.mean().item() == pytest.approx(1, abs=0.03)
    torch.manual_seed(0)
    assert torch.equal(block._scale(torch.ones(2), counts), kept)
    assert block.eval()._scale(torch.ones(2), counts).tolist() == [[1.0, 1.0]]


def test_a_dropped_sample_passes_unchanged() -> None:
    torch.manual_seed(0)
    block = _Block(Vit3d.Config(dim=48, heads=2, layer_scale=1.0, drop_path=0.5), 0.5).train()
    t = torch.randn(16, 3, 48)
    found, _ = block(t.flatten(0, 1), [t.shape[:2]], None)
    unchanged = (found.unflatten(0, (16, 3)) == t).flatten(1).all(dim=1)
    assert 0 < unchanged.sum() < 16  # both halves dropped: a quarter


@pytest.mark.parametrize("position", ["rope", "sincos"])
def test_both_kinds_of_position_ignore_the_origin_and_see_the_voxel_size(position: str) -> None:
    model, x = vit(position=position), crop()
    coords = regular_coords_mm(x)
    moved = model(x, coords_mm=coords + torch.tensor([-211.0, 37.0, -980.0])[:, None, None, None])
    torch.testing.assert_close(moved.tokens, model(x).tokens, rtol=1e-3, atol=1e-3)
    assert (model(x, coords_mm=2 * coords).tokens - model(x).tokens).abs().max() > 1e-2


def test_waves_are_sines_and_cosines_of_millimetres_over_wavelengths() -> None:
    model = vit(dim=14, heads=2, position="sincos", wavelengths_mm=(40.0, 160.0))
    waves = model._waves(torch.tensor([[[10.0, 0.0, 80.0]]]))[0, 0]  # x, y, z: a quarter, none, two whole waves
    expected = [1, math.sin(math.pi / 8), 0, 0, 0, 0, 0, math.cos(math.pi / 8), 1, 1, 1, -1, 0, 0]
    expected[4:6], expected[10:12] = [0, 0], [1, -1]
    torch.testing.assert_close(waves, torch.tensor(expected), rtol=0, atol=1e-5)


def test_swiglu_has_as_many_weights_and_is_a_gated_product() -> None:
    plain, gated = vit(dim=48), vit(dim=48, mlp="swiglu")
    count = [sum(p.numel() for p in model.blocks[0].mlp.parameters()) for model in (plain, gated)]
    assert count[1] == pytest.approx(count[0], rel=0.02)
    mlp, t = gated.blocks[0].mlp, torch.randn(1, 5, 48)
    by_hand = mlp.down(mlp.gate(t) * torch.sigmoid(mlp.gate(t)) * mlp.up(t))
    torch.testing.assert_close(mlp(t), by_hand)


def test_the_names_of_the_weights_are_those_of_files_already_written() -> None:
    block = ["norm1.weight", "norm1.bias", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "scale1"]
    block += ["norm2.weight", "norm2.bias", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias", "scale2"]
    others = ["cls_token", "register_tokens", "mask_token", "patch_embed.weight", "patch_embed.bias"]
    names = {*others, "norm.weight", "norm.bias", *(f"blocks.{i}.{name}" for i in range(3) for name in block)}
    assert vit().state_dict().keys() == names


@pytest.mark.parametrize("patch_vox", [4, 8, 16])
def test_every_patch_size_sees_all_voxels_of_a_token_and_no_others(patch_vox: int) -> None:
    model = vit(patch_vox=patch_vox, depth=0)
    x = torch.rand(1, 1, patch_vox, 2 * patch_vox, patch_vox, requires_grad=True)
    model(x).tokens[0, 1].square().sum().backward()
    assert bool((x.grad[0, 0, :, patch_vox:] != 0).all())
    assert not x.grad[0, 0, :, :patch_vox].any()


def test_a_width_that_does_not_split_into_heads_is_rejected() -> None:
    with pytest.raises(ValueError, match="dim 100 does not split into 3 heads"):
        Vit3d.Config(dim=100, heads=3).build()
