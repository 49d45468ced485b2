"""`lungssl cosegment`."""

from pathlib import Path
from typing import Annotated

import typer


def cosegment(
    exhale: Annotated[Path, typer.Option(help="A volume file (.nii.gz, .mha, .nrrd, ...) or a DICOM folder.")],
    inhale: Annotated[Path, typer.Option(help="The same patient at inhale, likewise.")],
    diameters: Annotated[
        Path, typer.Option(help="CSV: two diameters of each lesion of each scan, LPS mm (docs/guide/cosegment.md).")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for masks of both scans and lesions.csv.")],
    model: Annotated[
        Path | None,
        typer.Option(help="A run of `finetune cosegment`; without it GrabCut draws each scan by its own diameters."),
    ] = None,
    exhale_mask: Annotated[Path | None, typer.Option(help="Lungs of --exhale; without it they are found.")] = None,
    inhale_mask: Annotated[Path | None, typer.Option(help="Lungs of --inhale.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Masks of lesions in both phases from two diameters each.

    Example: lungssl cosegment --exhale exhale.nii.gz --inhale inhale.nii.gz --diameters lesions.csv -o lesions
    """
    from lungssl.errors import ConfigError

    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not overwrite:
        raise ConfigError(f"-o {output} is in use; name a new folder or give --overwrite")

    from lungssl_data.pair import Phase
    from lungssl_data.readers import read_labels, read_volume

    from lungssl import drawing_lesions
    from lungssl.cli import BANNER

    written = {(output / name).resolve() for name in drawing_lesions.FILES}
    for path in (exhale, inhale, diameters, exhale_mask, inhale_mask):
        if path is not None and path.resolve() in written:
            raise ConfigError(f"{path} is an input and would be written over; name another output")
    scans: dict[Phase, Path] = {"exhale": exhale, "inhale": inhale}
    masks: dict[Phase, Path | None] = {"exhale": exhale_mask, "inhale": inhale_mask}
    found = drawing_lesions.draw_lesions(
        {phase: read_volume(path) for phase, path in scans.items()},
        {phase: None if path is None else read_labels(path) for phase, path in masks.items()},
        diameters,
        model=model,
        device=device,
    )
    drawing_lesions.write_lesions(found, output)
    print(drawing_lesions.describe(found))
    print(BANNER)
