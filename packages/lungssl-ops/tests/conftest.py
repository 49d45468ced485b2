from collections.abc import Iterator

import pytest
import torch
from jaxtyping import config as shape_checks


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
