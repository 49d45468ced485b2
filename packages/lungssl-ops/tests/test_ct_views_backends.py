"""The random stream, and that all backends give the same views."""

import importlib
import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from lungssl_ops.cpp import library, pointer
from lungssl_ops.ct_views import (
    SOURCE,
    ViewTable,
    _views,
    ct_views,
    mask_views,
    view_affine,
    view_coords_mm,
)
from lungssl_ops.ct_views.philox import normals, philox4x32
from lungssl_ops.dispatch import Backend
from lungssl_ops.patches import patchify
from torch import Tensor

GPU = "cuda" if torch.cuda.is_available() else "cpu"
AVAILABLE = {b for device in ("cpu", GPU) for b in _views.available(torch.zeros(1, dtype=torch.int16, device=device))}
BACKENDS = [backend for backend in get_args(Backend) if backend in AVAILABLE]
FAST = [backend for backend in BACKENDS if backend != "reference"]
KNOWN_WORDS = [
    # Counter, key, words: tests/kat_vectors of the authors' Random123, philox4x32 with 10 rounds.
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

if "triton" in BACKENDS:
    import triton
    import triton.language as tl

    @triton.jit
    def _words_kernel(seed, out, COUNT: tl.constexpr):  # noqa: ANN001, ANN202
        at = tl.arange(0, COUNT)
        words = tl.randint4x(tl.load(seed), at)
        for k in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
            tl.store(out + 4 * at + k, words[k].to(tl.uint32, bitcast=True).to(tl.int64))


def _place(backend: Backend) -> str:
    """Where a backend is tested; Triton's interpreter runs on the CPU."""
    return GPU if backend == "triton" else "cpu"


def _words(text: str) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


def _table(views: int, size: tuple[int, int, int], volumes: list[Tensor], *, zoom: float, nodes: int) -> ViewTable:
    """General views, around the middle of their volumes and partly outside."""
    generator = torch.Generator().manual_seed(0)
    volume = torch.arange(views) % len(volumes)
    middle = torch.stack([torch.tensor(volumes[int(i)].shape[::-1]) / 2 for i in volume])
    matrix = torch.linalg.qr(torch.randn(views, 3, 3, generator=generator))[0]
    return ViewTable(
        volume=volume,
        affine=view_affine(size, middle + torch.randn(views, 3, generator=generator), zoom * matrix),
        lattice=torch.randn(views, 3, nodes, nodes, nodes, generator=generator) if nodes else None,
        window_hu=torch.tensor([[-1000.0, 400.0]]) + 50 * torch.randn(views, 1, generator=generator),
        shift_hu=10 * torch.randn(views, generator=generator),
        gamma=0.7 + torch.rand(views, generator=generator),
        noise_hu=25 * torch.rand(views, generator=generator),
        seed=torch.randint(-(2**62), 2**62, (views,), generator=generator),
    )


def _last(table: ViewTable) -> ViewTable:
    """The table's last row."""

    def last(column: Tensor | None) -> Tensor | None:
        return None if column is None else column[-1:]

    return ViewTable(
        volume=table.volume[-1:],
        affine=table.affine[-1:],
        lattice=last(table.lattice),
        window_hu=last(table.window_hu),
        shift_hu=last(table.shift_hu),
        gamma=last(table.gamma),
        noise_hu=last(table.noise_hu),
        seed=last(table.seed),
    )


def _volumes(*sizes: tuple[int, int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-1024, 600, size, generator=generator, dtype=torch.int16) for size in sizes]


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_WORDS)
def test_philox_gives_the_words_its_authors_publish(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = _words(counter)
    k0, k1 = _words(key)
    assert " ".join(f"{int(word):08x}" for word in philox4x32((c0, c1, c2, c3), (k0, k1))) == expected
    if "cpp" in BACKENDS:
        given = [torch.tensor([int(word, 16) for word in text.split()]).to(torch.uint32) for text in (counter, key)]
        words = torch.zeros(4, dtype=torch.uint32)
        library(SOURCE).philox_words(pointer(given[0]), pointer(given[1]), pointer(words))
        assert " ".join(f"{word:08x}" for word in words.tolist()) == expected


@pytest.mark.parametrize("seed", [0, 2**62 + 12345, -3])
def test_the_words_are_those_of_triton(seed: int) -> None:
    if "triton" not in BACKENDS:
        pytest.skip("Triton can't run here")
    out = torch.empty(64, 4, dtype=torch.int64, device=GPU)
    _words_kernel[(1,)](torch.tensor([seed], device=GPU), out, COUNT=64)  # pyright: ignore[reportArgumentType]
    zero = torch.zeros(64, dtype=torch.int64)
    low, high = (torch.tensor((seed >> bits) & 0xFFFFFFFF) for bits in (0, 32))
    expected = torch.stack(philox4x32((torch.arange(64), zero, zero, zero), (low, high)), 1)
    assert torch.equal(out.cpu(), expected)


def test_the_numbers_are_normal_and_unrelated() -> None:
    sample = normals(torch.tensor([1, 2]), 200_000, torch.float64)
    spread = 1 / math.sqrt(400_000)
    assert abs(sample.mean().item()) < 4 * spread
    assert abs(sample.var().item() - 1) < 4 * spread * math.sqrt(2)
    assert abs(sample.pow(4).mean().item() - 3) < 4 * spread * math.sqrt(96)
    assert sample.abs().max() < 5.77
    below = (sample < torch.tensor([-1.959964, -0.674490, 0.0, 1.281552])[:, None, None]).double().mean((1, 2))
    torch.testing.assert_close(below, torch.tensor([0.025, 0.25, 0.5, 0.9]).double(), rtol=0, atol=4 * 0.5 * spread)
    for lag in (1, 2, 3, 4):
        assert abs((sample[:, lag:] * sample[:, :-lag]).mean().item()) < 4 * spread
    assert abs((sample[0] * sample[1]).mean().item()) < 4 * math.sqrt(2) * spread


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_noise_is_that_of_the_definition_to_a_millionth(backend: Backend) -> None:
    size, seed = (3, 5, 131), torch.tensor([2**61 + 5])
    table = ViewTable(
        volume=torch.tensor([0]),
        affine=torch.eye(3, 4)[None],
        window_hu=torch.tensor([[-8.0, 8.0]]),
        noise_hu=torch.tensor([1.0]),
        seed=seed,
    )
    volume = torch.zeros(1, 1, 1, 1, dtype=torch.int16, device=_place(backend))
    found = 16 * ct_views(volume, table, size, fill_hu=0.0, backend=backend).cpu().double().flatten() - 8
    expected = normals(seed, 3 * 5 * 131, torch.float64)[0]
    # The noise itself to 1e-6, and 16 x half a unit in the last place of numbers below 1.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("size", "fill_hu", "zoom", "nodes"),
    [
        ((5, 7, 9), -1000.0, 1.0, 4),
        ((5, 7, 9), None, 0.7, 2),
        ((4, 3, 131), -1000.0, 0.2, 5),  # longer than the C++ kernel's row buffer
        ((3, 4, 5), None, 2.2, 3),
        ((3, 4, 6), -200.0, 1.9, 0),
        ((1, 1, 1), -1000.0, 1.0, 2),
        ((7, 1, 2), None, 1.0, 0),
    ],
)
def test_views_and_masks_agree_with_the_definition_in_float64(
    backend: Backend, size: tuple[int, int, int], fill_hu: float | None, zoom: float, nodes: int
) -> None:
    volumes = _volumes((9, 11, 13), (14, 8, 10), (1, 6, 7), (8, 8, 1))
    table = _table(4, size, volumes, zoom=zoom, nodes=nodes)
    moved = [v.to(_place(backend)) for v in volumes]
    expected = ct_views(volumes, table, size, fill_hu=fill_hu, dtype=torch.float64)
    found = ct_views(moved, table, size, fill_hu=fill_hu, backend=backend)
    assert _error(found.cpu(), expected) < 1e-5
    masks = [(v > -300).byte() * 3 for v in moved]
    for rule in ("nearest", "wholly"):
        same = mask_views(masks, table, size, rule=rule, backend=backend).cpu() == mask_views(
            [m.cpu() for m in masks], table, size, rule=rule, backend="reference"
        )
        # A position within rounding of the border between two voxels may fall to either.
        assert same.float().mean() > 0.99


@pytest.mark.parametrize("backend", BACKENDS)
def test_patches_are_the_patches_of_the_view(backend: Backend) -> None:
    volumes = [v.to(_place(backend)) for v in _volumes((9, 11, 13))]
    for size, patch in (((4, 6, 10), (2, 3, 5)), ((3, 4, 8), (3, 1, 4)), ((2, 2, 134), (1, 2, 67))):
        table = _table(2, size, volumes, zoom=1.0, nodes=3)
        view = ct_views(volumes, table, size, backend=backend)
        assert torch.equal(ct_views(volumes, table, size, patch_vox=patch, backend=backend), patchify(view, patch))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_float32_view_rounded(backend: Backend, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter rounds bfloat16 wrongly (triton#11584): needs a GPU")
    volumes, size = [v.to(_place(backend)) for v in _volumes((9, 11, 13))], (3, 5, 7)
    table = _table(2, size, volumes, zoom=1.0, nodes=4)
    found = ct_views(volumes, table, size, dtype=dtype, backend=backend)
    assert torch.equal(found, ct_views(volumes, table, size, backend=backend).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_depends_on_its_own_row_only(backend: Backend) -> None:
    volumes, size = [v.to(_place(backend)) for v in _volumes((9, 11, 13), (5, 6, 7))], (3, 5, 7)
    table = _table(3, size, volumes, zoom=1.2, nodes=4)
    last = _last(table)
    whole = ct_views(volumes, table, size, backend=backend)
    assert torch.equal(ct_views(volumes, last, size, backend=backend), whole[2:])
    reseeded = ct_views(volumes, replace(last, seed=torch.tensor([1])), size, backend=backend)
    assert not torch.equal(reseeded, whole[2:])


@pytest.mark.parametrize("backend", FAST)
def test_repeats_are_bit_equal_with_any_number_of_threads(backend: Backend) -> None:
    volumes, size = [v.to(_place(backend)) for v in _volumes((9, 11, 13))], (3, 5, 33)
    table = _table(3, size, volumes, zoom=1.0, nodes=4)
    first = ct_views(volumes, table, size, backend=backend)
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        again = ct_views(volumes, table, size, backend=backend)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first, again)


@pytest.mark.parametrize("backend", FAST)
def test_volumes_need_not_be_contiguous_nor_in_one_tensor(backend: Backend) -> None:
    stored = torch.stack(_volumes((9, 11, 13), (9, 11, 13))).to(_place(backend))
    batch, size = stored.transpose(1, 3)[:, ::2, 1:], (3, 4, 5)
    table = _table(2, size, list(batch), zoom=1.0, nodes=4)
    found = ct_views(batch, table, size, backend=backend)
    assert torch.equal(found, ct_views(list(batch.contiguous()), table, size, backend=backend))


@pytest.mark.parametrize("backend", FAST)
def test_every_element_of_the_result_is_written(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes, size = [v.to(_place(backend)) for v in _volumes((9, 11, 13))], (3, 5, 131)
    table = _table(2, size, volumes, zoom=0.3, nodes=4)
    masks, eye = [torch.ones_like(v, dtype=torch.uint8) for v in volumes], torch.eye(3, 4, device=_place(backend))
    empty = torch.empty

    def poisoned(*shape: object, **options: object) -> Tensor:
        tensor = empty(*shape, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 77)

    module = importlib.import_module(f"lungssl_ops.ct_views.{'cpu' if backend == 'cpp' else backend}")
    with monkeypatch.context() as patch:
        patch.setattr(module.torch, "empty", poisoned)
        results = [
            ct_views(volumes, table, size, backend=backend),
            ct_views(volumes, table, size, patch_vox=(3, 5, 1), backend=backend),
        ]
        mask = mask_views(masks, table, size, backend=backend)
        coords = view_coords_mm(table, size, eye.repeat(2, 1, 1), backend=backend)
    assert all(result.isfinite().all() for result in (*results, coords))
    assert set(mask.unique().tolist()) <= {0, 1}


@pytest.mark.parametrize("backend", FAST)
def test_the_operators_keep_torchs_rules(backend: Backend) -> None:
    volumes, size = [v.to(_place(backend)) for v in _volumes((5, 6, 7), (4, 4, 4))], [2, 3, 4]
    packed = _table(2, (2, 3, 4), volumes, zoom=1.0, nodes=2).packed()
    ops = torch.ops.lungssl_ops
    views = getattr(ops, f"ct_views_{backend}").default
    torch.library.opcheck(views, (volumes, *packed, size, [], -1000.0, True, torch.float32))
    torch.library.opcheck(views, (volumes, *packed, size, [1, 3, 2], None, False, torch.float32))
    masks = [(v > 0).byte() for v in volumes]
    torch.library.opcheck(getattr(ops, f"mask_views_{backend}").default, (masks, *packed, size, True, True))
    coords, eye = getattr(ops, f"view_coords_mm_{backend}").default, torch.eye(3, 4, device=_place(backend))
    torch.library.opcheck(coords, (packed.numbers, packed.lattice, size, eye.repeat(2, 1, 1)))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("backend", FAST)
def test_compiles_as_one_graph(backend: Backend) -> None:
    volumes, size = [v.to(_place(backend)) for v in _volumes((5, 6, 7))], (2, 3, 4)
    table = _table(2, size, volumes, zoom=1.0, nodes=2)

    def step(volume: Tensor) -> Tensor:
        return 2 * ct_views(volume, table, size, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    batch = torch.stack(volumes)
    assert torch.equal(compiled(batch), step(batch))


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    volumes = _volumes((2, 2, 2))
    table = _table(1, (1, 1, 1), volumes, zoom=1.0, nodes=0)
    with pytest.raises(RuntimeError, match="ct_views has no backend 'compiled'"):
        ct_views(volumes, table, (1, 1, 1), backend="compiled")
