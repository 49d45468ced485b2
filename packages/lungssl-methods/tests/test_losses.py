import math

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Float
from lungssl_methods.losses import dino_loss, mae_loss, teacher_entropy, teacher_probs, update_centre
from lungssl_methods.method import LocalGather
from torch import Tensor


def _uniform(*shape: int) -> Tensor:
    return torch.full(shape, 1.0 / shape[-1], dtype=torch.float64)


# T1


@pytest.mark.parametrize(("k", "ln_k"), [(4096, 8.317766), (8192, 9.010913), (65536, 11.090355)])
def test_zero_student_logits_cost_ln_k_for_any_teacher(k: int, ln_k: float) -> None:
    probs = teacher_probs(torch.randn(2, 3, k) * 0.1, torch.zeros(k), 0.04)
    loss = dino_loss(torch.zeros(4, 3, k), probs, torch.ones(4, 2) - torch.eye(4, 2))
    assert loss.item() == pytest.approx(ln_k, rel=1e-6)


def test_a_student_equal_to_its_teacher_costs_the_teachers_entropy() -> None:
    logits = torch.randn(2, 3, 64)  # nearly one-hot after sharpening
    probs = teacher_probs(logits, torch.zeros(64), 0.1)
    loss = dino_loss(logits, probs, torch.eye(2), student_temperature=0.1)
    assert loss.item() == pytest.approx(teacher_entropy(probs).mean().item(), abs=1e-5)
    assert 0.01 < loss.item() < 1.0


# T2


def _pairs_by_loop(student: Tensor, probs: Tensor) -> Tensor:
    terms = [
        -(probs[t] * F.log_softmax(student[s] / 0.1, dim=-1)).sum(-1).mean()
        for t in range(len(probs))
        for s in range(len(student))
        if s != t
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("views", [2, 4, 10])
def test_ones_minus_eye_is_the_mean_over_ordered_pairs_and_dinov2s_split(views: int) -> None:
    teachers, local = 2, views - 2
    student, logits = torch.randn(views, 5, 33), torch.randn(teachers, 5, 33)
    probs = teacher_probs(logits, torch.zeros(33), 0.06)
    loss = dino_loss(student, probs, torch.ones(views, teachers) - torch.eye(views, teachers))
    torch.testing.assert_close(loss, _pairs_by_loop(student, probs), rtol=1e-5, atol=0)
    # DINOv2 (ssl_meta_arch.py): local terms and 2 x the mean of the two global ones, both over (2 local + 2) terms.
    cross = [[-(probs[t] * F.log_softmax(s / 0.1, -1)).sum(-1).mean() for t in range(2)] for s in student]
    local_sum = sum(sum(row) for row in cross[2:])
    global_sum = cross[0][1] + cross[1][0]
    torch.testing.assert_close(loss, (local_sum + global_sum) / (2 * local + 2), rtol=1e-5, atol=0)


def test_a_uniform_student_splits_ln_k_as_dinov2_logs_it() -> None:
    # K 65536 and 8 local crops: 9.8581 local and 1.2323 global (`ssl.md` B.0).
    k, student = 65536, torch.zeros(10, 1, 65536)
    probs = _uniform(2, 1, k).float()
    pairs = torch.ones(10, 2) - torch.eye(10, 2)
    local, total = pairs.clone(), pairs.sum()
    local[:2] = 0
    share = local.sum() / total
    assert (share * dino_loss(student, probs, local)).item() == pytest.approx(9.8581, abs=1e-4)
    assert ((1 - share) * dino_loss(student, probs, pairs - local)).item() == pytest.approx(1.2323, abs=1e-4)


# T4


def test_constant_logits_give_the_centre_in_closed_form() -> None:
    centre, logits = torch.zeros(5), torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    for n in range(1, 8):
        centre = update_centre(centre, logits * 6, torch.tensor(6.0), momentum=0.9, gather=LocalGather())
        torch.testing.assert_close(centre, (1 - 0.9**n) * logits, rtol=1e-5, atol=1e-6)


def test_unequal_local_batches_give_the_global_mean() -> None:
    rows = torch.randn(7, 5)

    class OtherRank(LocalGather):
        """A rank that holds the last 4 rows."""

        def sum(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
            return value + torch.cat([rows[3:].sum(0), torch.tensor([4.0])])

    ours = update_centre(torch.zeros(5), rows[:3].sum(0), torch.tensor(3.0), momentum=0.9, gather=OtherRank())
    torch.testing.assert_close(ours, 0.1 * rows.mean(0))


def test_the_centre_is_subtracted_before_sharpening() -> None:
    logits, centre = torch.tensor([[1.0, 2.0]]), torch.tensor([0.5, 1.0])
    expected = 1.0 / (1.0 + math.exp((1.0 - 0.5) / 0.25))
    assert teacher_probs(logits, centre, 0.25)[0, 0].item() == pytest.approx(expected)


def test_large_logits_do_not_overflow() -> None:
    # exp(4 / 0.04) is inf in float32 (`ops.md` 2, numerics).
    probs = teacher_probs(torch.tensor([[4.0, 0.0], [1e3, -1e3]]), torch.zeros(2), 0.04)
    torch.testing.assert_close(probs, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


def test_entropy_of_uniform_and_certain_teachers() -> None:
    assert teacher_entropy(_uniform(2, 4096))[0].item() == pytest.approx(8.317766, abs=1e-6)
    assert teacher_entropy(torch.eye(3)).tolist() == [0.0, 0.0, 0.0]


# T10


@pytest.mark.parametrize(("patch_vox", "expected"), [(8, 0.998047), (16, 0.999756)])
def test_predicting_zero_costs_n_minus_1_over_n(patch_vox: int, expected: float) -> None:
    image = torch.rand(2, 1, patch_vox, 2 * patch_vox, 3 * patch_vox)
    mask = torch.tensor([[True, False, True, True, False, True]]).expand(2, 6)
    weight = torch.ones(2, *image.shape[2:])
    loss = mae_loss(torch.zeros(2, 6, patch_vox**3), image, mask, weight, patch_vox=patch_vox)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_the_mae_loss_ignores_visible_voxels() -> None:
    image, pred = torch.rand(1, 1, 4, 8, 4, requires_grad=True), torch.randn(1, 2, 64, requires_grad=True)
    mask = torch.tensor([[False, True]])
    mae_loss(pred, image, mask, torch.ones(1, 4, 8, 4), patch_vox=4).backward()
    assert image.grad is not None and pred.grad is not None
    assert (image.grad[:, :, :, :4] == 0).all() and (image.grad[:, :, :, 4:] != 0).any()
    assert (pred.grad[:, 0] == 0).all() and (pred.grad[:, 1] != 0).all()


def test_air_noise_below_the_floor_asks_for_little() -> None:
    # 5 HU of noise under a floor of 20 HU leaves targets of variance 1 / 16.
    image = 0.01 + torch.randn(1, 1, 16, 32, 16) * 5 / 1400
    mask, weight = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 16, 32, 16)
    assert mae_loss(torch.zeros(1, 2, 4096), image, mask, weight, patch_vox=16).item() == pytest.approx(1 / 16, rel=0.1)
