import torch
from lungssl_methods.method import LocalGather
from lungssl_methods.moments import RunningMoments


def test_one_update_standardises_that_batch_without_bias() -> None:
    x = 30 + torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1, 2, 3, 4])
    moments = RunningMoments(5, 0.9)
    assert torch.equal(moments(x), x)
    moments.collect(x)
    moments.update(LocalGather())
    out = moments(x)
    torch.testing.assert_close(out.mean(0), torch.zeros(5), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.std(0, correction=0), torch.ones(5), atol=1e-3, rtol=0)


def test_the_average_is_adams_over_updates() -> None:
    moments = RunningMoments(1, 0.9)
    for value in (2.0, 4.0):
        moments.collect(torch.full((3, 1), value))
        moments.update(LocalGather())
    torch.testing.assert_close(moments.weight(), torch.tensor(1 - 0.9**2, dtype=torch.float64))
    mean = (0.9 * 0.1 * 2 + 0.1 * 4) / (1 - 0.9**2)
    spread = ((0.9 * 0.1 * 4 + 0.1 * 16) / (1 - 0.9**2) - mean**2 + 1e-6) ** 0.5
    torch.testing.assert_close(moments(torch.tensor([[4.0]])), torch.tensor([[(4 - mean) / spread]]))


def test_micro_batches_count_as_one_batch() -> None:
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    whole, parts = RunningMoments(3, 0.9), RunningMoments(3, 0.9)
    whole.collect(x)
    parts.collect(x[:2])
    parts.collect(x[2:])
    for moments in (whole, parts):
        moments.update(LocalGather())
    torch.testing.assert_close(whole.total, parts.total)


def test_rows_that_do_not_count_change_nothing() -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    counted = torch.tensor([True, False, True, True, False, True])
    some, all_of_them = RunningMoments(3, 0.9), RunningMoments(3, 0.9)
    some.collect(torch.where(counted[:, None], x, 1e3), counted)
    all_of_them.collect(x[counted])
    for moments in (some, all_of_them):
        moments.update(LocalGather())
    torch.testing.assert_close(some.total, all_of_them.total)
    before = some.total.clone()
    some.collect(x, torch.zeros(6, dtype=torch.bool))
    some.update(LocalGather())
    assert torch.equal(some.total, before)


def test_a_constant_channel_stays_finite() -> None:
    moments = RunningMoments(2, 0.9)
    moments.collect(torch.ones(4, 2))
    moments.update(LocalGather())
    assert torch.isfinite(moments(torch.ones(4, 2))).all()
