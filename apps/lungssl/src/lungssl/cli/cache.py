"""`lungssl cache build|info|verify`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lungssl.cli import new_app

app = new_app(help="Build, inspect and check pair caches.", no_args_is_help=True)

SPACING_MM = (0.3, 20.0)
MARGIN_MM = (0.0, 500.0)
"""At most the width of the widest field of view, which keeps all of it."""
JOBS = (1, 1024)
MEMORY_GIB = (0.0, 1e6)
TIME_LIMIT_S = (0.0, 1e7)
"""Some four months."""

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
    ids you give: use de-identified ones, or --keyed-ids, which takes any name and says none, only its number.

    Example: lungssl cache build cohort.csv --out cohort-cache --spacing-mm 2 --jobs 4
    """
    import sys
    import time

    from lungssl_data.ids import ids_of, load_key
    from lungssl_data.layouts import read_layout

    from lungssl.errors import DataError
    from lungssl.training.progress import duration

    for option, value, (low, high) in (
        ("--spacing-mm", spacing_mm, SPACING_MM),
        ("--margin-mm", margin_mm, MARGIN_MM),
        ("--jobs", jobs, JOBS),
        ("--memory-gib", memory_gib, MEMORY_GIB),
        ("--time-limit-s", time_limit_s, TIME_LIMIT_S),
    ):
        _check_range(option, value, low, high)
    part = _shard(shard)
    key = load_key() if keyed_ids else None
    sources = read_layout(layout, source, key=key)
    from lungssl_data.building.plan import shard_of

    mine = shard_of(sources, part)
    if dry_run:
        for item in mine:
            print(_outline(item, named=not keyed_ids))
        bad = sum(bool(item.problem) for item in mine)
        print(f"{len(mine) - bad} of {len(sources)} patients would be built into {out}, nothing was written")
        if bad:
            raise DataError(f"{bad} of {len(mine)} patients can't be used; mend what their lines name")
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
        ids=ids_of(key) if key is not None else "as given",
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
    listed = {item.patient for item in sources}
    more = sorted(path.stem for path in out.glob("*.h5") if path.stem not in listed)
    if more:
        print(
            f"{len(more)} patients of earlier builds, whom {source.name} does not have, stay in {out}: "
            f"{', '.join(more[:5])}{', ...' if len(more) > 5 else ''}; delete their files to take them out",
            file=sys.stderr,
        )
    if failed:
        others = f"; the other {len(mine) - len(failed)} are in {out}" if len(failed) < len(mine) else ""
        raise DataError(
            f"{len(failed)} of {len(mine)} patients failed, first {', '.join(failed[:5])}{others}. "
            f"Mend what the lines above name and run the same command again"
        )
    look = f"; look at the {warned} with warnings" if warned else ""
    print(f"{len(mine)} patients in {out}{look}; check with `lungssl cache verify {out}`")


def _shard(text: str) -> tuple[int, int]:
    from lungssl.errors import ConfigError

    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ConfigError(f"--shard {text}: expected i/n with i from 1 to n, e.g. 2/4")
    return int(index), int(count)


def _check_range(option: str, value: float, low: float, high: float) -> None:
    from lungssl.errors import ConfigError

    if not low <= value <= high:  # nan is in no range
        raise ConfigError(f"{option} {value:.12g}: expected a number from {low:g} to {high:,.12g}")


def _outline(source: Any, *, named: bool) -> str:
    """One patient as `--dry-run` shows it: what would be read, and how its phases were told.

    Files go by their format, and the patient by its place in the layout, unless they may be `named`.
    """
    from lungssl_data.building.naming import role_of

    patient = source.patient if named else f"{source.patient} ({source.place})"
    if source.problem:
        return f"{patient}: can't be used: {source.problem}"
    parts = []
    for phase, scan in source.scans.items():
        masks = [role for role in ("lung", "lobes", "lesion") if getattr(scan, role) is not None]
        evidence = f" by {scan.evidence}" if scan.evidence else ""
        image = str(scan.image) if named else role_of("image", scan.image)
        parts.append(f"{phase}{evidence}: {image}" + (f" with {', '.join(masks)}" if masks else ""))
    parts += [f"{len(points.exhale_mm)} {kind} landmarks" for kind, points in source.landmarks.items()]
    parts += ["a displacement"] if source.displacement else []
    parts += [f"split {source.split}"] if source.split else []
    parts += [] if source.dual_phase else ["not dual-phase"]
    return f"{patient}{f' ({source.dataset})' if source.dataset and named else ''}: {'; '.join(parts)}"


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
