"""EMPIRE10: `scans/{01..30}_{Fixed,Moving}.mhd` and `lungMasks/` with the same names.

Source: https://empire10.grand-challenge.org, Murphy et al. 2011, doi:10.1109/TMI.2011.2158349; `domain.md` C5. The
names say nothing of the phase. For the twelve pairs that Lung250M-4B took, its process_empire.py does: fixed is
expiration but in four. For the others the masks decide: the larger lungs are inhale, and lungs of equal size are two
scans of one phase, taken as two inhale scans of one person.

Lung250M-4B adds -24 to stored values, so scans may be stored with an offset: the peak of air in each scan's middle
slice decides.
"""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from lungssl_data.layouts.files import dataset_name, found, has_name, nothing_found
from lungssl_data.layouts.source import PairSource, ScanSource, attempt, check_path
from lungssl_data.pair import CacheError, Phase
from lungssl_data.readers import files_of, read_labels

FILE = r"(\d\d)_(fixed|moving)\.mhd"
IMAGE = rf"scans/{FILE}"
MASK = rf"lungmasks/{FILE}"
FIXED_IS: dict[int, Phase] = {1: "exhale", 7: "exhale", 8: "exhale", 13: "inhale", 14: "exhale", 16: "inhale"}
FIXED_IS |= {17: "inhale", 18: "exhale", 20: "exhale", 21: "exhale", 23: "inhale", 28: "exhale"}
"""`idx_select` and `order_swap` of Lung250M-4B's data_curation/process_empire.py."""
LEAST_GAIN = 1.05
"""Ratio of lung volumes that makes an exhale and an inhale of two scans; repeated scans of one phase differ less."""
OFFSETS_HU = (0, -24, -1024)
"""What may have to be added to stored values."""
AIR_HU = (-1000, 40)
"""Where the peak of air lies, and how far off at most, noise and scatter included."""


def recognises(root: Path) -> bool:
    """Whether there is a scan."""
    return has_name(root, IMAGE)


def read(root: Path) -> list[PairSource]:
    """Pairs by number; with a problem where an image is missing or damaged, or where nothing tells the phase."""
    images, masks = found(root, IMAGE), found(root, MASK)
    if not images:
        raise nothing_found(root, "scans/01_Fixed.mhd, scans/01_Moving.mhd, ... of EMPIRE10")
    numbers = sorted({number for number, _ in images})
    return [one for number in numbers for one in attempt(f"empire10-{number}", _pair, root, number, images, masks)]


def _pair(
    root: Path, number: str, images: dict[tuple[str, ...], Path], masks: dict[tuple[str, ...], Path]
) -> list[PairSource]:
    for role in ("fixed", "moving"):
        if (number, role) not in images:
            raise CacheError(f"no {role} image; copy scans/{number}_{role.capitalize()}.mhd again")
    fixed, evidence = _fixed_phase(number, masks)
    scans = {
        role: ScanSource(
            image=images[number, role],
            offset_hu=offset_hu(images[number, role]),
            lung=masks.get((number, role)),
            lung_codes="nonzero",
            evidence=evidence,
        )
        for role in ("fixed", "moving")
    }
    name = f"empire10-{number}"
    parts: list[tuple[str, dict[Phase, ScanSource]]]
    if fixed is None:
        parts = [(f"{name}-{role}", {"inhale": scan}) for role, scan in scans.items()]
    else:
        other: Phase = "inhale" if fixed == "exhale" else "exhale"
        parts = [(name, {fixed: scans["fixed"], other: scans["moving"]})]
    return [
        PairSource(
            patient=patient,
            scans=part,
            dataset=dataset_name(root, "empire10"),
            licence="terms of the EMPIRE10 challenge",
            person=name,
            dual_phase=fixed is not None,
        )
        for patient, part in parts
    ]


def offset_hu(path: Path) -> int:
    """What brings the peak of air in the middle slice nearest to -1000 HU; 0 where there is no peak of air."""
    check_path(path, path.name)
    files_of(path)  # refuses a header that points elsewhere
    reader = sitk.ImageFileReader()
    reader.SetImageIO("MetaImageIO")  # whatever the case of the suffix
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        x, y, z = reader.GetSize()
        reader.SetExtractIndex([0, 0, z // 2])
        reader.SetExtractSize([x, y, 1])
        values = sitk.GetArrayFromImage(reader.Execute())  # not a view: the image ends with this line
    except (RuntimeError, ValueError) as error:
        raise CacheError(f"{path.name}: damaged or no 3-D scan; copy it again") from error
    off = {}
    for offset in OFFSETS_HU:
        near = values[np.abs(values.astype(float) + offset - AIR_HU[0]) <= AIR_HU[1]].astype(float) + offset
        if near.size >= 0.02 * values.size:
            off[offset] = abs(float(np.median(near)) - AIR_HU[0])
    return min(off, key=lambda offset: (off[offset], -offset)) if off else 0


def _fixed_phase(number: str, masks: dict[tuple[str, ...], Path]) -> tuple[Phase | None, str]:
    """Of the fixed scan, None where both scans are of one phase; and what tells it."""
    if int(number) in FIXED_IS:
        return FIXED_IS[int(number)], "order published with Lung250M-4B"
    ml = {}
    for role in ("fixed", "moving"):
        if (number, role) not in masks:
            raise CacheError(
                f"without lungMasks/{number}_{role.capitalize()}.mhd nothing tells its phases; "
                f"copy the masks, or write a manifest"
            )
        mask = read_labels(masks[number, role])
        ml[role] = np.count_nonzero(mask.labels) * mask.geometry.voxel_ml()
    if not min(ml.values()):
        raise CacheError("an empty lung mask; copy lungMasks again")
    evidence = "volume of the lung masks"
    if max(ml.values()) < LEAST_GAIN * min(ml.values()):
        return None, evidence
    return ("inhale" if ml["fixed"] > ml["moving"] else "exhale"), evidence
