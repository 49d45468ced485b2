"""What the collections of one inspiratory scan per patient share."""

from pathlib import Path

from lungssl_data.layouts.files import dataset_name
from lungssl_data.layouts.source import PairSource, ScanSource

PROTOCOL = "routine protocol: chest CT is taken at inspiration"


def inhale_source(
    root: Path,
    patient: str,
    image: Path,
    *,
    dataset: str,
    licence: str,
    lung: Path | None = None,
    lung_codes: str = "lungssl",
    lesion: Path | None = None,
) -> PairSource:
    """A patient with an inhale scan; `lesion` is a mask of any lesion."""
    scan = ScanSource(
        image=image, lung=lung, lung_codes=lung_codes, lesion=lesion, lesion_codes="any", evidence=PROTOCOL
    )
    return PairSource(patient=patient, scans={"inhale": scan}, dataset=dataset_name(root, dataset), licence=licence)
