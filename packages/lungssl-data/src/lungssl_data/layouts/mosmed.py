"""MosMedData 1110: `studies/CT-{0..4}/study_XXXX.nii.gz`, 50 of them with `masks/study_XXXX_mask.nii.gz`.

Source: Morozov et al. 2020, https://arxiv.org/abs/2005.06465; `domain.md` C9. Masks are of ground glass and
consolidation together, 1.
"""

from pathlib import Path

from lungssl_data.layouts.files import found, has_name, nothing_found
from lungssl_data.layouts.single_phase import inhale_source
from lungssl_data.layouts.source import PairSource

IMAGE = r"ct-[0-4]/study_(\d{4})\.nii(?:\.gz)?"
MASK = r"study_(\d{4})_mask\.nii(?:\.gz)?"


def recognises(root: Path) -> bool:
    """Whether there is a study in a folder of its severity."""
    return has_name(root, IMAGE)


def read(root: Path) -> list[PairSource]:
    """Patients by the study's number, one inhale scan each."""
    images, masks = found(root, IMAGE), found(root, MASK)
    if not images:
        raise nothing_found(root, "studies/CT-1/study_0255.nii.gz, ... of MosMedData")
    return [
        inhale_source(
            root, f"mosmed-{key[0]}", image, dataset="mosmed", licence="CC BY-NC-ND 3.0", lesion=masks.get(key)
        )
        for key, image in sorted(images.items())
    ]
