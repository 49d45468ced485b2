"""A pair of scans in, aeration figures, maps and doubts out."""

import csv
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32, UInt8
from lungssl_data.lung_mask import LungMaskError, lung_sides
from lungssl_data.pair import PhaseScan
from lungssl_data.prepare import PrepareConfig, prepare_scan
from lungssl_data.readers import read_labels, read_volume, write_floats, write_labels
from lungssl_data.resample import resample_labels
from lungssl_data.volume import LabelMap, Volume
from lungssl_tasks.aeration import Matched, Part, breath, match, of_scan, of_volume
from lungssl_tasks.aeration.change import HYPER_HU, NON_HU, corrected_ventilation
from lungssl_tasks.aeration.parts import LOBE_NAMES, Down
from lungssl_tasks.aeration.precision import RECRUITMENT, below_detectable
from lungssl_tasks.aeration.strain import principal_stretches
from lungssl_tasks.registration.trust import LUNGS
from numpy import ndarray

from lungssl.errors import ConfigError, DataError
from lungssl.quality import Check, checks
from lungssl.registering import Registered, codes_of, lungs_of_lobes, preset_config, read_landmarks, register_volumes

PADDED_HU = -3024
"""What scanners fill corners with: `prepare_scan` never mixes it into its neighbours."""
MaskKind = Literal["aerated", "whole"]
"""Of what the lung masks hold: the air-filled lung alone, or also what isn't aerated."""
NOT_MEASURABLE = "not measurable: aerated-only mask"
ROLES = {"exhale": "fixed", "inhale": "moving"}
MAPS = tuple(f"map_{name}.nii.gz" for name in ("jacobian", "stretch", "gas_gain", "inhale_hu", "events", "lung"))
EVENTS = {1: "recruited", 2: "derecruited", 3: "hyperinflated"}
"""Codes of the map of what became of tissue."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Analysed:
    """All that is known of a pair."""

    registered: Registered
    scans: Mapping[str, PhaseScan]
    """`exhale` and `inhale`, cubes that hold the lungs alone: what tissue is looked up on. `parts` are counted on the
    scans' own voxels."""
    parts: Mapping[str, Part]
    matched: Matched
    checks: list[Check]
    masks: MaskKind
    down: Down
    seconds: float

    def figures(self) -> dict[str, dict[str, float | None]]:
        """By part of the lungs; None for what can't be told."""
        return {name: part.figures(non_aerated=self.masks == "whole") for name, part in self.parts.items()}

    def headline(self) -> str:
        """Recruitment of both lungs in one sentence."""
        recruited = self.figures()["lungs"]["net_recruited_percent"]
        grams = self.figures()["lungs"]["net_recruited_g"]
        if recruited is None or grams is None:
            why = NOT_MEASURABLE if self.masks == "aerated" else "not measurable: no lung mass"
            return f"Recruitment from exhale to inhale: {why}"
        said = f"Net recruitment from exhale to inhale: {recruited:.1f} % of lung mass ({grams:.0f} g)"
        return f"{said}, below detectable change" if below_detectable(recruited) else said

    def jacobian(self) -> Float32[ndarray, "z y x"]:
        """Volume at inhale by that at exhale, on the exhale grid; 0 beyond the lung."""
        return self.registered.jacobian()[0]

    def motion_mm(self) -> Float32[ndarray, "3 z y x"]:
        """u on the exhale grid."""
        return self.registered.registration.on_grid(self.scans["exhale"].geometry())

    def stretch(self) -> Float32[ndarray, "z y x"]:
        """Length at inhale by that at exhale along the direction that grows most; 0 beyond the lung."""
        scan = self.scans["exhale"]
        largest = principal_stretches(self.motion_mm(), scan.spacing_mm)[..., 0]
        return np.where(scan.lung > 0, largest, 0).astype(np.float32)

    def events(self) -> UInt8[ndarray, "z y x"]:
        """EVENTS on the exhale grid."""
        before, after = self.matched.exhale_hu, self.matched.inhale_hu
        found = np.zeros(len(before), np.uint8)
        found[(before >= HYPER_HU) & (after < HYPER_HU)] = 3
        if self.masks == "whole":
            found[(before >= NON_HU) & (after < NON_HU)] = 1
            found[(before < NON_HU) & (after >= NON_HU)] = 2
        return self.on_grid(found)

    def matched_hu(self) -> Float32[ndarray, "z y x"]:
        """HU of the same tissue at inhale, on the exhale grid; NaN beyond the lung."""
        return self.on_grid(self.matched.inhale_hu.astype(np.float32), beyond=np.nan)

    def gas_gain(self) -> Float32[ndarray, "z y x"]:
        """SACJ, relative gain of gas, on the exhale grid; NaN where it says nothing."""
        return self.on_grid(corrected_ventilation(self.matched).astype(np.float32), beyond=np.nan)

    def on_grid(self, values: ndarray, beyond: float = 0) -> ndarray:
        """Values of exhale lung voxels as an image."""
        lung = self.scans["exhale"].lung > 0
        image = np.full(lung.shape, beyond, values.dtype)
        image[lung] = values
        return image

    def as_dict(self) -> dict[str, object]:
        """For a program: no file names, nothing of the patient. None for what can't be told."""
        whole, figures = self.masks == "whole", self.figures()
        return {
            "research_use_only": True,
            "headline": self.headline(),
            "masks": self.masks,
            "not_measurable": NOT_MEASURABLE if self.masks == "aerated" else None,
            "gravity_pulls_to": self.down,
            "registered_voxel_mm": self.scans["exhale"].spacing_mm[0],
            "smallest_real_difference_percent": dataclasses.asdict(RECRUITMENT["machine"]),
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "registration": self.registered.summary(),
            "parts": {
                name: {
                    "exhale": held.exhale.as_dict(non_aerated=whole),
                    "inhale": held.inhale.as_dict(non_aerated=whole),
                    "pair": figures[name],
                }
                for name, held in self.parts.items()
            },
            "seconds": round(self.seconds, 1),
        }


def analyse_files(
    exhale: Path,
    inhale: Path,
    *,
    exhale_mask: Path | None = None,
    inhale_mask: Path | None = None,
    exhale_lobes: Path | None = None,
    inhale_lobes: Path | None = None,
    model: Path | None = None,
    landmarks: tuple[Path, Path] | None = None,
    aerated_masks: bool = False,
    preset: str = "default",
    prone: bool = False,
    device: str = "auto",
    say: Callable[[str], None],
) -> Analysed:
    """Register the pair and count what its lungs hold.

    Masks, lobes (1 RUL, 2 RML, 3 RLL, 4 LUL, 5 LLL) or a lobe `model` are taken to hold all of the lung, unless
    `aerated_masks` says that they lack what isn't aerated; masks made without any of them do. `landmarks`: files of
    points of exhale and, row by row, of inhale, only looked at when all is done. Raises ConfigError for options that
    don't fit together, DataError for scans, masks or points that can't be used, and what the readers raise.
    """
    files = {
        "mask": {"exhale": exhale_mask, "inhale": inhale_mask},
        "lobes": {"exhale": exhale_lobes, "inhale": inhale_lobes},
    }
    for what, of in files.items():
        if (of["exhale"] is None) != (of["inhale"] is None):
            raise ConfigError(f"--exhale-{what} and --inhale-{what} belong together; give both or neither")
    ways = [f"--exhale-{what}" for what, of in files.items() if of["exhale"] is not None]
    ways += ["--model"] if model is not None else []
    if len(ways) > 1:
        raise ConfigError(f"{' and '.join(ways)} exclude each other: each says where the lungs are")
    if aerated_masks and not ways:
        raise ConfigError("--aerated-masks is about given masks; without any, lungs are found by their air anyway")
    preset_config(preset)
    started = time.perf_counter()
    volumes = {"exhale": read_volume(exhale), "inhale": read_volume(inhale)}
    by_role = {role: volumes[phase] for phase, role in ROLES.items()}
    points = None if landmarks is None else read_landmarks(landmarks, by_role, names=tuple(ROLES))
    lungs: dict[str, LabelMap] = {}
    lobes: dict[str, LabelMap | None] = {}
    for phase, volume in volumes.items():
        mask, lobe = files["mask"][phase], files["lobes"][phase]
        lobes[phase] = None if lobe is None else _on_grid(read_labels(lobe), volume, f"--{phase}-lobes")
        if model is not None:
            lobes[phase] = _lobes_of(volume, model, device=device)
        if (found := lobes[phase]) is not None:
            lungs[phase] = lungs_of_lobes(found, f"lobes of {phase}")
        elif mask is not None:
            lungs[phase] = _with_sides(_on_grid(read_labels(mask), volume, f"--{phase}-mask"), volume, phase)
        else:
            lungs[phase] = _found(volume, phase)
        say(f"{phase}: lungs after {time.perf_counter() - started:.1f} s")
    _check_same_lungs(lungs)
    registered = register_volumes(
        by_role,
        {role: lungs[phase] for phase, role in ROLES.items()},
        preset=preset,
        points=points,
        sided=True,
        device=device,
        say=lambda line: say(line.replace("fixed:", "exhale:").replace("moving:", "inhale:")),
    )
    scans = {phase: _lung_alone(volumes[phase], lungs[phase], lobes[phase], preset) for phase in ROLES}
    u_mm = registered.registration.on_grid(scans["exhale"].geometry())
    matched = match(scans["exhale"], scans["inhale"], u_mm, registered.jacobian()[0])
    down: Down = "front" if prone else "back"
    voxels = {phase: of_volume(volumes[phase], lungs[phase], lobes[phase]) for phase in ROLES}
    parts = breath(voxels["exhale"], voxels["inhale"], matched, matched_voxels=of_scan(scans["exhale"]), down=down)
    masks: MaskKind = "whole" if ways and not aerated_masks else "aerated"
    return Analysed(
        registered=registered,
        scans=scans,
        parts=parts,
        matched=matched,
        checks=checks(volumes, registered, voxels, parts, whole=masks == "whole"),
        masks=masks,
        down=down,
        seconds=time.perf_counter() - started,
    )


def _lung_alone(volume: Volume, lung: LabelMap, lobes: LabelMap | None, preset: str) -> PhaseScan:
    """The cubes that tissue is looked up on, made from what is in the lung alone: the grid that was registered on."""
    inside = Volume(hu=np.where(lung.labels > 0, volume.hu, np.int16(PADDED_HU)), geometry=volume.geometry)
    config = PrepareConfig(spacing_mm=preset_config(preset).spacing_mm)
    return prepare_scan(inside, config=config, lung=lung, lobes=lobes)


def _on_grid(mask: LabelMap, volume: Volume, option: str) -> LabelMap:
    """On the volume's grid; DataError for a mask that is empty, or of another scan."""
    if not mask.labels.any():
        raise DataError(f"{option} is empty; give a mask of the lungs, or leave it out to have one made")
    labels = resample_labels(mask, volume.geometry)
    if not labels.any():
        raise DataError(f"{option} doesn't lie within the scan; is it of another one?")
    return LabelMap(labels=labels, geometry=volume.geometry)


def _found(volume: Volume, phase: str) -> LabelMap:
    from lungssl.segmenting import segment_lungs

    try:
        return segment_lungs(volume).mask
    except LungMaskError as error:
        raise DataError(f"--{phase}: {error}; give --{phase}-mask") from error


def _check_same_lungs(lungs: Mapping[str, LabelMap]) -> None:
    """DataError where one scan lacks a lung that the other has: their figures would compare different tissue."""
    sides = {phase: codes_of(mask) for phase, mask in lungs.items()}
    if empty := [phase for phase, held in sides.items() if not held]:
        raise DataError(f"no lung was found at {' and '.join(empty)}; give --exhale-mask and --inhale-mask")
    if sides["exhale"] != sides["inhale"]:
        said = {phase: " and ".join(LUNGS[side] for side in sorted(held)) for phase, held in sides.items()}
        raise DataError(
            f"exhale shows the {said['exhale']} lung, inhale the {said['inhale']}: give masks of the same lungs "
            f"(--exhale-mask, --inhale-mask); lungs without air aren't found by it"
        )


def _with_sides(mask: LabelMap, volume: Volume, phase: str) -> LabelMap:
    """1 right, 2 left, of a mask that may not tell them apart."""
    if codes_of(mask) == {1, 2}:
        return mask
    try:
        sides = lung_sides(mask.labels > 0, volume)
    except LungMaskError as error:
        raise DataError(f"--{phase}-mask: {error}; give one with 1 right and 2 left") from error
    return LabelMap(labels=sides, geometry=volume.geometry)


def _lobes_of(volume: Volume, model: Path, *, device: str) -> LabelMap:
    from lungssl.segmenting import segment_with_model
    from lungssl.training.precision import pick_device

    found = segment_with_model(volume, model, device=str(pick_device(device)))
    if found.names != LOBE_NAMES:
        raise ConfigError(
            f"--model labels {', '.join(found.names.values())}; analyze takes a model of lobes, "
            f"{', '.join(LOBE_NAMES.values())}"
        )
    return found.mask


def write_tables(found: Analysed, json_path: Path, csv_path: Path) -> None:
    """All figures as JSON, and as one row a part and figure; what can't be told is empty, or says why."""
    held = found.as_dict()
    json_path.write_text(json.dumps(held, indent=1, allow_nan=False), encoding="utf-8")
    why = NOT_MEASURABLE if found.masks == "aerated" else ""
    with csv_path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "of", "figure", "value"])
        writer.writerow(["", "", "use", "research only"])
        for name, part in found.parts.items():
            figures = part.figures(non_aerated=found.masks == "whole")
            scans = {phase: getattr(part, phase) for phase in ROLES}
            rows = {phase: one.as_dict(non_aerated=found.masks == "whole") for phase, one in scans.items()}
            told = {phase: one.as_dict() for phase, one in scans.items()} | {"pair": part.figures()}
            for of, values in (rows | {"pair": figures}).items():
                for figure, value in values.items():
                    untold = why if told[of][figure] is not None else ""
                    writer.writerow([name, of, figure, untold if value is None else f"{value:.6g}"])


def write_maps(found: Analysed, folder: Path) -> None:
    """MAPS on the grid that was registered on, of the exhale lungs; NaN where nothing is known."""
    folder.mkdir(parents=True, exist_ok=True)
    grid = found.scans["exhale"].geometry()
    for name, image in (
        ("jacobian", found.jacobian()),
        ("stretch", found.stretch()),
        ("gas_gain", found.gas_gain()),
        ("inhale_hu", found.matched_hu()),
    ):
        write_floats(folder / f"map_{name}.nii.gz", image.astype(np.float32), grid)
    for name, labels in (("events", found.events()), ("lung", found.scans["exhale"].lung)):
        write_labels(folder / f"map_{name}.nii.gz", LabelMap(labels=labels, geometry=grid))
