"""What a training step costs, so that methods are compared at equal cost: images, voxels, tokens and FLOPs.

Two counts that share nothing: `step_budget` adds up formulas of products from their shapes during one forward, and
what the backward will cost from which operands need a gradient; `counted_flops` runs forward and backward under
torch's FlopCounterMode, which looks at what reaches the dispatcher. A multiply-add is 2 FLOPs; additions, norms,
activations and resampling are not counted by either, as is usual (they are bound by memory).
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import lungssl_ops.prototype_ce.rows  # noqa: F401  (registers the operator that is counted)
import torch
import torch.nn.functional as F
from lungssl_backbones.encoder import Encoder
from lungssl_data.batch import PairBatch
from lungssl_ops.dispatch import forced
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from lungssl_methods import distillation
from lungssl_methods.method import Method


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One step of one method on one batch."""

    patients: int
    """Different ones."""
    images_student: int
    """Crops through the encoder that is trained."""
    images_teacher: int
    """Crops through encoders that are not: teachers and anchors."""
    voxels_student: int
    voxels_teacher: int
    tokens_student: int
    """Tokens that the encoder processed: with `keep`, the kept ones."""
    tokens_teacher: int
    flops_forward: int
    flops_backward: int

    @property
    def flops(self) -> int:
        """Of the whole step, but for the optimizer's."""
        return self.flops_forward + self.flops_backward


def step_budget(method: nn.Module, batch: PairBatch, *, step: int = 0) -> Budget:
    """The cost of a training step on `batch`, from one forward of a method in `train()`; moves no parameter.

    Counts and teachers' sums that a forward moves are put back, as is the random state, and whether it was training.
    """
    assert isinstance(method, Method)
    kept = {name: value.clone() for name, value in method.state_dict().items()}
    training = method.training
    passes: list[tuple[bool, int, int, int]] = []
    with ExitStack() as stack, torch.random.fork_rng(devices=[]):
        for module in method.modules():
            if isinstance(module, Encoder):
                student = module is method.encoder

                def note(_: nn.Module, arguments: tuple[Any, ...], found: Any, student: bool = student) -> None:
                    several = not isinstance(arguments[0], Tensor)
                    images = arguments[0] if several else [arguments[0]]
                    for image, features in zip(images, found if several else [found], strict=True):
                        kept = features.tokens.shape[1] or math.prod(features.grid)  # none of a summary alone
                        passes.append((student, len(image), image.numel(), len(image) * kept))

                stack.callback(module.register_forward_hook(note).remove)
        # The definitions, whose products torch's functions show.
        stack.enter_context(forced(residual_attention="reference", residual_mlp="reference"))
        shapes = stack.enter_context(_Products())
        method.train()
        method(batch, step)
    method.train(training)
    method.load_state_dict(kept)
    for module in method.modules():
        if isinstance(module, distillation.Distillation):
            module.forget()

    def total(student: bool, what: int) -> int:
        return sum(one[what] for one in passes if one[0] is student)

    return Budget(
        patients=len(batch.patient.unique()),
        images_student=total(True, 1),
        images_teacher=total(False, 1),
        voxels_student=total(True, 2),
        voxels_teacher=total(False, 2),
        tokens_student=total(True, 3),
        tokens_teacher=total(False, 3),
        flops_forward=shapes.forward,
        flops_backward=shapes.backward,
    )


def counted_flops(method: nn.Module, batch: PairBatch, *, step: int = 0) -> int:
    """Forward and backward of a step as torch's FlopCounterMode counts them; leaves gradients, and no count, behind.

    One formula of torch's is put right: in a grouped convolution's backward it takes the gradient of the weight to be
    that of a convolution without groups (torch 2.15). For a depthwise kernel of 7x7x7 with 40 channels on 8x8x8 places
    it counts 576 MFLOP, where there are 28; for a step of DINO with convnext3d_atto, 7 times all that is computed.
    """
    mapping = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.random.fork_rng(devices=[]):
        method(batch, step).loss.backward()
    return counter.get_total_flops()


class _Products(TorchFunctionMode):
    """Adds up the FLOPs of products by the shapes of their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        rule = _RULES.get(func)
        if rule is not None:
            forward, backward = rule(result, *args, **(kwargs or {}))
            self.forward += forward
            self.backward += backward if torch.is_grad_enabled() else 0
        return result


_Cost = tuple[int, int]
"""FLOPs forward, and backward where gradients are wanted."""


def _product(flops: int, *operands: Tensor) -> _Cost:
    """The gradient of each operand is a product as large as the forward's."""
    return flops, flops * sum(one.requires_grad for one in operands)


def _linear(out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> _Cost:
    return _product(2 * out.numel() * x.shape[-1], x, weight)


def _convolution(out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> _Cost:
    return _product(2 * out.numel() * math.prod(weight.shape[1:]), x, weight)


def _transposed_convolution(out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> _Cost:
    return _product(2 * x.numel() * math.prod(weight.shape[1:]), x, weight)


def _matmul(out: Tensor, a: Tensor, b: Tensor, **_: Any) -> _Cost:
    return _product(2 * out.numel() * a.shape[-1], a, b)


def _distances(out: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> _Cost:
    """torch.cdist beyond 25 points: one product of (-2 a, |a|^2, 1) and (b, 1, |b|^2); in here never differentiated."""
    return (2 * out.numel() * (a.shape[-1] + 2) if max(out.shape[-2:]) > 25 else 0), 0


def _attention(
    _out: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> _Cost:
    """Scores and values; the backward has four products, and a fused kernel's makes the scores again.

    Fused kernels take (batch, heads, tokens, channels) and give a mask no gradient; else torch keeps the scores, as
    in a SwinUnetr, whose windows are an axis of their own and whose mask is a learned bias.
    """
    *batch, n, d = query.shape
    flops = 2 * math.prod(batch) * n * key.shape[-2] * (d + value.shape[-1])
    fused = query.ndim == 4 and (attn_mask is None or not attn_mask.requires_grad)
    return flops, (flops * 5 // 2 if fused else 2 * flops) if query.requires_grad else 0


def _prototypes(_out: Any, student: Tensor, teacher: Tensor, prototypes: Tensor, *arguments: Any, **_: Any) -> _Cost:
    """Logits of both sides and, in the forward already, the gradients that are wanted (`lungssl_ops.prototype_ce`)."""
    (s, b, d), t, k = student.shape, len(teacher), len(prototypes)
    to_student, to_prototypes = arguments[-2:]
    return 2 * b * k * d * (s + t + s * (bool(to_student) + bool(to_prototypes))), 0


_RULES: dict[Any, Callable[..., _Cost]] = {
    F.linear: _linear,
    F.conv3d: _convolution,
    F.conv_transpose3d: _transposed_convolution,
    torch.matmul: _matmul,
    torch.bmm: _matmul,
    torch.mm: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.cdist: _distances,
    F.scaled_dot_product_attention: _attention,
    torch.ops.lungssl_ops.prototype_ce_rows.default: _prototypes,
}


@register_flop_formula(torch.ops.lungssl_ops.prototype_ce_rows, get_raw=True)
def _(*arguments: Any, out_val: Any = None, **_: Any) -> int:
    return _prototypes(out_val, *arguments)[0]


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # a linear layer in bf16 on a CPU (`lungssl_ops.transformer`)

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * math.prod(x) * weight[0]


def _convolution_backward(grad: torch.Size, x: torch.Size, weight: torch.Size, *arguments: Any, **_: Any) -> int:
    """Each weight, which a grouped kernel has per input channel of its group only, meets every place that the kernel is
    laid on: once for the gradient of the input, once for its own."""
    transposed, (to_input, to_weight, _bias) = arguments[4], arguments[7]
    batch, _channels, *places = x if transposed else grad
    return 2 * batch * math.prod(places) * math.prod(weight) * (to_input + to_weight)
