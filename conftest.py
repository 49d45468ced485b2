"""Read before any test is collected: without a GPU, Triton kernels are tested on the CPU, by Triton's interpreter."""

import os
import warnings

with warnings.catch_warnings():
    # lungssl-ops alone needs no numpy, and torch says on import that there is none.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy", category=UserWarning)
    import torch

if not torch.cuda.is_available():
    # Triton reads it when imported, for its own functions too, and any test may import it: torch's FLOP counter does.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # unset, Triton 3.9 warns that its default will change
