"""Device and number format of a run."""

from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lungssl.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """`auto` is the first accelerator, else the CPU. Raises ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise ConfigError(
            f"--device {name}: not usable here ({str(error).splitlines()[0]}); try auto or cpu"
        ) from error
    return device


def cpu_bf16() -> str:
    """Instructions by which the CPU multiplies bf16: `AMX`, `AVX-512`, or none; none where torch cannot tell.

    Forward and backward of `vit3d_s` (4 x 48 x 48 x 48) on two EPYC cores with AVX-512's: 0.25 s, 0.69 s in float32.
    """
    found = _capabilities()
    return "AMX" if found.get("amx_bf16", False) else "AVX-512" if found.get("avx512_bf16", False) else ""


def autocast(device: torch.device, precision: Literal["auto", "fp32", "bf16"], module: nn.Module) -> torch.autocast:
    """bf16 autocast for `module` where asked for or, with `auto`, where it is faster: other CPUs emulate it.

    Convolutions are another matter: on CPUs with AVX-512 and without AMX the gradient of a 3-D kernel's weight is wrong
    in bf16 where maps are two voxels deep (3 x 3 x 3; infinite, or off by its own size), or small beside a larger
    kernel, and bf16 is no faster there (resenc_tiny 0.10 s either way). torch 2.15, oneDNN 3.13.3, EPYC.
    So `auto` is float32 for them; asking for bf16 raises ConfigError.
    """
    if device.type == "cpu" and precision != "fp32" and _convolves(module) and _wrong_convolutions():
        if precision == "bf16":
            raise ConfigError(
                "train.precision: bf16 gives wrong gradients of 3-D convolutions on this CPU (AVX-512 without AMX, see "
                "training/precision.py); take train.precision=auto or fp32"
            )
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=False)
    fast = device.type == "cuda" or (device.type == "cpu" and cpu_bf16() != "")
    wanted = precision == "bf16" or (precision == "auto" and fast)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


def _wrong_convolutions() -> bool:
    """Whether the CPU is of the kind on which bf16 convolutions have wrong gradients."""
    found = _capabilities()
    return bool(found.get("avx512_f", False)) and not found.get("amx_bf16", False)


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(part, _ConvNd) for part in module.modules())


def _capabilities() -> dict[str, Any]:
    return getattr(torch.cpu, "get_capabilities", dict)()
