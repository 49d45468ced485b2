"""Air, tissue and mass in CT, and what they say of a lung between two phases.

With f the tissue fraction of a voxel (HU -1000 is air, 0 water), tissue that neither enters nor leaves satisfies
f_inhale(phi(x)) J(x) = f_exhale(x), J the Jacobian determinant of phi, the map from exhale to inhale (Reinhardt et al.
2008, https://doi.org/10.1016/j.media.2008.03.007; Yin et al. 2009, https://doi.org/10.1118/1.3193526). Blood that moves
and lung that is recruited break it: these are targets of weak losses, not laws.
"""

import torch
from jaxtyping import Bool, Float
from lungssl_data.batch import HU_WINDOW
from torch import Tensor

FRACTION = (0.02, 1.1)
"""Fractions are clipped to this: below, noise of 20 HU is all there is; above is bone (`ssl.md` C)."""
NON_AERATED_HU = -100.0
"""Lung above it holds no air (Gattinoni et al. 2001, https://doi.org/10.1164/ajrccm.164.9.2103121)."""


def to_hu(image: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Network input back in HU; what `batch.HU_WINDOW` clipped stays so."""
    low, high = HU_WINDOW
    return low + (high - low) * image.float()


def undisturbed_hu(
    image: Float[Tensor, "b c z y x"], *, shift_hu: Float[Tensor, " b"], gamma: Float[Tensor, " b"]
) -> Float[Tensor, "b c z y x"]:
    """HU of a view before its own shift and gamma (`lungssl_ops.ct_views`); its noise and what the window clipped stay.

    Absolute density is the signal of C4 and C5 (`ssl.md` E8). With gamma from 0.9 to 1.1 and shifts up to 10 HU, drawn
    per view, ln J of lung at -850 HU errs by a standard deviation of 0.19, where expansion is 0.1 to 0.5; undone, by
    0.006 (means of 512 voxels, noise up to 25 HU).
    """
    each = (-1, 1, 1, 1, 1)
    return to_hu(image.float() ** (1.0 / gamma.view(each))) - shift_hu.view(each)


def tissue_fraction(hu: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Share of a voxel that is not air: (HU + 1000) / 1000, clipped to FRACTION."""
    return ((hu + 1000.0) / 1000.0).clamp(*FRACTION)


def compressed_hu(hu_inhale: Float[Tensor, "*shape"], jacobian: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """HU of exhale lung that inhales to `hu_inhale` with its volume times `jacobian`: its tissue is in less room."""
    return (hu_inhale + 1000.0) * jacobian - 1000.0


def mass_residual(
    exhale_hu: Float[Tensor, "*shape"],
    inhale_hu: Float[Tensor, "*shape"],
    jacobian: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
) -> Float[Tensor, ""]:
    """Mean of |f_inhale J - f_exhale| where `mask` is true, 0 without such a place; inhale HU are at phi(x).

    Smooth both scans by 4 to 5 mm before: registration is no better, and tissue has edges.
    """
    residual = (tissue_fraction(inhale_hu) * jacobian - tissue_fraction(exhale_hu)).abs()
    return torch.where(mask, residual, 0.0).sum() / mask.sum().clamp_min(1)


def log_jacobian_from_density(
    exhale_fraction: Float[Tensor, "*shape"], inhale_fraction: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """ln J as conserved mass has it: ln f_exhale - ln f_inhale. Above 0 where lung expands. Needs no derivative."""
    return exhale_fraction.log() - inhale_fraction.log()


def jacobian_of_map(
    place_mm: Float[Tensor, "b 3 z y x"], spacing_mm: tuple[float, float, float]
) -> Float[Tensor, "b z y x"]:
    """Determinant of the derivative of a map given at the nodes of a grid, which is (x, y, z) `spacing_mm` apart.

    Central differences, one-sided at the border: exact for affine maps, O(h^2) inside. NaN beside unknown places.
    """
    columns = [torch.gradient(place_mm, spacing=spacing_mm[axis], dim=4 - axis)[0] for axis in range(3)]
    return torch.linalg.det(torch.stack(columns, dim=-1).movedim(1, -2))


def jacobian_of_view_map(
    coords_mm: Float[Tensor, "b 3 z y x"], place_mm: Float[Tensor, "b 3 z y x"]
) -> Float[Tensor, "b z y x"]:
    """Determinant of the derivative of the map that takes a view's voxels at `coords_mm` to `place_mm`.

    By the chain rule from both derivatives by the voxel's index, so that a view's rotation and zoom cancel.
    """
    step = (1.0, 1.0, 1.0)
    return jacobian_of_map(place_mm, step) / jacobian_of_map(coords_mm, step)
