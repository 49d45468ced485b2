"""`lungssl doctor`."""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

_EXTRAS = {
    "triton": "fused GPU kernels",
    "hdf5plugin": "lz4 caches",
    "SimpleITK": "DICOM and MetaImage",
    "monai": "sliding-window inference",
    "tensorboard": "tb/ of a run",
    "matplotlib": "pictures in reports",
    "timm": "2-D weights to inflate",
    "submitit": "SLURM",
}


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the self-check.")] = False,
) -> None:
    """Say what this machine has, what is missing and whether lungssl works here. Exit code 1 where it does not.

    Example: lungssl doctor
    """
    from importlib.util import find_spec

    import torch

    from lungssl.training.precision import cpu_bf16
    from lungssl.training.run_folder import cores, environment

    here = environment()
    print(f"lungssl      {here['versions'].get('lungssl', 'not installed as a package')}")
    print(f"python       {here['python']}  {sys.executable}")
    print(f"platform     {here['platform']}")
    print(f"torch        {torch.__version__}, {torch.get_num_threads()} threads of {cores()} cores")
    print(f"cpu          {torch.backends.cpu.get_cpu_capability()}, bf16 products: {cpu_bf16() or 'emulated'}")
    print(f"memory       {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB")
    for line in _devices():
        print(f"accelerator  {line}")
    for name, folder in {"here": Path.cwd(), "cache": _cache_folder()}.items():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        print(f"disk ({name})".ljust(13) + f"{shutil.disk_usage(existing).free / 2**30:.0f} GiB free  {folder}")
    for name, purpose in _EXTRAS.items():
        found = find_spec(name) is not None
        print(f"{'found' if found else 'absent'}".ljust(13) + f"{name} ({purpose})")
    print("found        g++" if shutil.which("g++") else "absent       g++ (C++ kernels, torch.compile on the CPU)")
    if quick:
        return
    problems = _self_check()
    for problem in problems:
        print(f"FAILED       {problem}")
    if problems:
        raise typer.Exit(1)
    print("ok           lungssl works here")


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["none: training runs on the CPU"]
    return [
        f"cuda:{index} {torch.cuda.get_device_name(index)}, "
        f"{torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB"
        for index in range(torch.cuda.device_count())
    ]


def _self_check() -> list[str]:
    """Known answers through each package, in seconds."""
    import math

    import torch
    from lungssl_backbones import create_backbone
    from lungssl_data.views import scale_hu
    from lungssl_methods.losses import dino_loss

    problems = []
    started = time.perf_counter()
    # A student that knows nothing: ln K whatever the teacher says (`ssl.md` T1).
    teacher = torch.full((2, 3, 4096), 1 / 4096)
    loss = dino_loss(torch.zeros(2, 3, 4096), teacher, 1 - torch.eye(2))
    if abs(float(loss) - math.log(4096)) > 1e-4:
        problems.append(f"dino loss of zero logits is {float(loss):.6f}, not ln 4096 = {math.log(4096):.6f}")
    image = scale_hu(torch.full((1, 1, 32, 32, 32), -1000.0))
    if float(image.abs().max()) != 0.0:
        problems.append("-1000 HU is not network input 0")
    encoder = create_backbone("vit3d_nano")
    encoder(image).tokens.sum().backward()
    if any(p.grad is not None and not bool(p.grad.isfinite().all()) for p in encoder.parameters()):
        problems.append("vit3d_nano has gradients that are not finite")
    print(f"self-check   {time.perf_counter() - started:.1f} s")
    return problems


def _cache_folder() -> Path:
    from lungssl.cohort import user_cache_folder

    return user_cache_folder()
