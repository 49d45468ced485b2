"""The teacher's biases against the exponential domain, over blocks, ranks and extremes."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lungssl_ops.prototype_ce import centering_bias, sinkhorn_bias
from torch import Tensor


def _assigned(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """Rows' shares of prototypes as SwAV's paper has them: scale by prototype, then by row (supplement, listing 1)."""
    q = torch.exp(logits / temperature).T
    k, n = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / k
        q = q / q.sum(dim=0, keepdim=True) / n
    return (q * n).T


def _rows(n: int, k: int, d: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 100 + k)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    prototypes = torch.randn(k, d, generator=generator, dtype=torch.float64)
    normalised = torch.nn.functional.normalize
    return normalised(rows, dim=-1).to(dtype), normalised(prototypes, dim=-1).to(dtype)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 11),
    iterations=st.integers(1, 4),
    block_bytes=st.sampled_from([1, 200, 2**20]),
)
def test_its_softmax_is_the_assignment_of_the_exponential_domain(
    n: int, k: int, iterations: int, block_bytes: int
) -> None:
    rows, prototypes = _rows(n, k, 5)
    bias = sinkhorn_bias(rows, prototypes, temperature=0.07, iterations=iterations, block_bytes=block_bytes)
    found = torch.softmax(rows @ prototypes.T / 0.07 + bias, dim=-1)
    torch.testing.assert_close(found, _assigned(rows @ prototypes.T, 0.07, iterations), rtol=1e-10, atol=1e-14)


def test_after_many_iterations_all_prototypes_get_the_same_share() -> None:
    rows, prototypes = _rows(24, 6, 8)
    shares = [
        torch.softmax(rows @ prototypes.T / 0.1 + sinkhorn_bias(rows, prototypes, temperature=0.1, iterations=i), -1)
        for i in (3, 200)
    ]
    for share in shares:
        torch.testing.assert_close(share.sum(dim=1), torch.ones(24, dtype=torch.float64))
    assert (shares[0].sum(dim=0) - 4).abs().max() < 1.5
    torch.testing.assert_close(shares[1].sum(dim=0), torch.full((6,), 4.0, dtype=torch.float64), rtol=1e-6, atol=0)


def test_it_stays_in_float32_and_finite_where_the_exponential_overflows() -> None:
    rows, prototypes = _rows(12, 9, 5)
    rows = rows.view(3, 4, 5) * 20  # logits up to 20: exp(20 / 0.04) is 1e217
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sinkhorn_bias(rows.float(), prototypes.float(), temperature=0.04, block_bytes=100)
    assert found.dtype == torch.float32 and found.isfinite().all()
    exact = sinkhorn_bias(rows, prototypes, temperature=0.04)
    assert (found - exact).norm() / exact.norm() < 1e-5
    assert sinkhorn_bias(rows.bfloat16(), prototypes.bfloat16(), temperature=0.04).dtype == torch.float32


def test_ranks_with_unequal_rows_or_none_agree_with_one_that_has_all() -> None:
    rows, prototypes = _rows(7, 5, 4)
    parts = [rows[:5], rows[5:], rows[:0]]
    barrier, shared, found = threading.Barrier(3), [torch.zeros(5)] * 3, [torch.zeros(5)] * 3

    def rank(i: int) -> None:
        def over_ranks(value: Tensor) -> Tensor:
            shared[i] = value
            barrier.wait(timeout=30)
            result = torch.logsumexp(torch.stack(shared), dim=0)
            barrier.wait(timeout=30)
            return result

        found[i] = sinkhorn_bias(parts[i], prototypes, temperature=0.1, over_ranks=over_ranks)

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = sinkhorn_bias(rows, prototypes, temperature=0.1)
    for bias in found:
        torch.testing.assert_close(bias, expected, rtol=1e-12, atol=1e-12)


_RANK = """
import sys, torch, torch.distributed as dist
from lungssl_ops.prototype_ce import all_reduce_logsumexp
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
values = torch.tensor([[1.0, 500.0, -torch.inf, -torch.inf], [2.0, -500.0, 3.0, -torch.inf]])
torch.save(all_reduce_logsumexp(values[rank]), f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_the_sum_over_ranks_overflows_nowhere_and_skips_ranks_without_rows(tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    # Not by torch's spawn, whose children would have to import this file by a name.
    ranks = [subprocess.Popen([sys.executable, "-c", _RANK, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    expected = torch.tensor([2.0 + torch.log1p(torch.tensor(-1.0).exp()).item(), 500.0, 3.0, -torch.inf])
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)


def test_the_centre_is_subtracted_from_the_logits() -> None:
    logits, centre = torch.randn(3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    found = torch.softmax(logits / 0.04 + centering_bias(centre, 0.04), dim=-1)
    torch.testing.assert_close(found, torch.softmax((logits - centre) / 0.04, dim=-1))
    assert centering_bias(centre.bfloat16(), 0.04).dtype == torch.float32


def test_what_makes_no_sense_is_refused() -> None:
    rows, prototypes = _rows(3, 5, 4)
    with pytest.raises(ValueError, match="sinkhorn_bias needs a finite temperature above 0, got 0"):
        sinkhorn_bias(rows, prototypes, temperature=0.0)
    with pytest.raises(ValueError, match="centering_bias needs a finite temperature above 0, got nan"):
        centering_bias(torch.zeros(5), float("nan"))
    with pytest.raises(ValueError, match="at least 1 iteration, got 0; SwAV and DINOv2 take 3"):
        sinkhorn_bias(rows, prototypes, temperature=0.1, iterations=0)
    with pytest.raises(ValueError, match="needs at least 1 row, got none; without rows use bias=None"):
        sinkhorn_bias(rows[:0], prototypes, temperature=0.1)
