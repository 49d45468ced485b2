"""The moving average beside its rivals."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lungssl_ops.ema import ema_update_
from lungssl_ops.ema.reference import ema_update_reference_
from lungssl_ops.measure import Case


def cases(*, quick: bool, device: str, compiled: bool) -> Iterator[Case]:
    """The sizes of the README's table, or tiny ones."""
    for millions in [0.3] if quick else [5.5, 22.0]:
        yield _case(millions, device)


def _case(millions: float, device: str) -> Case:
    # The tensors of a ViT: a few small ones for each big one.
    width = 384
    block = [(width,), (3 * width, width), (width,), (width, width), (width,), (4 * width, width), (4 * width,)]
    count = max(1, round(millions * 1e6 / sum(torch.Size(shape).numel() for shape in block)))
    shapes = block * count
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    start = [torch.randn(shape, generator=generator).to(device) for shape in shapes]

    def multiply_add(teacher: list[Tensor], student: list[Tensor], momentum: float) -> None:
        torch._foreach_mul_(teacher, momentum)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(teacher, student, alpha=1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]

    def run(update: Callable[[list[Tensor], list[Tensor], float], None]) -> Callable[[], Tensor]:
        teacher = [p.clone() for p in start]

        def call() -> Tensor:
            update(teacher, student, 0.996)
            return teacher[1]

        return call

    def expected() -> Tensor:
        return 0.996 * start[1].double() + (1.0 - 0.996) * student[1].double()

    runs = {
        "ours": run(ema_update_),  # pyright: ignore[reportArgumentType]
        "reference": run(ema_update_reference_),  # pyright: ignore[reportArgumentType]
        "foreach_mul_add": run(multiply_add),
    }
    numel = sum(p.numel() for p in student)
    return Case(op="ema", size=f"{numel / 1e6:.1f}M", floor_bytes=12 * numel, runs=runs, expected=expected)
