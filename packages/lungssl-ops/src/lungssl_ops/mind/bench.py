"""MIND-SSC beside the public formulation."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lungssl_ops.measure import Case
from lungssl_ops.mind import mind_ssc
from lungssl_ops.mind.reference import NEIGHBOURS, PAIRS, mind_ssc_reference


def cases(*, quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """The sizes of the README's table, or a tiny one."""
    yield _case((24, 20, 26) if quick else (96, 96, 96), device, compiled=compiled)


def _case(size: tuple[int, int, int], device: str, *, compiled: bool) -> Case:
    # Neighbouring voxels of a CT are alike: noise, smoothed.
    generator = torch.Generator().manual_seed(0)
    image = F.avg_pool3d(torch.randn(1, 1, *size, generator=generator), 3, stride=1, padding=1).to(device)
    kernels = [torch.zeros(12, 1, 3, 3, 3, device=device) for _ in range(2)]
    for channel, pair in enumerate(PAIRS):
        for kernel, neighbour in zip(kernels, pair, strict=True):
            dz, dy, dx = NEIGHBOURS[neighbour]
            kernel[channel, 0, 1 + dz, 1 + dy, 1 + dx] = 1

    def convolutions(image: Tensor) -> Tensor:
        # How public code computes it: each neighbour by a convolution with 27 taps, one of them 1; bounds on the host.
        padded = F.pad(image, (2,) * 6, mode="replicate")
        first, second = (F.conv3d(padded, kernel, dilation=2) for kernel in kernels)
        squares = F.pad((first - second) ** 2, (1,) * 6, mode="replicate")
        distances = F.avg_pool3d(squares, 3, stride=1)
        distances = distances - distances.min(dim=1, keepdim=True)[0]
        variance = distances.mean(dim=1, keepdim=True)
        overall = variance.mean().item()
        return torch.exp(-distances / variance.clamp(overall * 0.001, overall * 1000))

    runs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: mind_ssc(image),
        "ours_fp16": lambda: mind_ssc(image, dtype=torch.float16),
        "reference": lambda: mind_ssc(image, backend="reference"),
        "eager": lambda: convolutions(image),
    }
    if compiled:
        definition = torch.compile(mind_ssc_reference)
        runs["compile"] = lambda: definition(image, radius=1, dilation=2, dtype=torch.float32)
    return Case(
        op="mind",
        size="x".join(str(s) for s in size),
        floor_bytes=4 * 13 * image.numel(),  # reads the image, writes twelve
        runs=runs,
        expected=lambda: mind_ssc(image.double(), backend="reference"),
        tolerance={"ours": 1e-5, "ours_fp16": 1e-3, "reference": 1e-5},
        stem="mind",
        slow=("eager", "reference"),
    )
