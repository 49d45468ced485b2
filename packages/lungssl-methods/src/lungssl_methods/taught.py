"""Correspondences that features find themselves: a point of one phase looked up in the other, kept if it leads back.

`ssl.md` C3 (iii). The lung of each view is read on a lattice of its voxels; a point's partner is the place with the
most similar features around where the coarse affine leads, and is kept where the most similar place around the point
is the point again (forward-backward check of optical flow, Sundaram et al. 2010, doi:10.1007/978-3-642-15549-9_32).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64
from lungssl_backbones.encoder import Features
from lungssl_data.batch import View
from torch import Tensor

from lungssl_methods.correspondence import Matches, half_diagonal_mm, sample_matches
from lungssl_methods.latent import take
from lungssl_methods.method import Gather
from lungssl_methods.points import pyramid_at

LATTICE_VOX = 2
"""Pitch of the places that are compared: with it a lung of 48 x 48 x 48 voxels has some 5,000."""


def taught_matches(
    first: View,
    second: View,
    features: tuple[Features, Features],
    strides_vox: tuple[int, ...],
    count: int,
    *,
    affine: Float[Tensor, "b 3 4"],
    reach_mm: float,
    residual_mm: float,
    generator: torch.Generator | None = None,
    gather: Gather | None = None,
) -> Matches:
    """`count` random lung points per sample of `first`, with the places of `second` whose features match theirs.

    `affine` maps the first scan's mm to the second's; places are looked for up to `reach_mm` from where it leads, and
    on the way back from the point. Matches whose way back ends farther than `residual_mm` from the point, or than half
    the lattice's diagonal where that is more, are not valid. No gradient.
    """
    with torch.no_grad(), torch.autocast(first.image.device.type, enabled=False):
        points = sample_matches(first, first, count, generator=generator, gather=gather)
        here, there = (_lattice(view, of, strides_vox) for view, of in zip((first, second), features, strict=True))
        query = F.normalize(pyramid_at(features[0], strides_vox, points.first_vox), dim=-1)
        start_mm = points.second_mm @ affine[:, :, :3].mT + affine[:, None, :, 3]
        forth, found = there.most_similar(query, around_mm=start_mm, reach_mm=reach_mm)
        back, _ = here.most_similar(take(there.features, forth), around_mm=points.second_mm, reach_mm=reach_mm)
        residual = torch.linalg.vector_norm(take(here.mm, back) - points.second_mm, dim=-1)
        most = half_diagonal_mm(first, LATTICE_VOX)[:, :, 0].clamp(min=residual_mm)
        return Matches(
            first_vox=points.first_vox,
            second_vox=take(there.vox, forth),
            second_mm=take(there.mm, forth),
            valid=points.valid & found & (residual <= most),
        )


@dataclass(frozen=True, kw_only=True)
class _Lattice:
    """Places of a view, and what the pyramid says there."""

    vox: Float32[Tensor, "b n 3"]
    mm: Float32[Tensor, "b n 3"]
    lung: Bool[Tensor, "b n"]
    features: Float32[Tensor, "b n c"]
    """Of unit length."""

    def most_similar(
        self, query: Float32[Tensor, "b k c"], *, around_mm: Float32[Tensor, "b k 3"], reach_mm: float
    ) -> tuple[Int64[Tensor, "b k"], Bool[Tensor, "b k"]]:
        """Index of each query's most similar place in the lung within reach, and whether there is one."""
        allowed = (torch.cdist(around_mm, self.mm) <= reach_mm) & self.lung[:, None]
        cosine = (query @ self.features.mT).masked_fill(~allowed, -torch.inf)
        return cosine.argmax(dim=2), allowed.any(dim=2)


def _lattice(view: View, features: Features, strides_vox: tuple[int, ...]) -> _Lattice:
    b, _, *shape = view.image.shape
    axes = [torch.arange(LATTICE_VOX // 2, side, LATTICE_VOX, device=view.image.device) for side in shape]
    index = tuple(axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
    vox = torch.stack(index[::-1], dim=-1).float().expand(b, -1, 3)
    return _Lattice(
        vox=vox,
        mm=view.coords_mm[(slice(None), slice(None), *index)].mT,
        lung=(view.lung & view.valid)[(slice(None), *index)],
        features=F.normalize(pyramid_at(features, strides_vox, vox), dim=-1),
    )
