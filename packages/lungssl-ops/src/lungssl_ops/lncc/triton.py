"""LNCC in Triton: three launches for the mean, six with gradients; each goes over the volume with a window on one axis.

One program makes a block of rows x lanes of its result and reads the window's taps along its axis through the caches.

    rows      x: images -> means and (co)variances along x              8 read + 20 written bytes a voxel (float32)
    merge     y: those -> over y and x                                  20 + 20
    compare   z: those -> over the cube; mean, map, adjoint fields      28 + 12 (one gradient) or 20 (both)
    sum    x, y: adjoints and images -> adjoints summed                 2 x (20 + 12), or 2 x (28 + 20)
    gradient  z: those -> gradients                                     20 + 4, or 28 + 8

196 bytes a voxel with one gradient, 88 without, where two kernels that keep their windows on chip would move 48. Stored
are two buffers of five fields, used in turn (six with a mask); the backward of the map makes them again.

Numerics: there is no running sum, which would drift, and what is summed is small. A window is merged from parts i of
weight w_i, mean m_i and variance v_i as differences d_i to the first part's mean: m = m_1 + D / W, and
v = sum w_i (v_i + d_i^2) / W - (D / W)^2 with D = sum w_i d_i, W = sum w_i. Adjoints travel likewise: what a window
gives to a voxel of values f, m is A + 2 B m + C f, stored as the value at the tap's own voxel and moved from there by
2 B (m - m_tap) + C (f - f_tap). Float32 then is as good in air beside tissue as anywhere. Equal bits on repetition.
"""

from typing import Any

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from lungssl_ops.gate import GateCase
from lungssl_ops.lncc import kernels
from lungssl_ops.lncc.operators import operators
from lungssl_ops.tuning import Config, pick

CONFIGS = tuple(
    Config(blocks={"ROWS": rows, "LANES": lanes}, num_warps=warps)
    for rows, lanes, warps in ((16, 64, 8), (8, 128, 8), (16, 32, 4), (32, 32, 8), (8, 64, 4), (4, 128, 4), (4, 256, 8))
)


def _sweep(
    fixed: Float[Tensor, "b 1 z y x"],
    moving: Float[Tensor, "b 1 z y x"],
    mask: Float[Tensor, "b 1 z y x"] | None,
    upstream: Float[Tensor, "b 1 z y x"] | None,
    *,
    window: int,
    eps: float,
    zeros: bool,
    with_map: bool = False,
    grad_fixed: bool = False,
    grad_moving: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if grad_fixed and not grad_moving:  # LNCC is symmetric, and the kernels know moving or both
        mean, found, to_moving, to_fixed = _sweep(
            moving, fixed, mask, upstream, window=window, eps=eps, zeros=zeros, with_map=with_map, grad_moving=True
        )
        return mean, found, to_fixed, to_moving
    fixed, moving = fixed.contiguous(), moving.contiguous()
    mask, upstream = (None if t is None else t.contiguous() for t in (mask, upstream))
    sides, (b, _, depth, height, width), total = grad_fixed + grad_moving, fixed.shape, fixed.numel()
    numbers, weights = _numbers(fixed, moving, mask, eps)
    outputs = [fixed.new_empty(fixed.shape if wanted else 0) for wanted in (with_map, grad_fixed, grad_moving)]
    first, second = (fixed.new_empty((6 if mask is not None else 5, total)) for _ in range(2))
    # Axes as [outer, high, wide], the window along `wide` for x and `high` for y and z.
    x, y, z = (1, b * depth * height, width), (b * depth, height, width), (b, depth, height * width)
    # An absent tensor is never read; any pointer will do.
    masked, given = fixed if mask is None else mask, fixed if upstream is None else upstream
    options = {"HALF": window // 2, "MASKED": mask is not None}
    key = f"w{window}_s{sides}_{'mask_' if mask is not None else ''}{str(fixed.dtype).removeprefix('torch.')}"

    def compare(config: Config) -> Tensor:
        partial = fixed.new_empty((b, _blocks(z, config)))
        tensors = (second, fixed, moving, masked, given, numbers, partial, outputs[0], first)
        switches = {"ZEROS": zeros, "UPSTREAM": upstream is not None, "MAP": with_map, "SIDES": sides}
        _run(kernels.compare_kernel, config, z, *tensors, width=width, **options, **switches)
        return partial

    per_item = {"per_item": depth * height}, {"per_item": depth}
    _launch(kernels.rows_kernel, key, x, fixed, moving, masked, numbers, first, **per_item[0], **options, ZEROS=zeros)
    _launch(kernels.merge_kernel, key, y, first, numbers, second, **per_item[1], **options, ZEROS=zeros)
    partial = compare(pick("lncc_compare_kernel", key, CONFIGS, compare))
    if sides:
        images, options["SIDES"] = (fixed, moving, masked, numbers), sides
        _launch(kernels.sum_kernel, key, x, first, *images, second, **per_item[0], **options, ALONG_ROWS=False)
        _launch(kernels.sum_kernel, key, y, second, *images, first, **per_item[1], **options, ALONG_ROWS=True)
        _launch(kernels.gradient_kernel, key, z, first, *images, *outputs[1:], **options)
    return (partial.sum(dim=1, dtype=torch.float64) / weights).to(fixed.dtype), outputs[0], outputs[1], outputs[2]


def _numbers(
    fixed: Float[Tensor, "b 1 z y x"], moving: Float[Tensor, "b 1 z y x"], mask: Tensor | None, eps: float
) -> tuple[Float[Tensor, "b 4"], Float[Tensor, "b"]]:
    """Per volume: both means, 1 / the voxels that count and eps, in the images' dtype; and the voxels in float64.

    As a tensor: the kernels would get Python's numbers in float32, and the host would wait for the device.
    """
    axes, b = (1, 2, 3, 4), len(fixed)
    if mask is None:
        weights = torch.full((b,), fixed[0].numel(), dtype=torch.float64, device=fixed.device)
        sums = [image.sum(axes, dtype=torch.float64) for image in (fixed, moving)]
    else:
        weights = mask.sum(axes, dtype=torch.float64)
        counting = (torch.where(mask > 0, mask * image, 0) for image in (fixed, moving))
        sums = [image.sum(axes, dtype=torch.float64) for image in counting]
    shares = [torch.where(weights > 0, s / weights, 0) for s in (*sums, torch.ones_like(weights))]
    numbers = [*shares, torch.full_like(weights, eps)]
    return torch.stack(numbers, dim=1).to(fixed.dtype), weights


def _blocks(view: tuple[int, int, int], config: Config) -> int:
    """Of one outer element."""
    _, high, wide = view
    return triton.cdiv(high, config.blocks["ROWS"]) * triton.cdiv(wide, config.blocks["LANES"])


def _run(kernel: Any, config: Config, view: tuple[int, int, int], *tensors: Tensor, **options: int) -> None:
    outer, high, wide = view
    kernel[(outer * _blocks(view, config),)](
        *tensors,
        total=outer * high * wide,
        high=high,
        wide=wide,
        **options,
        **config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def _launch(kernel: Any, key: str, view: tuple[int, int, int], *tensors: Tensor, **options: int) -> None:
    def launch(config: Config) -> None:
        _run(kernel, config, view, *tensors, **options)

    launch(pick(f"lncc_{kernel.__name__}", key, CONFIGS, launch))


lncc_triton = operators("triton", _sweep)


def gate_cases() -> list[GateCase]:
    """Window 9: of float32 all kernels with every switch on, in float64 the largest."""
    return [
        _gate_case(
            kernels.rows_kernel,
            ("fixed", "moving", "mask", "numbers", "target"),
            ("per_item",),
            ZEROS=False,
            MASKED=True,
        ),
        _gate_case(kernels.merge_kernel, ("source", "numbers", "target"), ("per_item",), ZEROS=False, MASKED=True),
        *(
            _gate_case(
                kernels.compare_kernel,
                ("source", "fixed", "moving", "mask", "upstream", "numbers", "partial", "map", "adjoints"),
                ("width",),
                element,
                ZEROS=zeros,
                MASKED=not zeros,
                UPSTREAM=True,
                MAP=True,
                SIDES=2,
            )
            for element, zeros in (("fp32", False), ("fp32", True), ("fp64", False))
        ),
        _gate_case(
            kernels.sum_kernel,
            ("source", "fixed", "moving", "mask", "numbers", "target"),
            ("per_item",),
            MASKED=True,
            SIDES=2,
            ALONG_ROWS=True,
        ),
        _gate_case(
            kernels.gradient_kernel,
            ("source", "fixed", "moving", "mask", "numbers", "grad_fixed", "grad_moving"),
            MASKED=True,
            SIDES=2,
        ),
    ]


def _gate_case(
    kernel: Any, tensors: tuple[str, ...], last: tuple[str, ...] = (), element: str = "fp32", **switches: int
) -> GateCase:
    config = CONFIGS[0]
    constants = {"HALF": 4, **switches, **config.blocks}
    signature = dict.fromkeys(tensors, f"*{element}") | dict.fromkeys(("total", "high", "wide", *last), "i32")
    zeros = "_zeros" if switches.get("ZEROS") else ""
    return GateCase(
        name=f"lncc_{kernel.__name__}_{element}{zeros}",
        kernel=kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible_by_16=tensors,
    )
