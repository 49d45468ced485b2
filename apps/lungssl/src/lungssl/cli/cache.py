"""`lungssl cache build|info|verify`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lungssl.cli import new_app

app = new_app(help="Build, inspect and check pair caches.", no_args_is_help=True)

CacheArgument = Annotated[Path, typer.Argument(help="Cache folder.")]


@app.command()
def build(
    source: Annotated[Path, typer.Argument(help="A folder of patients, or a manifest.csv.")],
    out: Annotated[Path, typer.Option(help="Cache folder to make or complete.")],
    layout: Annotated[str, typer.Option(help="How SOURCE is laid out; see `lungssl list layouts`.")] = "auto",
    spacing_mm: Annotated[float, typer.Option(help="Isotropic voxel size.")] = 2.0,
    margin_mm: Annotated[float, typer.Option(help="Kept around the lungs.")] = 20.0,
    compression: Annotated[
        Literal["lz4", "gzip"], typer.Option(help="gzip reads in MATLAB; lz4 is several times faster.")
    ] = "lz4",
    jobs: Annotated[int, typer.Option(help="Patients at a time, each in a process of its own that may die.")] = 1,
    shard: Annotated[str, typer.Option(help="i/n: build only the i-th of n parts, as on n machines.")] = "1/1",
    keyed_ids: Annotated[
        bool, typer.Option("--keyed-ids", help="Replace patient ids by keyed hashes with this machine's secret.")
    ] = False,
    phase_check: Annotated[
        Literal["fail", "warn"], typer.Option(help="What an inhale scan with less gas than its exhale scan does.")
    ] = "fail",
    memory_gib: Annotated[float, typer.Option(help="Memory that a patient may take; 0 for no limit.")] = 0.0,
    time_limit_s: Annotated[float, typer.Option(help="Time that a patient may take; 0 for no limit.")] = 1800.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be read, write nothing.")] = False,
) -> None:
    """Read scans, find the lungs, resample, and write one verified file per patient.

    Done patients are skipped, a bad one is reported in a line (and in build.jsonl) and the others go on. The same
    command goes on after an interruption, and may run on several machines at a time. Patients are told apart by the
    ids you give: use de-identified ones, or --keyed-ids.

    Example: lungssl cache build cohort.csv --out cohort-cache --spacing-mm 2 --jobs 4
    """
    import sys
    import time

    from lungssl_data.layouts import read_layout

    from lungssl.errors import ConfigError, DataError
    from lungssl.training.progress import duration

    if not 0.3 <= spacing_mm <= 20 or margin_mm < 0:
        raise ConfigError(f"--spacing-mm {spacing_mm} --margin-mm {margin_mm}: spacing from 0.3 to 20, margin from 0")
    if jobs < 1 or memory_gib < 0 or time_limit_s < 0:
        raise ConfigError(
            f"--jobs {jobs} --memory-gib {memory_gib:g} --time-limit-s {time_limit_s:g}: jobs from 1, the others from 0"
        )
    part = _shard(shard)
    sources = read_layout(layout, source)
    if keyed_ids:
        sources = _with_keyed_ids(sources)
    from lungssl_data.building.plan import shard_of

    mine = shard_of(sources, part)
    if dry_run:
        for item in mine:
            print(_outline(item))
        print(f"{len(mine)} of {len(sources)} patients would be built into {out}, nothing was written")
        return
    from lungssl_data.build import build_cache
    from lungssl_data.prepare import PrepareConfig

    started, failed, warned = time.perf_counter(), [], 0
    outcomes = build_cache(
        sources,
        out,
        config=PrepareConfig(spacing_mm=spacing_mm, margin_mm=margin_mm),
        compression=compression,
        jobs=jobs,
        shard=part,
        phase_check=phase_check,
        time_limit_s=time_limit_s or None,
        memory_limit_gib=memory_gib or None,
    )
    for place, built in enumerate(outcomes, start=1):
        left = (time.perf_counter() - started) / place * (len(mine) - place)
        eta = f"  [{duration(left)} left]" if place < len(mine) else ""
        print(f"{place}/{len(mine)} {built.patient}: {built.outcome}: {built.message}{eta}", file=sys.stderr)
        for warning in built.warnings:
            print(f"  {built.patient}: WARNING: {warning}", file=sys.stderr)
        warned += bool(built.warnings)
        if built.outcome == "failed":
            failed.append(built.patient)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(mine)} patients failed, first {', '.join(failed[:5])}; "
            f"the others are in {out}. Mend what the lines above name and run the same command again"
        )
    look = f"; look at the {warned} with warnings" if warned else ""
    print(f"{len(mine)} patients in {out}{look}; check with `lungssl cache verify {out}`")


def _shard(text: str) -> tuple[int, int]:
    from lungssl.errors import ConfigError

    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ConfigError(f"--shard {text}: expected i/n with i from 1 to n, e.g. 2/4")
    return int(index), int(count)


def _with_keyed_ids(sources: list[Any]) -> list[Any]:
    """The sources with keyed patient and person ids; equal ids stay equal."""
    from dataclasses import replace

    from lungssl_data.ids import keyed_id, load_key
    from lungssl_data.splits import keyed_person

    key = load_key()
    return [
        replace(s, patient=keyed_id(s.patient, key), person=keyed_person(s.person, key) if s.person else "")
        for s in sources
    ]


def _outline(source: Any) -> str:
    """One patient as `--dry-run` shows it: what would be read, and how its phases were told."""
    parts = []
    for phase, scan in source.scans.items():
        masks = [role for role in ("lung", "lobes", "lesion") if getattr(scan, role) is not None]
        evidence = f" by {scan.evidence}" if scan.evidence else ""
        parts.append(f"{phase}{evidence}: {scan.image}" + (f" with {', '.join(masks)}" if masks else ""))
    parts += [f"{len(points.exhale_mm)} {kind} landmarks" for kind, points in source.landmarks.items()]
    parts += ["a displacement"] if source.displacement else []
    parts += [f"split {source.split}"] if source.split else []
    parts += [] if source.dual_phase else ["not dual-phase"]
    return f"{source.patient}{f' ({source.dataset})' if source.dataset else ''}: {'; '.join(parts)}"


@app.command()
def info(cache: CacheArgument) -> None:
    """Show patients, phases, grids, lung volumes, labels and splits.

    Example: lungssl cache info cohort-cache
    """
    from lungssl_data.cache import PairCache

    opened = PairCache(cache)
    width = max(len(patient) for patient in opened.patients)
    for patient, record in opened.records.items():
        parts = []
        for phase in record.phases():
            grid = opened.phase_record(patient, phase)
            z, y, x = grid.shape
            extra = [name for name in grid.datasets if name not in ("ct", "valid", "lung", "lung_points_vox")]
            labels = f" +{','.join(extra)}" if extra else ""
            parts.append(f"{phase} {x}x{y}x{z} at {grid.spacing_mm[0]:g} mm, lung {grid.lung_ml / 1000:.2f} l{labels}")
        link = "  field" if record.has_displacement else ""
        print(f"{patient:<{width}}  {record.split:<5}  {'; '.join(parts)}{link}")
    counts = {split: len(opened.split(split)) for split in ("train", "val", "test")}
    pairs = sum(len(record.phases()) == 2 for record in opened.records.values())
    print(f"{len(opened)} patients ({pairs} with both phases); {counts}; fingerprint {opened.fingerprint()}")


@app.command()
def verify(cache: CacheArgument) -> None:
    """Read every byte back and compare checksums.

    Example: lungssl cache verify cohort-cache
    """
    import sys

    from lungssl_data.cache import PairCache

    from lungssl.errors import DataError

    opened, bad = PairCache(cache), []
    for patient, problems in opened.verify():
        if problems:
            bad.append(patient)
            print(f"{patient}: {'; '.join(problems)}", file=sys.stderr)
    if bad:
        raise DataError(
            f"{len(bad)} of {len(opened)} files are damaged ({', '.join(bad[:5])}); delete them and rebuild"
        )
    print(f"{len(opened)} patients, all checksums agree")
