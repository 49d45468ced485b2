import pytest
import torch
import torch.distributed as dist
from lungssl_ops.ema import ema_update_
from lungssl_ops.ema.reference import ema_update_reference_
from torch import Tensor


def _parameters(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (7,), (), (0, 4), (2, 3, 1, 5)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return [*tensors, torch.randn(5, 3, generator=generator).T]


def test_a_constant_student_gives_the_closed_form() -> None:
    # t_n - s = (t_0 - s) * product of the momenta
    (teacher,), (student,) = [torch.tensor([2.0, -3.0])], [torch.tensor([0.5, 0.25])]
    expected, product = teacher.clone(), 1.0
    for momentum in (0.9, 0.95, 0.99, 0.999):
        ema_update_([teacher], [student], momentum)
        product *= momentum
    torch.testing.assert_close(teacher, student + (expected - student) * product, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996])
def test_agrees_with_the_loop(momentum: float) -> None:
    ours, loop, student = _parameters(0), _parameters(0), _parameters(1)
    ema_update_(ours, student, momentum)
    ema_update_reference_(loop, student, momentum)
    for a, b in zip(ours, loop, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_momentum_one_keeps_every_bit() -> None:
    teacher, before = _parameters(0), _parameters(0)
    ema_update_(teacher, _parameters(1), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(teacher, before, strict=True))


def test_needs_no_gradient_and_leaves_the_student_alone() -> None:
    teacher, student = [torch.ones(3)], [torch.zeros(3, requires_grad=True)]
    ema_update_(teacher, student, 0.5)
    assert not teacher[0].requires_grad and torch.equal(student[0], torch.zeros(3))


def test_a_half_precision_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kept in float32, got torch.bfloat16; call .float\(\)"):
        ema_update_([torch.ones(2).bfloat16()], [torch.ones(2).bfloat16()], 0.99)


def test_momentum_and_lists_are_checked() -> None:
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got 1.5"):
        ema_update_([torch.ones(2)], [torch.ones(2)], 1.5)
    with pytest.raises(ValueError, match="got 1 and 2 tensors"):
        ema_update_([torch.ones(2)], [torch.ones(2), torch.ones(2)], 0.5)


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")
def test_what_ranks_share_out_is_moved_in_its_parts() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        (expected, *_), (student, *_) = _parameters(0), _parameters(1)
        parts = [distribute_tensor(one, mesh, [Shard(0)]) for one in (expected.clone(), student)]
        ema_update_([parts[0]], [parts[1]], 0.3)
        ema_update_([expected], [student], 0.3)
        assert torch.equal(parts[0].full_tensor(), expected)
        with pytest.raises(ValueError, match="shared out over the ranks alike; shard both, or none"):
            ema_update_([parts[0]], [distribute_tensor(student, mesh, [Replicate()])], 0.3)
        with pytest.raises(ValueError, match="shared out over the ranks alike; shard both, or none"):
            ema_update_([parts[0]], [student], 0.3)
    finally:
        dist.destroy_process_group()
