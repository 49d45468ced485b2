"""The definition through torch.compile: one kernel that gathers eight taps, where there is neither Triton nor our C++.

`grid_sample` in 3-D has no lowering in Inductor (torch 2.15), so compiling around it fuses nothing.
"""

import torch

from lungssl_ops.warp.reference import warp_reference, warp_terms_reference

warp_compiled = torch.compile(warp_reference, dynamic=False)
warp_terms_compiled = torch.compile(warp_terms_reference, dynamic=False)
