"""Local strain of a displacement field (`domain.md` A5)."""

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray

from lungssl_tasks.registration.scores import deformation_gradient


def principal_stretches(
    u_mm: Float[ndarray, "3 z y x"], spacing_mm: tuple[float, float, float]
) -> Float64[ndarray, "z y x 3"]:
    """Length at inhale by length at exhale along the three principal directions, the largest first.

    Square roots of the eigenvalues of F^T F, F = I + grad u; their product is |det F|. Differences as in
    `registration.scores.deformation_gradient`. Green's strain along them is (stretch^2 - 1) / 2.
    """
    gradient = deformation_gradient(u_mm, spacing_mm)
    squared = np.linalg.eigvalsh(np.swapaxes(gradient, -1, -2) @ gradient)
    return np.sqrt(np.maximum(squared[..., ::-1], 0.0))
