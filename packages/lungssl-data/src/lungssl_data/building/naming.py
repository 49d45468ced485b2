"""Files by their role: a file's name, or a folder's, can be a person's, and what a build says is kept and sent on."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lungssl_data.layouts.source import MASKS, PHASE_ALIASES, PairSource
from lungssl_data.pair import CacheError
from lungssl_data.readers import VolumeError

_FORMATS = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".dcm", ".raw", ".img", ".zraw")


@contextmanager
def called(role: str, path: Path) -> Iterator[None]:
    """Names a file by its role and format in what is raised: its name can be a person's."""
    try:
        yield
    except (VolumeError, CacheError) as error:
        problem = getattr(error, "problem", str(error)).removeprefix(f"{path.name}: ")
        raise CacheError(f"{role_of(role, path)}: {problem}") from error


def role_of(role: str, path: Path) -> str:
    """The role, with the format where the suffix is a known one."""
    suffix = ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()
    return f"{role} ({suffix})" if suffix in _FORMATS else role


def redacted(error: Exception, source: PairSource) -> str:
    """The error in one line, with each of the patient's paths and file names replaced by its role and format."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and not isinstance(error, ValueError) and error.strerror:
        text = f"{error.strerror}" + (f": {error.filename}" if error.filename else "")
    for name, role in sorted(_roles(source).items(), key=lambda item: -len(item[0])):
        text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-]|\.\w)", role, text)
    return text


def _roles(source: PairSource) -> dict[str, str]:
    """Every path and file name of the patient's, and what to call it."""
    roles: dict[str, str] = {}

    def add(path: Path, role: str) -> None:
        name = role_of(role, path)
        for text in (str(path), str(path.resolve()), path.name):
            if text.lower() not in PHASE_ALIASES:  # a DICOM folder `exhale` needs no other name
                roles.setdefault(text, name)

    for phase, scan in source.scans.items():
        for role in ("image", *MASKS):
            path: Path | None = getattr(scan, role)
            if path is not None:
                add(path, f"{phase} {role}")
        if scan.slices or scan.image.is_dir():
            for file in scan.slices or scan.image.rglob("*"):
                if len(file.name) > 4:  # shorter ones look like counts and positions
                    add(file, f"{phase} slice")
        elif not scan.raw and scan.image.suffix.lower() in (".mhd", ".nhdr", ".dcm") and scan.image.is_file():
            for file in scan.image.parent.glob(f"{scan.image.stem}*" if scan.image.suffix != ".dcm" else "*"):
                add(file, f"{phase} image")
    if source.displacement is not None:
        add(source.displacement, "displacement")
    return roles
