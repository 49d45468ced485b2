"""`lungssl analyze`."""

from pathlib import Path
from typing import Annotated

import typer


def analyze(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Page to write, .html; .json and .csv come beside it.")
    ],
    exhale: Annotated[
        Path | None, typer.Option(help="A volume file (.nii.gz, .mha, .nrrd, ...) or a DICOM folder.")
    ] = None,
    inhale: Annotated[Path | None, typer.Option(help="The same patient at inhale, likewise.")] = None,
    cohort: Annotated[
        Path | None, typer.Option(help="Instead of a pair: a folder of analyses, of which one page is made.")
    ] = None,
    exhale_mask: Annotated[
        Path | None,
        typer.Option(help="Lungs of --exhale, non-aerated lung included; without it they are found by air."),
    ] = None,
    inhale_mask: Annotated[Path | None, typer.Option(help="Lungs of --inhale.")] = None,
    exhale_lobes: Annotated[
        Path | None, typer.Option(help="Lobes of --exhale in place of a mask: 1 RUL, 2 RML, 3 RLL, 4 LUL, 5 LLL.")
    ] = None,
    inhale_lobes: Annotated[Path | None, typer.Option(help="Lobes of --inhale.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="A run of `finetune segment`: its lobes in place of masks.")
    ] = None,
    exhale_landmarks: Annotated[
        Path | None, typer.Option(help="Points of --exhale (.csv, .txt, .pts, LPS mm) to judge by; with the next one.")
    ] = None,
    inhale_landmarks: Annotated[Path | None, typer.Option(help="Where they are in --inhale, row by row.")] = None,
    aerated_masks: Annotated[
        bool, typer.Option("--aerated-masks", help="The masks lack what isn't aerated: no recruitment is given.")
    ] = False,
    maps: Annotated[Path | None, typer.Option(help="Folder for maps (.nii.gz) on the cubes registered.")] = None,
    preset: Annotated[str, typer.Option(help="Of registration: coarse, fast, default or accurate.")] = "default",
    prone: Annotated[
        bool, typer.Option("--prone", help="The patient lay face down: gravity pulls to the front.")
    ] = False,
    encoder: Annotated[
        Path | None, typer.Option(help="Show what an encoder (a .safetensors file) makes of both phases, as colours.")
    ] = None,
    no_viewer: Annotated[
        bool, typer.Option("--no-viewer", help="Pictures alone in the page: some 1.5 MB, not 4 to 15.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Aeration, recruitment and hyperinflation of a pair: a page to read, tables, maps.

    Recruitment needs masks that hold non-aerated lung; lungs that are found by their air don't, and the page says so.

    Example: lungssl analyze --exhale exhale.nii.gz --inhale inhale.nii.gz -o pairs/one.html

    Example: lungssl analyze --cohort pairs -o cohort.html
    """
    from lungssl.errors import ConfigError

    if output.suffix != ".html":
        raise ConfigError(f"-o {output}: expected a name that ends with .html")
    if output.is_dir() or not output.parent.is_dir():
        raise ConfigError(f"-o {output}: name a file in a folder that exists")
    if cohort is not None:
        if exhale is not None or inhale is not None:
            raise ConfigError("--cohort is of analyses that were made; leave --exhale and --inhale out")
        if not cohort.is_dir():
            raise ConfigError(f"--cohort {cohort}: name a folder of analyses")
        if output.exists() and not overwrite:
            raise ConfigError(f"{output} exists; name another -o or give --overwrite")
        from lungssl.reports.cohort_report import write_cohort

        print(f"{write_cohort(cohort, output)} pairs: {output}")
        return
    if exhale is None or inhale is None:
        raise ConfigError("give --exhale and --inhale, or --cohort with a folder of analyses")
    if (exhale_landmarks is None) != (inhale_landmarks is None):
        raise ConfigError("--exhale-landmarks and --inhale-landmarks belong together; give both or neither")
    tables = output.with_suffix(".json"), output.with_suffix(".csv")
    for path in (output, *tables):
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists; name another -o or give --overwrite")
    if maps is not None and maps.exists() and (not maps.is_dir() or any(maps.iterdir())) and not overwrite:
        raise ConfigError(f"--maps {maps} is in use; name a new folder or give --overwrite")

    from lungssl_backbones.weights import load_encoder

    from lungssl import analyzing
    from lungssl.cli import BANNER
    from lungssl.finetuning import encoder_file
    from lungssl.reports.analysis_report import write_report

    written = {path.resolve() for path in (output, *tables)}
    written |= set() if maps is None else {(maps / name).resolve() for name in analyzing.MAPS}
    points = (exhale_landmarks, inhale_landmarks)
    for path in (exhale, inhale, exhale_mask, inhale_mask, exhale_lobes, inhale_lobes, *points):
        if path is not None and path.resolve() in written:
            raise ConfigError(f"{path} is an input and would be written over; name another output")

    shown = None if encoder is None else load_encoder(encoder_file(encoder))
    found = analyzing.analyse_files(
        exhale,
        inhale,
        exhale_mask=exhale_mask,
        inhale_mask=inhale_mask,
        exhale_lobes=exhale_lobes,
        inhale_lobes=inhale_lobes,
        model=model,
        landmarks=None
        if exhale_landmarks is None or inhale_landmarks is None
        else (exhale_landmarks, inhale_landmarks),
        aerated_masks=aerated_masks,
        preset=preset,
        prone=prone,
        device=device,
        say=print,
    )
    analyzing.write_tables(found, *tables)
    if maps is not None:
        analyzing.write_maps(found, maps)
    write_report(found, output, viewer=not no_viewer, encoder=shown)
    for check in found.checks:
        if check.doubt:
            print(f"DOUBT {check.name}: {check.doubt}")
    print(found.headline())
    print(BANNER)
    print(f"report: {output}")
