"""The definition through `torch.compile`: two kernels and no temporary of the patches' size."""

import torch

from lungssl_ops.patches.reference import masked_patch_mse_reference

masked_patch_mse_compiled = torch.compile(masked_patch_mse_reference)
