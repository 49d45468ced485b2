"""`lungssl segment`."""

from pathlib import Path
from typing import Annotated

import typer


def segment(
    image: Annotated[Path, typer.Argument(help="A volume file (.nii, .nii.gz, .mha, .mhd, .nrrd) or a DICOM folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Mask to write, on the image's own grid.")],
    model: Annotated[
        Path | None, typer.Option(help="A fine-tuning run or its export/model; without it the lungs, no training.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing mask.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Segment one scan: the air-filled lungs (1 right, 2 left), or the structures of a fine-tuned model.

    Example: lungssl segment ct.nii.gz -o lobes.nii.gz --model runs/lobes
    """
    from lungssl.errors import ConfigError

    if output.exists() and not overwrite:
        raise ConfigError(f"-o {output} exists; name another file or give --overwrite")
    if output.is_dir() or not output.parent.is_dir():
        raise ConfigError(f"-o {output}: name a file in a folder that exists")

    from lungssl_data.readers import read_volume, write_labels

    from lungssl import segmenting

    volume = read_volume(image)
    if model is None:
        result = segmenting.segment_lungs(volume)
    else:
        from lungssl.training.precision import pick_device

        result = segmenting.segment_with_model(volume, model, device=str(pick_device(device)))
    write_labels(output, result.mask)
    print(segmenting.describe(result))
