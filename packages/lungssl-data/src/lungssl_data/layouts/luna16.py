"""LUNA16: `subset{0..9}/{seriesuid}.mhd`, lungs in `seg-lungs-LUNA16/{seriesuid}.mhd` (left 3, right 4, trachea 5).

Source: https://luna16.grand-challenge.org; `domain.md` C8. Patient ids are keyed hashes of the series' UID, as no UID
leaves for a cache. `annotations.csv`, of nodules, is not read.
"""

from pathlib import Path

from lungssl_data.ids import keyed_id, load_key
from lungssl_data.layouts.files import found, has_name, nothing_found
from lungssl_data.layouts.single_phase import inhale_source
from lungssl_data.layouts.source import PairSource

IMAGE = r"subset\d/(\d[\d.]*\d)\.mhd"
MASK = r"seg-lungs-luna16/(\d[\d.]*\d)\.mhd"


def recognises(root: Path) -> bool:
    """Whether there is a scan in a subset."""
    return has_name(root, IMAGE)


def read(root: Path) -> list[PairSource]:
    """Patients by id, one inhale scan each."""
    images, masks = found(root, IMAGE), found(root, MASK)
    if not images:
        raise nothing_found(root, "subset0/<series UID>.mhd, ... of LUNA16")
    key = load_key()
    sources = [
        inhale_source(
            root,
            keyed_id(uid[0], key, prefix="luna16-"),
            image,
            dataset="luna16",
            licence="CC BY 4.0",
            lung=masks.get(uid),
            lung_codes="luna16",
        )
        for uid, image in images.items()
    ]
    return sorted(sources, key=lambda source: source.patient)
