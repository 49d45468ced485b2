"""The definitions of the warp, the Jacobian and the regularisers, in plain torch; all are differentiable.

Axes: b batch, c channels, z y x voxels. Displacements are in voxels of the field's own grid, components (x, y, z).
`fill` is what lies outside the image; None stands for its border, repeated.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Axis = tuple[tuple[Int[Tensor, "b z y x"], Float[Tensor, "b z y x"]], ...]
"""The two voxels that a coordinate lies between along one axis, each as its index and its weight."""


def warp_reference(
    image: Float[Tensor, "b c z y x"], u_vox: Float[Tensor, "b 3 z y x"], *, fill: float | None
) -> Float[Tensor, "b c z y x"]:
    """I(v + u(v)), trilinear: `grid_sample(align_corners=True)` without the detour through normalised coordinates."""
    b, c, *sides = image.shape
    z_taps, y_taps, x_taps = (_taps(u_vox, axis, sides[2 - axis], fill) for axis in (2, 1, 0))
    flat = image.flatten(2) if fill is None else image.flatten(2) - fill
    warped = torch.zeros_like(image)
    for z_index, z_weight in z_taps:
        for y_index, y_weight in y_taps:
            for x_index, x_weight in x_taps:
                index = ((z_index * sides[1] + y_index) * sides[2] + x_index).flatten(1)[:, None].expand(-1, c, -1)
                weight = (z_weight * y_weight * x_weight)[:, None]
                warped = warped + weight * flat.gather(2, index).reshape(b, c, *sides)
    return warped if fill is None else warped + fill


def jacobian_determinant(u_vox: Float[Tensor, "b 3 z y x"]) -> Float[Tensor, "b z y x"]:
    """det(I + grad u) at every voxel; 1 where nothing changes volume, 0 or less where the map folds.

    Differences are those of `numpy.gradient` (and so of VoxelMorph's and Learn2Reg's scores, which crop the border):
    central inside, one-sided at the border; 0 along an axis of one voxel. No spacing enters: a displacement in voxels
    differentiated by voxels has the determinant of the same map in mm. Raises ValueError for another shape.
    """
    if u_vox.ndim != 5 or u_vox.shape[1] != 3:
        raise ValueError(f"jacobian_determinant got a field of shape {tuple(u_vox.shape)}; expected [b, 3, z, y, x]")
    rows = [[_gradient(u_vox[:, i], 3 - j) + float(i == j) for j in range(3)] for i in range(3)]
    return _determinant(rows)


def folding(
    u_vox: Float[Tensor, "b 3 z y x"], *, weight: Float[Tensor, "b 1 z y x"] | None = None
) -> Float[Tensor, " b"]:
    """Weighted mean over voxels of relu(-det J): 0 for a map that folds nowhere."""
    penalty = torch.relu(-jacobian_determinant(u_vox))[:, None]
    return _mean(_ones(u_vox) * penalty if weight is None else weight * penalty, weight, u_vox)


def diffusion(
    u_vox: Float[Tensor, "b 3 z y x"],
    *,
    weight: Float[Tensor, "b 1 z y x"] | None = None,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Float[Tensor, " b"]:
    """Sum of |grad u|^2, all nine derivatives of u in mm by mm, over the weight of all voxels; `spacing_mm` (x, y, z).

    Differences are between neighbours, each weighted by the mean of the two voxels' weights. Central ones would let a
    field that alternates from voxel to voxel go free. An axis of n voxels has n - 1 of them: a field of one slope gives
    (n - 1) / n of its square, summed over the axes.
    """
    weights = _ones(u_vox) if weight is None else weight
    total = torch.zeros_like(u_vox[:, 0, 0, 0, 0])
    for axis, h in enumerate(spacing_mm):
        dim = 4 - axis
        squared = (_component_scale(u_vox, spacing_mm) / h * u_vox.diff(dim=dim)).square()
        total = total + (_pair_mean(weights, dim) * squared).sum(dim=(1, 2, 3, 4))
    return _over_weight(total, weight, u_vox)


def bending(
    u_vox: Float[Tensor, "b 3 z y x"],
    *,
    weight: Float[Tensor, "b 1 z y x"] | None = None,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Float[Tensor, " b"]:
    """Sum of the bending energy of u in mm over the weight of all voxels, in 1/mm^2; 0 for any affine map.

    Rueckert et al. 1999, doi:10.1109/42.796284, eq. 4: squares of the second derivatives, mixed ones twice. Those along
    one axis are [1, -2, 1] at voxels that have both neighbours; mixed ones are differences of differences over squares
    of 2 x 2 voxels, with the mean of the four weights. So a field of one curvature gives a little less on a small grid.
    """
    weights = _ones(u_vox) if weight is None else weight
    u_mm = u_vox * _component_scale(u_vox, spacing_mm)
    total = torch.zeros_like(u_vox[:, 0, 0, 0, 0])
    for axis, h in enumerate(spacing_mm):
        dim = 4 - axis
        if u_vox.shape[dim] > 2:
            squared = (u_mm.diff(n=2, dim=dim) / h**2).square()
            total = total + (weights.narrow(dim, 1, u_vox.shape[dim] - 2) * squared).sum(dim=(1, 2, 3, 4))
        for other in range(axis):
            mixed = u_mm.diff(dim=dim).diff(dim=4 - other) / (h * spacing_mm[other])
            corners = _pair_mean(_pair_mean(weights, dim), 4 - other)
            total = total + 2.0 * (corners * mixed.square()).sum(dim=(1, 2, 3, 4))
    return _over_weight(total, weight, u_vox)


def warp_terms_reference(
    image: Float[Tensor, "b c z y x"],
    u_vox: Float[Tensor, "b 3 z y x"],
    weight: Float[Tensor, "b 1 z y x"] | None,
    *,
    fill: float | None,
    spacing_mm: tuple[float, float, float],
    with_bending: bool,
) -> tuple[Float[Tensor, "b c z y x"], Float[Tensor, "b 3"]]:
    """The warped image, and folding, diffusion and bending (0 unless asked for) of each sample."""
    terms = [folding(u_vox, weight=weight), diffusion(u_vox, weight=weight, spacing_mm=spacing_mm)]
    terms.append(bending(u_vox, weight=weight, spacing_mm=spacing_mm) if with_bending else torch.zeros_like(terms[0]))
    return warp_reference(image, u_vox, fill=fill), torch.stack(terms, dim=1)


def over_weight(
    sums: Float[Tensor, "b k"], weight: Float[Tensor, "b 1 z y x"] | None, u_vox: Float[Tensor, "b 3 z y x"]
) -> Float[Tensor, "b k"]:
    """Sums over voxels as means; 0 for a sample whose weights are all 0."""
    if weight is None:
        return sums / (u_vox.numel() // (3 * u_vox.shape[0]))
    # Double: 4e6 weights summed in float32 are off by more than the sums they divide.
    total = weight.sum(dim=(1, 2, 3, 4), dtype=torch.float64)[:, None]
    return torch.where(total > 0, sums / torch.where(total > 0, total, 1.0).to(sums.dtype), 0.0)


def _taps(u_vox: Float[Tensor, "b 3 z y x"], axis: int, size: int, fill: float | None) -> Axis:
    shape = [1, 1, 1]
    shape[2 - axis] = size
    low, high = (0, size - 1) if fill is None else (-1, size)
    u = u_vox[:, axis]
    # Cell and fraction from u alone: v + u in float32 would round the fraction to 1e-5 voxel at v = 160.
    floor = u.detach().floor()
    fraction = u - floor
    start = torch.arange(size, device=u.device).reshape(shape)
    index = start + floor.nan_to_num(nan=0.0).clamp(-size - 1, size + 1).long()
    # Beyond what interpolates, and as in ATen at its lowest edge, the value is constant: no gradient. NaN stays NaN.
    inside = (index >= low) & (index < high) & ((index > low) | (fraction > 0)) & ~u.isnan()
    fraction = torch.where(inside, fraction, torch.where(u.isnan(), u.detach(), 0.0))
    index = index.clamp(low, high)
    taps = []
    for i, weight in ((index, 1.0 - fraction), (index + 1, fraction)):
        taps.append((i.clamp(0, size - 1), weight if fill is None else weight * ((i >= 0) & (i < size))))
    return tuple(taps)


def _gradient(f: Float[Tensor, "b z y x"], dim: int) -> Float[Tensor, "b z y x"]:
    size = f.shape[dim]
    if size == 1:
        return torch.zeros_like(f)
    edges = f.diff(dim=dim)
    inside = (edges.narrow(dim, 0, size - 2) + edges.narrow(dim, 1, size - 2)) / 2
    return torch.cat([edges.narrow(dim, 0, 1), inside, edges.narrow(dim, size - 2, 1)], dim=dim)


def _determinant(j: list[list[Float[Tensor, "b z y x"]]]) -> Float[Tensor, "b z y x"]:
    return (
        j[0][0] * (j[1][1] * j[2][2] - j[1][2] * j[2][1])
        + j[0][1] * (j[1][2] * j[2][0] - j[1][0] * j[2][2])
        + j[0][2] * (j[1][0] * j[2][1] - j[1][1] * j[2][0])
    )


def _component_scale(
    u_vox: Float[Tensor, "b 3 z y x"], spacing_mm: tuple[float, float, float]
) -> Float[Tensor, "1 3 1 1 1"]:
    return torch.tensor(spacing_mm, dtype=u_vox.dtype, device=u_vox.device).reshape(1, 3, 1, 1, 1)


def _pair_mean(f: Float[Tensor, "b _c _z _y _x"], dim: int) -> Float[Tensor, "b _c2 _z2 _y2 _x2"]:
    size = f.shape[dim]
    return (f.narrow(dim, 0, size - 1) + f.narrow(dim, 1, size - 1)) / 2


def _ones(u_vox: Float[Tensor, "b 3 z y x"]) -> Float[Tensor, "b 1 z y x"]:
    return torch.ones_like(u_vox[:, :1])


def _mean(
    values: Float[Tensor, "b 1 z y x"],
    weight: Float[Tensor, "b 1 z y x"] | None,
    u_vox: Float[Tensor, "b 3 z y x"],
) -> Float[Tensor, " b"]:
    return _over_weight(values.sum(dim=(1, 2, 3, 4)), weight, u_vox)


def _over_weight(
    total: Float[Tensor, " b"], weight: Float[Tensor, "b 1 z y x"] | None, u_vox: Float[Tensor, "b 3 z y x"]
) -> Float[Tensor, " b"]:
    return over_weight(total[:, None], weight, u_vox)[:, 0]
