"""Losses and their parts as pure functions of tensors."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from lungssl_ops.multicrop_ce import multicrop_cross_entropy
from lungssl_ops.patches import masked_patch_mse, patchify
from torch import Tensor

from lungssl_methods.method import Gather


def dino_loss(
    student_logits: Float[Tensor, "s b k"],
    teacher_probs: Float[Tensor, "t b k"],
    weight: Float[Tensor, "s t"] | Float[Tensor, "s t b"],
    *,
    student_temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Weighted mean over view pairs of H(teacher_t, softmax(student_s / temperature)), in nats; ln k is chance.

    Caron et al. 2021, https://arxiv.org/abs/2104.14294. With weight = 1 - eye it is the mean over ordered pairs of
    different views, hence also DINOv2's sum of its local and global terms. NaN where all weights are 0.

    For logits that are there anyway; `lungssl_ops.prototype_ce` gets the same from rows and prototypes without them.
    """
    return multicrop_cross_entropy(_float32_at_least(student_logits) / student_temperature, teacher_probs, weight)


def teacher_probs(
    logits: Float[Tensor, "*rows k"], centre: Float[Tensor, " k"], temperature: float
) -> Float[Tensor, "*rows k"]:
    """softmax((logits - centre) / temperature), float32 at least: rounding logits to bf16 moves them by 2 %."""
    return torch.softmax((_float32_at_least(logits) - centre) / temperature, dim=-1)


def update_centre(
    centre: Float[Tensor, " k"],
    logit_sum: Float[Tensor, " k"],
    count: Float[Tensor, ""],
    *,
    momentum: float,
    gather: Gather,
) -> Float[Tensor, " k"]:
    """The centre after one step: momentum * centre + (1 - momentum) * mean teacher logits over all ranks' rows.

    Takes the sum and number of rows, so that ranks and accumulated micro-batches of unequal size weigh as they should.
    From 0, n steps of constant logits c give (1 - momentum^n) c. Without a row the centre stays.
    """
    total = gather.sum(torch.cat([logit_sum, count[None]]))
    share = (1.0 - momentum) * (total[-1] > 0).to(total)
    return torch.lerp(centre, total[:-1] / total[-1].clamp_min(1.0), share)


def teacher_entropy(probs: Float[Tensor, "*rows k"]) -> Float[Tensor, "*rows"]:
    """Entropy of each row in nats: ln k where the teacher says nothing, 0 where it is certain."""
    return torch.special.entr(probs).sum(dim=-1)


def mae_loss(
    pred: Float[Tensor, "b n p"],
    image: Float[Tensor, "b 1 z y x"],
    mask: Bool[Tensor, "b n"],
    voxel_weight: Float[Tensor, "b z y x"],
    *,
    patch_vox: int,
    norm: Literal["patch", "none"] = "patch",
    variance_floor: float = (20 / 1400) ** 2,
) -> Float[Tensor, ""]:
    """Mean squared error over the voxels of masked patches, weighted; see `lungssl_ops.patches.masked_patch_mse`.

    The floor is (20 HU)^2 in units of the 1400 HU input window: about CT noise, so that patches of air ask for nothing
    that could be predicted. NaN where no masked voxel has weight.
    """
    patch = (patch_vox, patch_vox, patch_vox)
    target, weight = patchify(image, patch), patchify(voxel_weight[:, None], patch)
    return masked_patch_mse(pred, target, mask, weight, norm=norm, variance_floor=variance_floor)


def mae_loss_and_ratio(
    pred: Float[Tensor, "b n p"],
    image: Float[Tensor, "b 1 z y x"],
    mask: Bool[Tensor, "b n"],
    voxel_weight: Float[Tensor, "b z y x"],
    *,
    patch_vox: int,
    norm: Literal["patch", "none"] = "patch",
    variance_floor: float = (20 / 1400) ** 2,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`mae_loss`, and its ratio to that of predicting 0: 1 where nothing is learned."""
    patch = (patch_vox, patch_vox, patch_vox)
    target, weight = patchify(image, patch), patchify(voxel_weight[:, None], patch)
    loss, zero_loss = (
        masked_patch_mse(guess, target, mask, weight, norm=norm, variance_floor=variance_floor)
        for guess in (pred, torch.zeros_like(pred))
    )
    return loss, ratio_to_still(loss, zero_loss)


def ratio_to_still(loss: Float[Tensor, ""], still: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """`loss` over that of predicting no change, without gradient; 1 where that is 0 and nothing was there to learn.

    A held-out batch of plain air must not make a run's mean NaN, nor 0, which would be perfect.
    """
    return torch.where(still > 1e-6, loss / still.clamp_min(1e-6), 1.0).detach()


def _float32_at_least(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
