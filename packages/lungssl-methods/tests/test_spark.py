"""SparK: what is hidden must change nothing that the encoder says."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lungssl_backbones import create_backbone
from lungssl_data.batch import PairBatch
from lungssl_methods.spark import Spark, _unpatched
from lungssl_methods.sparse import check_sparse, hidden_from, visible_norm, widen
from lungssl_ops.patches import patchify
from torch import Tensor, nn

MakeBatch = Callable[..., PairBatch]
GRID = (3, 1, 2)  # tokens; not a cube, an odd number of them


@pytest.fixture
def resenc() -> nn.Module:
    return create_backbone("resenc_tiny")


def _image_and_mask(encoder: nn.Module) -> tuple[Tensor, Tensor]:
    stride = encoder.token_stride_vox
    image = torch.rand(2, 1, *(side * stride for side in GRID))
    hidden = torch.zeros(2, *GRID, dtype=torch.bool)
    hidden[0, 0, 0, 1] = hidden[0, 2, 0, 0] = hidden[1, 1] = True
    return image, hidden


def _sparse_pyramid(encoder: nn.Module, image: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
    with hidden_from(encoder, hidden):
        return encoder(image * ~widen(hidden, image.shape[2:])).pyramid


@pytest.mark.parametrize("name", ["resenc_tiny", "resenc_l"])
def test_hidden_voxels_and_their_blocks_are_zero_at_every_stage_and_visible_ones_are_not(name: str) -> None:
    encoder = create_backbone(name, **({"widths": (8, 8, 16), "depths": (1, 1, 1)} if name == "resenc_l" else {}))
    image, hidden = _image_and_mask(encoder)
    for level in _sparse_pyramid(encoder, image, hidden):
        seen = ~widen(hidden, level.shape[2:])
        assert bool((level[~seen.expand_as(level)] == 0).all())
        assert bool((level.abs().sum(dim=1, keepdim=True)[seen] > 0).all())


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", ["resenc_tiny", "resenc_l"])
def test_a_hidden_slab_at_the_end_is_as_if_the_crop_ended_before_it(name: str, axis: int) -> None:
    # Every convolution pads with zeros, so the dense encoder on the smaller crop is the answer, norms included.
    encoder = create_backbone(name, **({"widths": (8, 8, 16), "depths": (1, 2, 1)} if name == "resenc_l" else {}))
    for parameter in encoder.parameters():  # biases and gains away from 0 and 1
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.7, 0.4)
    stride, grid = encoder.token_stride_vox, (4, 2, 3)
    image = torch.rand(2, 1, *(side * stride for side in grid))
    hidden = torch.zeros(2, *grid, dtype=torch.bool)
    hidden.movedim(1 + axis, 0)[-1] = True
    with hidden_from(encoder, hidden):
        found = encoder(image * ~widen(hidden, image.shape[2:])).pyramid
    smaller = encoder(image.narrow(2 + axis, 0, (grid[axis] - 1) * stride)).pyramid
    for ours, dense in zip(found, smaller, strict=True):
        torch.testing.assert_close(ours.narrow(2 + axis, 0, dense.shape[2 + axis]), dense, rtol=1e-4, atol=1e-4)


def test_with_nothing_hidden_it_is_the_dense_encoder(resenc: nn.Module) -> None:
    image, hidden = _image_and_mask(resenc)
    sparse = _sparse_pyramid(resenc, image, torch.zeros_like(hidden))
    for ours, dense in zip(sparse, resenc(image).pyramid, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_norms_take_their_statistics_from_visible_voxels(groups: int, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(2, 6, 3, 5, 7, dtype=torch.float64) + 1).to(dtype)
    visible = torch.rand(2, 1, 3, 5, 7) < 0.5
    weight, bias = torch.rand(6, dtype=dtype), torch.rand(6, dtype=dtype)
    found = visible_norm(x, visible, groups, weight=weight, bias=bias, eps=1e-5)
    for sample in range(2):
        # The visible voxels side by side, as if they were the whole crop.
        dense = x[sample][:, visible[sample, 0]][None].double()
        expected = F.group_norm(dense, groups, weight.double(), bias.double(), eps=1e-5)[0]
        torch.testing.assert_close(found[sample][:, visible[sample, 0]].double(), expected, rtol=1e-5, atol=1e-5)
    assert bool((found[~visible.expand_as(found)] == 0).all())


def test_hooks_are_gone_after_an_error_in_the_encoder_and_the_state_is_untouched(resenc: nn.Module) -> None:
    image, hidden = _image_and_mask(resenc)
    before, dense = list(resenc.state_dict()), resenc(image).tokens
    with pytest.raises(RuntimeError), hidden_from(resenc, hidden):
        resenc(torch.rand(2, 3, *image.shape[2:]))  # three channels where it has one
    assert list(resenc.state_dict()) == before and torch.equal(resenc(image).tokens, dense)


@pytest.mark.parametrize("name", ["vit3d_nano", "convnext3d_atto", "swin_unetr_s"])
def test_encoders_that_it_cannot_hide_from_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"is a Linear\. Take resenc_tiny, or mae"):
        check_sparse(create_backbone(name))


def test_a_compiled_encoder_is_refused(resenc: nn.Module) -> None:
    resenc.compile()
    image, hidden = _image_and_mask(resenc)
    with pytest.raises(ValueError, match=r"set train\.compile: false"):
        _sparse_pyramid(resenc, image, hidden)


def test_cells_are_put_where_patches_are_taken_from() -> None:
    image = torch.rand(2, 1, 6, 4, 8)
    cells = patchify(image, (2, 2, 2)).mT.unflatten(2, (3, 2, 4))
    assert torch.equal(_unpatched(cells, 2), image)


def test_it_learns_a_batch_and_every_weight_of_the_encoder_has_a_part(make_batch: MakeBatch) -> None:
    encoder = create_backbone("resenc_tiny")
    method = Spark.Config(decoder_width=16, mask_unit_tokens=1).build(encoder, total_steps=1)
    batch = make_batch(2, locals_per_slot=0, global_size=(32, 16, 32))
    method.eval()
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    ratios = []
    for _ in range(25):
        output = method(batch, 0)
        ratios.append(float(output.metrics["loss_vs_zero"]))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert ratios[0] == pytest.approx(1.0) and ratios[-1] < 0.99 and ratios[-1] < min(ratios[:10])
    without = {name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == {"mask_value"}


def test_bfloat16_gives_numbers_and_held_out_losses_repeat(make_batch: MakeBatch, resenc: nn.Module) -> None:
    method = Spark.Config(mask_unit_tokens=1).build(resenc, total_steps=1).eval()
    batch = make_batch(2, locals_per_slot=0, global_size=(32, 16, 32))
    assert torch.equal(method(batch, 0).loss, method(batch, 5).loss)
    with torch.autocast("cpu", torch.bfloat16):
        output = method(batch, 0)
    output.loss.backward()
    assert bool(output.loss.isfinite()) and all(
        bool(p.grad.isfinite().all()) for p in resenc.parameters() if p.grad is not None
    )


def test_a_decoder_whose_width_does_not_split_is_refused(resenc: nn.Module) -> None:
    with pytest.raises(ValueError, match="multiple of 4, got 30"):
        Spark.Config(decoder_width=30).build(resenc, total_steps=1)
