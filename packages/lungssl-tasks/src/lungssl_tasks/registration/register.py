"""From two scans to a displacement field: coarse affine, discrete search, descent; and how far to trust it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from lungssl_data.pair import PhaseScan
from lungssl_data.volume import Geometry

from lungssl_tasks.registration.alignment import AlignmentConfig, align
from lungssl_tasks.registration.common_grid import CommonGrid, common_grid, sampling_matrix, unit_to_mm
from lungssl_tasks.registration.descent import DescentConfig, Level, descend
from lungssl_tasks.registration.search import SearchConfig, search
from lungssl_tasks.registration.trust import Trust, judge

PointFeatures = Callable[[Literal["fixed", "moving"], Float[np.ndarray, "n 3"]], Float[torch.Tensor, "n c"]]
"""Features of one of the two scans at points within it, LPS mm."""
Start = Callable[[Float[np.ndarray, "3 4"]], "Coarse"]
"""A network's answer, given the affine."""
ROWS = 1 << 20
"""Points that `Registration.on_grid` takes at a time: some 100 MB of working memory."""


@dataclass(frozen=True, kw_only=True)
class RegistrationConfig:
    """How a pair is registered. Presets: PRESETS."""

    spacing_mm: float = 2.0
    """Voxels that scans are to be brought to before `register` sees them (`prepare_scan`)."""
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    descent: DescentConfig = field(default_factory=DescentConfig)


PRESETS: dict[str, RegistrationConfig] = {
    "coarse": RegistrationConfig(descent=DescentConfig(levels=())),
    "fast": RegistrationConfig(
        spacing_mm=3.0,
        descent=DescentConfig(levels=(Level(spacing_mm=3.0, iterations=30),)),
    ),
    "default": RegistrationConfig(),
    "accurate": RegistrationConfig(
        spacing_mm=1.5,
        descent=DescentConfig(
            levels=(
                Level(spacing_mm=4.5, iterations=60, rim=0),
                Level(spacing_mm=3.0, iterations=60, rim=0),
                Level(spacing_mm=1.5, iterations=60),
            ),
        ),
    ),
}
"""By what they cost: seconds, half a minute, minutes of two cores for a chest. `coarse` is the search, or a network,
alone: what features are worth by themselves."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Coarse:
    """A field to begin descent with."""

    v_mm: Float[np.ndarray, "3 z y x"]
    """Components (x, y, z): what is at a fixed p lies at A(p + v(p))."""
    grid: Geometry
    """Axis-aligned, over the fixed scan; beyond it, its border repeats."""
    disagreement_mm: float
    """Median over lung of how far there and back miss their start."""


@dataclass(frozen=True, kw_only=True)
class Registration:
    """Where the points of a fixed scan are in a moving one: p + u(p) = A(p + v(p)).

    `v` is known in the fixed lung; around it, it is filled in smoothly, which says nothing of ribs or spine.
    """

    affine: Float[np.ndarray, "3 4"]
    """A, LPS mm."""
    v_mm: Float[np.ndarray, "3 z y x"]
    """Components (x, y, z), on the grid of the fixed scan; beyond it, its border repeats."""
    grid: Geometry
    trust: Trust

    def at(self, points_mm: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        """u at points of the fixed scan, LPS mm, linear between voxels."""
        moved = points_mm + self._v_at(points_mm)
        return moved @ self.affine[:, :3].T + self.affine[:, 3] - points_mm

    def back(
        self, points_mm: Float[np.ndarray, "n 3"], *, tolerance_mm: float = 0.01, most: int = 100
    ) -> Float[np.ndarray, "n 3"]:
        """The inverse: q + back(q) is the point of the fixed scan that lies at q in the moving one.

        Fixed-point iteration on the affine's inverse (Chen et al. 2008, Medical Physics 35(1), 81-88), damped where it
        doesn't come nearer. A point that isn't within `tolerance_mm` after `most` rounds is NaN. Where the field folds,
        several points come to one place, and one of them is given.
        """
        inverse = np.linalg.inv(self.affine[:, :3])
        start = (points_mm - self.affine[:, 3]) @ inverse.T
        found, step = start.copy(), np.ones((len(start), 1))
        error = np.full(len(start), np.inf)
        going = np.arange(len(start))
        for _ in range(most):
            residual = start[going] - found[going] - self._v_at(found[going])
            size = np.linalg.norm(residual, axis=1)
            step[going] = np.where((size > error[going])[:, None], step[going] / 2, step[going])
            error[going] = size
            on = size >= tolerance_mm
            going = going[on]
            if not len(going):
                break
            found[going] += step[going] * residual[on]
        return np.where((error < tolerance_mm)[:, None], found - points_mm, np.nan)

    def on_grid(self, grid: Geometry) -> Float[np.ndarray, "3 z y x"]:
        """u at every voxel of a grid that may be oblique, float32, components (x, y, z) LPS mm."""
        return _on_grid(self.at, grid)

    def back_on_grid(self, grid: Geometry) -> Float[np.ndarray, "3 z y x"]:
        """`back` at every voxel of a grid; NaN where there is no inverse."""
        return _on_grid(self.back, grid)

    def _v_at(self, points_mm: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        scaled = points_mm @ self._to_unit[:3, :3].T + self._to_unit[:3, 3]
        where = torch.from_numpy(scaled)[None, :, None, None].float()
        volume = torch.from_numpy(np.asarray(self.v_mm, np.float32))[None]
        found = F.grid_sample(volume, where, align_corners=True, padding_mode="border")
        return found[0, :, :, 0, 0].T.double().numpy()

    @property
    def _to_unit(self) -> Float[np.ndarray, "4 4"]:
        return np.linalg.inv(unit_to_mm(self.grid))


def register(
    fixed: PhaseScan,
    moving: PhaseScan,
    config: RegistrationConfig | None = None,
    *,
    affine: Float[np.ndarray, "3 4"] | None = None,
    features: PointFeatures | None = None,
    start: Start | None = None,
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Registration:
    """Register `moving` to `fixed`, two scans with lung masks and cubes of one size.

    `affine`, fixed to moving LPS mm, is looked for unless given. `features` of points, an encoder's, take the place of
    MIND-SSC in the search, or stand beside it (`SearchConfig.given_share`); `start`, a network's answer, that of the
    search. `say` hears of each stage. A lung that only one scan shows is left out, and is a doubt. Raises ValueError
    for voxels that aren't cubes, an empty lung, or scans with no lung of the same side.
    """
    config = config or PRESETS["default"]
    device = device or torch.device("cpu")
    for name, scan in (("fixed", fixed), ("moving", moving)):
        if max(scan.spacing_mm) - min(scan.spacing_mm) > 1e-3:
            raise ValueError(f"the {name} scan has voxels of {scan.spacing_mm} mm; resample to cubes first")
        if not scan.lung.any():
            raise ValueError(f"the {name} scan has an empty lung mask; give a mask of the lungs, or leave it out")
    common = set(np.unique(fixed.lung)) & set(np.unique(moving.lung)) - {0}
    if not common:
        raise ValueError(
            "the scans show no lung of the same side (1 right, 2 left); check that both are of one patient, and that "
            "the masks name the sides alike"
        )
    seen = fixed, moving
    fixed, moving = (dataclasses.replace(scan, lung=scan.lung * np.isin(scan.lung, list(common))) for scan in seen)
    if affine is None:
        affine = align(fixed, moving, config.alignment, device=device)
        say("affine")
    spacing_mm = fixed.spacing_mm[0]
    pair = common_grid(fixed, moving, affine, multiple=config.descent.multiple(spacing_mm), device=device)
    if start is None:
        given = None if features is None else _coarse_features(pair, fixed, moving, affine, features, config.search)
        v_vox, disagreement_mm = search(pair, config.search, given)
        say("search")
    else:
        coarse = start(affine)
        v_vox, disagreement_mm = _onto(pair, coarse, fixed.geometry()), coarse.disagreement_mm
        say("network")
    v_vox = descend(pair, v_vox, config.descent, say=say)
    v_vox = filled(v_vox, F.max_pool3d(pair.fixed_lung, 3, stride=1, padding=1) > 0)
    trust = judge(
        pair,
        v_vox,
        disagreement_mm,
        affine=affine,
        fixed=seen[0],
        moving=seen[1],
        descended=bool(config.descent.levels),
    )
    z, y, x = fixed.ct_hu.shape
    v_mm = (v_vox[0, :, :z, :y, :x] * spacing_mm).cpu().numpy()
    return Registration(affine=affine, v_mm=v_mm, grid=fixed.geometry(), trust=trust)


def _onto(pair: CommonGrid, coarse: Coarse, grid: Geometry) -> Float[torch.Tensor, "1 3 z y x"]:
    """The coarse field on the pair's grid, in its voxels."""
    z, y, x = pair.fixed_hu.shape[2:]
    device = pair.fixed_hu.device
    padded = dataclasses.replace(grid, shape=(z, y, x))
    theta = sampling_matrix(padded, coarse.grid, np.eye(3, 4), device)[None]
    where = F.affine_grid(theta, [1, 1, z, y, x], align_corners=True)
    v_mm = torch.from_numpy(np.asarray(coarse.v_mm, np.float32))[None].to(device)
    return F.grid_sample(v_mm, where, padding_mode="border", align_corners=True) / pair.spacing_mm


def _coarse_features(
    pair: CommonGrid,
    fixed: PhaseScan,
    moving: PhaseScan,
    affine: Float[np.ndarray, "3 4"],
    features: PointFeatures,
    config: SearchConfig,
) -> tuple[Float[torch.Tensor, "1 c z y x"], Float[torch.Tensor, "1 c z y x"]]:
    """At the middles of the coarse grid's voxels, and where the affine takes them; 0 beyond the scans."""
    block, spacing_mm = config.block(pair.spacing_mm), np.asarray(fixed.spacing_mm)
    shape = [-(-size // block) for size in pair.fixed_hu.shape[2:]]
    middles = np.argwhere(np.ones(shape, bool))[:, ::-1] * block + (block - 1) / 2
    here = middles * spacing_mm + np.asarray(fixed.origin_mm)
    found = []
    there = here @ affine[:, :3].T + affine[:, 3]
    roles: tuple[tuple[Literal["fixed", "moving"], PhaseScan, np.ndarray], ...]
    roles = ("fixed", fixed, here), ("moving", moving, there)
    for role, scan, points in roles:
        last = (np.array(scan.ct_hu.shape[::-1]) - 1) * np.asarray(scan.spacing_mm)
        offset = points - np.asarray(scan.origin_mm)
        inside = ((offset >= 0) & (offset <= last)).all(axis=1)
        some = features(role, points[inside])
        whole = torch.zeros(len(points), some.shape[1])
        whole[torch.from_numpy(inside)] = some.float().cpu()
        found.append(whole.T.reshape(1, -1, *shape).to(pair.fixed_hu.device))
    return found[0], found[1]


def filled(
    v: Float[torch.Tensor, "1 3 z y x"], known: Bool[torch.Tensor, "1 1 z y x"]
) -> Float[torch.Tensor, "1 3 z y x"]:
    """What isn't known taken from means over ever larger blocks (push-pull, Gortler et al. 1996,
    doi:10.1145/237170.237200): smooth, and far away the mean of all.
    """
    weight = known.float()
    if bool((weight > 0).all()) or max(v.shape[2:]) == 1:
        return v
    size = v.shape[2:]
    half = (size[0] + 1) // 2, (size[1] + 1) // 2, (size[2] + 1) // 2
    share = F.adaptive_avg_pool3d(weight, half)
    coarse = F.adaptive_avg_pool3d(v * weight, half) / share.clamp_min(1e-12)
    coarse = filled(coarse, share > 0)
    return torch.where(known, v, F.interpolate(coarse, size=size, mode="trilinear", align_corners=False))


def _on_grid(
    displacement: Callable[[Float[np.ndarray, "n 3"]], Float[np.ndarray, "n 3"]], grid: Geometry
) -> Float[np.ndarray, "3 z y x"]:
    z, y, x = grid.shape
    affine = grid.index_to_mm()
    found = np.empty((z, y * x, 3), np.float32)
    plane = np.stack(np.meshgrid(np.arange(x), np.arange(y), indexing="xy"), -1).reshape(-1, 2)
    slices = max(1, ROWS // len(plane))
    for first in range(0, z, slices):
        some = np.arange(first, min(z, first + slices))
        index = np.concatenate([np.column_stack([plane, np.full(len(plane), k)]) for k in some])
        points = index @ affine[:, :3].T + affine[:, 3]
        found[some] = displacement(points).reshape(len(some), -1, 3)
    return np.ascontiguousarray(np.moveaxis(found.reshape(z, y, x, 3), -1, 0))
