import os
import warnings
from collections.abc import Iterator

import pytest

with warnings.catch_warnings():
    # The package needs no numpy, and torch says on import that there is none.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy", category=UserWarning)
    import torch

from jaxtyping import config as shape_checks

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is imported
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # unset, Triton 3.9 warns that its default will change


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    """Where Triton kernels are tested: on the GPU if there is one, else on the CPU, by Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Our functions without the tests' shape checks, which `torch.compile(fullgraph=True)` can't trace."""
    torch.compiler.reset()
    shape_checks.update("jaxtyping_disable", True)
    yield
    shape_checks.update("jaxtyping_disable", False)
    torch.compiler.reset()
