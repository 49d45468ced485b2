import warnings

import pytest

with warnings.catch_warnings():
    # The package needs no numpy, and torch says on import that there is none.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy", category=UserWarning)
    import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
