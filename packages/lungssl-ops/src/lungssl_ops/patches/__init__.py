"""Patch layout and masked patch error. No kernel: `torch.compile` of the reference is within reach of the floor."""

from lungssl_ops.patches.reference import masked_patch_mse, patchify, unpatchify

__all__ = ["masked_patch_mse", "patchify", "unpatchify"]
