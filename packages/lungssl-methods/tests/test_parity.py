"""Our losses against those of lightly 1.6.0 (MIT), by values stored in golden/lightly.npz; its maker is beside it.

Where definitions differ, the arguments that make them equal are in the tests. Loss and gradients in float64.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lungssl_methods.contrast import nt_xent
from lungssl_methods.losses import dino_loss, teacher_probs, update_centre
from lungssl_methods.method import LocalGather
from lungssl_methods.regularisers import koleo
from lungssl_methods.variance import barlow_twins, vicreg_terms
from lungssl_ops.multicrop_ce import multicrop_cross_entropy
from torch import Tensor

Golden = dict[str, Tensor]


@pytest.fixture(scope="module")
def golden() -> Golden:
    with np.load(Path(__file__).parent / "golden" / "lightly.npz") as file:
        assert file["versions"][0] == "lightly 1.6.0"
        return {name: torch.from_numpy(file[name]) for name in file.files if name != "versions"}


def _agrees(golden: Golden, name: str, loss: Callable[..., Tensor], inputs: list[str], rtol: float = 1e-9) -> None:
    tensors = [golden[f"{name}/{key}"].clone().requires_grad_() for key in inputs]
    value = loss(*tensors)
    assert value.item() == pytest.approx(golden[f"{name}/loss"].item(), rel=rtol)
    for key, gradient in zip(inputs, torch.autograd.grad(value, tensors), strict=True):
        expected = golden[f"{name}/{key}_grad"]
        # Relative to the largest: entries near 0 are differences of larger ones.
        torch.testing.assert_close(gradient, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@pytest.mark.parametrize(("name", "temperature"), [("nt_xent", 0.5), ("nt_xent_cold", 0.1)])
def test_nt_xent_is_lightlys_where_every_row_is_another_patient(golden: Golden, name: str, temperature: float) -> None:
    patients = torch.arange(6)
    _agrees(golden, name, lambda a, b: nt_xent(a, b, patients, temperature), ["first", "second"])


def test_vicreg_is_lightlys_with_weights_25_25_and_1(golden: Golden) -> None:
    def loss(first: Tensor, second: Tensor) -> Tensor:
        invariance, variance, covariance = vicreg_terms(first, second)
        return 25 * invariance + 25 * variance + covariance

    _agrees(golden, "vicreg", loss, ["first", "second"])


def test_barlow_twins_is_lightlys(golden: Golden) -> None:
    _agrees(golden, "barlow_twins", barlow_twins, ["first", "second"])


def test_koleo_is_lightlys_where_every_row_is_another_patient(golden: Golden) -> None:
    _agrees(golden, "koleo", lambda x: koleo(x, torch.arange(7)), ["x"])


def _dino_targets(golden: Golden, name: str) -> Tensor:
    logits = golden[f"{name}/teacher"] - golden[f"{name}/centre"]
    return torch.softmax(logits / golden["temperatures"][1], dim=-1)


def test_the_multicrop_cross_entropy_is_lightlys_dino_loss_for_views_weighed_1_minus_eye(golden: Golden) -> None:
    targets, weight = _dino_targets(golden, "dino"), 1 - torch.eye(5, 2)
    _agrees(
        golden,
        "dino",
        lambda student: multicrop_cross_entropy(student / golden["temperatures"][0], targets, weight),
        ["student"],
    )


def test_dino_loss_is_lightlys(golden: Golden) -> None:
    student_temperature, teacher_temperature = golden["temperatures"].tolist()
    targets = teacher_probs(golden["dino/teacher"], golden["dino/centre"], teacher_temperature)
    _agrees(
        golden,
        "dino",
        lambda student: dino_loss(student, targets, 1 - torch.eye(5, 2), student_temperature=student_temperature),
        ["student"],
    )


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_the_centre_moves_as_lightlys(golden: Golden, name: str) -> None:
    rows = golden[f"{name}/teacher"].flatten(0, -2)
    count = torch.tensor(float(len(rows)), dtype=torch.float64)
    moved = update_centre(golden[f"{name}/centre"], rows.sum(0), count, momentum=0.9, gather=LocalGather())
    torch.testing.assert_close(moved, golden[f"{name}/centre_after"], rtol=1e-9, atol=1e-12)


def test_ibots_term_is_lightlys_as_dino_weighs_it(golden: Golden) -> None:
    # As `Dino._patch_loss`: the mean over masked images, then times their share, as images without a mask count 0.
    mask = golden["ibot/mask"]
    weight = (1.0 / mask.sum(dim=1).clamp_min(1).double())[:, None].expand_as(mask)[mask]
    share = mask.any(dim=1).double().mean()
    targets = _dino_targets(golden, "ibot")[None]

    def loss(student: Tensor) -> Tensor:
        logits = student[None] / golden["temperatures"][0]
        return share * multicrop_cross_entropy(logits, targets, weight[None, None])

    assert 0 < share < 1
    _agrees(golden, "ibot", loss, ["student"])
