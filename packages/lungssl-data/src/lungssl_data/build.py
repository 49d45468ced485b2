"""Building a pair cache from files: what is done already stays, what fails is reported, the rest goes on."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lungssl_data.cache import write_pair
from lungssl_data.cache_index import FORMAT_VERSION, PatientRecord, rebuild_index
from lungssl_data.field import read_field
from lungssl_data.layouts.source import LOBE_CODES, PairSource, ScanSource
from lungssl_data.pair import CacheError, Displacement, PhasePair, PhaseScan, Split
from lungssl_data.prepare import PrepareConfig, coarse_affine, prepare_scan
from lungssl_data.readers import files_of, read_labels, read_volume
from lungssl_data.splits import assign_splits
from lungssl_data.volume import LabelMap

PREPARE_VERSION = 2
"""Raised whenever the same files and parameters would give other voxels."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """What became of one patient."""

    patient: str
    outcome: Literal["built", "unchanged", "failed"]
    message: str
    """Shapes and lung volumes, or what is wrong and what to do."""


def build_cache(
    sources: Sequence[PairSource],
    folder: Path,
    *,
    config: PrepareConfig,
    compression: Literal["lz4", "gzip"] = "lz4",
) -> Iterator[Built]:
    """Build or complete a cache, patient by patient; yields each one's outcome.

    A patient is rebuilt when its files, `config` or the code's version changed (content hash). Patients in the folder
    that `sources` doesn't name are left alone. A patient that fails leaves no file of this build behind.
    """
    names = [source.patient for source in sources]
    if len(set(names)) < len(names):
        raise CacheError(f"patient ids repeat: {sorted({n for n in names if names.count(n) > 1})}; give each its own")
    folder.mkdir(parents=True, exist_ok=True)
    known = {record.patient: record for record in rebuild_index(folder)}
    fixed: dict[str, Split] = {patient: record.split for patient, record in known.items()}
    fixed |= {source.patient: source.split for source in sources if source.split is not None}
    splits = assign_splits([*known, *names], fixed)
    for source in sources:
        try:
            yield _build_one(source, folder, config, compression, splits[source.patient], known)
        except (ValueError, OSError) as error:
            yield Built(patient=source.patient, outcome="failed", message=" ".join(str(error).split()))
    rebuild_index(folder)


def pair_from_source(source: PairSource, *, config: PrepareConfig, split: Split, key: str = "") -> PhasePair:
    """Read and prepare one patient; ValueError (or a subclass) with the file's name for what can't be used."""
    scans = {phase: _scan(scan, config) for phase, scan in source.scans.items()}
    exhale, inhale = scans.get("exhale"), scans.get("inhale")
    displacement = None
    if source.displacement is not None:
        u_mm, geometry = read_field(source.displacement)
        displacement = Displacement(
            u_mm=u_mm, spacing_mm=geometry.spacing_mm, origin_mm=geometry.origin_mm, provenance=source.displacement.name
        )
    if exhale is None or inhale is None:
        if displacement is not None:
            raise CacheError(
                f"patient {source.patient}: a displacement needs both phases, there is only {next(iter(scans))}"
            )
        return PhasePair(patient=source.patient, exhale=exhale, inhale=inhale, split=split, key=key)
    return PhasePair(
        patient=source.patient,
        exhale=exhale,
        inhale=inhale,
        exhale_to_inhale=coarse_affine(exhale, inhale),
        affine_provenance="lung mask moments",
        displacement=displacement,
        split=split,
        key=key,
    )


def _build_one(
    source: PairSource,
    folder: Path,
    config: PrepareConfig,
    compression: Literal["lz4", "gzip"],
    split: Split,
    known: dict[str, PatientRecord],
) -> Built:
    key = _key(source, config, compression)
    before = known.get(source.patient)
    if before is not None and before.key == key and before.split == split:
        return Built(patient=source.patient, outcome="unchanged", message=f"{'+'.join(before.phases())}, {split}")
    pair = pair_from_source(source, config=config, split=split, key=key)
    write_pair(pair, folder, compression=compression)
    parts = [f"{phase} {_describe(pair.scan(phase))}" for phase in pair.phases()]
    return Built(patient=source.patient, outcome="built", message=f"{'; '.join(parts)}; {split}")


def _scan(source: ScanSource, config: PrepareConfig) -> PhaseScan:
    return prepare_scan(
        read_volume(source.image),
        config=config,
        lung=read_labels(source.lung) if source.lung else None,
        lobes=_lobes(source) if source.lobes else None,
        source_sha256=_sha256(source.files()["image"]),
    )


def _lobes(source: ScanSource) -> LabelMap:
    assert source.lobes is not None
    labels = read_labels(source.lobes)
    table = np.zeros(256, np.uint8)
    for theirs, ours in LOBE_CODES[source.lobe_codes].items():
        table[theirs] = ours
    recoded = table[labels.labels]
    if not recoded.any():
        raise CacheError(
            f"{source.lobes.name}: none of its labels is a lobe in the codes {source.lobe_codes!r}; "
            f"name the right ones in lobe_codes: {', '.join(LOBE_CODES)}"
        )
    return LabelMap(labels=recoded, geometry=labels.geometry)


def _describe(scan: PhaseScan) -> str:
    z, y, x = scan.ct_hu.shape
    litres = np.count_nonzero(scan.lung) * scan.geometry().voxel_ml() / 1000
    mean_hu = scan.ct_hu[scan.lung > 0].mean()
    return f"{x}x{y}x{z}, lung {litres:.2f} l at {mean_hu:.0f} HU" + (", lobes" if scan.lobes is not None else "")


def _key(source: PairSource, config: PrepareConfig, compression: str) -> str:
    parts = {
        "versions": [FORMAT_VERSION, PREPARE_VERSION],
        "config": asdict(config),
        "compression": compression,
        "scans": {
            phase: {role: _sha256(files) for role, files in scan.files().items()} | {"lobe_codes": scan.lobe_codes}
            for phase, scan in source.scans.items()
        },
        "displacement": _sha256(files_of(source.displacement)) if source.displacement else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()
