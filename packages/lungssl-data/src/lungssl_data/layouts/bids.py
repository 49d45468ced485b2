"""BIDS-like: `sub-XX/[ses-YY/]ct/sub-XX[_ses-YY]_acq-{ee,ei}_ct.nii.gz`; CT is no official BIDS data type.

Masks carry the derivatives' names, beside the scan or in a `derivatives/` tree:
`sub-XX[_ses-YY]_acq-ee_desc-{lung,lobes,lesion,vessels}_dseg.nii.gz`. Each session is a patient of the cache; a
subject's sessions are one person.
"""

from pathlib import Path

from lungssl_data.layouts.files import dataset_name, found, has_name, nothing_found
from lungssl_data.layouts.source import MASKS, PairSource, ScanSource
from lungssl_data.pair import Phase

ACQUISITIONS: dict[str, Phase] = {"ee": "exhale", "ei": "inhale"}
SCAN = r"sub-([a-z0-9]+)(?:_ses-([a-z0-9]+))?_acq-(ee|ei)"
IMAGE = rf"{SCAN}_ct\.nii(?:\.gz)?"
LABELS = rf"{SCAN}_desc-({'|'.join(MASKS)})_dseg\.nii(?:\.gz)?"


def recognises(root: Path) -> bool:
    """Whether there is a scan with an acquisition `ee` or `ei`."""
    return has_name(root, IMAGE)


def read(root: Path) -> list[PairSource]:
    """Subjects and sessions by name; those with masks only last, with that problem."""
    images, labels = found(root, IMAGE), found(root, LABELS)
    if not images:
        raise nothing_found(root, "sub-01/ct/sub-01_acq-ee_ct.nii.gz, sub-01_acq-ei_ct.nii.gz, ...")
    patients: dict[tuple[str, str], dict[Phase, ScanSource]] = {}
    for key, image in sorted(images.items()):
        subject, session, acquisition = key
        masks = {role: labels.get((*key, role)) for role in MASKS}
        scan = ScanSource(image=image, **masks, evidence="file name")
        patients.setdefault((subject, session), {})[ACQUISITIONS[acquisition]] = scan
    orphans = set(key[:2] for key in labels) - set(patients)
    sources = [
        PairSource(
            patient=_id(subject, session),
            scans=scans,
            dataset=dataset_name(root, ""),
            person=_id(subject, "") if session else "",
        )
        for (subject, session), scans in patients.items()
    ]
    problem = "masks without their scan, which is named like them and ends in _acq-ee_ct or _acq-ei_ct; put it there"
    return sources + [PairSource(patient=_id(*orphan), problem=problem) for orphan in sorted(orphans)]


def _id(subject: str, session: str) -> str:
    return f"sub-{subject}" + (f"_ses-{session}" if session else "")
