"""How cohorts lie on disk. A layout is one file with `read(root) -> list[PairSource]` and `recognises(root) -> bool`,
which looks at names only, and one line here.

A layout raises CacheError for what is wrong with the whole, and lists a patient whose files can't be used with a
`problem` (`source.attempt`). Neither names a file or a patient, which `read_layout` may have been told to hide: it says
numbers and roles, or is a NamedError. Ids are read as they are; they are keyed and checked here, for all layouts.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lungssl_data.layouts.source import PairSource

LAYOUTS = {
    "folder": "lungssl_data.layouts.folder:read",
    "manifest": "lungssl_data.layouts.manifest:read",
    "bids": "lungssl_data.layouts.bids:read",
    "dicom": "lungssl_data.layouts.dicom:read",
    "dirlab-4dct": "lungssl_data.layouts.dirlab_4dct:read",
    "dirlab-copd": "lungssl_data.layouts.dirlab_copd:read",
    "popi": "lungssl_data.layouts.popi:read",
    "learn2reg": "lungssl_data.layouts.learn2reg:read",
    "lung250m": "lungssl_data.layouts.lung250m:read",
    "empire10": "lungssl_data.layouts.empire10:read",
    "tcia-ventilation": "lungssl_data.layouts.tcia_ventilation:read",
    "tcia-4dlung": "lungssl_data.layouts.tcia_4dlung:read",
    "nsclc-radiomics": "lungssl_data.layouts.nsclc_radiomics:read",
    "luna16": "lungssl_data.layouts.luna16:read",
    "mosmed": "lungssl_data.layouts.mosmed:read",
    "covid-19-20": "lungssl_data.layouts.covid_19_20:read",
}
FIRST = ("manifest",)
"""Asked by `auto` before all others: somebody wrote it for this cohort."""
GENERIC = (("folder", "bids"), ("dicom",))
"""Asked only where no collection recognises the place, the second group only after the first."""


def read_layout(name: str, root: Path, *, key: bytes | None = None) -> "list[PairSource]":
    """The patients under `root`, read as layout `name`; `auto` asks every layout whether it recognises the names.

    Patients whose files can't be used are among them, with their `problem`; what is wrong with the whole, ids that
    can't be used included, raises CacheError. With a `key` (`ids.load_key`) ids of patients and persons are replaced by
    keyed hashes, so that any text may be one, and errors name nothing but `root`.
    """
    from lungssl_data.layouts.patients import check_ids, with_keyed_ids, with_paths_checked, with_places
    from lungssl_data.layouts.source import nameless
    from lungssl_data.pair import CacheError

    if name not in ("auto", *LAYOUTS):
        raise ValueError(f"layout {name!r} is unknown; known are auto, {', '.join(LAYOUTS)}")
    try:
        module, function = LAYOUTS[recognised(root) if name == "auto" else name].split(":")
        sources = with_paths_checked(with_places(getattr(import_module(module), function)(root)))
    except Exception as error:  # whatever it is, its text may be a name
        if key is None:
            raise
        text = nameless(error)
        if text != str(error):
            text += " (ids are keyed, so no name is said; read it without a key to see it)"
        raise CacheError(text) from None
    if key is not None:
        sources = with_keyed_ids(sources, key)
    check_ids(sources)
    return sources


def recognised(root: Path) -> str:
    """The one layout whose names are found under `root`; CacheError, with those that come into question, else."""
    from lungssl_data.pair import CacheError

    if not root.exists():
        raise CacheError(f"{root}: no such file or folder; expected a cohort's folder or a manifest.csv")
    named = {*FIRST, *(name for names in GENERIC for name in names)}
    for names in (FIRST, [name for name in LAYOUTS if name not in named], *GENERIC):
        fitting = [name for name in names if import_module(LAYOUTS[name].split(":")[0]).recognises(root)]
        if len(fitting) > 1:
            raise CacheError(f"{root}: may be any of {', '.join(fitting)}; name one with --layout")
        if fitting:
            return fitting[0]
    raise CacheError(
        f"{root}: no layout recognises it; expected one of {', '.join(LAYOUTS)}; name one with --layout, or write a "
        f"manifest.csv"
    )
