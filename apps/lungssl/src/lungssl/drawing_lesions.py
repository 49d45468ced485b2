"""Lesions of a pair of scans that is in no cache, from the diameters somebody measured: by GrabCut, or by a network."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from lungssl_data.lung_mask import LungMaskError
from lungssl_data.pair import Phase, PhasePair, PhaseScan
from lungssl_data.prepare import PrepareConfig, coarse_affine, prepare_scan
from lungssl_data.readers import write_labels
from lungssl_data.resample import resample_labels
from lungssl_data.volume import LabelMap, Volume
from lungssl_tasks.cosegmentation.diameters_file import check_places, read_diameters
from lungssl_tasks.cosegmentation.grabcut import GrabCutConfig
from lungssl_tasks.cosegmentation.lesion_pairs import LesionPairs
from lungssl_tasks.cosegmentation.lesions import PHASES, Match, Measured
from lungssl_tasks.cosegmentation.model import CosegmentationModel
from lungssl_tasks.model_folder import load_cosegmentation
from numpy import ndarray
from scipy import ndimage

from lungssl.errors import ConfigError, DataError
from lungssl.lesion_scoring import likelier
from lungssl.segmenting import FAR_MM, model_folder, segment_lungs
from lungssl.training.precision import pick_device

GRABCUT_SPACING_MM = 4.0
"""Voxels on which GrabCut's weights were chosen (`docs/decisions/0011-joint.md`)."""
MASKS: dict[Phase, str] = {phase: f"{phase}_lesions.nii.gz" for phase in PHASES}
TABLE = "lesions.csv"
FILES = (*MASKS.values(), TABLE)
"""What is written."""
MOST_LESIONS = 255
"""Labels of a mask."""


@dataclass(frozen=True, kw_only=True)
class DrawnLesion:
    """One phase of one lesion; the fields are the columns of the CSV."""

    lesion: int
    """Its label in the masks, the same in both phases."""
    phase: Phase
    diameters: Literal["own", "other phase"]
    """Whose told where it is."""
    drawn_by: Literal["GrabCut", "network", "nobody"]
    """`nobody`: without a network a phase is drawn by its own diameters alone."""
    volume_ml: float | None
    """0 where nothing was found, None where nobody looked."""
    mean_hu: float | None
    """None where nothing was found."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawnLesions:
    """Of both phases, on the scans' own grids."""

    masks: Mapping[Phase, LabelMap]
    lesions: list[DrawnLesion]


def draw_lesions(
    volumes: Mapping[Phase, Volume],
    lungs: Mapping[Phase, LabelMap | None],
    diameters: Path,
    *,
    model: Path | None = None,
    device: str = "auto",
) -> DrawnLesions:
    """Masks of the lesions in a file of diameters, which names one patient. Lungs are found where none are given.

    `model`: a run of `finetune cosegment`; it also draws in a phase without diameters, where the coarse affine of the
    lungs' boxes takes the other phase's. Raises ConfigError for a model of another kind, DataError for a file that
    can't be read or isn't of these scans, and for lungs that aren't found.
    """
    given, patient = _given(diameters)
    if np.array_equal(volumes["exhale"].hu, volumes["inhale"].hu):
        raise DataError("--exhale and --inhale are the same scan; give both phases")
    # GrabCut cuts its own crops, and has no use for a side.
    network, side_vox = (None, 1) if model is None else load_cosegmentation(model_folder(model))
    where = pick_device(device)
    spacing_mm = GRABCUT_SPACING_MM if network is None else network.encoder.spacing_mm
    scans: dict[Phase, PhaseScan] = {}
    for phase in PHASES:
        try:
            lung = lungs[phase] or segment_lungs(volumes[phase]).mask
            # Lungs that are found by their air lack what is dense, which may lie far behind them.
            config = PrepareConfig(spacing_mm=spacing_mm, margin_mm=FAR_MM)
            scans[phase] = prepare_scan(volumes[phase], config=config, lung=lung)
        except LungMaskError as error:
            raise DataError(f"--{phase}: {error}; give --{phase}-mask") from error
    pair = PhasePair(
        patient=patient,
        exhale=scans["exhale"],
        inhale=scans["inhale"],
        exhale_to_inhale=coarse_affine(scans["exhale"], scans["inhale"]),
        affine_provenance="lung boxes",
    )
    try:
        for phase in PHASES:
            check_places(given, pair.patient, phase, scans[phase])
        lesions = LesionPairs(
            {pair.patient: pair},
            [pair.patient],
            side_vox=side_vox,
            supervision="diameters",
            grabcut=GrabCutConfig(),
            seed=0,
            diameters=given,
        )
    except ValueError as error:
        raise DataError(f"--diameters: {error}") from error
    if len(lesions.matches) > MOST_LESIONS:
        raise DataError(f"--diameters: {len(lesions.matches)} lesions, at most {MOST_LESIONS} go into a mask; split it")
    labels = {phase: np.zeros(scans[phase].ct_hu.shape, np.uint8) for phase in PHASES}
    rows: list[tuple[int, Phase, Literal["own", "other phase"], Literal["GrabCut", "network", "nobody"]]] = []
    for number, match in enumerate(lesions.matches, start=1):
        answers = _by_grabcut(lesions, match) if network is None else _by_network(network.to(where), lesions, match)
        for phase, parts in answers.items():
            for mask, corner in parts:
                _paste(labels[phase], mask, corner, number)
            own = bool(getattr(match, phase))
            by = "network" if network is not None else "GrabCut" if own else "nobody"
            rows.append((number, phase, "own" if own else "other phase", by))
    masks = {
        phase: LabelMap(
            labels=resample_labels(
                LabelMap(labels=labels[phase], geometry=scans[phase].geometry()), volumes[phase].geometry
            ),
            geometry=volumes[phase].geometry,
        )
        for phase in PHASES
    }
    return DrawnLesions(masks=masks, lesions=[_measured(*row, volumes, masks) for row in rows])


def write_lesions(found: DrawnLesions, folder: Path) -> None:
    """FILES: masks whose labels are the lesions' numbers, and a row for each lesion and phase."""
    folder.mkdir(parents=True, exist_ok=True)
    for phase, mask in found.masks.items():
        write_labels(folder / MASKS[phase], mask)
    with (folder / TABLE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(DrawnLesion.__dataclass_fields__)
        for one in found.lesions:
            figures = (
                "" if one.volume_ml is None else f"{one.volume_ml:.3f}",
                "" if one.mean_hu is None else f"{one.mean_hu:.1f}",
            )
            writer.writerow([one.lesion, one.phase, one.diameters, one.drawn_by, *figures])


def describe(found: DrawnLesions) -> str:
    """One line a lesion."""
    lines = []
    for number in dict.fromkeys(one.lesion for one in found.lesions):
        cells = [
            f"{one.phase} not drawn: no diameters there, and no --model"
            if one.volume_ml is None
            else f"{one.phase} {one.volume_ml:.1f} ml"
            + (" (NOTHING FOUND)" if one.mean_hu is None else f", mean {one.mean_hu:.0f} HU")
            + (" (told by the other phase)" if one.diameters == "other phase" else "")
            for one in found.lesions
            if one.lesion == number
        ]
        lines.append(f"lesion {number}: {'; '.join(cells)}")
    return "\n".join(lines)


def _given(diameters: Path) -> tuple[Measured, str]:
    """What a file of one patient holds, and the patient."""
    try:
        given = read_diameters(diameters)
    except (OSError, ValueError) as error:
        raise DataError(f"--diameters: {error}") from error
    patients = list(dict.fromkeys(patient for patient, _ in given))
    if len(patients) > 1:
        raise ConfigError(f"--diameters {diameters}: {len(patients)} patients; keep the lines of this pair's")
    return given, patients[0]


Parts = list[tuple[Bool[ndarray, "z y x"], tuple[int, int, int]]]
"""Masks, and where in the scan their first voxels are."""


def _by_grabcut(lesions: LesionPairs, match: Match) -> dict[Phase, Parts]:
    return {phase: [lesions.pseudo(match.patient, phase, k) for k in getattr(match, phase)] for phase in PHASES}


def _by_network(network: CosegmentationModel, lesions: LesionPairs, match: Match) -> dict[Phase, Parts]:
    """What the network draws of what is connected with the ellipsoid: other lesions lie in the crop, too."""
    crops = lesions.crops(match)
    where = next(network.parameters()).device
    values = [
        torch.from_numpy(getattr(crops[phase], name).astype(np.float32))[None, None].to(where)
        for name in ("hu", "told")
        for phase in PHASES
    ]
    network.eval()
    with torch.inference_mode():
        logits = network(values[0], values[1], values[2] / 255, values[3] / 255)
    found: dict[Phase, Parts] = {}
    for phase, one in zip(PHASES, logits, strict=True):
        mask = likelier(one)
        parts, _ = ndimage.label(mask, structure=np.ones((3, 3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
        told = parts[crops[phase].told >= 127]
        found[phase] = [(mask & np.isin(parts, told[told > 0]), crops[phase].low)]
    return found


def _paste(
    labels: UInt8[ndarray, "z y x"], mask: Bool[ndarray, "_z _y _x"], corner: tuple[int, int, int], number: int
) -> None:
    """A lesion's voxels into a scan's labels; of two lesions the first keeps what both would have."""
    places = np.argwhere(mask) + corner
    z, y, x = places[((places >= 0) & (places < labels.shape)).all(axis=1)].T
    free = labels[z, y, x] == 0
    labels[z[free], y[free], x[free]] = number


def _measured(
    number: int,
    phase: Phase,
    diameters: Literal["own", "other phase"],
    by: Literal["GrabCut", "network", "nobody"],
    volumes: Mapping[Phase, Volume],
    masks: Mapping[Phase, LabelMap],
) -> DrawnLesion:
    inside = masks[phase].labels == number
    return DrawnLesion(
        lesion=number,
        phase=phase,
        diameters=diameters,
        drawn_by=by,
        volume_ml=None if by == "nobody" else float(inside.sum() * masks[phase].geometry.voxel_ml()),
        mean_hu=float(volumes[phase].hu[inside].mean()) if inside.any() else None,
    )
