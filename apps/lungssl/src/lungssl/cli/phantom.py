"""`lungssl phantom`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def phantom(
    out: Annotated[Path, typer.Option(help="Folder to make; each phantom becomes a sub-folder.")],
    count: Annotated[int, typer.Option(min=1, help="How many patients.")] = 1,
    preset: Annotated[
        Literal["deep", "ards"], typer.Option(help="Deep breath-hold of a healthy chest, or ventilated ARDS.")
    ] = "deep",
    seed: Annotated[int, typer.Option(help="Seed of the first; the others follow.")] = 0,
    spacing_mm: Annotated[float, typer.Option(help="Voxel size.")] = 2.0,
    texture_rho: Annotated[
        float, typer.Option(min=0, max=1, help="Share of texture that both phases have in common.")
    ] = 1.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a used folder.")] = False,
) -> None:
    """Make exhale/inhale phantoms: CT, masks, lobes, exact displacement and landmarks, as plain files.

    The folders are a cohort in layout `folder`, ready for `lungssl cache build`. The same seed gives the same bytes.

    Example: lungssl phantom --out phantoms --count 4 --preset ards
    """
    import sys

    from lungssl.errors import ConfigError

    if not 0.5 <= spacing_mm <= 10:
        raise ConfigError(f"--spacing-mm {spacing_mm}: phantoms are made from 0.5 to 10 mm")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ConfigError(f"--out {out} is not empty; name another folder or give --overwrite")

    from lungssl_data.phantom import PhantomConfig, make_phantom, write_phantom

    for place in range(count):
        config = PhantomConfig(preset=preset, seed=seed + place, spacing_mm=spacing_mm, texture_rho=texture_rho)
        folder = out / f"{preset}{seed + place:03d}"
        write_phantom(make_phantom(config), folder)
        print(f"{place + 1}/{count} {folder}", file=sys.stderr)
