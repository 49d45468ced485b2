"""COVID-19-20: `Train/volume-covid19-A-XXXX_{ct,seg}.nii.gz`, `Validation/` without masks.

Source: https://covid-segmentation.grand-challenge.org, Roth et al. 2022, doi:10.1016/j.media.2022.102605; `domain.md`
C9. Masks are of any lesion, 1.
"""

from pathlib import Path

from lungssl_data.layouts.files import found, has_name, nothing_found
from lungssl_data.layouts.single_phase import inhale_source
from lungssl_data.layouts.source import PairSource

IMAGE = r"volume-covid19-a-(\d{4}(?:_\d+)?)_ct\.nii(?:\.gz)?"
MASK = r"volume-covid19-a-(\d{4}(?:_\d+)?)_seg\.nii(?:\.gz)?"


def recognises(root: Path) -> bool:
    """Whether there is a volume."""
    return has_name(root, IMAGE)


def read(root: Path) -> list[PairSource]:
    """Patients by number, one inhale scan each."""
    images, masks = found(root, IMAGE), found(root, MASK)
    if not images:
        raise nothing_found(root, "Train/volume-covid19-A-0003_ct.nii.gz, ... of COVID-19-20")
    return [
        inhale_source(
            root,
            f"covid-19-20-{key[0]}",
            image,
            dataset="covid-19-20",
            licence="terms of the COVID-19-20 challenge",
            lesion=masks.get(key),
        )
        for key, image in sorted(images.items())
    ]
