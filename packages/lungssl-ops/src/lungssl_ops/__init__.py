"""Tensor operations for 3-D self-supervised learning. One folder per op: `reference.py` is the definition.

lungssl_ops.multicrop_ce   cross-entropy of all student x teacher view pairs, without forming the pairs
lungssl_ops.ema            moving average of a parameter list
lungssl_ops.patches        patchify, unpatchify, masked patch-normalised squared error
lungssl_ops.bench          timings of the above beside their rivals
"""
