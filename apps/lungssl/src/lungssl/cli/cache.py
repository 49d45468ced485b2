"""`lungssl cache build|info|verify`."""

from pathlib import Path
from typing import Annotated, Literal

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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be read, write nothing.")] = False,
) -> None:
    """Read scans, find the lungs, resample, and write one verified file per patient.

    Done patients are skipped, a bad one is reported in a line and the others go on. Patients are told apart by the ids
    you give: use de-identified ones.

    Example: lungssl cache build cohort.csv --out cohort-cache --spacing-mm 2
    """
    import sys
    import time

    from lungssl_data.layouts import read_layout

    from lungssl.errors import ConfigError, DataError
    from lungssl.training.progress import duration

    if not 0.3 <= spacing_mm <= 20 or margin_mm < 0:
        raise ConfigError(f"--spacing-mm {spacing_mm} --margin-mm {margin_mm}: spacing from 0.3 to 20, margin from 0")
    sources = read_layout(layout, source)
    if dry_run:
        for item in sources:
            print(f"{item.patient}: {', '.join(f'{phase} {scan.image}' for phase, scan in item.scans.items())}")
        return
    from lungssl_data.build import build_cache
    from lungssl_data.prepare import PrepareConfig

    config = PrepareConfig(spacing_mm=spacing_mm, margin_mm=margin_mm)
    started, failed = time.perf_counter(), []
    for place, built in enumerate(build_cache(sources, out, config=config, compression=compression), start=1):
        left = (time.perf_counter() - started) / place * (len(sources) - place)
        eta = f"  [{duration(left)} left]" if place < len(sources) else ""
        print(f"{place}/{len(sources)} {built.patient}: {built.outcome}: {built.message}{eta}", file=sys.stderr)
        if built.outcome == "failed":
            failed.append(built.patient)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(sources)} patients failed, first {', '.join(failed[:5])}; "
            f"the others are in {out}. Mend what the lines above name and run the same command again"
        )
    print(f"{len(sources)} patients in {out}; check with `lungssl cache verify {out}`")


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
