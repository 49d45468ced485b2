import os
import warnings

import pytest

with warnings.catch_warnings():
    # The package needs no numpy, and torch says on import that there is none.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy", category=UserWarning)
    import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is imported
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # unset, Triton 3.9 warns that its default will change


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
