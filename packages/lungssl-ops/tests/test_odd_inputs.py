"""What a user may hand in by mistake: refused with what was expected, or documented and finite."""

import os
import signal
from collections.abc import Callable

import pytest
import torch
from lungssl_ops.cost_volume import cost_volume, inverse_consistent
from lungssl_ops.ct_views import ViewTable, ct_views, mask_views, view_affine
from lungssl_ops.ema import ema_update_
from lungssl_ops.lncc import lncc
from lungssl_ops.mind import mind_ssc
from lungssl_ops.multicrop_ce import multicrop_cross_entropy
from lungssl_ops.patches import embed_patches, masked_patch_mse
from lungssl_ops.prototype_ce import mean_logits, prototype_cross_entropy, sinkhorn_bias
from lungssl_ops.warp import jacobian_determinant

CUBE = torch.zeros(1, 1, 4, 4, 4)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "weights that would broadcast": (
        lambda: multicrop_cross_entropy(torch.randn(3, 4, 9), torch.rand(2, 4, 9), torch.ones(3, 2, 1)),
        r"weight \(3, 2, 1\); expected .* \[s, t\]",
    ),
    "one row of weights": (
        lambda: multicrop_cross_entropy(torch.randn(3, 4, 9), torch.rand(2, 4, 9), torch.ones(1, 2)),
        r"weight \(1, 2\); expected",
    ),
    "no samples": (
        lambda: multicrop_cross_entropy(torch.randn(3, 0, 9), torch.rand(2, 0, 9), torch.ones(3, 2)),
        "none of size 0",
    ),
    "a misspelt norm": (
        lambda: masked_patch_mse(
            torch.zeros(1, 2, 8),
            torch.zeros(1, 2, 8),
            torch.ones(1, 2, dtype=torch.bool),
            torch.ones(1, 2, 8),
            norm="Patch",  # pyright: ignore[reportArgumentType]
        ),
        "norm 'Patch' is unknown; known are 'patch' and 'none'",
    ),
    "channels of a patch embedding": (
        lambda: embed_patches(torch.zeros(1, 2, 4, 4, 4), torch.zeros(8, 1, 2, 2, 2)),
        "with the same c",
    ),
    "a single row of logits": (lambda: mean_logits(torch.zeros(8), torch.zeros(4, 8)), "at least one axis before"),
    "a single prototype": (
        lambda: sinkhorn_bias(torch.zeros(2, 8), torch.zeros(8), temperature=0.1),
        r"prototypes of \(8,\)",
    ),
    "no room": (
        lambda: sinkhorn_bias(torch.zeros(2, 8), torch.zeros(4, 8), temperature=0.1, block_bytes=0),
        "block_bytes 0 leaves no room",
    ),
    "an image without a batch": (lambda: mind_ssc(torch.zeros(1, 4, 4, 4)), r"expected \[b, 1, z, y, x\]"),
    "two channels": (lambda: mind_ssc(torch.zeros(1, 2, 4, 4, 4)), r"expected \[b, 1, z, y, x\]"),
    "stored numbers": (lambda: mind_ssc(CUBE.to(torch.int16)), r"torch.int16; .* image.float\(\)"),
    "boxes far away": (lambda: mind_ssc(CUBE, dilation=10**9), "dilation from 1 to 2047 voxels, got 1 and 1000000000"),
    "features without a batch": (
        lambda: cost_volume(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), reach=1),
        r"\[b, c, z, y, x\] of one shape and floating type",
    ),
    "two types of fields": (
        lambda: inverse_consistent(torch.zeros(1, 3, 4, 4, 4), torch.zeros(1, 3, 4, 4, 4, dtype=torch.float64)),
        "of one shape and type",
    ),
    "two components": (lambda: jacobian_determinant(torch.zeros(1, 2, 4, 4, 4)), r"expected \[b, 3, z, y, x\]"),
    "a window of 9.0": (lambda: lncc(CUBE, CUBE, window=9.0), "whole, odd window"),  # pyright: ignore
    "a window of 2^31": (lambda: lncc(CUBE, CUBE, window=2**31 + 1), "whole, odd window of 3 to 4095"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_with_what_was_expected(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        unchecked(call)


def unchecked(call: Callable[[], object]) -> object:
    """Without the type checks of the tests, which users don't have."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        return call()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_an_infinite_lattice_is_refused() -> None:
    lattice = torch.zeros(1, 3, 4, 4, 4)
    lattice[0, 1, 2, 3, 1] = -torch.inf
    affine = view_affine((4, 4, 4), torch.full((1, 3), 2.0), torch.eye(3)[None])
    table = ViewTable(volume=torch.zeros(1, dtype=torch.int64), affine=affine, lattice=lattice)
    for call in (
        lambda: ct_views(torch.zeros(1, 8, 8, 8, dtype=torch.int16), table, (4, 4, 4)),
        lambda: mask_views(torch.zeros(1, 8, 8, 8, dtype=torch.uint8), table, (4, 4, 4)),
    ):
        with pytest.raises(ValueError, match="view 0 of the table has an infinite lattice"):
            call()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_bias_of_minus_infinity_takes_a_prototype_out(backend: str) -> None:
    torch.manual_seed(0)
    student, teacher, prototypes = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(5, 4)
    bias = torch.zeros(5)
    bias[2] = -torch.inf
    temperatures = {"student_temperature": 0.5, "teacher_temperature": 0.4}
    loss, entropy = prototype_cross_entropy(
        student, teacher, prototypes, prototypes, torch.ones(2, 2), bias=bias, backend=backend, **temperatures
    )  # pyright: ignore
    probs = torch.softmax(teacher @ prototypes.T / 0.4 + bias, -1)
    expected = -(probs[None] * torch.log_softmax(student @ prototypes.T / 0.5, -1)[:, None]).sum(-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, torch.special.entr(probs).sum(-1), rtol=1e-5, atol=1e-5)


def test_an_average_of_momentum_one_or_zero_copies_whatever_the_other_holds() -> None:
    kept, bad = torch.tensor([1.0, 2.0]), torch.tensor([torch.nan, torch.inf])
    teacher = [kept.clone()]
    ema_update_(teacher, [bad], 1.0)
    assert torch.equal(teacher[0], kept)
    teacher = [bad.clone()]
    ema_update_(teacher, [kept], 0.0)
    assert torch.equal(teacher[0], kept)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_kernels_run_in_a_forked_process() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        image, other = torch.randn(1, 1, 24, 24, 24), torch.randn(1, 1, 24, 24, 24)
        here = lncc(image, other).item()  # libgomp's threads are there from now on
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # a kernel that waits for threads of the parent never ends
            os._exit(0 if abs(lncc(image, other).item() - here) < 1e-6 else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)
