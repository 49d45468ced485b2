from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lungssl_ops.dispatch import Backend, forced
from lungssl_ops.transformer import Affine, Rotation, _attention, residual_attention, residual_mlp
from lungssl_ops.transformer.attention import LONGEST
from lungssl_ops.transformer.reference import rotate
from torch import Tensor, nn

ONE = torch.zeros(1)
BACKENDS = _attention.available(ONE)
FAST = [backend for backend in BACKENDS if backend != "reference"]
DIM, HEADS, HIDDEN = 42, 3, 70
COUNTS = [torch.Size([2, 7]), torch.Size([3, 5])]
"""Odd, and longer than a vector only where a test says so."""


def affine(to: int, size: int | None = None, *, dtype: torch.dtype = torch.float32) -> Affine:
    weight = torch.randn(to, dtype=dtype) if size is None else torch.randn(to, size, dtype=dtype) * size**-0.5
    return Affine(weight.requires_grad_(), torch.randn(to, dtype=dtype).requires_grad_())


def rotations(counts: list[torch.Size], pairs: int, *, each: bool, dtype: torch.dtype) -> list[Rotation]:
    angles = [torch.randn(b if each else 1, t, pairs, dtype=dtype) for b, t in counts]
    return [(angle.cos(), angle.sin()) for angle in angles]


Inputs = tuple[Tensor, Affine, Affine, Affine]


def inputs(kind: str, counts: list[torch.Size], *, dim: int = DIM, dtype: torch.dtype = torch.float32) -> Inputs:
    rows = torch.randn(sum(b * t for b, t in counts), dim, dtype=dtype).requires_grad_()
    first, second = ((3 * dim, dim), (dim, dim)) if kind == "attention" else ((HIDDEN, dim), (dim, HIDDEN))
    return rows, affine(dim, dtype=dtype), affine(*first, dtype=dtype), affine(*second, dtype=dtype)


def call(kind: str, counts: list[torch.Size], rotation: list[Rotation] | None) -> Callable[..., Tensor]:
    if kind == "mlp":
        return partial(residual_mlp, counts=counts)
    return partial(residual_attention, counts=counts, heads=HEADS, rotation=rotation)


def found(function: Callable[..., Tensor], given: Inputs, scale: Tensor | None, **options: object) -> list[Tensor]:
    """The result and the gradients of all that has one."""
    leaves = [given[0], *(part for layer in given[1:] for part in layer), *([] if scale is None else [scale])]
    result = function(*given, scale=scale, **options)
    return [result, *torch.autograd.grad(result.float().sin().sum(), leaves)]


def exactly(kind: str, given: Inputs, scale: Tensor | None, rotation: list[Rotation] | None) -> list[Tensor]:
    """By the definition in float64."""
    rows, *layers = given
    exact = (rows.detach().double().requires_grad_(), *(_double(layer) for layer in layers))
    turns = None if rotation is None else [(cos.double(), sin.double()) for cos, sin in rotation]
    by = None if scale is None else scale.detach().double().requires_grad_()
    return found(call(kind, COUNTS, turns), exact, by, backend="reference")


def _double(layer: Affine) -> Affine:
    return Affine(*(part.detach().double().requires_grad_() for part in layer))


def _errors(some: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(some, exact, strict=True)]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("scaled", ["all", "each", "none"])
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_odd_sizes_agree_with_the_definition_in_every_gradient(backend: Backend, scaled: str, kind: str) -> None:
    given = inputs(kind, COUNTS)
    scale = {"all": torch.randn(1, DIM), "each": torch.randn(5, DIM), "none": None}[scaled]
    if scale is not None:
        scale[-1] = scale[-1] if scaled == "all" else 0.0  # a dropped sample
        scale.requires_grad_()
    rotation = rotations(COUNTS, 5, each=scaled == "each", dtype=torch.float32) if kind == "attention" else None
    exact = exactly(kind, given, scale, rotation)
    assert max(_errors(found(call(kind, COUNTS, rotation), given, scale, backend=backend), exact)) < 2e-6


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_under_autocast_it_is_no_further_from_the_truth_than_the_definition(backend: Backend, kind: str) -> None:
    given, scale = inputs(kind, COUNTS), torch.randn(5, DIM).requires_grad_()
    rotation = rotations(COUNTS, 7, each=False, dtype=torch.float32)
    exact = exactly(kind, given, scale, rotation)
    errors = []
    for by in (backend, "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = found(call(kind, COUNTS, rotation), given, scale, backend=by)
        assert result[0].dtype == torch.float32
        errors.append(_errors(result, exact))
    fast, plain = errors
    assert max(fast) < 0.05
    assert all(a < 1.3 * b + 1e-3 for a, b in zip(fast, plain, strict=True)), errors


@pytest.mark.parametrize("backend", FAST)
def test_tokens_of_bf16_are_summed_in_float32(backend: Backend) -> None:
    rows, *layers = inputs("attention", COUNTS)
    half = (rows.detach().bfloat16().requires_grad_(), *layers)
    results = [found(call("attention", COUNTS, None), half, None, backend=by) for by in (backend, "reference")]
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("tokens", [1, 17, 64, LONGEST])
def test_any_number_of_tokens(backend: Backend, tokens: int) -> None:
    counts = [torch.Size([1, tokens])]
    given = inputs("attention", counts)
    rotation = rotations(counts, 6, each=True, dtype=torch.float32)
    results = [found(call("attention", counts, rotation), given, None, backend=by) for by in (backend, "reference")]
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("dim", "heads", "pairs"), [(6, 1, 3), (12, 2, 1), (33, 3, 5), (64, 2, 15), (64, 2, 16)])
def test_heads_of_any_width_and_strided_inputs(backend: Backend, dim: int, heads: int, pairs: int) -> None:
    _, norm, joint, out = inputs("attention", COUNTS, dim=dim)
    rows = torch.randn(29, 2 * dim)[:, ::2].requires_grad_()
    strided = Affine(*(torch.stack([part, part], dim=1)[:, 0] for part in norm))
    function = partial(residual_attention, counts=[torch.Size([0, 5]), *COUNTS], heads=heads)
    rotation = rotations([torch.Size([0, 5]), *COUNTS], pairs, each=True, dtype=torch.float32)
    results = []
    for by in (backend, "reference"):
        result = function(rows, strided, joint, out, rotation=rotation, backend=by)
        leaves = [rows, *norm, *joint, *out]
        first = torch.autograd.grad(result.sin().sum(), leaves, retain_graph=True)
        again = torch.autograd.grad(result.sin().sum(), leaves)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
        results.append([result, *first])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_is_torchs_encoder_layer(backend: Backend) -> None:
    torch.manual_seed(1)
    theirs = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.0, "gelu", batch_first=True, norm_first=True)
    tokens = torch.randn(4, 9, DIM)
    expected = theirs(tokens)
    own, counts = theirs.self_attn, [tokens.shape[:2]]
    norm, out, again, widen, narrow = (
        Affine(part.weight, part.bias)
        for part in (theirs.norm1, own.out_proj, theirs.norm2, theirs.linear1, theirs.linear2)
    )
    joint = Affine(own.in_proj_weight, own.in_proj_bias)
    rows = residual_attention(
        tokens.flatten(0, 1), norm, joint, out, counts=counts, heads=HEADS, eps=1e-5, backend=backend
    )
    rows = residual_mlp(rows, again, widen, narrow, counts=counts, eps=1e-5, backend=backend)
    torch.testing.assert_close(rows.unflatten(0, (4, 9)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_do_not_see_each_other_nor_do_samples(backend: Backend) -> None:
    rows, *layers = (part for part in inputs("attention", COUNTS))
    with torch.no_grad():
        together = residual_attention(rows, *layers, counts=COUNTS, heads=HEADS, backend=backend)
        alone = residual_attention(rows[19:24], *layers, counts=[torch.Size([1, 5])], heads=HEADS, backend=backend)
    torch.testing.assert_close(together[19:24], alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", [1, 4])
def test_the_first_tokens_alone_are_those_of_all(backend: Backend, first: int) -> None:
    given, scale = inputs("attention", COUNTS), torch.randn(5, DIM)
    function = call("attention", COUNTS, rotations(COUNTS, 4, each=True, dtype=torch.float32))
    some = function(*given, scale=scale, first=first, backend=backend)
    whole = function(*given, scale=scale, backend=backend)
    kept = [
        part.unflatten(0, count)[:, :first].flatten(0, 1)
        for part, count in zip(whole.split([14, 15]), COUNTS, strict=True)
    ]
    torch.testing.assert_close(some, torch.cat(kept))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(backend: Backend, bad: float) -> None:
    for kind in ("attention", "mlp"):
        rows, *layers = inputs(kind, COUNTS)
        spoiled = rows.detach().clone()
        spoiled[2, 3] = bad
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            result = call(kind, COUNTS, None)(spoiled, *layers, backend=backend)
        assert result[2].isnan().all()
        assert result[14:].isfinite().all()  # another size


@pytest.mark.parametrize("backend", FAST)
def test_results_are_bit_equal_and_do_not_depend_on_the_number_of_threads(backend: Backend) -> None:
    counts = [torch.Size([3, 67])]
    rows, *_ = given = inputs("mlp", counts)
    upstream = torch.randn_like(rows)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            result = residual_mlp(*given, counts=counts, backend=backend)
            results.append([*torch.autograd.grad(result, [rows, *given[1], given[3].bias], upstream)])
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(results[1], results[2], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # torch's products may differ


@pytest.mark.parametrize("backend", FAST)
def test_frozen_weights_get_no_gradient_and_cost_no_product(backend: Backend) -> None:
    rows, norm, joint, out = inputs("attention", COUNTS)
    frozen = [Affine(*(part.detach() for part in layer)) for layer in (norm, joint, out)]
    result = residual_attention(rows, *frozen, counts=COUNTS, heads=HEADS, backend=backend)
    (grad,) = torch.autograd.grad(result.sum(), rows)
    whole = residual_attention(rows, norm, joint, out, counts=COUNTS, heads=HEADS, backend=backend)
    assert torch.equal(grad, torch.autograd.grad(whole.sum(), rows)[0])


def test_what_cpp_cannot_do_is_left_to_the_definition(unchecked: None) -> None:
    given = inputs("mlp", COUNTS)
    expected = residual_mlp(*given, counts=COUNTS, backend="reference")
    with torch.autocast("cpu", dtype=torch.float16):
        assert residual_mlp(*given, counts=COUNTS).isfinite().all()
    exact = inputs("mlp", COUNTS, dtype=torch.float64)
    assert residual_mlp(*exact, counts=COUNTS).dtype == torch.float64
    traced = torch.compile(partial(residual_mlp, counts=COUNTS), fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(*given), expected)
    long = [torch.Size([1, LONGEST + 1])]
    attention = inputs("attention", long)
    with forced(residual_attention="reference"):
        by_definition = residual_attention(*attention, counts=long, heads=HEADS)
    assert torch.equal(residual_attention(*attention, counts=long, heads=HEADS), by_definition)


def test_a_quarter_turn_takes_the_first_channel_of_a_pair_to_the_second() -> None:
    q = torch.tensor([1.0, 0.0, 5.0]).expand(1, 1, 1, 3)
    turned = rotate(q, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    assert turned.flatten().tolist() == [0.0, 1.0, 5.0]


def test_the_rotations_gradient_is_turned_back() -> None:
    angle = torch.rand(2, 5, 3, dtype=torch.float64)
    q = torch.randn(2, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q: rotate(q, angle.cos(), angle.sin()), [q])
    with torch.no_grad():
        turned = rotate(q, angle.cos(), angle.sin())
        torch.testing.assert_close(rotate(turned, angle.cos(), -angle.sin()), q)


def test_the_definitions_gradients_are_those_of_differences() -> None:
    counts = [torch.Size([1, 3]), torch.Size([2, 2])]
    for kind in ("attention", "mlp"):
        rows, *layers = inputs(kind, counts, dim=6, dtype=torch.float64)
        scale = torch.randn(3, 6, dtype=torch.float64).requires_grad_()
        flat = [part for layer in layers for part in layer]

        def function(rows: Tensor, scale: Tensor, *flat: Tensor, kind: str = kind) -> Tensor:
            layers = [Affine(*flat[i : i + 2]) for i in (0, 2, 4)]
            return call(kind, counts, None)(rows, *layers, scale=scale, backend="reference")

        assert torch.autograd.gradcheck(function, (rows, scale, *flat))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heads": 5}, "42 channels don't split into 5 heads"),
        ({"counts": [torch.Size([2, 7])]}, r"29 rows for \[torch.Size\(\[2, 7\]\)\]"),
        ({"scale": torch.ones(4, DIM)}, "scale has 4 rows for 5 samples"),
        ({"first": 8}, "first 8 of 7 tokens"),
        ({"rotation": [(torch.ones(1, 7, 8),) * 2, (torch.ones(1, 5, 8),) * 2]}, "8 pairs for heads of 14 channels"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, object], message: str) -> None:
    given = inputs("attention", COUNTS)
    with pytest.raises(ValueError, match=message):
        residual_attention(*given, **({"counts": COUNTS, "heads": HEADS} | changed))
    rows, norm, joint, _ = given
    with pytest.raises(ValueError, match=r"out has a weight of \(42, 41\)"):
        residual_attention(rows, norm, joint, affine(DIM, DIM - 1), counts=COUNTS, heads=HEADS)
    with pytest.raises(ValueError, match=r"norm of \(41,\) for tokens of 42 channels"):
        residual_mlp(rows, affine(DIM - 1), affine(HIDDEN, DIM), affine(DIM, HIDDEN), counts=COUNTS)


def test_the_mlp_is_what_its_layers_give() -> None:
    rows, norm, widen, narrow = inputs("mlp", COUNTS)
    scale = torch.randn(1, DIM)
    by_hand = rows + scale * F.linear(F.gelu(F.linear(F.layer_norm(rows, (DIM,), *norm, 1e-6), *widen)), *narrow)
    torch.testing.assert_close(residual_mlp(rows, norm, widen, narrow, counts=COUNTS, scale=scale), by_hand)
