"""`lungssl phantom`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from lungssl_data.phantom.config import PresetName  # a Literal: Typer reads the choices from it


def phantom(
    out: Annotated[Path, typer.Option(help="Folder to make; each phantom becomes a sub-folder.")],
    count: Annotated[int, typer.Option(min=1, help="How many patients.")] = 1,
    preset: Annotated[
        PresetName, typer.Option(help="Healthy at a moderate or deep breath; ARDS at a breath or at two pressures.")
    ] = "deep",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first; the others follow.")] = 0,
    spacing_mm: Annotated[float, typer.Option(help="Voxel size.")] = 2.0,
    texture_rho: Annotated[
        float, typer.Option(min=0, max=1, help="Share of texture that both phases have in common.")
    ] = 1.0,
    layout: Annotated[
        str, typer.Option(help="Write them as this collection lays out its patients; see `lungssl list layouts`.")
    ] = "folder",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a used folder.")] = False,
) -> None:
    """Make exhale/inhale phantoms: CT, masks, lobes, exact displacement and landmarks, as plain files.

    The folders are a cohort in layout `folder`, ready for `lungssl cache build`. The same seed gives the same bytes.
    Another --layout has its own names, formats and units, and holds what that collection holds.

    Example: lungssl phantom --out phantoms --count 4 --preset ards
    """
    import sys

    from lungssl_data.layouts.copies import COPIES, Phantoms, write_copy

    from lungssl.errors import ConfigError

    if not 0.5 <= spacing_mm <= 10:
        raise ConfigError(f"--spacing-mm {spacing_mm}: phantoms are made from 0.5 to 10 mm")
    if layout not in COPIES:
        raise ConfigError(f"--layout {layout}: there is no copy of it; known are {', '.join(COPIES)}")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ConfigError(f"--out {out} is not empty; name another folder or give --overwrite")

    from lungssl_data.phantom import PhantomConfig, make_phantom, write_phantom

    def made(place: int) -> Any:
        return make_phantom(
            PhantomConfig(preset=preset, seed=seed + place, spacing_mm=spacing_mm, texture_rho=texture_rho)
        )

    if layout != "folder":
        try:
            write_copy(layout, out, Phantoms(made, count))
        except ValueError as error:
            raise ConfigError(f"--count {count}: {error}") from error
        print(f"{count} phantoms as {layout} in {out}", file=sys.stderr)
        return
    for place in range(count):
        folder = out / f"{preset}{seed + place:03d}"
        write_phantom(made(place), folder)
        print(f"{place + 1}/{count} {folder}", file=sys.stderr)
