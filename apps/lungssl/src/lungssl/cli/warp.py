"""`lungssl warp`."""

from pathlib import Path
from typing import Annotated

import typer


def warp(
    field: Annotated[Path, typer.Option(help="Displacement field, .nrrd or .mha, as `lungssl register` writes it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    image: Annotated[Path | None, typer.Option(help="A moving scan, to be brought onto the field's grid.")] = None,
    labels: Annotated[Path | None, typer.Option(help="A moving segmentation, likewise.")] = None,
    points: Annotated[
        Path | None,
        typer.Option(help="Points of the fixed scan, LPS mm (.csv, .txt, .pts), to be found in the moving."),
    ] = None,
    fixed: Annotated[
        Path | None, typer.Option(help="The fixed scan: only for --points that are voxel indices (.pts), to count in.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Apply a displacement field: to a scan or a segmentation of the moving side, or to points of the fixed side.

    Example: lungssl warp --field field.nrrd --labels inhale_lobes.nii.gz -o lobes_on_exhale.nii.gz
    """
    from lungssl.errors import ConfigError

    if sum(one is not None for one in (image, labels, points)) != 1:
        raise ConfigError("give one of --image, --labels and --points")
    if output.exists() and not overwrite:
        raise ConfigError(f"-o {output} exists; name another file or give --overwrite")
    if output.is_dir() or not output.parent.is_dir():
        raise ConfigError(f"-o {output}: name a file in a folder that exists")
    if output.resolve() in {path.resolve() for path in (field, image, labels, points) if path is not None}:
        raise ConfigError(f"-o {output} is an input and would be written over; name another file")

    from lungssl_data.field import read_field
    from lungssl_data.points import read_points, write_points
    from lungssl_data.readers import read_labels, read_volume, write_labels, write_volume

    from lungssl import registering

    u_mm, grid = read_field(field, oblique=True)
    if image is not None:
        write_volume(output, registering.warp_volume(read_volume(image), u_mm, grid))
    elif labels is not None:
        write_labels(output, registering.warp_labels(read_labels(labels), u_mm, grid))
    elif points is not None:
        counted_in = None if fixed is None else read_volume(fixed).geometry
        known = read_points(points, counted_in, of="exhale")
        write_points(output, registering.warp_points(known, u_mm, grid))
