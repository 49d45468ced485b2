"""The views in Triton: one launch for all views of a call; the kernels are in kernels.py.

One program makes BLOCK voxels of one view, in the order z, y, x: positions, eight taps a sample, noise, intensities,
and one store, into the volume or into its patches. A volume is found by its address in the table, so their sizes may
differ. The displacement is not computed from all 8 nodes of a voxel's cell: torch interpolates the lattice along z and
y beforehand, which leaves n nodes per row of the view; a voxel reads two of them. Random words are made for four voxels
at a time.
Bytes per voxel in main memory: about 2 zoom^3 read (each voxel of the volume once; neighbours share taps through the
caches), 2 or 4 written, and 24 n / size_x for the rows of nodes (2 at n = 4 and 48 voxels).
Numerics: float32; taps are interpolated along x, then y, then z, where the definition adds eight weighted ones; sine
and cosine are series, logarithm and exponential the GPU's fast ones (near 1, the logarithm is a series, too).
"""

# pyright: reportCallIssue=false
# A launch takes more than the kernel's own arguments.

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int16, UInt8
from torch import Tensor

from lungssl_ops.ct_views.fakes import masks_fake, views_fake
from lungssl_ops.ct_views.kernels import coords_kernel, masks_kernel, views_kernel
from lungssl_ops.ct_views.table import Packed, check_values, samples_per_voxel, views_shape
from lungssl_ops.gate import GateCase
from lungssl_ops.tuning import Config, pick

CANDIDATES = (
    Config(blocks={"BLOCK": 512}, num_warps=4),
    Config(blocks={"BLOCK": 256}, num_warps=4),
    Config(blocks={"BLOCK": 128}, num_warps=4),
    Config(blocks={"BLOCK": 256}, num_warps=2),
    Config(blocks={"BLOCK": 1024}, num_warps=8),
)


def ct_views_triton(
    volumes: list[Int16[Tensor, "_z _y _x"]],
    packed: Packed,
    size_vox: list[int],
    *,
    patch_vox: list[int],
    fill_hu: float | None,
    antialias: bool,
    dtype: torch.dtype,
) -> Float[Tensor, "v 1 z y x"] | Float[Tensor, "v n p"]:
    """`ct_views_reference` in float32."""
    return _ct_views(volumes, *packed, size_vox, patch_vox, fill_hu, antialias, dtype)


def mask_views_triton(
    masks: list[UInt8[Tensor, "_z _y _x"]], packed: Packed, size_vox: list[int], *, wholly: bool, antialias: bool
) -> UInt8[Tensor, "v z y x"]:
    """`mask_views_reference`."""
    return _mask_views(masks, *packed, size_vox, wholly, antialias)


def view_coords_mm_triton(
    packed: Packed, size_vox: list[int], voxel_to_mm: Float32[Tensor, "v 3 4"]
) -> Float32[Tensor, "v 3 z y x"]:
    """`view_coords_mm_reference`."""
    return _view_coords_mm(packed.numbers, packed.lattice, size_vox, voxel_to_mm)


@torch.library.custom_op("lungssl_ops::ct_views_triton", mutates_args=())
def _ct_views(
    volumes: list[Tensor],
    volume: Tensor,
    numbers: Tensor,
    seed: Tensor,
    lattice: Tensor | None,
    size_vox: list[int],
    patch_vox: list[int],
    fill_hu: float | None,
    antialias: bool,
    dtype: torch.dtype,
) -> Tensor:
    packed = Packed(volume, numbers, seed, lattice)
    check_values(packed, len(volumes))
    out = torch.empty(views_shape(len(volume), size_vox, patch_vox), dtype=dtype, device=volumes[0].device)
    if not len(volume):
        return out
    sources = [part.contiguous() for part in volumes]
    arguments, constants = _geometry(sources, packed, size_vox, antialias=antialias)
    constants |= {
        "EDGE": fill_hu is None,
        "NOISE": bool((numbers[:, 16] > 0).any()),
        "GAMMA": bool((numbers[:, 15] != 1).any()),
        "PATCHES": bool(patch_vox),
    }

    def launch(config: Config) -> None:
        views_kernel[_grid(config, len(volume), size_vox)](
            *arguments,
            out,
            *size_vox,
            *(patch_vox or size_vox),
            float(fill_hu or 0.0),
            **constants,
            **config.blocks,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )

    launch(pick("ct_views", f"nodes{constants['NODES']}_samples{int(constants['SAMPLES'])}", CANDIDATES, launch))
    return out


_ct_views.register_fake(views_fake)


@torch.library.custom_op("lungssl_ops::mask_views_triton", mutates_args=())
def _mask_views(
    masks: list[Tensor],
    volume: Tensor,
    numbers: Tensor,
    seed: Tensor,
    lattice: Tensor | None,
    size_vox: list[int],
    wholly: bool,
    antialias: bool,
) -> Tensor:
    packed = Packed(volume, numbers, seed, lattice)
    check_values(packed, len(masks))
    out = torch.empty((len(volume), *size_vox), dtype=torch.uint8, device=masks[0].device)
    if not len(volume):
        return out
    sources = [part.contiguous() for part in masks]
    arguments, constants = _geometry(sources, packed, size_vox, antialias=antialias)
    config = CANDIDATES[0]
    masks_kernel[_grid(config, len(volume), size_vox)](
        *arguments,
        out,
        *size_vox,
        WHOLLY=wholly,
        **constants,
        **config.blocks,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    return out


_mask_views.register_fake(masks_fake)


@torch.library.custom_op("lungssl_ops::view_coords_mm_triton", mutates_args=())
def _view_coords_mm(numbers: Tensor, lattice: Tensor | None, size_vox: list[int], voxel_to_mm: Tensor) -> Tensor:
    out = torch.empty((len(numbers), 3, *size_vox), dtype=torch.float32, device=voxel_to_mm.device)
    if not len(numbers):
        return out
    moved, rows, nodes = _on_device(numbers, lattice, size_vox, out.device)
    config = CANDIDATES[0]
    coords_kernel[_grid(config, len(numbers), size_vox)](
        moved,
        rows,
        voxel_to_mm.contiguous(),
        out,
        *size_vox,
        NODES=nodes,
        **config.blocks,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    return out


@_view_coords_mm.register_fake
def _(numbers: Tensor, lattice: Tensor | None, size_vox: list[int], voxel_to_mm: Tensor) -> Tensor:
    return voxel_to_mm.new_empty((len(numbers), 3, *size_vox))


def _grid(config: Config, views: int, size_vox: list[int]) -> tuple[int]:
    z, y, x = size_vox
    return (views * triton.cdiv(z * y * x, config.blocks["BLOCK"]),)


def _geometry(
    sources: list[Tensor], packed: Packed, size_vox: list[int], *, antialias: bool
) -> tuple[list[Tensor], dict[str, Any]]:
    """Both kernels' first arguments, on the device, and what is compiled in. The caller keeps the sources alive."""
    device = sources[0].device
    samples = samples_per_voxel(packed.numbers, antialias=antialias)
    places = torch.tensor([[part.data_ptr(), *part.shape] for part in sources])[packed.volume]
    whole = torch.cat([places, packed.seed[:, None], samples.long()], 1)
    numbers, rows, nodes = _on_device(packed.numbers, packed.lattice, size_vox, device)
    constants = {
        "NODES": nodes,
        "SAMPLES": bool((samples > 1).any()),
        "INDEX": tl.int64 if max(part.numel() for part in sources) >= 2**31 else tl.int32,
    }
    return [whole.to(device), numbers, rows], constants


def _on_device(
    numbers: Tensor, lattice: Tensor | None, size_vox: list[int], device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """The table's numbers, the lattice at each row, and its number of nodes along x: 0, and any tensor, without one."""
    moved = numbers.contiguous().to(device)
    if lattice is None:
        return moved, moved, 0
    return moved, lattice_rows(lattice.to(device), size_vox[0], size_vox[1]), lattice.shape[-1]


def lattice_rows(lattice: Float32[Tensor, "v 3 n n n"], size_z: int, size_y: int) -> Float32[Tensor, "v z y n 3"]:
    """The lattice at each row of the views: interpolated along z and y, still n nodes along x."""
    for axis, side in ((2, size_z), (3, size_y)):
        n, last = lattice.shape[axis], max(side - 1, 1)
        place = torch.arange(side, device=lattice.device) * (n - 1)
        cell = (place // last).clamp_max(n - 2)
        shape = [1] * lattice.dim()
        shape[axis] = side
        part = ((place - cell * last) / last).reshape(shape)
        below, above = lattice.index_select(axis, cell), lattice.index_select(axis, cell + 1)
        lattice = below + part * (above - below)
    return lattice.permute(0, 2, 3, 4, 1).contiguous()


def gate_cases() -> list[GateCase]:
    """All of a training step's work, with one and with more samples a voxel, to a volume and to patches; both masks."""
    shared = {"whole": "*i64", "numbers": "*fp32", "rows": "*fp32"}
    sizes = dict.fromkeys(("size_z", "size_y", "size_x"), "i32")
    patches = dict.fromkeys(("patch_z", "patch_y", "patch_x"), "i32")
    cases = []
    for name, result, nodes, flags in (
        ("plain", "fp32", 0, {"SAMPLES": False, "EDGE": True, "NOISE": False, "GAMMA": False, "PATCHES": False}),
        ("step", "bf16", 4, {"SAMPLES": False, "EDGE": False, "NOISE": True, "GAMMA": True, "PATCHES": True}),
        ("shrinking", "bf16", 4, {"SAMPLES": True, "EDGE": False, "NOISE": True, "GAMMA": True, "PATCHES": True}),
        ("large", "fp32", 4, {"SAMPLES": True, "EDGE": True, "NOISE": True, "GAMMA": True, "PATCHES": False}),
    ):
        constants = {"NODES": nodes, "INDEX": tl.int64 if name == "large" else tl.int32, **flags}
        for config in CANDIDATES if name == "step" else CANDIDATES[:1]:
            block = config.blocks["BLOCK"]
            cases.append(
                GateCase(
                    name=f"ct_views_{name}_{block}x{config.num_warps}",
                    kernel=views_kernel,
                    signature=shared
                    | {"out": f"*{result}"}
                    | sizes
                    | patches
                    | {"fill": "fp32"}
                    | dict.fromkeys((*constants, "BLOCK"), "constexpr"),
                    constants=constants | {"BLOCK": block},
                    num_warps=config.num_warps,
                    divisible_by_16=("whole", "numbers", "rows", "out"),
                )
            )
    for wholly in (False, True):
        constants = {"NODES": 4, "SAMPLES": wholly, "WHOLLY": wholly, "INDEX": tl.int32, "BLOCK": 512}
        cases.append(
            GateCase(
                name=f"mask_views_{'wholly' if wholly else 'nearest'}",
                kernel=masks_kernel,
                signature=shared | {"out": "*u8"} | sizes | dict.fromkeys(constants, "constexpr"),
                constants=constants,
                divisible_by_16=("whole", "numbers", "rows", "out"),
            )
        )
    constants = {"NODES": 4, "BLOCK": 512}
    tensors = dict.fromkeys(("numbers", "rows", "to_mm", "out"), "*fp32")
    cases.append(
        GateCase(
            name="view_coords_mm",
            kernel=coords_kernel,
            signature=tensors | sizes | dict.fromkeys(constants, "constexpr"),
            constants=constants,
            divisible_by_16=tuple(tensors),
        )
    )
    return cases
