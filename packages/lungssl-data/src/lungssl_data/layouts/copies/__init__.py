"""Tiny copies of the collections' layouts, made of phantoms: real names, formats, offsets and units.

They test the readers, and let people try them, without a download. A copy is one function `write(root, phantoms)` and
one line here.

Where a collection's files have a fixed size, `lungssl-phantom.json` tells the reader the copy's own.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lungssl_data.phantom import Phantom

COPIES = {
    "folder": "lungssl_data.layouts.copies.generic:write_folder",
    "manifest": "lungssl_data.layouts.copies.generic:write_manifest",
    "bids": "lungssl_data.layouts.copies.generic:write_bids",
    "dicom": "lungssl_data.layouts.copies.dicom:write_pacs",
    "dirlab-4dct": "lungssl_data.layouts.copies.dirlab:write_4dct",
    "dirlab-copd": "lungssl_data.layouts.copies.dirlab:write_copd",
    "popi": "lungssl_data.layouts.copies.popi:write",
    "learn2reg": "lungssl_data.layouts.copies.registration:write_learn2reg",
    "lung250m": "lungssl_data.layouts.copies.registration:write_lung250m",
    "empire10": "lungssl_data.layouts.copies.registration:write_empire10",
    "tcia-ventilation": "lungssl_data.layouts.copies.dicom:write_ventilation",
    "tcia-4dlung": "lungssl_data.layouts.copies.dicom:write_4dlung",
    "nsclc-radiomics": "lungssl_data.layouts.copies.dicom:write_nsclc",
    "luna16": "lungssl_data.layouts.copies.single_phase:write_luna16",
    "mosmed": "lungssl_data.layouts.copies.single_phase:write_mosmed",
    "covid-19-20": "lungssl_data.layouts.copies.single_phase:write_covid_19_20",
}


def write_copy(name: str, root: Path, phantoms: "Sequence[Phantom]") -> None:
    """Write the phantoms under `root` as layout `name` has its first patients; ValueError for more than it has."""
    if name not in COPIES:
        raise ValueError(f"layout {name!r} is unknown; known are {', '.join(COPIES)}")
    root.mkdir(parents=True, exist_ok=True)
    module, function = COPIES[name].split(":")
    getattr(import_module(module), function)(root, phantoms)


class Phantoms(Sequence):
    """Phantoms that are made when asked for, so that only the last one is in memory."""

    def __init__(self, make: "Callable[[int], Phantom]", count: int) -> None:
        self._make, self._count = make, count
        self._last: tuple[int, Phantom] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < self._count:
            raise IndexError(place)
        if self._last is None or self._last[0] != place:
            self._last = None  # before the next one takes memory
            self._last = (place, self._make(place))
        return self._last[1]
