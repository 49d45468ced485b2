"""The prototype cross-entropy beside its rivals: eager (DINOv3's form), attention, chunked linear cross-entropy."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lungssl_ops.measure import Case
from lungssl_ops.prototype_ce import centering_bias, prototype_cross_entropy

STUDENT, TEACHER = 0.1, 0.04
"""Temperatures: DINO's."""


class _Inputs(NamedTuple):
    student: Tensor  # s b d
    teacher: Tensor  # t b d
    student_prototypes: Tensor  # k d
    teacher_prototypes: Tensor
    centre: Tensor  # k
    weight: Tensor  # s t


def cases(*, quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """The gradient of rows and prototypes: iBOT's rows, one view of each, and on a GPU DINO's crops."""
    if quick:
        yield _case(1, 1, 96, 1024, 64, device, compiled=compiled)
    elif device.startswith("cuda"):
        for s, t, b in ((10, 2, 32), (1, 1, 2074), (1, 1, 16589)):
            yield _case(s, t, b, 65536, 256, device, compiled=compiled)
    else:
        yield _case(1, 1, 512, 16384, 256, device, compiled=compiled, stem="prototype_ce")
        yield _case(10, 2, 16, 4096, 256, device, compiled=compiled)


def _case(s: int, t: int, b: int, k: int, d: int, device: str, *, compiled: bool, stem: str = "") -> Case:
    inputs = _inputs(s, t, b, k, d, device)

    def run(loss: Callable[[_Inputs], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(loss(inputs), (inputs.student, inputs.student_prototypes))[1]

    def expected() -> Tensor:
        exact = _Inputs(*(tensor.detach().double() for tensor in inputs))
        exact.student.requires_grad_()
        exact.student_prototypes.requires_grad_()
        # On a GPU all logits of the largest case in float64 would not fit.
        loss = _ours(exact, backend="torch" if device.startswith("cuda") else "reference")
        return torch.autograd.grad(loss, exact.student_prototypes)[0]

    runs = {"ours": run(_ours), "reference": run(partial(_ours, backend="reference")), "eager": run(_eager)}
    if s == t == 1 and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        runs["linear_cross_entropy"] = run(_linear_cross_entropy)
    if device.startswith("cuda"):
        runs |= {"rows": run(partial(_ours, tier="row")), "flash": run(partial(_ours, tier="flash"))}
        runs["flex"] = run(_flex)
    elif s == t == 1:
        runs["sdpa"] = lambda: _sdpa(inputs)
    if compiled:
        runs["compile"] = run(torch.compile(_eager))
    size = f"N{b}_K{k}_D{d}" if s == t == 1 else f"S{s}_T{t}_B{b}_K{k}_D{d}"
    element = inputs.student.element_size()
    ours = dict.fromkeys(("ours", "rows", "flash"), 2e-2 if element == 2 else 1e-5)
    return Case(
        op="prototype_ce",
        size=size,
        stem=stem,
        time_word="_time",
        # Rows and prototypes in, the gradients of the student's out.
        floor_bytes=element * d * ((2 * s + t) * b + 3 * k),
        # Both logits once, and the products that give both gradients.
        floor_flops=2 * (3 * s + t) * b * k * d,
        runs=runs,
        expected=expected,
        tolerance=ours | ({} if element == 2 else {"reference": 1e-5}),
        slow=("reference", "compile", "linear_cross_entropy", "sdpa"),
    )


def _inputs(s: int, t: int, b: int, k: int, d: int, device: str) -> _Inputs:
    """Views of one sample are alike, as are the prototypes of student and teacher; bfloat16 on a GPU."""
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int, near: Tensor | None = None) -> Tensor:
        noise = F.normalize(torch.randn(*shape, generator=generator), dim=-1)
        return noise if near is None else F.normalize(near + 0.5 * noise, dim=-1)

    sample, prototypes = unit(1, b, d), unit(k, d)
    rows = unit(s, b, d, near=sample), unit(t, b, d, near=sample), unit(k, d, near=prototypes), prototypes
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    tensors = [tensor.to(device, dtype) for tensor in rows]
    centre = 0.01 * torch.randn(k, generator=generator)
    weight = torch.ones(1, 1) if s == t == 1 else torch.ones(s, t) - torch.eye(s, t)
    student, teacher, student_prototypes, teacher_prototypes = tensors
    inputs = _Inputs(student, teacher, student_prototypes, teacher_prototypes, centre.to(device), weight.to(device))
    inputs.student.requires_grad_()
    inputs.student_prototypes.requires_grad_()
    return inputs


def _ours(inputs: _Inputs, **options: str) -> Tensor:
    return prototype_cross_entropy(
        *inputs[:4],
        inputs.weight,
        bias=centering_bias(inputs.centre, TEACHER),
        student_temperature=STUDENT,
        teacher_temperature=TEACHER,
        **options,  # pyright: ignore[reportArgumentType]
    ).loss


def _teacher_probs(inputs: _Inputs) -> Tensor:
    with torch.no_grad():
        logits = F.linear(inputs.teacher, inputs.teacher_prototypes).float()
        return F.softmax((logits - inputs.centre) / TEACHER, dim=-1)


def _eager(inputs: _Inputs) -> Tensor:
    """DINOv3's form (dinov3/loss/dino_clstoken_loss.py): all pairs by einsum, those without weight taken out after."""
    logits = F.linear(inputs.student, inputs.student_prototypes).float()
    pairs = -torch.einsum("sbk,tbk->st", F.log_softmax(logits / STUDENT, dim=-1), _teacher_probs(inputs))
    return (pairs * inputs.weight).sum() / (inputs.weight.sum() * inputs.student.shape[1])


def _linear_cross_entropy(inputs: _Inputs) -> Tensor:
    """torch's own, by chunks, with the teacher's probabilities in full."""
    rows = inputs.student[0] / STUDENT
    options = torch.nn.LinearCrossEntropyOptions()  # pyright: ignore[reportAttributeAccessIssue]
    target = _teacher_probs(inputs)[0].to(rows.dtype)
    return F.linear_cross_entropy(rows, inputs.student_prototypes, target, options=options)  # pyright: ignore


def _sdpa(inputs: _Inputs) -> Tensor:
    """The identities of `triton.py` by the CPU's flash attention; the backward over shares of the prototypes."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    (x, y, keys, teacher_keys), n = (tensor.detach() for tensor in inputs[:4]), inputs.student.shape[1]
    bias = centering_bias(inputs.centre, TEACHER)
    mask = bias.expand(1, 1, n, -1)
    _, lse = attend(x[None], keys[None, None], keys[None, None], scale=1 / STUDENT)
    _, teacher_lse = attend(y[None], teacher_keys[None, None], keys[None, None], attn_mask=mask, scale=1 / TEACHER)
    gradient, share = torch.empty_like(keys), len(keys) // 16
    for at in (slice(start, start + share) for start in range(0, len(keys), share)):
        p = torch.mm(x[0] / STUDENT, keys[at].T).sub_(lse[0, 0, :, None]).exp_()
        q = torch.addmm(bias[at], y[0] / TEACHER, teacher_keys[at].T).sub_(teacher_lse[0, 0, :, None]).exp_()
        torch.mm(p.sub_(q).T, x[0] / (STUDENT * n), out=gradient[at])
    return gradient


def _flex(inputs: _Inputs) -> Tensor:
    """The identities of `triton.py` by flex_attention, compiled; its autograd does the rest."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    attend = _COMPILED.setdefault("flex", torch.compile(flex_attention))
    d, bias = inputs.student.shape[-1], centering_bias(inputs.centre, TEACHER)

    def with_bias(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + bias[k]

    x, y = (rows.reshape(1, 1, -1, d) for rows in (inputs.student, inputs.teacher))
    keys, teacher_keys = inputs.student_prototypes[None, None], inputs.teacher_prototypes[None, None]
    _, own = attend(x, keys, keys, scale=1 / STUDENT, return_aux=AuxRequest(lse=True))
    values = attend(y, teacher_keys, keys, score_mod=with_bias, scale=1 / TEACHER)
    weight = inputs.weight / (inputs.weight.sum() * inputs.student.shape[1])
    pull = torch.einsum("st,tbd->sbd", weight, values.view(inputs.teacher.shape).float())
    share = weight.sum(dim=1, keepdim=True)
    return (share * own.lse.view(inputs.student.shape[:2])).sum() - (inputs.student * pull).sum() / STUDENT


_COMPILED: dict[str, Callable[..., Any]] = {}
"""torch.compile once, not per call."""
