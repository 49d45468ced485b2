"""Makes lightly.npz: losses of lightly, and their gradients, on small fixed inputs in float64.

    pip install lightly==1.6.0 torchvision numpy
    python make_lightly.py

The file states the versions that it was made with. Tests read it, and need no lightly.
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from lightly.loss import (  # pyright: ignore[reportMissingImports]  (not a dependency: see above)
    BarlowTwinsLoss,
    DINOLoss,
    IBOTPatchLoss,
    KoLeoLoss,
    NTXentLoss,
    VICRegLoss,
)

# A power of two: lightly holds the teacher's temperature in float32, which 0.04 is not exact in.
TEACHER_TEMPERATURE = 0.0625
STUDENT_TEMPERATURE = 0.125


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    found: dict[str, np.ndarray] = {}

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def record(name: str, loss: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor]) -> None:
        for x in inputs.values():
            x.requires_grad_()
        value = loss(*inputs.values())
        gradients = torch.autograd.grad(value, list(inputs.values()))
        found[f"{name}/loss"] = np.asarray(value.item())
        for (key, x), gradient in zip(inputs.items(), gradients, strict=True):
            found[f"{name}/{key}"] = x.detach().numpy()
            found[f"{name}/{key}_grad"] = gradient.numpy()

    record("nt_xent", NTXentLoss(temperature=0.5), {"first": draw(6, 5), "second": draw(6, 5)})
    record("nt_xent_cold", NTXentLoss(temperature=0.1), {"first": draw(6, 5), "second": draw(6, 5)})
    record("vicreg", VICRegLoss(), {"first": 0.7 * draw(9, 5), "second": 0.7 * draw(9, 5)})
    record("barlow_twins", BarlowTwinsLoss(lambda_param=5e-3), {"first": draw(9, 5), "second": draw(9, 5) + 1.0})
    record("koleo", KoLeoLoss(), {"x": draw(7, 5)})

    dino = DINOLoss(output_dim=6, student_temp=STUDENT_TEMPERATURE).double()
    dino.center.copy_(draw(6))
    teacher = 0.2 * draw(2, 3, 6)
    found |= {"dino/centre": dino.center.flatten().numpy().copy(), "dino/teacher": teacher.numpy()}
    record(
        "dino",
        lambda student: dino(list(teacher), list(student), teacher_temp=TEACHER_TEMPERATURE),
        {"student": draw(5, 3, 6)},
    )
    found["dino/centre_after"] = dino.center.flatten().numpy()

    ibot = IBOTPatchLoss(output_dim=6, student_temp=STUDENT_TEMPERATURE).double()
    ibot.center.center.copy_(draw(6))
    # Of 4, 0, 2 and 1 tokens: lightly divides by their numbers in float32, exactly if they are powers of two.
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [0] * 6, [0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0]]).bool().view(4, 2, 3)
    teacher_patches = 0.2 * draw(int(mask.sum()), 6)
    found |= {
        "ibot/centre": ibot.center.center.flatten().numpy().copy(),
        "ibot/teacher": teacher_patches.numpy(),
        "ibot/mask": mask.flatten(1).numpy(),
    }
    record(
        "ibot",
        lambda student: ibot(teacher_patches, student, mask, teacher_temp=TEACHER_TEMPERATURE),
        {"student": draw(int(mask.sum()), 6)},
    )
    found["ibot/centre_after"] = ibot.center.center.flatten().numpy()

    found["temperatures"] = np.array([STUDENT_TEMPERATURE, TEACHER_TEMPERATURE])
    found["versions"] = np.array([f"lightly {version('lightly')}", f"torch {torch.__version__}"])
    np.savez_compressed(Path(__file__).with_name("lightly.npz"), **found)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
