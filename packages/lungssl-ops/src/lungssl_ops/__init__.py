"""Tensor operations for self-supervised learning and registration in 3-D; `<op>/reference.py` is the definition.

lungssl_ops.prototype_ce   cross-entropy of student and teacher over prototypes, without the logits of all rows at once
lungssl_ops.multicrop_ce   the same from logits: all student x teacher view pairs, without forming the pairs
lungssl_ops.ct_views       all views of a step from int16 CT volumes, in one call
lungssl_ops.lncc           local normalised cross-correlation
lungssl_ops.warp           warping with Jacobian and regularisers, composition, exponential
lungssl_ops.mind           MIND-SSC descriptors
lungssl_ops.cost_volume    feature cost volume and coupled-convex step
lungssl_ops.patches        patchify, patch embedding, masked patch-normalised squared error
lungssl_ops.transformer    attention and MLP of a pre-norm transformer layer, crops of several sizes together
lungssl_ops.ema            moving average of a parameter list
lungssl_ops.bench          timings of the above beside their rivals
lungssl_ops.gate           compiles the Triton kernels for GPUs that are not here
"""
