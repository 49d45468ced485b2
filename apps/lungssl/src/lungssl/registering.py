"""Two scans' files in, a displacement field and what was asked for beside it out."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
import yaml
from jaxtyping import Bool, Float, Float32
from lungssl_backbones.encoder import Encoder
from lungssl_backbones.weights import load_encoder
from lungssl_data.field import field_image
from lungssl_data.lung_mask import LungMaskError
from lungssl_data.pair import AIR_HU, PhaseScan
from lungssl_data.points import read_points
from lungssl_data.prepare import SIDE_UNKNOWN, PrepareConfig, prepare_scan
from lungssl_data.readers import read_labels, read_volume
from lungssl_data.resample import resample_labels
from lungssl_data.volume import Geometry, LabelMap, Volume
from lungssl_ops.warp import jacobian_determinant
from lungssl_tasks.joint.inference import predicted_labels
from lungssl_tasks.joint.model import JointModel
from lungssl_tasks.model_folder import load_displacements
from lungssl_tasks.registration import PRESETS, Registration, RegistrationConfig, register
from lungssl_tasks.registration.network import DisplacementModel, predict
from lungssl_tasks.registration.register import Start
from lungssl_tasks.registration.scores import LandmarkErrors, landmark_errors
from lungssl_tasks.tidying import tidy
from numpy import ndarray
from torch import nn

from lungssl.comparison.landmarks import point_features
from lungssl.errors import ConfigError, DataError, did_you_mean
from lungssl.finetuning import encoder_file
from lungssl.segmenting import model_folder
from lungssl.training.precision import pick_device

LUNG_OF_LOBE = {1: 1, 2: 1, 3: 1, 4: 2, 5: 2}
ENCODER_SHARE = 0.5
"""Of the search's cost, what an encoder's features have beside MIND-SSC, unless it is said. Not tuned."""
SLAB = 32
"""Slices that are warped at a time: 200 MB of float64 field for 512 x 512 voxels."""
WINDOW_MM = 192.0
"""Side of the windows that an encoder sees, as plan `phases` trains and judges them, where its run isn't known."""


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A registration with what it was made from."""

    registration: Registration
    fixed: Volume
    moving: Volume
    scans: dict[str, PhaseScan]
    """`fixed` and `moving` as they were registered: axis-aligned cubes around the lungs."""
    preset: str
    seconds: float
    """Of registering, reading files not counted."""
    landmarks: LandmarkErrors | None = None
    """Of points that were given of both scans."""
    points_mm: tuple[Float[ndarray, "n 3"], Float[ndarray, "n 3"]] | None = None
    """These points, LPS: of the fixed and of the moving scan."""
    lobes: LabelMap | None = None
    """Of the fixed scan on its own grid, as a joint model sees them; without islands."""

    def field(self, spacing_mm: float | None = None) -> tuple[Float32[ndarray, "3 z y x"], Geometry]:
        """u on the fixed image's grid, or on one of about `spacing_mm` with the same first voxel and directions."""
        grid = coarser(self.fixed.geometry, spacing_mm)
        return self.registration.on_grid(grid), grid

    def inverse(self, spacing_mm: float | None = None) -> tuple[Float32[ndarray, "3 z y x"], Geometry]:
        """From moving to fixed points, on the moving image's grid; NaN where none was found."""
        grid = coarser(self.moving.geometry, spacing_mm)
        return self.registration.back_on_grid(grid), grid

    def jacobian(self) -> tuple[Float32[ndarray, "z y x"], Geometry]:
        """Volume of the moving by the fixed lung at each voxel of the registered grid; 0 outside of the fixed lung."""
        found, scan = self.registration, self.scans["fixed"]
        v_vox = torch.from_numpy(np.asarray(found.v_mm, np.float32) / scan.spacing_mm[0])[None]
        determinant = jacobian_determinant(v_vox)[0].numpy() * np.float32(np.linalg.det(found.affine[:, :3]))
        return np.where(scan.lung > 0, determinant, np.float32(0)), scan.geometry()

    def summary(self) -> dict[str, object]:
        """Figures for a program."""
        trust = dataclasses.asdict(self.registration.trust)
        return {
            "preset": self.preset,
            "seconds": round(self.seconds, 2),
            "affine": self.registration.affine.tolist(),
            "trusted": not self.registration.trust.doubts,
            "landmarks": None if self.landmarks is None else dataclasses.asdict(self.landmarks),
            **{
                name: (round(value, 5) if math.isfinite(value) else None) if isinstance(value, float) else value
                for name, value in trust.items()
            },
        }

    def describe(self) -> str:
        """Lines for a person."""
        trust = self.registration.trust
        lines = [
            f"registered in {self.seconds:.1f} s ({self.preset})",
            f"lungs overlap {trust.overlap:.3f} (Dice), insides correlate {trust.similarity:.2f}, "
            f"there and back differ by {trust.disagreement_mm:.1f} mm",
            f"moving lung {trust.volume_ratio:.2f} times the fixed one; SD of ln J {trust.jacobian_sd:.2f}, "
            f"folds {trust.folded_share:.3%}",
        ]
        if (errors := self.landmarks) is not None:
            lines.append(
                f"TRE of {errors.points} landmarks {errors.mean_mm:.2f} mm (median {errors.median_mm:.2f}, "
                f"95th centile {errors.p95_mm:.2f}, worst {errors.max_mm:.2f}); {errors.identity_mm:.1f} mm before"
            )
        doubts = [f"NOT TRUSTED: {doubt}" for doubt in trust.doubts]
        return "\n".join([*lines, *(doubts or ["nothing speaks against it"])])


def register_files(
    fixed: Path,
    moving: Path,
    *,
    fixed_mask: Path | None = None,
    moving_mask: Path | None = None,
    preset: str = "default",
    encoder: Path | None = None,
    encoder_share: float = ENCODER_SHARE,
    model: Path | None = None,
    diffeomorphic: bool = False,
    landmarks: tuple[Path, Path] | None = None,
    lobes: bool = False,
    device: str = "auto",
    say: Callable[[str], None],
) -> Registered:
    """Register the scan in `moving` to that in `fixed`; masks of the lungs are made where none is given.

    `encoder`: a pretraining run or weights, whose features stand beside MIND-SSC in the search, for `encoder_share` of
    the cost; with 1 they stand alone.
    `model`: a fine-tuned registration network, whose answer takes the place of the search. `landmarks`: files of points
    of `fixed` and, row by row, where they are in `moving`; they are only looked at when all is done.

    Raises ConfigError for an unknown preset, DataError for scans whose lungs can't be found or matched, and what the
    readers raise.
    """
    preset_config(preset)  # a wrong name is told before minutes of reading
    volumes = {"fixed": read_volume(fixed), "moving": read_volume(moving)}
    points = None if landmarks is None else read_landmarks(landmarks, volumes)
    masks = {
        role: None if path is None else read_labels(path)
        for role, path in (("fixed", fixed_mask), ("moving", moving_mask))
    }
    return register_volumes(
        volumes,
        masks,
        preset=preset,
        encoder=encoder,
        encoder_share=encoder_share,
        model=model,
        diffeomorphic=diffeomorphic,
        points=points,
        lobes=lobes,
        device=device,
        say=say,
    )


def register_volumes(
    volumes: Mapping[str, Volume],
    masks: Mapping[str, LabelMap | None],
    *,
    preset: str = "default",
    encoder: Path | None = None,
    encoder_share: float = ENCODER_SHARE,
    model: Path | None = None,
    diffeomorphic: bool = False,
    points: tuple[Float[ndarray, "n 3"], Float[ndarray, "n 3"]] | None = None,
    lobes: bool = False,
    sided: bool = False,
    device: str = "auto",
    say: Callable[[str], None],
) -> Registered:
    """As `register_files`, of what has been read: `fixed` and `moving`, and their points in LPS mm.

    `lobes`: find them, too, where `model` is a joint one. `sided`: the masks' codes are sides, 1 right and 2 left,
    though one be missing.
    """
    config = preset_config(preset)
    if diffeomorphic:
        config = dataclasses.replace(config, descent=dataclasses.replace(config.descent, diffeomorphic=True))
    if encoder is not None and model is not None:
        raise ConfigError("--encoder and --model exclude each other: a network has an encoder of its own")
    network = None if model is None else load_displacements(model_folder(model)).to(pick_device(device))
    backbone = None if encoder is None else load_encoder(encoder_file(encoder))
    if network is not None:
        assert isinstance(network.encoder, nn.Module)
        backbone = network.encoder
    # Masks of 1 alone name no sides: both lungs are taken for one, unless the other scan's are told apart.
    plain = {role: mask is not None and not sided and codes_of(mask) == {1} for role, mask in masks.items()}
    one_code = all(plain.values())
    started = time.perf_counter()
    scans: dict[str, PhaseScan] = {}
    seen: dict[str, PhaseScan] = {}  # as the encoder sees them
    for role, volume in volumes.items():
        mask = masks[role]
        if mask is not None and not mask.labels.any():
            raise DataError(f"--{role}-mask is empty; give a mask of the lungs, or leave it out to have one made")
        if mask is not None and not resample_labels(mask, volume.geometry).any():
            raise DataError(f"--{role}-mask doesn't lie within --{role}; is it of another scan?")
        if mask is not None and plain[role] and not one_code:
            mask = LabelMap(labels=mask.labels * np.uint8(SIDE_UNKNOWN), geometry=mask.geometry)
        if mask is not None and codes_of(mask) & {4, 5}:
            mask = lungs_of_lobes(mask, f"--{role}-mask")
        try:
            scan = prepare_scan(volume, config=PrepareConfig(spacing_mm=config.spacing_mm), lung=mask)
        except LungMaskError as error:
            raise DataError(f"--{role}: {error}; give --{role}-mask") from error
        if backbone is not None:
            assert isinstance(backbone, Encoder)
            shown = prepare_scan(volume, config=PrepareConfig(spacing_mm=backbone.spacing_mm), lung=mask)
            seen[role] = dataclasses.replace(shown, lung=(shown.lung > 0).astype(np.uint8))
        scans[role] = dataclasses.replace(scan, lung=(scan.lung > 0).astype(np.uint8)) if one_code else scan
        say(f"{role}: lungs {float((scan.lung > 0).sum()) * config.spacing_mm**3 / 1e6:.2f} l")
    features, start = None, None
    if network is not None:
        start = network_start(network, seen)
    elif backbone is not None:
        features = encoder_features(backbone, seen, window_mm=window_mm_of(encoder, backbone))
        config = searched_by(config, encoder_share)
    try:
        found = register(
            scans["fixed"],
            scans["moving"],
            config,
            features=features,
            start=start,
            device=pick_device(device),
            say=lambda stage: say(f"{stage} after {time.perf_counter() - started:.1f} s"),
        )
    except ValueError as error:
        raise DataError(str(error)) from error
    return Registered(
        registration=found,
        fixed=volumes["fixed"],
        moving=volumes["moving"],
        scans=scans,
        preset=preset,
        seconds=time.perf_counter() - started,
        landmarks=None if points is None else landmark_errors(points[0] + found.at(points[0]), points[1], points[0]),
        points_mm=points,
        lobes=_lobes(network, seen, found, volumes["fixed"].geometry)
        if lobes and isinstance(network, JointModel)
        else None,
    )


def _lobes(network: JointModel, scans: Mapping[str, PhaseScan], found: Registration, grid: Geometry) -> LabelMap:
    labels = tidy(predicted_labels(network, scans["fixed"], scans["moving"], found.affine))
    own = LabelMap(labels=labels, geometry=scans["fixed"].geometry())
    return LabelMap(labels=resample_labels(own, grid), geometry=grid)


def codes_of(mask: LabelMap) -> set[int]:
    """But for 0, by counting: sorting, as `numpy.unique` does, takes seconds for a large scan."""
    return set(np.flatnonzero(np.bincount(mask.labels.ravel())).tolist()) - {0}


def lungs_of_lobes(lobes: LabelMap, name: str) -> LabelMap:
    """1 right, 2 left, of lobes 1 RUL, 2 RML, 3 RLL, 4 LUL, 5 LLL; DataError for other codes."""
    if unknown := sorted(codes_of(lobes) - set(LUNG_OF_LOBE)):
        raise DataError(f"{name}: unknown code {unknown[0]}; expected lobes 1 RUL, 2 RML, 3 RLL, 4 LUL, 5 LLL")
    table = np.array([0, *LUNG_OF_LOBE.values()], np.uint8)
    return LabelMap(labels=table[lobes.labels], geometry=lobes.geometry)


def preset_config(name: str) -> RegistrationConfig:
    """Of PRESETS; ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"--preset {name!r} is unknown{did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def read_landmarks(
    paths: tuple[Path, Path], volumes: Mapping[str, Volume], *, names: Sequence[str] = ("fixed", "moving")
) -> tuple[Float[ndarray, "n 3"], Float[ndarray, "n 3"]]:
    """Points of the fixed and of the moving scan, LPS mm; DataError where they aren't as many, or lie beyond it.

    `names`: of the options by which the scans were given.
    """
    here, there = (
        read_points(path, volumes[role].geometry, of=phase)
        for path, role, phase in zip(paths, ("fixed", "moving"), ("exhale", "inhale"), strict=True)
    )
    if len(here) != len(there):
        raise DataError(
            f"{paths[0].name} has {len(here)} points and {paths[1].name} {len(there)}; row by row they must be the same"
        )
    for path, role, name, points in zip(paths, ("fixed", "moving"), names, (here, there), strict=True):
        if (outside := beyond(points, volumes[role].geometry)).any():
            raise DataError(
                f"{path.name}: point {int(np.argmax(outside)) + 1} lies beyond --{name}; points must be in LPS mm "
                f"(in RAS the signs of x and y are turned)"
            )
    return here, there


def beyond(points_mm: Float[ndarray, "n 3"], grid: Geometry) -> Bool[ndarray, " n"]:
    """Whether points lie beyond the voxels of a grid."""
    index_to_mm = grid.index_to_mm()
    index = (points_mm - index_to_mm[:, 3]) @ np.linalg.inv(index_to_mm[:, :3]).T
    return ((index < -0.5) | (index > np.array(grid.shape[::-1]) - 0.5)).any(axis=1)


def searched_by(config: RegistrationConfig, share: float) -> RegistrationConfig:
    """The preset with an encoder's features in its search; ConfigError for a share beyond 0 to 1."""
    if not 0 <= share <= 1:
        raise ConfigError(f"--encoder-share {share}: expected 0 (MIND-SSC alone) to 1 (the encoder's features alone)")
    return dataclasses.replace(config, search=dataclasses.replace(config.search, given_share=share))


def network_start(network: DisplacementModel, scans: Mapping[str, PhaseScan]) -> Start:
    """What `register` begins with: the network's answer on scans of its voxels."""
    return lambda affine: predict(network, scans["fixed"], scans["moving"], affine)


def window_mm_of(source: Path | None, encoder: nn.Module) -> float:
    """Side of the views that a pretraining run trained its encoder on: attention is at home, and quick, in no others.
    WINDOW_MM for weights without a run.
    """
    assert isinstance(encoder, Encoder)
    recipe = None if source is None or not source.is_dir() else source / "config.yaml"
    if recipe is None or not recipe.is_file():
        return WINDOW_MM
    views = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("views") or {}
    return views["global_vox"] * encoder.spacing_mm if "global_vox" in views else WINDOW_MM


def encoder_features(
    encoder: nn.Module, scans: Mapping[str, PhaseScan], *, window_mm: float = WINDOW_MM
) -> Callable[[str, Float[ndarray, "n 3"]], Float[torch.Tensor, "n c"]]:
    """Frozen features of each scan at points, LPS mm, seen through windows of about `window_mm`; points beyond a scan's
    voxels take those of its border.
    """
    assert isinstance(encoder, Encoder)
    stride = encoder.token_stride_vox
    side_vox = max(1, round(window_mm / encoder.spacing_mm / stride)) * stride

    def features(role: str, points_mm: Float[ndarray, "n 3"]) -> Float[torch.Tensor, "n c"]:
        scan = scans[role]
        first = np.asarray(scan.origin_mm)
        last = first + (np.array(scan.ct_hu.shape[::-1]) - 1) * np.asarray(scan.spacing_mm)
        inside = torch.from_numpy(np.clip(points_mm, first, last)).float()
        return point_features(encoder, scan, inside, side_vox)

    return features


def coarser(grid: Geometry, spacing_mm: float | None) -> Geometry:
    """The grid with every n-th voxel along each axis, n such that they lie at most `spacing_mm` apart; itself for None.

    The last voxel may lie up to n - 1 voxels within the grid's end.
    """
    if spacing_mm is None:
        return grid
    every = [max(1, int(spacing_mm / mm + 1e-6)) for mm in grid.spacing_mm]
    z, y, x = (1 + (size - 1) // step for size, step in zip(grid.shape, reversed(every), strict=True))
    sx, sy, sz = (mm * step for mm, step in zip(grid.spacing_mm, every, strict=True))
    return dataclasses.replace(grid, shape=(z, y, x), spacing_mm=(sx, sy, sz))


def warp_volume(moving: Volume, u_mm: Float32[ndarray, "3 z y x"], grid: Geometry) -> Volume:
    """The moving scan where the field's grid finds it, trilinear; AIR_HU beyond the moving scan."""
    warped = _warped(moving.hu, moving.geometry, u_mm, grid, sitk.sitkLinear, AIR_HU)
    return Volume(hu=np.rint(warped).astype(np.int16), geometry=grid)


def warp_labels(moving: LabelMap, u_mm: Float32[ndarray, "3 z y x"], grid: Geometry) -> LabelMap:
    """Moving labels where the field's grid finds them, of the nearest voxel."""
    warped = _warped(moving.labels, moving.geometry, u_mm, grid, sitk.sitkNearestNeighbor, 0)
    return LabelMap(labels=warped.astype(np.uint8), geometry=grid)


def warp_points(
    points_mm: Float[ndarray, "n 3"], u_mm: Float32[ndarray, "3 z y x"], grid: Geometry
) -> Float[ndarray, "n 3"]:
    """Fixed points in the moving scan, p + u(p), as ITK reads the field; DataError for points beyond what it knows."""
    if (outside := beyond(points_mm, grid)).any():
        raise DataError(
            f"point {int(np.argmax(outside)) + 1} of {len(points_mm)} lies beyond the field; points must be of the "
            f"fixed scan, in LPS mm"
        )
    transform = sitk.DisplacementFieldTransform(sitk.Cast(field_image(u_mm, grid), sitk.sitkVectorFloat64))
    moved = np.array([transform.TransformPoint(point) for point in points_mm.tolist()])
    if (lost := ~np.isfinite(moved).all(axis=1)).any():
        raise DataError(f"point {int(np.argmax(lost)) + 1} of {len(points_mm)} lies where the field is not known (NaN)")
    return moved


def _warped(
    values: ndarray, geometry: Geometry, u_mm: Float32[ndarray, "3 z y x"], grid: Geometry, how: int, beyond: float
) -> ndarray:
    """`beyond` where the field leads out of the volume, or is NaN. By slabs: ITK wants the field in float64."""
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection(geometry.direction.ravel().tolist())
    found = []
    for first in range(0, grid.shape[0], SLAB):
        u_slab = u_mm[:, first : first + SLAB]
        corner = grid.index_to_mm() @ np.array([0.0, 0.0, first, 1.0])
        slab = dataclasses.replace(grid, shape=u_slab.shape[1:], origin_mm=(corner[0], corner[1], corner[2]))
        field = field_image(np.nan_to_num(u_slab), slab)
        reference = sitk.Image(list(reversed(slab.shape)), sitk.sitkUInt8)
        reference.CopyInformation(field)
        transform = sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
        warped = sitk.GetArrayFromImage(sitk.Resample(image, reference, transform, how, beyond))
        found.append(np.where(np.isfinite(u_slab).all(axis=0), warped, warped.dtype.type(beyond)))
    return np.concatenate(found)


def write_summary(registered: Registered, path: Path) -> None:
    """The figures as JSON."""
    path.write_text(json.dumps(registered.summary(), indent=1), encoding="utf-8")
