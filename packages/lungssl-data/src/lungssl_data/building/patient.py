"""From one patient's files to its file in the cache."""

import hashlib
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from lungssl_data.aeration_checks import airless, gas_ml, scan_warnings, swapped_phases
from lungssl_data.building.duplicates import voxels_sha256
from lungssl_data.building.hashes import HashStore
from lungssl_data.building.naming import called, redacted
from lungssl_data.building.plan import patient_in
from lungssl_data.cache import write_pair
from lungssl_data.cache_index import FORMAT_VERSION
from lungssl_data.field import read_field
from lungssl_data.fit_checks import check_fit
from lungssl_data.layouts.source import (
    LESION_CODES,
    LOBE_CODES,
    LUNG_CODES,
    VESSEL_CODES,
    PairSource,
    ScanSource,
    read_image,
)
from lungssl_data.lung_mask import LUNG_MASK_VERSION
from lungssl_data.pair import CacheError, Displacement, LandmarkKind, Landmarks, PhasePair, PhaseScan, Split
from lungssl_data.prepare import PREPARE_VERSION, PrepareConfig, coarse_affine, prepare_scan
from lungssl_data.readers import files_of, read_labels
from lungssl_data.resample import RESAMPLE_VERSION
from lungssl_data.volume import Geometry, LabelMap

READERS_VERSION = 3
"""Raised whenever the same files would be read as other voxels, grids or landmarks."""
STEP_VERSIONS = {
    "format": FORMAT_VERSION,
    "readers": READERS_VERSION,
    "lung_mask": LUNG_MASK_VERSION,
    "resample": RESAMPLE_VERSION,
    "prepare": PREPARE_VERSION,
}
"""What the key of a patient holds of the code, step by step."""

PhaseCheck = Literal["fail", "warn"]


@dataclass(frozen=True, kw_only=True)
class Built:
    """What became of one patient."""

    patient: str
    outcome: Literal["built", "unchanged", "failed"]
    message: str
    """Shapes and lung volumes, or what is wrong and what to do. Files are named by their role, never by their name."""
    warnings: tuple[str, ...] = ()
    """What somebody should look at though the patient was built."""
    time_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that turns sources into files, the same for every patient of a build."""

    folder: Path
    config: PrepareConfig
    compression: Literal["lz4", "gzip"] = "lz4"
    phase_check: PhaseCheck = "fail"
    threads: int = 1
    """For one patient: its two phases are prepared side by side from 2 on, in twice the memory."""
    hashes: HashStore = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hashes", HashStore(self.folder))


def build_patient(source: PairSource, split: Split, recipe: Recipe) -> Built:
    """Build one patient unless its file is up to date. Never raises for what is wrong with the patient's data."""
    started = time.monotonic()
    try:
        built = _build(source, split, recipe)
    except Exception as error:  # one patient's odd file must not end a night's build
        built = failed(source.patient, _explained(error, source), recipe.folder)
    return replace(built, time_s=time.monotonic() - started)


def failed(patient: str, why: str, folder: Path) -> Built:
    """A patient who was not built, and whether an earlier build's file is left."""
    if patient_in(folder, patient) is not None:
        why += "; the cache keeps its file of an earlier build, delete that if it should not be used"
    return Built(patient=patient, outcome="failed", message=why)


def pair_from_source(
    source: PairSource,
    *,
    config: PrepareConfig,
    split: Split,
    key: str = "",
    threads: int = 1,
) -> PhasePair:
    """Read and prepare one patient; ValueError (or a subclass) with the file's role for what can't be used."""
    if source.problem:
        raise CacheError(source.problem)
    side_by_side = threads > 1 and len(source.scans) > 1
    each = max(1, threads // len(source.scans)) if side_by_side else threads

    def prepared(item: tuple[str, ScanSource]) -> tuple[str, PhaseScan, Geometry]:
        phase, scan = item
        ready, geometry = _scan(phase, scan, config, each)
        return phase, ready, geometry

    if side_by_side:
        with ThreadPoolExecutor(len(source.scans)) as pool:
            done = list(pool.map(prepared, source.scans.items()))
    else:
        done = [prepared(item) for item in source.scans.items()]
    scans = {phase: scan for phase, scan, _ in done}
    exhale, inhale = scans.get("exhale"), scans.get("inhale")
    pair = PhasePair(patient=source.patient, exhale=exhale, inhale=inhale, person=source.person, split=split, key=key)
    if exhale is None or inhale is None:
        for what, given in (("a displacement", source.displacement), ("landmarks", source.landmarks)):
            if given:
                raise CacheError(
                    f"patient {source.patient}: {what} need both phases, there is only {next(iter(scans))}"
                )
        return pair
    displacement = None
    if source.displacement is not None:
        u_mm, geometry = read_field(source.displacement)
        displacement = Displacement(
            u_mm=u_mm, spacing_mm=geometry.spacing_mm, origin_mm=geometry.origin_mm, provenance="given field"
        )
    return replace(
        pair,
        exhale_to_inhale=coarse_affine(exhale, inhale),
        affine_provenance="lung mask moments",
        displacement=displacement,
        landmarks=_checked_landmarks(source.landmarks, {phase: geometry for phase, _, geometry in done}),
    )


def patient_key(source: PairSource, recipe: Recipe) -> str:
    """SHA-256 of the sources' bytes, what the layout says of them, the parameters and the versions of all steps."""
    sha256 = recipe.hashes.of
    parts = {
        "versions": STEP_VERSIONS,
        "config": asdict(recipe.config),
        "compression": recipe.compression,
        "scans": {
            phase: {role: sha256(files) for role, files in scan.files().items()}
            | {"codes": [scan.lung_codes, scan.lobe_codes, scan.lesion_codes], "offset_hu": scan.offset_hu}
            | ({"vessel_codes": scan.vessel_codes} if scan.vessels else {})  # keys of others stay as they were
            | {"raw": asdict(scan.raw) if scan.raw else None}
            for phase, scan in source.scans.items()
        },
        "displacement": sha256(files_of(source.displacement)) if source.displacement else None,
        "landmarks": {
            kind: hashlib.sha256(points.exhale_mm.tobytes() + points.inhale_mm.tobytes()).hexdigest()
            for kind, points in source.landmarks.items()
        },
        "person": source.person,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _explained(error: Exception, source: PairSource) -> str:
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "new thread" in str(error)):
        return "it needs more memory than there is; lower --jobs, raise the memory limit, or crop the scan"
    if isinstance(error, (ValueError, OSError)):
        return redacted(error, source)
    # Anything else nobody foresaw. Its text could quote the file, so only the place is told.
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame else "an unknown place"
    return f"unexpected {type(error).__name__} in {place}; the file is damaged, or this is a bug"


def _build(source: PairSource, split: Split, recipe: Recipe) -> Built:
    source.check_paths()  # before anything is opened
    key = patient_key(source, recipe)
    before = patient_in(recipe.folder, source.patient)
    if before is not None and before.key == key and before.split == split:
        return Built(patient=source.patient, outcome="unchanged", message=f"{'+'.join(before.phases())}, {split}")
    pair = pair_from_source(source, config=recipe.config, split=split, key=key, threads=recipe.threads)
    for phase in pair.phases():
        problem = airless(pair.scan(phase))
        if problem:
            raise CacheError(f"{phase}: {problem}")
    warnings = [*source.notes, *check_fit(pair)]
    warnings += [f"{phase}: {text}" for phase in pair.phases() for text in scan_warnings(pair.scan(phase))]
    swapped = swapped_phases(pair) if source.dual_phase else None
    if swapped and recipe.phase_check == "fail":
        raise CacheError(
            f"{swapped}; exchange the phases, or build with --phase-check warn if the fields of view explain it"
        )
    write_pair(pair, recipe.folder, compression=recipe.compression)
    parts = [f"{phase} {_describe(pair.scan(phase))}" for phase in pair.phases()]
    parts += [f"{len(points.exhale_mm)} {kind} landmarks" for kind, points in pair.landmarks.items()]
    if not source.dual_phase:
        warnings.append("the two scans are of one phase, as the collection says")
    return Built(
        patient=source.patient,
        outcome="built",
        message=f"{'; '.join(parts)}; {split}",
        warnings=(*warnings, swapped) if swapped else tuple(warnings),
    )


def _scan(phase: str, source: ScanSource, config: PrepareConfig, threads: int) -> tuple[PhaseScan, Geometry]:
    with called(f"{phase} image", source.image):
        volume = read_image(source)

    def labels(role: str, path: Path | None, codes: str, known: Mapping[str, Mapping[int, int]]) -> LabelMap | None:
        if path is None:
            return None
        with called(f"{phase} {role}", path):
            return _labels(path, role, codes, known)

    scan = prepare_scan(
        volume,
        config=config,
        lung=labels("lung", source.lung, source.lung_codes, LUNG_CODES),
        lobes=labels("lobes", source.lobes, source.lobe_codes, LOBE_CODES),
        lesion=labels("lesion", source.lesion, source.lesion_codes, LESION_CODES),
        vessels=labels("vessels", source.vessels, source.vessel_codes, VESSEL_CODES),
        source_sha256=voxels_sha256(volume),
        threads=threads,
    )
    return scan, volume.geometry


def _labels(path: Path, role: str, codes: str, known: Mapping[str, Mapping[int, int]]) -> LabelMap:
    """A label map in the cache's codes; CacheError where it has labels, but none that `codes` knows."""
    labels = read_labels(path)
    if role == "lung" and codes == "lungssl":
        return labels  # as it is: `prepare_scan` names codes that it doesn't know
    table = np.zeros(256, np.uint8)
    for theirs, ours in known[codes].items():
        table[theirs] = ours
    recoded = table[labels.labels]
    if not recoded.any() and (role != "lesion" or labels.labels.any()):  # a scan may have no lesion
        word = {"lobes": "lobe", "vessels": "vessel"}.get(role, role)
        raise CacheError(
            f"none of its labels is a {word} in the codes {codes!r}; "
            f"name the right ones in {word}_codes: {', '.join(known)}"
        )
    return LabelMap(labels=recoded, geometry=labels.geometry)


def _checked_landmarks(
    given: Mapping[LandmarkKind, Landmarks], grids: Mapping[str, Geometry]
) -> dict[LandmarkKind, Landmarks]:
    """The landmarks, if each lies in its scan; CacheError with the count of those that don't."""
    for kind, points in given.items():
        for phase, points_mm in (("exhale", points.exhale_mm), ("inhale", points.inhale_mm)):
            affine = grids[phase].index_to_mm()
            index = (points_mm - affine[:, 3]) @ np.linalg.inv(affine[:, :3]).T
            shape = np.asarray(grids[phase].shape[::-1])
            inside = ((index >= -0.5 - 1e-3) & (index <= shape - 0.5 + 1e-3)).all(1)  # NaN is not inside
            if not inside.all():
                raise CacheError(
                    f"{np.count_nonzero(~inside)} of {len(points_mm)} {kind} landmarks of {phase} are not finite or "
                    f"outside of the scan; check their unit, origin and axes"
                )
    return dict(given)


def _describe(scan: PhaseScan) -> str:
    z, y, x = scan.ct_hu.shape
    litres = np.count_nonzero(scan.lung) * scan.geometry().voxel_ml() / 1000
    extra = "".join(f", {name}" for name in ("lobes", "lesion", "vessels") if getattr(scan, name) is not None)
    return f"{x}x{y}x{z}, lung {litres:.2f} l, gas {gas_ml(scan) / 1000:.2f} l{extra}"
