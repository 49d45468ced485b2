"""Outputs of other libraries' networks for weights and inputs that a formula gives, so that tests need no library.

    python make_golden.py     needs dynamic-network-architectures==0.4.4 (with timm<1.0.23) and monai==1.6.1

Each <name>.safetensors holds the outputs, thinned out, as `output0`, ...; its metadata are the peer's version and
`shapes`: JSON of the names and shapes of the peer's weights. Weights and input are not stored: see `weight`, `volume`.
"""

import json
import math
import sys
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

THIN = 3
"""Every third voxel of each map is kept."""


def noise(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [-0.5, 0.5) that look random, float32: fractions of a large sine, computed in float64."""
    place = torch.arange(math.prod(shape), dtype=torch.float64) + zlib.crc32(name.encode()) % 9973
    return (((place * 12.9898).sin() * 43758.5453).remainder(1.0) - 0.5).float().reshape(shape)


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight of a size that keeps activations near 1. Second names (`all_modules`) get the first name's numbers."""
    name = name.replace("all_modules.0.", "conv.").replace("all_modules.1.", "norm.")
    if name == "mask_token":
        return torch.zeros(shape)
    if len(shape) > 1:
        return noise(name, shape) * 3.4 / math.sqrt(math.prod(shape[1:]))
    return noise(name, shape) * 0.4 + (1.0 if name.endswith("weight") else 0.0)


def volume(shape: tuple[int, ...]) -> Tensor:
    return noise("volume", shape) + 0.5


def fill(module: nn.Module) -> nn.Module:
    """The module with every float of its state set by `weight`."""
    state = module.state_dict()
    values = {name: weight(name, tuple(t.shape)) if t.is_floating_point() else t for name, t in state.items()}
    module.load_state_dict(values)
    return module.eval()


def thin(maps: list[Tensor]) -> list[Tensor]:
    return [m[..., ::THIN, ::THIN, ::THIN].contiguous() for m in maps]


def resenc_l() -> tuple[nn.Module, list[Tensor]]:
    from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder

    peer = ResidualEncoder(
        1, 4, [4, 8, 12, 12], nn.Conv3d, 3, [1, 2, 2, 2], [1, 2, 1, 2], True, nn.InstanceNorm3d,
        {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True}, return_skips=True,
    )  # fmt: skip
    return peer, fill(peer)(volume((2, 1, 24, 16, 32)))


def primus() -> tuple[nn.Module, list[Tensor]]:
    return _primus(registers=0)


def primus_registers() -> tuple[nn.Module, list[Tensor]]:
    return _primus(registers=2)


def _primus(registers: int) -> tuple[nn.Module, list[Tensor]]:
    from dynamic_network_architectures.architectures.primus import Primus

    peer = Primus(
        1, 72, (8, 8, 8), 2, 2, 2, (24, 16, 32), init_values=0.1, scale_attn_inner=True,
        num_register_tokens=registers,
    )  # fmt: skip
    fill(peer)
    tokens = peer.down_projection(volume((2, 1, 24, 16, 32))).flatten(2).mT
    if registers:
        tokens = torch.cat([peer.register_tokens.expand(2, -1, -1), tokens], dim=1)
    return peer, [peer.eva(tokens)[0][:, registers:].mT.unflatten(2, (3, 2, 4))]


def swin_unetr() -> tuple[nn.Module, list[Tensor]]:
    return _swin(v2=False, downsample="merging", window=7)


def swin_unetr_v2() -> tuple[nn.Module, list[Tensor]]:
    return _swin(v2=True, downsample="mergingv2", window=3)


def _swin(*, v2: bool, downsample: str, window: int) -> tuple[nn.Module, list[Tensor]]:
    from monai.networks.nets import SwinUNETR

    peer = SwinUNETR(1, 2, feature_size=12, depths=(2, 2, 1, 1), use_v2=v2, downsample=downsample, window_size=window)
    return peer, fill(peer).swinViT(volume((1, 1, 32, 32, 64)), True)


PEERS: dict[str, tuple[str, Callable[[], tuple[nn.Module, list[Tensor]]]]] = {
    "resenc_l": ("dynamic-network-architectures", resenc_l),
    "primus": ("dynamic-network-architectures", primus),
    "primus_registers": ("dynamic-network-architectures", primus_registers),
    "swin_unetr": ("monai", swin_unetr),
    "swin_unetr_v2": ("monai", swin_unetr_v2),
}

if __name__ == "__main__":
    from safetensors.torch import save_file

    for name, (distribution, make) in PEERS.items():
        with torch.no_grad():
            peer, outputs = make()
        shapes = {key: list(t.shape) for key, t in peer.state_dict().items() if not key.startswith(("up_", "decoder"))}
        metadata = {"peer": f"{distribution} {version(distribution)}", "shapes": json.dumps(shapes)}
        path = Path(__file__).with_name(f"{name}.safetensors")
        save_file({f"output{i}": output for i, output in enumerate(thin(outputs))}, path, metadata)
        sys.stdout.write(f"{path.name}: {path.stat().st_size} bytes\n")
