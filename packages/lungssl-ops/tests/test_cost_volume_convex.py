import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lungssl_ops.cost_volume import _coupled_argmin, cost_volume, coupled_convex, label_displacements
from lungssl_ops.cost_volume.reference import coupled_argmin_reference
from lungssl_ops.dispatch import Backend
from torch import Tensor

BACKENDS = _coupled_argmin.available(torch.zeros(1))
FAST = [backend for backend in BACKENDS if backend != "reference"]


def _costs(reach: int, *grid: int, levels: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whole numbers below `levels`: many labels are equally good."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (2, (2 * reach + 1) ** 3, *grid), generator=generator).to(dtype)


def test_a_labelling_step_equals_the_sum_computed_label_by_label() -> None:
    cost, smooth = _costs(1, 2, 3, 4), torch.randn(2, 3, 2, 3, 4)
    found = coupled_argmin_reference(cost, smooth, weight=0.3)
    displacements = label_displacements(1)
    for b in range(2):
        for voxel in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
            s = smooth[(b, slice(None), *voxel)].double()
            sums = [c + 0.3 * (d.double() - s).square().sum() for c, d in zip(cost[b], displacements, strict=True)]
            values = torch.stack([v if v.ndim == 0 else v[voxel] for v in sums])
            assert found[(b, slice(None), *voxel)].tolist() == displacements[values.argmin()].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_lowest_of_equal_labels_wins(backend: Backend) -> None:
    flat = torch.zeros(1, 27, 1, 2, 3)
    step = _coupled_argmin(flat, backend=backend)
    # Without a penalty all 27 labels are equal; with one around the middle, the nearest is alone.
    nothing = torch.zeros(1, 3, 1, 2, 3)
    assert (step(flat, nothing, weight=0.0) == -1).all()
    assert (step(flat, nothing, weight=1.0) == 0).all()
    # Half way between two labels on each axis, eight are equal: the lowest has the smaller x, y and z.
    assert (step(flat, nothing + 0.5, weight=1.0) == 0).all()
    assert (step(flat, nothing - 0.5, weight=1.0) == -1).all()
    assert (step(flat + torch.inf, nothing, weight=1.0) == -1).all()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_all_backends_give_the_same_bits_where_many_labels_are_equal(backend: Backend, dtype: torch.dtype) -> None:
    costs = _costs(1, 3, 3, 5, dtype=dtype)
    expected = coupled_convex(costs, backend="reference")
    assert torch.equal(coupled_convex(costs, backend=backend), expected)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="no C++ compiler")
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    levels=st.sampled_from([2, 5, 1000]),
    weight=st.floats(0, 10),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 23)),
)
def test_the_labels_of_c_plus_plus_are_the_definitions(
    seed: int, levels: int, weight: float, grid: tuple[int, int, int]
) -> None:
    cost = _costs(2, *grid, levels=levels, seed=seed) / 7
    smooth = 2 * torch.rand(2, 3, *grid, generator=torch.Generator().manual_seed(seed)) - 1
    step = _coupled_argmin(cost, backend="cpp")
    assert torch.equal(step(cost, smooth, weight=weight), coupled_argmin_reference(cost, smooth, weight=weight))


@pytest.mark.skipif("cpp" not in BACKENDS, reason="no C++ compiler")
def test_grids_of_more_than_one_block_agree_with_the_definition() -> None:
    cost = _costs(1, 9, 11, 13) / 3  # 1,287 voxels: two blocks of 512 and a rest
    assert torch.equal(coupled_convex(cost, backend="cpp"), coupled_convex(cost, backend="reference"))


def test_a_smooth_warp_is_found_within_one_voxel() -> None:
    generator = torch.Generator().manual_seed(0)
    size = (16, 18, 20)
    features = F.avg_pool3d(torch.randn(1, 12, *size, generator=generator), 3, stride=1, padding=1) * 3
    z, y, x = torch.meshgrid(*(torch.linspace(0, torch.pi, n) for n in size), indexing="ij")
    bump = z.sin() * y.sin() * x.sin()
    field = torch.stack([2.0 * bump, -1.5 * bump, 1.0 * bump])  # x y z, voxels
    # fixed(v) = moving(v + u(v)).
    voxels = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in size), indexing="ij")[::-1])
    scale = torch.tensor([2 / (n - 1) for n in reversed(size)])
    grid = ((voxels + field).movedim(0, -1) * scale - 1)[None]
    fixed = F.grid_sample(features, grid, align_corners=True, padding_mode="border")
    found = coupled_convex(cost_volume(fixed, features, reach=3))[0]
    error = (found - field).norm(dim=0)
    assert error.mean() < 0.5 and error.max() < 1.0
    assert field.norm(dim=0).max() > 2.5


def test_zero_padding_pulls_a_constant_field_to_zero_at_the_border_and_replication_does_not() -> None:
    cost = torch.ones(1, 27, 4, 4, 4)
    cost[:, 14] = 0  # d = (1, 0, 0)
    constant = torch.tensor([1.0, 0, 0])[None, :, None, None, None].expand(1, 3, 4, 4, 4)
    torch.testing.assert_close(coupled_convex(cost), constant)
    zeros = coupled_convex(cost, weights=(), padding="zero")
    torch.testing.assert_close(zeros[0, :, 0, 0, 0], torch.tensor([8 / 27, 0, 0]))


@pytest.mark.parametrize("backend", FAST)
def test_every_displacement_is_written(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    cost, smooth = _costs(1, 1, 3, 7), torch.rand(2, 3, 1, 3, 7)
    step = _coupled_argmin(cost, backend=backend)
    expected = step(cost, smooth, weight=0.5)
    empty = torch.empty_like

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        return empty(*args, **kwargs).fill_(torch.nan)  # pyright: ignore[reportCallIssue, reportArgumentType]

    monkeypatch.setattr(torch, "empty_like", poisoned)
    assert torch.equal(step(cost, smooth, weight=0.5), expected)


@pytest.mark.parametrize("backend", FAST)
def test_costs_that_are_not_contiguous_and_two_threads_give_the_same_bits(backend: Backend) -> None:
    cost = _costs(1, 5, 3, 2).transpose(2, 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    found = coupled_convex(cost, backend=backend)
    torch.set_num_threads(1)
    again = coupled_convex(cost.contiguous(), backend=backend)
    torch.set_num_threads(threads)
    assert torch.equal(found, again)


@pytest.mark.parametrize("backend", FAST)
def test_the_custom_op_keeps_its_promises_to_torch(backend: Backend) -> None:
    module = importlib.import_module(f"lungssl_ops.cost_volume.{'cpu' if backend == 'cpp' else backend}")
    torch.library.opcheck(module._argmin, (torch.rand(1, 27, 1, 2, 3), torch.rand(1, 3, 1, 2, 3), 0.1))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"27, 125, 343, ...; got 64"):
        coupled_convex(torch.rand(1, 64, 2, 2, 2))
    with pytest.raises(ValueError, match="detach"):
        coupled_convex(torch.rand(1, 27, 2, 2, 2, requires_grad=True))
    with pytest.raises(ValueError, match=r"non-empty cost, .* got shape \(1, 27, 0, 2, 2\)"):
        coupled_convex(torch.rand(1, 27, 0, 2, 2))
