"""Warp and regularisers in Triton; the kernels are in kernels.py.

Forward: one program takes BLOCK consecutive voxels of a sample, gathers eight taps per channel and writes the warped
image; with the regularisers it also loads u at the neighbours (6, or 9 with bending) and writes three partial sums and
one byte per voxel that says where the map folds. Backward in u: the same gather gives value and derivative together;
coordinates, weights, differences and cofactors are found again instead of stored, cofactors only in blocks that touch a
folded voxel. Backward in the image: while |u| <= 2 voxels each voxel of the image gathers from the (2 r + 1)^3 voxels
that can touch it, r = ceil(max |u|), read on the device without waiting; beyond, atomic additions.
Bytes per voxel in main memory, float32, one channel: forward 12 (u) + 4 (image) + 4 (warped) + 1 (folds); backward
12 + 4 + 4 (gradient of the warped image) + 1 + 12 (gradient in u). Neighbours and taps are shared through the caches.
Numerics: sums of BLOCK voxels in the dtype of u, those of blocks in float64; weights of the adjoint are 1 - |distance|.
"""

from collections.abc import Sequence
from struct import pack, unpack
from typing import Any

import torch
import triton
from torch import Tensor

from lungssl_ops.gate import GateCase
from lungssl_ops.tuning import Config, pick
from lungssl_ops.warp.cpu import TERMS
from lungssl_ops.warp.kernels import adjoint_kernel, field_gradient_kernel, scatter_kernel, warp_kernel
from lungssl_ops.warp.reference import over_weight

CANDIDATES = (
    Config(blocks={"BLOCK": 128}, num_warps=4),
    Config(blocks={"BLOCK": 64}, num_warps=2),
    Config(blocks={"BLOCK": 256}, num_warps=8),
)
_BENDING_CANDIDATES = CANDIDATES[:2]
"""The third spills with bending; so does any of two voxels a thread."""
GATHER_REACH = 2
"""Largest displacement, in voxels, whose adjoint in the image is gathered: 125 reads a voxel."""


def warp_triton(image: Tensor, u_vox: Tensor, *, fill: float | None) -> Tensor:
    """`warp_reference`."""
    return _warp(image.contiguous(), u_vox.contiguous(), None, fill, (1.0, 1.0, 1.0), TERMS["none"])[0]


def warp_terms_triton(
    image: Tensor,
    u_vox: Tensor,
    weight: Tensor | None,
    *,
    fill: float | None,
    spacing_mm: tuple[float, float, float],
    with_bending: bool,
) -> tuple[Tensor, Tensor]:
    """`warp_terms_reference`."""
    weight = None if weight is None else weight.contiguous()
    terms = TERMS["bending" if with_bending else "first"]
    warped, sums, _ = _warp(image.contiguous(), u_vox.contiguous(), weight, fill, spacing_mm, terms)
    return warped, over_weight(sums, weight, u_vox)


@torch.library.custom_op("lungssl_ops::warp_triton", mutates_args=())
def _warp(
    image: Tensor, u_vox: Tensor, weight: Tensor | None, fill: float | None, spacing_mm: Sequence[float], terms: int
) -> tuple[Tensor, Tensor, Tensor]:
    b, _, *sides = image.shape
    size = sides[0] * sides[1] * sides[2]
    warped = torch.empty_like(image)
    folded = torch.empty((b, size if terms else 0), dtype=torch.uint8, device=image.device)
    sums = [u_vox.new_zeros((b, 3))]

    def launch(config: Config) -> None:
        blocks = triton.cdiv(size, config.blocks["BLOCK"])
        partial = u_vox.new_empty((b, 3, blocks if terms else 0))
        warp_kernel[(blocks, b)](
            image,
            u_vox,
            u_vox if weight is None else weight,
            warped,
            folded,
            partial,
            *_numbers(image, fill, spacing_mm),
            **_choices(weight, fill, terms),
            **_launch(config),
        )
        if terms:
            sums[0] = partial.sum(dim=2, dtype=torch.float64).to(u_vox.dtype)

    launch(pick("warp", f"terms{terms}", _candidates(terms), launch))
    return warped, sums[0], folded


@_warp.register_fake
def _(
    image: Tensor, u_vox: Tensor, weight: Tensor | None, fill: float | None, spacing_mm: Sequence[float], terms: int
) -> tuple[Tensor, Tensor, Tensor]:
    b, _, z, y, x = image.shape
    folded = u_vox.new_empty((b, z * y * x if terms else 0), dtype=torch.uint8)
    return torch.empty_like(image), u_vox.new_empty(b, 3), folded


@torch.library.custom_op("lungssl_ops::warp_triton_field_gradient", mutates_args=())
def _field_gradient(
    image: Tensor,
    u_vox: Tensor,
    weight: Tensor | None,
    folded: Tensor,
    grad_warped: Tensor,
    grad_sums: Tensor,
    fill: float | None,
    spacing_mm: Sequence[float],
    terms: int,
) -> Tensor:
    gradient = torch.empty_like(u_vox)
    size = u_vox[0, 0].numel()
    grad_sums = grad_sums.contiguous()

    def launch(config: Config) -> None:
        field_gradient_kernel[(triton.cdiv(size, config.blocks["BLOCK"]), u_vox.shape[0])](
            image,
            u_vox,
            u_vox if weight is None else weight,
            folded,
            grad_warped,
            grad_sums,
            gradient,
            *_numbers(image, fill, spacing_mm),
            **_choices(weight, fill, terms),
            **_launch(config),
        )

    launch(pick("warp_field_gradient", f"terms{terms}", _candidates(terms), launch))
    return gradient


@_field_gradient.register_fake
def _(
    image: Tensor,
    u_vox: Tensor,
    weight: Tensor | None,
    folded: Tensor,
    grad_warped: Tensor,
    grad_sums: Tensor,
    fill: float | None,
    spacing_mm: Sequence[float],
    terms: int,
) -> Tensor:
    return torch.empty_like(u_vox)


@torch.library.custom_op("lungssl_ops::warp_triton_image_gradient", mutates_args=())
def _image_gradient(u_vox: Tensor, grad_warped: Tensor, fill: float | None) -> Tensor:
    b, c, *sides = grad_warped.shape
    gradient = torch.empty_like(grad_warped)
    # Stays on the device: both kernels read it, one of them then has nothing to do.
    longest = u_vox.abs().amax(dim=(1, 2, 3, 4)).ceil().nan_to_num(nan=torch.inf).clamp(max=max(sides))
    reach = longest.to(torch.int32)
    limit = max(sides) if torch.are_deterministic_algorithms_enabled() else GATHER_REACH
    size = sides[0] * sides[1] * sides[2]
    config = Config(blocks={"BLOCK": 128}, num_warps=4)
    channels = min(4, triton.next_power_of_2(c))
    grid = (triton.cdiv(size, config.blocks["BLOCK"]), b, triton.cdiv(c, channels))
    adjoint_kernel[grid](
        u_vox, grad_warped, gradient, reach, limit, c, *sides, BORDER=fill is None, CHANNELS=channels, **_launch(config)
    )
    scatter_kernel[grid[:2]](
        u_vox, grad_warped, gradient, reach, limit, c, *sides, BORDER=fill is None, **_launch(config)
    )
    return gradient


@_image_gradient.register_fake
def _(u_vox: Tensor, grad_warped: Tensor, fill: float | None) -> Tensor:
    return torch.empty_like(grad_warped)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    image, u_vox, weight, ctx.fill, ctx.spacing_mm, ctx.terms = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(image, u_vox, weight, output[2])


def _backward(ctx: Any, grad_warped: Tensor, grad_sums: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    image, u_vox, weight, folded = ctx.saved_tensors
    grad_image = grad_u = None
    grad_warped = grad_warped.contiguous()
    if ctx.needs_input_grad[0]:
        grad_image = _image_gradient(u_vox, grad_warped, ctx.fill)
    if ctx.needs_input_grad[1]:
        grad_u = _field_gradient(
            image, u_vox, weight, folded, grad_warped, grad_sums, ctx.fill, ctx.spacing_mm, ctx.terms
        )
    return grad_image, grad_u, None, None, None, None


_warp.register_autograd(_backward, setup_context=_keep)


def _candidates(terms: int) -> tuple[Config, ...]:
    return _BENDING_CANDIDATES if terms == TERMS["bending"] else CANDIDATES


def _numbers(image: Tensor, fill: float | None, spacing_mm: Sequence[float]) -> tuple[float | int, ...]:
    """Fill and spacing as float32 and what that misses (Triton passes no doubles), then the sizes."""
    split = []
    for value in (fill or 0.0, *spacing_mm):
        (high,) = unpack("f", pack("f", value))
        split += [high, value - high]
    return (*split, *image.shape[1:])


def _choices(weight: Tensor | None, fill: float | None, terms: int) -> dict[str, bool]:
    return {"BORDER": fill is None, "WEIGHTED": weight is not None, "FIRST": terms > 0, "BENDING": terms > 1}


def _launch(config: Config) -> dict[str, Any]:
    # Said, since Triton 3.10 changes the default.
    return config.blocks | {"num_warps": config.num_warps, "enable_fp_fusion": True}


def gate_cases() -> list[GateCase]:
    """Every kernel as it is launched for float32: alone, with the first terms, and with all terms and weights."""
    numbers = {f"{name}_{part}": "fp32" for name in ("fill", "sx", "sy", "sz") for part in ("high", "low")}
    sizes = dict.fromkeys(("channels", "z", "y", "x"), "i32")
    choices = ("BORDER", "WEIGHTED", "FIRST", "BENDING", "BLOCK")
    cases = []
    for name, kernel, pointers in (
        ("warp", warp_kernel, ("image", "u", "weight", "warped", "folded", "partial")),
        (
            "warp_field_gradient",
            field_gradient_kernel,
            ("image", "u", "weight", "folded", "grad_warped", "grad_sums", "gradient"),
        ),
    ):
        signature = {p: "*u8" if p == "folded" else "*fp32" for p in pointers} | numbers | sizes
        for border, weighted, terms in ((True, False, 0), (True, False, 1), (False, True, 3)):
            for config in _candidates(terms):
                values = (border, weighted, terms > 0, terms > 1, config.blocks["BLOCK"])
                cases.append(
                    GateCase(
                        name=f"{name} {terms=} {border=} {weighted=} {config.blocks['BLOCK']}x{config.num_warps}",
                        kernel=kernel,
                        signature=signature | dict.fromkeys(choices, "constexpr"),
                        constants=dict(zip(choices, values, strict=True)),
                        num_warps=config.num_warps,
                        divisible_by_16=pointers,
                    )
                )
    pointers = ("u", "grad_warped", "gradient", "reach")
    signature = {p: "*i32" if p == "reach" else "*fp32" for p in pointers} | {"limit": "i32"} | sizes
    for name, kernel, extra in (
        ("warp_adjoint", adjoint_kernel, {"CHANNELS": 4}),
        ("warp_scatter", scatter_kernel, {}),
    ):
        constants = {"BORDER": True} | extra | {"BLOCK": 128}
        cases.append(
            GateCase(
                name=name,
                kernel=kernel,
                signature=signature | dict.fromkeys(constants, "constexpr"),
                constants=constants,
                divisible_by_16=pointers,
            )
        )
    return cases
