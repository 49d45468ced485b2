"""Device and number format of a run."""

from typing import Literal

import torch

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


def has_amx() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware tiles. False on torch versions that cannot tell."""
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False))


def autocast(device: torch.device, precision: Literal["auto", "fp32", "bf16"]) -> torch.autocast:
    """bf16 autocast where asked for or, with `auto`, where it is faster: without AMX a CPU emulates it."""
    fast = device.type == "cuda" or (device.type == "cpu" and has_amx())
    wanted = precision == "bf16" or (precision == "auto" and fast)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)
